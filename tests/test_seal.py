"""Sealed folders: damage to any file is found, and what a removal leaves is no sealed folder."""

from pathlib import Path

import jax
import numpy as np
import pytest

from distilbert_jax.machine import seal


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"truncated": truncate, "deleted": Path.unlink, "bit flipped": flip,
           "emptied": lambda path: path.write_bytes(b"")}


def assert_every_damage_is_found(folder, kind):
    """In every file of a sealed folder, one after the other; the seal is one of them."""
    assert seal.find_fault(folder) == ""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if kind != "deleted" and not path.stat().st_size:
            continue  # nothing in it that could be damaged
        content = path.read_bytes()
        DAMAGES[kind](path)
        fault = seal.find_fault(folder)
        assert fault and (path.name in fault or path.name == seal.SEAL), path
        path.write_bytes(content)
    assert seal.find_fault(folder) == ""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "9" / "d").mkdir(parents=True)
    (tmp_path / "9" / "d" / "numbers").write_bytes(bytes(range(256)))
    (tmp_path / "9" / "empty").touch()
    seal.write_json(tmp_path / "9" / "run.json", {"seed": 3})
    seal.seal(tmp_path / "9")
    return tmp_path / "9"


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_to_any_file_is_found(kind, folder):
    assert_every_damage_is_found(folder, kind)


def test_a_file_too_many_is_found(folder):
    (folder / "d" / "stray").write_text("")
    assert seal.find_fault(folder) == "d/stray does not belong to it"


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_file_is_read_only_as_it_was_sealed(kind, folder):
    flip(folder / "d" / "numbers")  # another file's damage is not looked for
    assert seal.read_json(folder, "run.json") == {"seed": 3}
    DAMAGES[kind](folder / "run.json")
    assert seal.read_json(folder, "run.json") == {}


def test_a_removal_that_is_cut_short_leaves_another_name(folder, monkeypatch):
    monkeypatch.setattr(seal, "delete", lambda folder: None)
    seal.remove(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["9.old"]
    monkeypatch.undo()
    seal.delete(folder.with_name("9.old"))
    assert not list(folder.parent.iterdir())


def test_a_fingerprint_is_of_names_and_values():
    tree = {"a": np.arange(3.0), "b": {"c": np.ones((2, 2), np.float32)}}
    first = seal.fingerprint(tree)
    assert first == seal.fingerprint(jax.tree.map(np.copy, tree)) and len(first) == 64
    for other in ({"a": tree["a"], "d": tree["b"]}, tree | {"a": np.array([0, 1, 2.5])},
                  tree | {"a": np.arange(3)}, tree | {"b": {"c": np.ones(4, np.float32)}}):
        assert seal.fingerprint(other) != first
