"""Our training of a sentence encoder beside that of sentence-transformers.

First both are timed in turn, then each trains alone for the same time, and gives the vectors that
its student has learnt.
"""

import dataclasses
import statistics
import time
from typing import Any

import numpy as np

from distilbert_jax.benchmark import task
from distilbert_jax.benchmark.sides import Worker
from distilbert_jax.benchmark.task import OurSide, TaskProblem
from distilbert_jax.data.examples import Examples
from distilbert_jax.evaluation.similarity import Embedder

SIDES = ("ours", "sentence-transformers")


@dataclasses.dataclass(frozen=True)
class SentenceProblem(TaskProblem):
    """What both sides train, and on which texts they are judged."""

    sentences: list[str] = dataclasses.field(default_factory=list)  # of `examples`
    texts: list[str] = dataclasses.field(default_factory=list)  # whose vectors are asked for
    tokenised: Examples | None = None  # these texts
    seconds: float = 0.0  # that each side trains in the end


def updates_in(problem: SentenceProblem, timed: list[float], lost: float) -> int:
    """How many updates fit into the time, by the median speed of the rounds.

    Args:
        problem: what is trained.
        timed: sentences per second of each round.
        lost: seconds that go before the first update.
    """
    speed = statistics.median(timed) / problem.config.batch_size
    return max(1, int((problem.seconds - lost) * speed))


class OurSentences(OurSide):
    """The step of embed, with its batches."""

    def __init__(self, problem: SentenceProblem, began: float):
        """Compile, and make first updates."""
        super().__init__(problem, began)
        self._timed: list[float] = []
        self._asked = problem

    def round(self) -> float:
        """Sentences per second."""
        self._timed.append(super().round())
        return self._timed[-1]

    def end(self) -> dict[str, Any]:
        """Train from the start for the problem's time; the vectors of its texts."""
        known, began = super().end(), time.perf_counter()
        steps = updates_in(self._asked, self._timed, self._first)
        self._begin(steps)
        self._train(range(steps))
        seconds = time.perf_counter() - began
        embedder = Embedder(self._assembly.graph, self._state.params["student"], self._mesh,
                            self._asked.shape.sentence.of_first)
        return known | {"updates": steps, "seconds": seconds,
                        "vectors": embedder(self._asked.tokenised)}


def _worker(name: str, problem: SentenceProblem, began: float) -> Worker:
    if name == "ours":
        return OurSentences(problem, began)
    from distilbert_jax.benchmark.sentence_trainer import SentenceTrainerSide

    return SentenceTrainerSide(problem, began)


def measure(problem: SentenceProblem) -> dict[str, dict[str, Any]]:
    """Time the sides in turn, then let each train.

    Returns:
        Side → sentences per second of each round (`rounds`), `updates` and `seconds` of the whole
        training, `vectors` [n, D] of the problem's texts, `process_bytes` at most.
    """
    return task.measure(problem, SIDES, _worker)


def speeds(found: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Side → its median of sentences per second, and how many times as fast ours is."""
    ours = found["ours"]["rounds"]
    return {name: (statistics.median(side["rounds"]), float(np.median(
        np.divide(ours, side["rounds"])))) for name, side in found.items()}
