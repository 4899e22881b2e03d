"""Signals, and the signs that another process is lost; whole runs of several: test_hosts.py."""

import signal
import time

import pytest
from test_sharding import mesh_of

from distilbert_jax.machine import processes


def test_updates_that_no_longer_come(monkeypatch):
    lost = []
    monkeypatch.setattr(processes, "UPDATE_SECONDS", 0.2)
    monkeypatch.setattr(processes, "give_up", lost.append)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    with processes.Watch() as watch:
        for _ in range(30):
            watch.beat()
            time.sleep(0.01)
        assert not lost
        time.sleep(0.5)
        assert set(lost) == {"no update was completed for 0.2 s"}
    ended = len(lost)
    time.sleep(0.2)
    assert len(lost) == ended


def test_only_the_loss_of_another_process_is_one(monkeypatch):
    try:
        raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer\nat: ...")
    except ValueError as cause:
        error = RuntimeError("update 3 cannot be saved")
        error.__cause__ = cause
    assert processes.find_loss(error) == ""  # a process alone
    monkeypatch.setattr(processes.jax.distributed, "is_initialized", lambda: True)
    assert processes.find_loss(error) == (
        "UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    assert processes.find_loss(RuntimeError("RESOURCE_EXHAUSTED: out of memory")) == ""


@pytest.mark.skipif(processes.jax.device_count() != 8, reason="needs 8 devices")
def test_a_second_signal_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        with processes.StopSignal(mesh_of("8x1")) as stop:
            assert not stop.asked()
            signal.raise_signal(signal.SIGINT)
            assert stop.asked()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
