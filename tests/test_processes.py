"""Signals, and the signs that another process is lost; whole runs of several: test_hosts.py."""

import hashlib
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from test_sharding import mesh_of

from distilbert_jax.machine import processes


def test_updates_that_no_longer_come(monkeypatch):
    """Three come after as long as is allowed; the next one is a second late."""
    now, lost = [0.0], []
    waits = iter([processes.UPDATE_SECONDS] * 3 + [processes.UPDATE_SECONDS + 1])
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(processes, "give_up", lambda what: lost.append((what, now[0])))
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    watch = processes.Watch()

    def wait(_):
        watch.beat()
        seconds = next(waits, None)
        now[0] += seconds or 0
        return seconds is None

    watch._ended = SimpleNamespace(wait=wait, set=lambda: None)
    with watch:
        pass
    assert lost == [("no update was completed for 1800 s", 4 * processes.UPDATE_SECONDS + 1)]


@pytest.mark.parametrize("number", [1, 2])
def test_the_watch_ends_with_the_run(number, monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: number)
    with processes.Watch() as watch:
        assert watch._thread.is_alive() == (number > 1)
    assert not watch._thread.is_alive()


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
def test_a_second_signal_acts_at_once(interrupts, capfd):
    with processes.StopSignal(mesh_of("8x1")) as stop:
        stop.unsaved = 12
        assert not stop.asked()
        signal.raise_signal(signal.SIGINT)
        assert stop.asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capfd.readouterr().err == (
        "\nstopping after this update, to save; press again to lose 12 updates\n")


@pytest.mark.skipif(processes.jax.device_count() != 8, reason="needs 8 devices")
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_is_answered_while_compiled_code_runs(times, interrupts, monkeypatch):
    """In which Python handles none: at once by a line, and by a second one when it is over."""
    said = []
    monkeypatch.setattr(processes.os, "write", lambda _, text: said.append(
        (time.monotonic(), text)))
    with processes.StopSignal(mesh_of("8x1")) as stop:
        for number in range(times):
            threading.Timer(0.1 * (number + 1), os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while not said:  # the machine may be quick
                hashlib.pbkdf2_hmac("sha256", b"a", b"b", 5_000_000)
                ended = time.monotonic()
        except KeyboardInterrupt:
            assert times == 2
        else:
            assert times == 1 and said[0][0] < ended
        assert stop.asked()
    assert [text for _, text in said] == [
        b"\nstopping after this update, to save; press again to save nothing\n"]


@pytest.fixture
def interrupts():
    """Ctrl-C raises a KeyboardInterrupt; the & of a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
