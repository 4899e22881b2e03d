"""One run at a time in a folder: lock.json says which process works in OUTPUT, on a disk or in gs://.

The process that holds it writes it anew every BEAT seconds. One that is dead on this machine is
seen at once; of one on another machine nothing is known but that it writes no more.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax

from distilbert_jax.errors import UserError
from distilbert_jax.machine import store
from distilbert_jax.machine.progress import say

BEAT = 10  # seconds
STALE = 3 * BEAT  # without a sign of life


@contextlib.contextmanager
def hold(output: str | Path) -> Iterator[None]:
    """Hold the folder of a run, which is made if need be; of several processes the first one does.

    Raises:
        UserError: another process that is alive holds it.
    """
    if jax.process_index():
        yield
        return
    path = store.path(output) / "lock.json"
    new = [] if store.is_remote(output) else [
        folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    own = _describe() | {"id": uuid.uuid4().hex}
    try:
        with store.errors_about(output):
            path.parent.mkdir(parents=True, exist_ok=True)
            _refuse_living(output, path)
            _write(path, own)
    except OSError as error:
        raise UserError(f"--output {output} cannot be used: {error.strerror}") from error
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, own, ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        with contextlib.suppress(OSError, UserError):
            if (_read(path) or {}).get("id") == own["id"]:
                path.unlink()
            for folder in new:
                folder.rmdir()  # fails where something is in it


def _refuse_living(output: str | Path, path: store.AnyPath) -> None:
    """Raise a UserError if the process that wrote the lock is alive; wait where only time can tell.
    """
    found = _read(path)
    if not found:
        return
    who = f"process {found.get('pid')} on {found.get('host')}"
    mine = _describe()
    if (found.get("host"), found.get("boot")) == (mine["host"], mine["boot"]):
        alive = _started(found.get("pid", 0)) == found.get("started", "")
    else:
        say(f"{output} was last held by {who}; waiting {STALE} s for a sign of life")
        time.sleep(STALE)
        alive = _read(path) not in (None, found)
    if alive:
        raise UserError(f"{output} is in use by {who}: wait for it, stop it, or name another "
                        "--output")


def _describe() -> dict[str, str | int]:
    """This process: machine, boot, number, and when it was started."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else "",
            "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str:
    """When a process of this machine was started, which tells it from a later one of its number;
    "gone" if there is none, "" where this cannot be seen."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "gone" if fields[0] == "Z" else fields[19]


def _beat(path: store.AnyPath, own: dict[str, str | int], ended: threading.Event) -> None:
    number = 0
    while not ended.wait(BEAT):
        number += 1
        with contextlib.suppress(OSError, UserError):
            _write(path, own | {"beat": number})


def _read(path: store.AnyPath) -> dict[str, str | int] | None:
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) and isinstance(found.get("pid", 0), int) else {}
    except FileNotFoundError:
        return None
    except ValueError:  # cut short by a crash
        return {}


def _write(path: store.AnyPath, content: dict[str, str | int]) -> None:
    with store.whole_file(path) as new:
        new.write_text(json.dumps(content))
