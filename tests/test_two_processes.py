"""Two processes of four devices are one run of eight: trained, saved, continued, stopped.

Each test starts real processes, on this machine, that find each other as on several hosts; a
distillation of the toy is what they do. What they are compared with is run by this process.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from one_process import small
from test_sharding import mesh_of

from distilbert_jax.commands import main
from distilbert_jax.jobs import setup

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
ROOT = Path(__file__).parents[1]
STEPS = 6
# Everything is in float64 but the exported student. In float32 the order in which the network
# adds up decides the sign of a gradient near 0, and Adam makes of that an update of up to 0.01.
PARAMETERS, LOSSES = 1e-6, 1e-7


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def command(toy, output, *words):
    """A distillation of the toy, as one types it."""
    corpus = [] if "--corpus" in words else ["--corpus", toy / "corpus.txt"]
    return ["distil", "--teacher", toy / "teacher", *corpus, "--output", output,
            "--sequence-length", "16", "--batch-size", "8", "--student-layers", "1",
            "--learning-rate", "0.01", "--steps", STEPS, "--save-every", "2",
            "--valid-share", "0.1", "--dtype", "float64", *words]


def start(toy, output, processes, *words, own=lambda number: {}):
    """Processes of one distillation of the toy; see started."""
    return started(processes, *command(toy, output, *words), own=own)


def started(processes, *words, own=lambda number: {}):
    """Processes of one program; together they have 8 devices, each its `own` environment."""
    common = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    common |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
               "JAX_NUM_CPU_DEVICES": str(8 // processes),
               "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if processes > 1:
        common |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
                   "JAX_NUM_PROCESSES": str(processes)}
    return [subprocess.Popen(
        [sys.executable, ROOT / "tests" / "one_process.py", *map(str, words)], text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=common | own(i) | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {}))
        for i in range(processes)]


def ended(running, code=0):
    """Wait; (stdout, stderr) of each."""
    try:
        said = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [code] * len(running), said
    return said


def alone_here(name, *words):
    """The command `name`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        small(patch.setattr)
        try:
            main.COMMANDS[name]([str(word) for word in words])
        finally:
            jax.config.update("jax_enable_x64", False)  # which the command has switched on


def distil(toy, output, processes, *words):
    """One distillation of the toy; what each process said, if there are several."""
    if processes > 1:
        return ended(start(toy, output, processes, *words))
    return alone_here(*command(toy, output, *words))


def continued(toy, before, output, processes, *words):
    """Copy a run as it was after update 4, and finish it."""
    shutil.copytree(before, output, ignore=shutil.ignore_patterns("6", "student", "report.md"))
    distil(toy, output, processes, *words)
    return output


def tensors(output):
    from safetensors.numpy import load_file

    return load_file(output / "student" / "model.safetensors")


def losses(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    clocks = ("seconds", "waiting")
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]


def assert_same(output, expected):
    ours, theirs = tensors(output), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=PARAMETERS, err_msg=name)
    for here, there in zip(losses(output), losses(expected), strict=True):
        assert here == pytest.approx(there, rel=LOSSES)


@pytest.fixture(scope="module")
def alone(toy, tmp_path_factory):
    """A run of one process with eight devices."""
    output = tmp_path_factory.mktemp("alone") / "run"
    distil(toy, output, 1)
    return output


@pytest.fixture(scope="module")
def together(toy, tmp_path_factory):
    """The same run in two processes of four devices, and what they said."""
    output = tmp_path_factory.mktemp("together") / "run"
    return output, distil(toy, output, 2)


def test_two_processes_choose_the_same_layers_and_keep_the_same_states(toy, tmp_path):
    """The rows of a batch are computed, and read again, by the processes that lay them."""
    words = ("--kept-maskings", "1", "--state-dtype", "exact", "--choose", "greedy")
    one, two, taken = (tmp_path / name for name in ("one", "two", "taken"))
    distil(toy, one, 1, *words)
    said = distil(toy, two, 2, *words)
    assert "gradient" in said[0][1] and "bytes a token" not in said[1][1]
    assert_same(two, one)
    states = [np.load(output / "states" / "00000.npy").view(np.float64)
              for output in (one, two)]
    np.testing.assert_allclose(*states, rtol=0, atol=1e-12)
    chosen = [json.loads((output / "layers.json").read_text()) for output in (one, two)]
    assert chosen[0]["request"] == chosen[1]["request"]
    for theirs, ours in zip(*(found["removals"] for found in chosen), strict=True):
        assert ours["left"] == theirs["left"]
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=LOSSES)

    # One process takes what two have kept.
    shutil.copytree(two, taken, ignore=shutil.ignore_patterns("checkpoints", "student"))
    before = {path: path.stat().st_mtime_ns for path in taken.rglob("*.npy")}
    distil(toy, taken, 1, *words)
    assert_same(taken, one)
    assert before == {path: path.stat().st_mtime_ns for path in taken.rglob("*.npy")}
    assert json.loads((taken / "layers.json").read_text()) == chosen[1]


