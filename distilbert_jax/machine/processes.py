"""Several processes as one run: they find each other, and all end when one of them is lost.

A process that is killed closes its connections, and the next collective fails in the others. One
that is stopped, or whose host is gone, sends no heartbeat any more, and JAX calls abort() in the
others. One that is alive but stuck stops the updates of all. Each way ends in one line that says
so and exit code 75.
"""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from typing import NoReturn

import jax

from distilbert_jax.errors import UserError, first_line

GO_ON = 75  # EX_TEMPFAIL, the exit code: the same command goes on
HEARTBEAT_SECONDS = 60  # a process that is silent for so long is lost
SHUTDOWN_SECONDS = 30  # that a process which has ended waits for the others
UPDATE_SECONDS = 1800  # an update, compiled, evaluated and saved, takes less


def connect() -> None:
    """Join the other processes of the run, if the environment says that there are any.

    Either JAX_COORDINATOR_ADDRESS (host:port of the first one), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID are set, or several workers of a TPU slice (TPU_WORKER_HOSTNAMES) are known to
    JAX itself. All but the first are silent.

    Raises:
        UserError: only some are set, or they are not numbers, or the others do not answer.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    missing = [name for name, value in zip(names, values, strict=True) if not value]
    if len(missing) < len(names):
        if missing:
            raise UserError(f"{' and '.join(missing)} not set, which several processes need beside "
                            f"{' and '.join(n for n in names if n not in missing)}")
        address, number, index = values
        if not (number.isdecimal() and index.isdecimal() and int(index) < int(number)):
            raise UserError(f"JAX_NUM_PROCESSES {number} and JAX_PROCESS_ID {index} must be whole "
                            "numbers, the second below the first")
        arguments = (address, int(number), int(index))
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        arguments = ()
    else:
        return
    try:
        jax.distributed.initialize(*arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                                   shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError("the processes of this run do not find each other: "
                        f"{first_line(error)}") from error
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")


def find_loss(error: BaseException | None) -> str:
    """What an error, or one behind it, tells of another process that is lost; "" for nothing."""
    while error is not None and jax.distributed.is_initialized():
        if re.search("Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", str(error)):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return ""


def give_up(what: str) -> NoReturn:
    """Say that another process is lost, and end this one at once: nobody answers any more."""
    os.write(2, f"\nerror: another process of this run is lost ({what}); the same command, started "
                "on every host, goes on from the last checkpoint\n".encode())
    os._exit(GO_ON)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """Stands in for the end by SIGABRT, which is all that JAX does where a heartbeat is missing."""
    give_up(f"JAX heard nothing of it for {HEARTBEAT_SECONDS} s, or lost the first one: see above")


class Watch:
    """Gives up where no update is completed for UPDATE_SECONDS; a single process is not watched."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._ended = threading.Event()

    def __enter__(self) -> "Watch":
        if jax.process_count() > 1:
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def beat(self) -> None:
        """Note that an update is completed."""
        self._last = time.monotonic()

    def _look(self) -> None:
        while not self._ended.wait(min(UPDATE_SECONDS / 4, 10)):
            if time.monotonic() - self._last > UPDATE_SECONDS:
                give_up(f"no update was completed for {UPDATE_SECONDS} s")
