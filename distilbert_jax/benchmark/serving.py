"""Latency of requests to a model in each runtime that serves it, and to its teacher.

Each runtime lives in a process of its own, which is pinned to as many CPUs as it has threads; all
answer the same requests in turn. `latency.py` is the short form that training reports have.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from distilbert_jax.benchmark.sides import Side
from distilbert_jax.export.exportable import Exportable, Run, reference
from distilbert_jax.export.formats import FORMATS
from distilbert_jax.models import hub

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, mask, types, as a Run takes them
Requests = dict[str, list[list[Batch]]]  # name → the batches of each round
Times = dict[str, tuple[float, float]]  # name → seconds and CPU seconds of a round

OWN = {"torch": "PyTorch, float32", "jax": "JAX, float32"}  # runtimes of the folder itself
FILES = ("onnx", "int8", "litert")  # rows of FORMATS whose runtime takes a number of threads
RUNTIMES = (*OWN, *FILES)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model in a runtime."""

    folder: Path
    runtime: str  # of RUNTIMES
    output: str  # what it answers, see Exportable
    role: str  # teacher or student

    @property
    def text(self) -> str:
        """The runtime, for tables."""
        return OWN[self.runtime] if self.runtime in OWN else FORMATS[self.runtime].text

    @property
    def bytes(self) -> int:
        """Size of the file, or of all files of the weights."""
        if self.runtime in FILES:
            return (self.folder / FORMATS[self.runtime].path).stat().st_size
        weights = list(self.folder.glob("*.safetensors")) or list(self.folder.glob("*.bin"))
        return sum(path.stat().st_size for path in weights)

    def lacks(self) -> str:
        """What has to be done before it can be timed; "" if it can."""
        if self.runtime == "torch" and not find_spec("torch"):
            return "pip install torch"
        if self.runtime not in FILES:
            return ""
        row = FORMATS[self.runtime]
        if not (self.folder / row.path).exists():
            return (f"distilbert-jax ship --model {self.folder} --formats {self.runtime} "
                    f"writes {row.path}")
        library = row.needs[-1]  # the runtime
        return "" if find_spec(library) else f"pip install \"distilbert_jax[{row.extra}]\""

    def open(self, threads: int) -> Run:
        """Load it, for so many threads; JAX takes as many as its process has CPUs."""
        if self.runtime == "jax":
            model = Exportable.of(hub.load_any(str(self.folder)))
            return reference(dataclasses.replace(model, output=self.output))
        if self.runtime == "torch":
            from distilbert_jax.benchmark.torch_model import TorchModel

            return TorchModel(self.folder, self.output, threads)
        row = FORMATS[self.runtime]
        return row.load(self.folder / row.path, threads=threads)


class Server:
    """A contender that answers, in its process."""

    def __init__(self, contender: Contender, threads: int, requests: Requests, began: float):
        """Load it, and answer one batch of every shape that comes.

        Args:
            contender: who.
            threads: that a product may take.
            requests: that it gets, round by round.
            began: when the process was started; not needed.
        """
        self._run, self._requests = contender.open(threads), requests
        self._round = 0
        shapes = {batch[0].shape: batch
                  for rounds in requests.values() for batches in rounds for batch in batches}
        for batch in shapes.values():
            self._run(*batch)

    def ready(self) -> None:
        """Nothing has to be known before the first round."""

    def round(self) -> Times:
        """Seconds and CPU seconds, of all threads, that the batches of this round take."""
        found = {}
        for name, rounds in self._requests.items():
            began, busy = time.perf_counter(), time.process_time()
            for batch in rounds[self._round]:
                self._run(*batch)
            found[name] = (time.perf_counter() - began, time.process_time() - busy)
        self._round += 1
        return found

    def end(self) -> dict[str, Any]:
        """Nothing is left to be known."""
        return {}


def measure(
    contenders: Sequence[Contender], requests: Sequence[Requests], threads: int, rounds: int
) -> list[list[Times]]:
    """Let all answer in turn, so that the machine's moods hit all alike.

    Args:
        contenders: who.
        requests: of each, of the same shapes; `rounds` of each name.
        threads: that each may take.
        rounds: how often all are called.

    Returns:
        For each contender the times of each round.
    """
    sides = []
    with _pinned(threads):
        for contender, given in zip(contenders, requests, strict=True):
            sides.append(Side(functools.partial(Server, contender, threads, given),
                              contender.runtime == "torch"))
    found: list[list[Times]] = [[] for _ in sides]
    for _ in range(rounds):
        for times, side in zip(found, sides, strict=True):
            times.append(side.round())
    for side in sides:
        side.end()
    return found


@contextlib.contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """Leave to this process, and to those that it starts meanwhile, the last of its CPUs.

    XLA has a thread for each CPU that its process may use, and no setting for fewer.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
