"""Figures of each step → metrics.jsonl and a board, cut back where a run goes on.

Beside the loop (train.py), which says what is logged, and when; here is how it reaches the disk. A
board (boards.py) shows the figures while the run goes on.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from distilbert_jax.errors import UserError
from distilbert_jax.machine import store
from distilbert_jax.machine.progress import say
from distilbert_jax.training.boards import BOARDS


class MetricsLog:
    """The figures of a run, in OUTPUT/metrics.jsonl and on a board; use it in `with`.

    Of several processes the first alone writes. Under gs:// nothing can be appended to a file, so
    the bucket holds what there was when `publish` was called last.
    """

    def __init__(
        self, output: str | Path, start: int, seen: int, on_save_error: str = "stop",
        log_to: str = "tensorboard", settings: Mapping[str, Any] | None = None,
    ):
        """Open the log, and remove the lines of updates after `start`.

        Args:
            output: the run's folder; may be a name under gs://.
            start: updates done before; 0 begins a new log.
            seen: real tokens of those updates.
            on_save_error: where a line cannot be written, "stop" raises a UserError, "continue"
                prints it and keeps the line for the next attempt.
            log_to: row of BOARDS.
            settings: of the run, which a board may show.

        Raises:
            UserError: the board cannot be reached.
        """
        first, self._output = jax.process_index() == 0, output
        self._path = fetch_metrics(output) if first else Path(os.devnull)
        kept = [line for line in _lines(self._path) if start and line["step"] <= start]
        self._seen, self._before = seen, kept[-1]["seconds"] if kept else 0.0
        self._began, self._recent = time.monotonic(), []
        self._stops, self._unwritten = on_save_error == "stop", b""
        if first:
            with store.whole_file(self._path) as new:
                new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("ab", buffering=0)
        self._board = BOARDS[log_to](output, start, settings or {}, first)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def count(self, tokens: float) -> None:
        """Count the real tokens of an update that has ended."""
        self._seen += int(tokens)
        self._recent = [*self._recent[-20:], (time.monotonic(), self._seen)]

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second over the last 20 updates."""
        (t0, n0), (t1, n1) = self._recent[0], self._recent[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Append one line: step, tokens seen, seconds in the loop over all continuations, figures.

        Raises:
            UserError: it cannot be written (with on_save_error "stop").
        """
        seconds = self._before + time.monotonic() - self._began
        line = {"step": step, "tokens_seen": self._seen, "seconds": round(seconds, 3), **figures}
        self._unwritten += (json.dumps(line) + "\n").encode()
        try:
            while self._unwritten:  # what is cut off by an error is completed later
                self._unwritten = self._unwritten[self._file.write(self._unwritten):]
        except OSError as error:
            text = f"{self._path} cannot be written ({error.strerror})"
            if self._stops:
                raise UserError(f"{text}; when there is room, the same command goes on") from error
            say(text)
            return
        self._board.add(step, figures)

    def publish(self) -> None:
        """Upload the log where the run's folder is under gs://.

        Raises:
            UserError: it cannot be uploaded (with on_save_error "stop").
        """
        if not store.is_remote(self._output) or jax.process_index():
            return
        self._board.flush()
        try:
            store.upload(self._output, "metrics.jsonl", self._board.name)
        except UserError as error:
            if self._stops:
                raise
            say(str(error))


def fetch_metrics(output: str | Path) -> Path:
    """Bring a run's metrics.jsonl to this machine, where its folder is under gs://."""
    return store.fetch(_path(output))


def read_metrics(output: str | Path, last: int | None = None) -> list[dict[str, int | float]]:
    """The lines of the copy of a run's metrics.jsonl on this machine, oldest first.

    Args:
        output: the run's folder.
        last: the update after which lines are left out; None for none.
    """
    return [line for line in _lines(store.local(_path(output)))
            if last is None or line["step"] <= last]


def _path(output: str | Path) -> str:
    return store.join(output, "metrics.jsonl")


def _lines(path: Path) -> list[dict[str, int | float]]:
    """All lines of a file that are complete; a crash may have cut off the last one."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"step", "tokens_seen", "seconds"} <= set(line):
            lines.append(line)
    return lines
