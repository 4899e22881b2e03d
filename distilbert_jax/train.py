"""The loop: next batch, step, log, evaluate, checkpoint. Everything that prints or writes in it."""

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from distilbert_jax.checkpoint import Checkpoints, abstract
from distilbert_jax.config import TrainConfig
from distilbert_jax.data.batches import Prefetch, read, row_indices, tokens_before
from distilbert_jax.data.pack import PackedRows
from distilbert_jax.masking import Vocabulary
from distilbert_jax.sharding import by_rows, local_rows, place_rows, replicated, shardings
from distilbert_jax.train_step import TrainState

LOG_EVERY = 10  # updates


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop needs; built by `distil`."""

    config: TrainConfig
    steps: int
    settings: dict[str, Any]  # what a continuation must share
    output: Path
    mesh: Mesh
    rows: PackedRows
    vocabulary: Vocabulary
    train_step: Callable[..., tuple[TrainState, dict[str, Any]]]
    evaluate: Callable[[dict[str, Any]], dict[str, float]]  # params → figures
    label: str  # of the progress bar


def train(run: Run, state: TrainState, teacher_params: dict[str, Any]) -> TrainState:
    """Train to the last step, from the newest checkpoint if there is one.

    Args:
        run: step, data and places.
        state: the beginning; the loop takes over whatever of it lies on a device.
        teacher_params: frozen, laid out on the mesh; {} without a teacher.

    Returns:
        The state after `run.steps` updates, saved.

    Raises:
        Interrupted: a signal came; the state is saved.
    """
    config, mesh = run.config, run.mesh
    places = shardings(state, mesh)
    whole = replicated(mesh)
    step_fn = jax.jit(
        run.train_step, donate_argnums=0,
        in_shardings=(places, shardings(teacher_params, mesh), whole, by_rows(mesh)),
        out_shardings=(places, whole))
    with Checkpoints(run.output, run.settings) as checkpoints, _StopSignal() as stop:
        restored = checkpoints.restore(abstract(state, places))
        state = jax.device_put(state, places) if restored is None else restored
        start = int(state.step)
        seen = tokens_before(config.seed, start, config.batch_size, run.rows)
        with (MetricsLog(run.output, start, seen) as log, _progress(run, start) as bar,
              Prefetch(_reader(run), range(start, run.steps)) as batches):
            if start:
                bar.write(f"{run.label}: continuing from update {start} of {run.steps}")
            else:
                log.write(0, run.evaluate(state.params))
            pending: tuple[int, dict[str, Any]] | None = None
            for step in range(start, run.steps):
                state, metrics = step_fn(state, teacher_params, run.vocabulary, next(batches))
                _report(pending, bar, log, batches)  # of the step before, while this one runs
                pending, done = (step + 1, metrics), step + 1
                evaluates = done % config.eval_every == 0 and done < run.steps
                stops = stop.signal and done < run.steps
                saves = done % config.save_every == 0 or done == run.steps or stops
                if evaluates or saves:  # neither may be ahead of the log
                    _report(pending, bar, log, batches)
                    pending = None
                if evaluates:
                    log.write(done, run.evaluate(state.params))
                if saves:
                    checkpoints.save(state)
                if stops:
                    raise Interrupted(f"stopped at update {done} of {run.steps}; "
                                      "the same command goes on from there")
    return state


def _reader(run: Run) -> Callable[[int], dict[str, jax.Array]]:
    """A function from a step to its batch, of which this process reads only its own rows."""
    size = run.config.batch_size
    own = local_rows(run.mesh, size)

    def batch(step: int) -> dict[str, jax.Array]:
        indices = row_indices(run.config.seed, step, size, len(run.rows))
        return place_rows(read(run.rows, indices[own]), run.mesh, size)

    return batch


def _report(
    pending: tuple[int, dict[str, Any]] | None, bar: "tqdm[Any]", log: "MetricsLog",
    batches: Prefetch,
) -> None:
    """Bring one step's metrics to the host, into the bar and, now and then, into the log."""
    if pending is None:
        return
    step, metrics = pending
    figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
    log.count(figures["tokens"])
    bar.set_postfix_str(f"loss {figures['loss']:.3f}, {log.tokens_per_second:,.0f} tokens/s",
                        refresh=False)
    bar.update()
    if step % LOG_EVERY == 0 or step == bar.total:
        log.write(step, {f"train_{name}": value for name, value in figures.items()} | {
            "waiting": batches.waiting()})  # share of the time, for data


class MetricsLog:
    """Figures of a run in `metrics.jsonl` and TensorBoard, cut back to `start` on continuation.

    `seen` are the real tokens of the updates before `start`.
    """

    def __init__(self, output: Path, start: int, seen: int):
        self._path = output / "metrics.jsonl"
        text = self._path.read_text() if self._path.exists() and start else ""
        lines = text.split("\n")[:-1]  # a last line without its end was cut off by a crash
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        self._seen, self._before = seen, json.loads(kept[-1])["seconds"] if kept else 0.0
        self._began, self._recent = time.monotonic(), []
        self._file = self._path.open("w")
        self._file.writelines(line + "\n" for line in kept)
        from tensorboardX import SummaryWriter  # slow to import

        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=start + bool(start))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.close()
        self._board.close()

    def count(self, tokens: float) -> None:
        """Note that an update of `tokens` real tokens has ended."""
        self._seen += int(tokens)
        self._recent = [*self._recent[-20:], (time.monotonic(), self._seen)]

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second over the last 20 updates."""
        (t0, n0), (t1, n1) = self._recent[0], self._recent[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Append one line; `seconds` is the time in the loop, over all continuations."""
        seconds = self._before + time.monotonic() - self._began
        line = {"step": step, "tokens_seen": self._seen, "seconds": round(seconds, 3), **figures}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)


def read_metrics(output: Path) -> list[dict[str, int | float]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _progress(run: Run, start: int) -> "tqdm[Any]":
    return tqdm(total=run.steps, initial=start, desc=run.label, unit=" updates",
                mininterval=0.5 if sys.stderr.isatty() else 15)


class _StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between updates."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "_StopSignal":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, self._before[number])  # a second one acts at once
