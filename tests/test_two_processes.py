"""Two processes of four devices are one run of eight: trained, saved, continued, stopped.

Each test starts real processes, on this machine, that find each other as on several hosts; a
distillation of the toy is what they do. It runs this file as a program.
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

import numpy as np
import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]
STEPS = 6
# Everything is in float64 but the exported student. In float32 the order in which the network
# adds up decides the sign of a gradient near 0, and Adam makes of that an update of up to 0.01.
PARAMETERS, LOSSES = 1e-6, 1e-7


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(toy, output, processes, *words, devices=8, own=lambda number: {}):
    """Processes of one distillation of the toy; see started."""
    corpus = [] if "--corpus" in words else ["--corpus", toy / "corpus.txt"]
    return started(
        processes, "distil", "--teacher", toy / "teacher", *corpus, "--output", output,
        "--sequence-length", "16", "--batch-size", "8", "--student-layers", "1",
        "--learning-rate", "0.01", "--steps", STEPS, "--save-every", "2",
        "--valid-share", "0.1", "--dtype", "float64", *words, devices=devices, own=own)


def started(processes, *words, devices=8, own=lambda number: {}):
    """Processes of one program; together they have `devices`, each its `own` environment."""
    common = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    common |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
               "JAX_NUM_CPU_DEVICES": str(devices // processes),
               "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if processes > 1:
        common |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
                   "JAX_NUM_PROCESSES": str(processes)}
    return [subprocess.Popen(
        [sys.executable, __file__, *map(str, words)], text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
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


def distil(toy, output, processes, *words, code=0, **options):
    return ended(start(toy, output, processes, *words, **options), code)


def continued(toy, before, output, processes, *words, **options):
    """Copy a run as it was after update 4, and finish it."""
    shutil.copytree(before, output, ignore=shutil.ignore_patterns("6", "student", "report.md"))
    distil(toy, output, processes, *words, **options)
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


def test_two_processes_keep_the_same_states(toy, tmp_path):
    """The rows of a batch are computed, and read again, by the processes that lay them."""
    kept = ("--kept-maskings", "1", "--state-dtype", "exact", "--states", tmp_path / "states")
    outputs = [tmp_path / name for name in ("alone", "together", "shared")]
    distil(toy, outputs[0], 1, *kept)
    distil(toy, outputs[2], 2, *kept)  # what one process kept
    shutil.move(tmp_path / "states", tmp_path / "before")
    said = distil(toy, outputs[1], 2, *kept)
    assert "gradient" in said[0][1] and "bytes a token" not in said[1][1]
    for output in outputs[1:]:
        assert_same(output, outputs[0])
    one, other = (np.load(tmp_path / name / "00000.npy").view(np.float64)
                  for name in ("before", "states"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


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


def test_two_processes_choose_the_same_layers(toy, tmp_path):
    """And a continuation by one process keeps them."""
    said, output = [], tmp_path / "run"
    for processes in (2, 1):
        distil(toy, output, processes, "--choose", "greedy", "--steps", 2 if processes == 2 else 3)
        said.append(json.loads((output / "layers.json").read_text()))
    assert said[0] == said[1]
    distil(toy, tmp_path / "alone", 1, "--choose", "greedy", "--steps", 1)
    alone = json.loads((tmp_path / "alone" / "layers.json").read_text())
    assert said[0]["request"] == alone["request"]
    for ours, theirs in zip(said[0]["removals"], alone["removals"], strict=True):
        assert ours["left"] == theirs["left"]
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=LOSSES)


@pytest.mark.parametrize("processes, mesh", [(2, "8x1"), (2, "4x2"), (1, "2x4"), (1, "1x1")])
def test_saved_in_one_and_continued_elsewhere(processes, mesh, toy, alone, tmp_path):
    devices = 1 if mesh == "1x1" else 8
    output = continued(toy, alone, tmp_path / "run", processes, "--mesh", mesh, devices=devices)
    assert_same(output, alone)


def test_what_the_first_process_refuses_ends_both(toy, tmp_path):
    (tmp_path / "blank.txt").write_text("\n")
    for _, errors in distil(toy, tmp_path / "run", 2, "--corpus", tmp_path / "blank.txt", code=2):
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
    for processes, name in ((1, "alone"), (2, "together")):
        ended(started(processes, "finetune", *words, "--output", tmp_path / name))
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
    from distilbert_jax.commands import launch, main

    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        launch.launch(main.prepare, [])
    error = capfd.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: {message}")
    assert error.count("\n") == 1


if __name__ == "__main__":
    from distilbert_jax.commands.main import run
    from distilbert_jax.evaluation import held_out, intervals
    from distilbert_jax.jobs import distil as job
    from distilbert_jax.machine import processes

    processes.HEARTBEAT_SECONDS = int(os.environ.get("HEARTBEAT_SECONDS", "60"))
    job._write_report = lambda *_: None  # seen elsewhere, and slow
    held_out.BATCH_TOKENS = 256
    intervals.DRAWS = 50
    run(sys.argv[1], sys.argv[2:])
