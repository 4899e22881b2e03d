"""A folder is held by one living process; the lock of a dead one is taken over, wherever it ran."""

import json
import os
import subprocess
import sys

import pytest

from distilbert_jax.errors import UserError
from distilbert_jax.machine import lock


def written(folder, **changes):
    """A lock as this process would write it, but for these fields."""
    (folder / "lock.json").write_text(json.dumps(lock._describe() | {"id": "other"} | changes))


def test_a_folder_is_held_once_and_left_as_it_was(tmp_path):
    output = tmp_path / "deep" / "out"
    with lock.hold(output):
        assert json.loads((output / "lock.json").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"out is in use by process {os.getpid()} on"):
            with lock.hold(output):
                pass
        assert (output / "lock.json").exists()  # the first one goes on
    assert not (tmp_path / "deep").exists()
    with lock.hold(tmp_path):
        (tmp_path / "kept").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_dead_process_holds_nothing(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for changes in (dict(pid=ended.pid, started="1"), dict(started="1"), dict(boot="another")):
        written(tmp_path, **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lock, "STALE", 0)  # what was held before a restart may be another host
            with lock.hold(tmp_path):
                pass
    (tmp_path / "lock.json").write_text("{")  # cut short by a crash
    with lock.hold(tmp_path):
        pass


def test_another_host_is_watched_for_a_sign_of_life(tmp_path, monkeypatch, capsys):
    written(tmp_path, host="elsewhere", pid=7)
    waits = []
    monkeypatch.setattr(lock.time, "sleep", waits.append)
    with lock.hold(tmp_path):
        pass
    assert waits == [lock.STALE]
    assert "was last held by process 7 on elsewhere; waiting 30 s" in capsys.readouterr().err

    written(tmp_path, host="elsewhere", pid=7)
    monkeypatch.setattr(lock.time, "sleep", lambda _: written(
        tmp_path, host="elsewhere", pid=7, beat=3))
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"):
        with lock.hold(tmp_path):
            pass


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with lock.hold(tmp_path):
        while "beat" not in json.loads((tmp_path / "lock.json").read_text()):
            pass


@pytest.mark.parametrize("content", ["[1]", '"a"', '{"pid": "x"}', "{"])
def test_a_lock_of_another_form_holds_nothing(content, tmp_path):
    (tmp_path / "lock.json").write_text(content)
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
