"""Several processes as one run: they find each other, stop together, and end when one is lost.

When a process is killed, its connections close, and the next collective fails in the others. When
one is suspended, or its host is gone, its heartbeat is missing, and JAX calls abort() in the
others. When one is alive but stuck, no update of any process is completed. In each case the others
print one line that says so and exit with code 75.
"""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from types import TracebackType
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distilbert_jax.errors import UserError, first_line
from distilbert_jax.machine.sharding import one_each, replicated

GO_ON = 75  # exit code EX_TEMPFAIL: the same command continues the run
HEARTBEAT_SECONDS = 60  # a process without a heartbeat for this long is lost
SHUTDOWN_SECONDS = 30  # how long a process that has ended waits for the others
UPDATE_SECONDS = 1800  # more than an update takes, with compilation, evaluation and saving


def connect() -> None:
    """Join the other processes of the run, if environment variables say that there are any.

    These are JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; on a TPU slice TPU_WORKER_HOSTNAMES with several workers, which JAX reads by
    itself. All processes but the first print nothing to standard output.

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
    """Search an error and its causes for the loss of another process.

    Returns:
        The first line of the error that says so; "" if none does, or there is no other process.
    """
    while error is not None and jax.distributed.is_initialized():
        if re.search("Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED", str(error)):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return ""


def give_up(what: str) -> NoReturn:
    """Print that another process is lost, and exit at once, because any collective would hang.

    Args:
        what: how the loss was noticed.
    """
    os.write(2, f"\nerror: another process of this run is lost ({what}); the same command, started "
                "on every host, goes on from the last checkpoint\n".encode())
    os._exit(GO_ON)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """Handle the SIGABRT by which JAX ends a process when a heartbeat is missing."""
    give_up(f"JAX heard nothing of it for {HEARTBEAT_SECONDS} s, or lost the first one: see above")


class Watch:
    """Ends one of several processes when no update is completed for UPDATE_SECONDS; use `with`."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        if jax.process_count() > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """Report that an update is completed."""
        self._last = time.monotonic()

    def _look(self) -> None:
        while not self._ended.wait(min(UPDATE_SECONDS / 4, 10)):
            if time.monotonic() - self._last > UPDATE_SECONDS:
                give_up(f"no update was completed for {UPDATE_SECONDS} s")


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between updates; use it in `with`.

    One of several processes may get the signal alone, or earlier than another, but all have to
    stop at the same update. So at every update the largest flag of all processes is computed.

    Python's handlers wait while the main thread is in compiled code, which the compilation of an
    update keeps it in for minutes. So the signal is answered by a thread that the system's own
    handler wakes.
    """

    def __init__(self, mesh: Mesh):
        self.unsaved = 0  # updates that a second signal loses
        self._signal = 0
        self._again = False  # a second one came before Python could handle the first
        self._sharding = one_each(mesh)
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))
        self._asked: jax.Array | None = None

    def __enter__(self) -> "StopSignal":
        # Python lets no other thread handle signals; there, the run is not stopped by them.
        mine = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._note)
                        for number in (signal.SIGINT, signal.SIGTERM) if mine}
        if mine:
            numbers, self._wake = os.pipe()
            os.set_blocking(self._wake, False)
            self._woken = signal.set_wakeup_fd(self._wake)
            self._answers = threading.Thread(target=self._answer, args=(numbers,), daemon=True)
            self._answers.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._woken)
            os.close(self._wake)
            self._answers.join()

    def asked(self) -> bool:
        """Whether to stop now; each of several processes must call it after every update.

        With several the answer is that of the update before, so that nobody waits for it.
        """
        if jax.process_count() == 1:
            return bool(self._signal)
        asked, devices = self._asked, self._sharding.mesh.size
        flags = jax.make_array_from_callback(
            (devices,), self._sharding, lambda _: np.array([self._signal], np.int32))
        self._asked = self._largest(flags)
        return asked is not None and bool(asked)

    def _note(self, number: int, _: object) -> None:
        self._signal = number
        signal.signal(number, self._before[number])  # a second one acts at once
        if self._again:
            signal.raise_signal(number)

    def _answer(self, numbers: int) -> None:
        """Say what the first signal whose number comes through this pipe will do; see a second."""
        answered = False
        with open(numbers, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in self._before:
                    continue
                if not answered:
                    answered = True
                    lost = f"lose {self.unsaved:,} update{'s' * (self.unsaved != 1)}"
                    os.write(2, ("\nstopping after this update, to save; press again to "
                                 f"{lost if self.unsaved else 'save nothing'}\n").encode())
                elif not self._signal:
                    self._again = True
