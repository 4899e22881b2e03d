"""Our training for a task beside the Hugging Face Trainer's: the same examples, batches, rates.

Both take tokenised examples; what each makes of them, padding included, is timed with it.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from distilbert_jax.benchmark.sides import Side, Worker, peak_bytes
from distilbert_jax.data.examples import Examples, Grid
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.machine.memory import keep_memory
from distilbert_jax.machine.sharding import make_mesh, place, place_rows, shardings
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.task_config import FinetuneConfig
from distilbert_jax.training.assemble import assemble


@dataclasses.dataclass(frozen=True)
class TaskProblem:
    """What both sides train."""

    config: FinetuneConfig | EmbedConfig
    folder: str  # of the model to start from
    model_type: str  # row of FAMILIES
    shape: EncoderConfig
    params: dict[str, Any]
    examples: Examples
    max_length: int  # tokens of the longest example that the task allows
    updates: int  # of a round
    rounds: int
    vectors: np.ndarray | None = None  # [n, D] that a sentence encoder learns
    teacher: EncoderConfig | None = None  # whose they are


class OurSide:
    """The step of finetune, with its batches."""

    def __init__(self, problem: TaskProblem, began: float):
        """Compile the step, for each number of rows that batches have, and make first updates."""
        keep_memory()
        jax.config.update("jax_enable_compilation_cache", False)
        self._problem, self._mesh = problem, make_mesh(problem.config.mesh)
        steps = problem.rounds * problem.updates
        self._begin(steps)
        sizes = {self._grid.size(step): step for step in reversed(range(steps))}
        self._train(sizes.values())  # one of each number of rows, so that all is compiled
        self._first, self._done = time.time() - began, 0

    def _begin(self, steps: int) -> None:
        """Prepare a training of so many updates."""
        problem, config = self._problem, self._problem.config
        self._grid = Grid(problem.examples, config.batch_size, steps, config.seed,
                          self._mesh.shape["data"], problem.vectors)
        assembly = assemble(config, FAMILIES[problem.model_type], problem.shape,
                            [problem.teacher] if problem.teacher else [], self._mesh, steps)
        state = assembly.init(assembly.cast(problem.params))
        self._assembly, self._state = assembly, place(state, shardings(state, self._mesh))
        self._step = assembly.jitted(self._state, {})

    def ready(self) -> None:
        """Nothing has to be known before the first round."""

    def round(self) -> float:
        """Examples per second."""
        began, updates = time.perf_counter(), self._problem.updates
        self._train(range(self._done, self._done + updates))
        self._done += updates
        return updates * self._grid.batch_size / (time.perf_counter() - began)

    def end(self) -> dict[str, Any]:
        """What is known of it beside its speed."""
        return {"first_update_seconds": self._first, "process_bytes": peak_bytes(),
                "padding": 1 - self._grid.filled(self._done)}

    def _train(self, steps: Iterable[int]) -> None:
        metrics: dict[str, jax.Array] = {}
        for step in steps:
            size = self._grid.size(step)
            batch = place_rows(self._grid.read(step, np.arange(size)), self._mesh, size)
            self._state, metrics = self._step(self._state, {}, None, batch)
        jax.block_until_ready(metrics)


def _worker(name: str, problem: TaskProblem, began: float) -> Worker:
    if name == "ours":
        return OurSide(problem, began)
    from distilbert_jax.benchmark.trainer import TrainerSide

    return TrainerSide(problem, name == "trainer-padded", began)


def measure(
    problem: TaskProblem, names: tuple[str, ...],
    worker: Callable[[str, Any, float], Worker] = _worker,
) -> dict[str, dict[str, Any]]:
    """Time the sides in turn.

    Args:
        problem: what they train.
        names: of the sides.
        worker: makes one from its name, the problem and when its process was started.

    Returns:
        Side → examples per second of each round (`rounds`), and what it knows in the end: of
        those here `first_update_seconds` from the start of its process, all compiled,
        `process_bytes` at most, `padding` as a share of what is computed.
    """
    sides = {}
    for name in names:
        sides[name] = Side(functools.partial(worker, name, problem), name != "ours")
    timed: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(problem.rounds):
        for name, side in sides.items():
            timed[name].append(side.round())
    return {name: {"rounds": timed[name]} | side.end() for name, side in sides.items()}


def table(found: dict[str, dict[str, Any]], examples: int, epochs: int) -> str:
    """A line for each side, in Markdown; all of a training, from its start on."""
    rows = [("side", "examples/s", "ours is", "padding", "first update s",
             f"{epochs} passes s", "ours is", "process MB")]
    rows.append(("---", *["--:"] * (len(rows[0]) - 1)))
    first = found["ours"]
    totals = {}
    for name, side in found.items():
        speed = statistics.median(side["rounds"])
        totals[name] = side["first_update_seconds"] + epochs * examples / speed
        ratio = statistics.median(
            a / b for a, b in zip(first["rounds"], side["rounds"], strict=True))
        rows.append((
            name, f"{speed:,.1f}", f"{ratio:.2f} x", f"{side['padding']:.0%}",
            f"{side['first_update_seconds']:.1f}", f"{totals[name]:,.0f}",
            f"{totals[name] / totals['ours']:.2f} x", f"{side['process_bytes'] / 1e6:,.0f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
