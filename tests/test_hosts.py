"""A process that is killed or hangs ends the others, in one line, and the run goes on after it."""

import re
import signal
import time

import pytest
from test_two_processes import alone, assert_same, distil, start  # noqa: F401

pytest.importorskip("transformers")
LOST = re.compile(r"^error: another process of this run is lost \((.*)\); the same command, "
                  "started on every host, goes on from the last checkpoint$", re.M)


def until(true, running, seconds=600):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline and all(p.poll() is None for p in running)
        time.sleep(0.02)


def saved(output, step):
    return lambda: (output / "checkpoints" / str(step) / "sha256.json").exists()


def reasons(survivors, seconds=120):
    """Each must end with code 75 and one line; what it gives as the reason."""
    said = [process.communicate(timeout=seconds)[1] for process in survivors]
    assert [process.returncode for process in survivors] == [75] * len(said), said
    found = [LOST.findall(errors) for errors in said]
    assert all(len(lines) == 1 for lines in found), said
    assert not any("Traceback" in errors or "stopped at" in errors for errors in said), said
    return [line for line, in found]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_ends_the_other(victim, toy, tmp_path, monkeypatch):
    monkeypatch.setenv("HEARTBEAT_SECONDS", "10")
    running = start(toy, tmp_path / "run", 2, "--steps", 100_000, "--eval-every", 100_000,
                    "--save-every", 20)
    try:
        until(saved(tmp_path / "run", 20), running)
        running[victim].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        reason, = reasons([running[1 - victim]])
        assert "JAX heard nothing of it for 10 s" in reason and time.monotonic() - began < 60
    finally:
        for process in running:
            process.kill()


def test_one_of_four_is_killed_then_both_of_two_and_they_train_the_same(toy, alone, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    running = start(toy, output, 4)
    until(saved(output, 2), running)
    running[0].kill()
    assert all(reasons(running[1:]))
    running = start(toy, output, 2)
    until(saved(output, 4), running)
    for process in running:
        process.kill()
        process.communicate()
    assert not (output / "student").exists()
    distil(toy, output, 1)
    assert_same(output, alone)
