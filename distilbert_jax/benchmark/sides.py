"""The sides of a benchmark: each lives in a process of its own and works while the others wait.

So its peak of memory is its own, and the moods of the machine are shared by all.
"""

import contextlib
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol, runtime_checkable

from distilbert_jax.errors import UserError


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


class Side:
    """The driver's end of one side."""

    def __init__(self, build: Callable[[float], Worker]):
        """Start its process, and wait until it is ready.

        Args:
            build: makes the worker, given when its process was started; it has to be picklable.

        Raises:
            UserError: of the side, or its process ended by itself.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=serve, args=(time.time(), other), daemon=True)
        # Ctrl-C reaches all processes of a terminal: the driver ends, and its sides with it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
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
