"""The sides of a benchmark: each lives in a process of its own and works while the others wait.

So its peak of memory is its own, and the moods of the machine are shared by all.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol, runtime_checkable

from distilbert_jax.errors import UserError

# What `keep_memory` does for a process that uses JAX, for one that uses PyTorch.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2000000000000",
               "MALLOC_ARENA_MAX": "1"}


@runtime_checkable
class Worker(Protocol):
    """One side, in its process."""

    def ready(self) -> Any:
        """What the driver has to know before the first round."""

    def round(self) -> Any:
        """Do the work that is timed, and give what was measured."""

    def end(self) -> dict[str, Any]:
        """What is known of the side in the end."""


def serve(began: float, pipe: Connection) -> None:
    """Be one side: what makes the worker is received, then each True is a round, False the end.

    Args:
        began: when the process was started [seconds since 1970]; the worker counts from then.
        pipe: to the driver; a UserError is sent in place of an answer.
    """
    with contextlib.suppress(EOFError, ConnectionError):  # the driver is gone
        try:
            worker = pipe.recv()(began)
            pipe.send(worker.ready())
            while pipe.recv():
                pipe.send(worker.round())
            pipe.send(worker.end())
        except UserError as error:
            pipe.send(error)


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Side:
    """The driver's end of one side."""

    def __init__(self, build: Callable[[float], Worker], keep_memory: bool = False):
        """Start its process, and wait until it is ready.

        Args:
            build: makes the worker, given when its process was started; it has to be picklable.
            keep_memory: whether its C library keeps freed memory from the start.

        Raises:
            UserError: of the side, or its process ended by itself.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=serve, args=(time.time(), other), daemon=True)
        # Ctrl-C reaches all processes of a terminal: the driver ends, and its sides with it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        with _environment(KEEP_MEMORY if keep_memory else {}):
            self._process.start()
        signal.signal(signal.SIGINT, before)
        other.close()
        self.ready = self._ask(build)  # not by args, which start() would wait for, deaf to Ctrl-C

    def round(self) -> Any:
        """Let it do its work once, and give what it measured."""
        return self._ask(True)

    def end(self) -> dict[str, Any]:
        """Let it go; what it knows of itself."""
        known = self._ask(False)
        self._process.join()
        return known

    def _ask(self, what: Any) -> Any:
        try:
            self._pipe.send(what)
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise UserError(f"a side of the benchmark ended by itself, with code "
                            f"{self._process.exitcode}; what it said stands above") from None
        if isinstance(answer, UserError):
            raise answer
        return answer
