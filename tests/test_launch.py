"""Compiled programs are kept between starts, and change nothing."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from distilbert_jax.commands import launch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def caching():
    """JAX as a user starts it, which looks for what is compiled; what is set is taken back."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_program_from_the_cache_trains_the_same_bytes(toy, tmp_path):
    pytest.importorskip("transformers")
    cache = tmp_path / "cache" / "distilbert_jax" / platform.node()
    shutil.copytree(toy, tmp_path / "toy")
    students, kept = [], []
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(ROOT)}
    for start in ("cold", "warm"):
        done = subprocess.run(
            [sys.executable, ROOT / "tests" / "one_process.py", "distil", "--teacher",
             "toy/teacher", "--corpus", "toy/corpus.txt", "--output", start, "--steps", "3",
             "--sequence-length", "16", "--batch-size", "8"],
            cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        students.append((tmp_path / start / "student" / "model.safetensors").read_bytes())
        kept.append({path.name for path in cache.glob("*-cache")})
    assert any(name.startswith("jit_train_step") for name in kept[0])
    assert kept[1] == kept[0]
    assert students[1] == students[0]


def test_a_folder_that_is_named_is_taken(caching, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "named")
    launch.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == "named" and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_used_costs_a_line(caching, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    launch.keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    line = capsys.readouterr().err
    assert "compiled programs are not kept" in line and line.count("\n") == 1