def test_two_processes_train_the_same(alone, together):
    assert_same(together[0], alone)
    assert {path.name for path in together[0].iterdir()} == {path.name for path in alone.iterdir()}


def test_the_first_process_alone_speaks(together):
    (first, _), (second, errors) = together[1]
    assert "train: " in first and "distil: " in together[1][0][1]
    # C++'s own: pieces of its threads' lines, in any order; ranks are 0 to 7.
    said = re.sub(r"\[Gloo\] Rank|is connected to|peer ranks\.|[0-7]|"
                  r"Expected number of connected peer ranks is :", "", second).strip()
    assert not said and "distil" not in errors


def test_saved_in_two_finished_early_and_continued_in_one(toy, alone, together, tmp_path):
    one, two = early = [continued(toy, together[0], tmp_path / f"{processes}", processes,
                                  "--finish", "last") for processes in (1, 2)]
    assert_same(two, one)
    for output in early:
        assert "update 4 of 6" in (output / "student" / "README.md").read_text()
    distil(toy, two, 1)
    assert_same(two, alone)


@pytest.mark.parametrize("processes, mesh", [(2, "4x2"), (1, "2x4"), (1, "1x1")])
def test_saved_in_one_and_continued_elsewhere(processes, mesh, toy, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", mesh_of)  # of some of the devices
    output = continued(toy, alone, tmp_path / "run", processes, "--mesh", mesh)
    assert_same(output, alone)


def test_what_the_first_process_refuses_ends_both(toy, tmp_path):
    (tmp_path / "blank.txt").write_text("\n")
    for _, errors in ended(start(
            toy, tmp_path / "run", 2, "--corpus", tmp_path / "blank.txt"), 2):
        assert "error: no text in" in errors.splitlines()[-1] and "Traceback" not in errors


def test_a_signal_to_one_stops_both_at_the_same_update(toy, tmp_path):
    running = start(toy, tmp_path / "run", 2, "--steps", 100_000, "--eval-every", 100_000,
                    "--save-every", 100_000)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 600
    while not log.exists() or log.read_text().count("\n") < 3:
        assert time.monotonic() < deadline and all(p.poll() is None for p in running)
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    (_, first), (_, second) = ended(running, 75)
    step = int(re.fullmatch(r"stopped at update (\d+) of 100000, saved in \d+\.\d s; the same "
                            r"command goes on from there", first.splitlines()[-1])[1])
    assert "stopped" not in second
    assert (tmp_path / "run" / "checkpoints" / str(step) / "sha256.json").exists()


def test_two_processes_distil_a_task_as_one(toy, tmp_path):
    """Teacher, its answers, chosen layers, both students and all answers."""
    random = np.random.default_rng(0)
    for name, count in (("train", 48), ("dev", 20)):
        texts = [" ".join(random.choice(["ba", "be", "da", "de"], 5)) for _ in range(count)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(
            f"{text},{'ab'[text.count('a') > 2]}\n" for text in texts))
    words = ("--model", toy / "teacher", "--train", tmp_path / "train.csv", "--dev",
             tmp_path / "dev.csv", "--distil", "--student-layers", "1", "--augment", "1",
             "--batch-size", "8", "--steps", "4", "--learning-rate", "0.01", "--dtype", "float64")
    alone_here("finetune", *words, "--output", tmp_path / "alone")
    ended(started(2, "finetune", *words, "--output", tmp_path / "together"))
    ours, theirs = ({path.relative_to(tmp_path / name): path for path in sorted(
        (tmp_path / name).rglob("*")) if path.is_file()} for name in ("together", "alone"))
    kept = [path for path in ours if "tensorboard" not in path.parts]
    assert set(kept) == {path for path in theirs if "tensorboard" not in path.parts}
    for path in kept:
        if path.name == "model.safetensors":
            from safetensors.numpy import load_file

            expected = load_file(theirs[path])
            for tensor, value in load_file(ours[path]).items():
                np.testing.assert_allclose(value, expected[tensor], rtol=0, atol=PARAMETERS)
    logits = [np.load(found[Path("answers/logits.npy")]) for found in (ours, theirs)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("given, message", [
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not set"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1"},
     "JAX_NUM_PROCESSES 2 and JAX_PROCESS_ID 2 must be"),
    ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "localhost:1"},
     "JAX_NUM_PROCESSES two and")])
def test_an_environment_that_cannot_be(given, message, monkeypatch, capfd):
    from distilbert_jax.commands import launch

    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        launch.launch(main.prepare, [])
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: {message}")
    assert error.count("\n") == 1
