"""The loop: next batch, step, log, evaluate, checkpoint. Everything that prints or writes in it.

Of several processes all run it, with the same numbers; the first alone prints and logs.
"""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from distilbert_jax.config import TrainConfig
from distilbert_jax.data.batches import Prefetch, read, row_indices, tokens_before
from distilbert_jax.data.pack import PackedRows
from distilbert_jax.errors import UserError
from distilbert_jax.machine import store
from distilbert_jax.machine.processes import Watch
from distilbert_jax.machine.progress import bar, say
from distilbert_jax.machine.sharding import (
    by_rows,
    local_rows,
    one_each,
    place,
    place_rows,
    replicated,
    shardings,
)
from distilbert_jax.training.checkpoint import Checkpoints, abstract
from distilbert_jax.training.labels import Vocabulary
from distilbert_jax.training.train_step import TrainState

LOG_EVERY = 10  # updates


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop needs; built by `distil`."""

    config: TrainConfig
    steps: int
    settings: dict[str, Any]  # what a continuation must share
    output: str | Path
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
        UserError: no checkpoint is sound or it is another run's, a file cannot be written, or too
            many updates in a row were skipped.
    """
    config, mesh = run.config, run.mesh
    places = shardings(state, mesh)
    step_fn = jit_step(run.train_step, state, teacher_params, mesh)
    with (Checkpoints(run.output, run.settings, config.keep, config.on_save_error) as checkpoints,
          _StopSignal(mesh) as stop):
        restored = checkpoints.restore(abstract(state, places))
        state = place(state, places) if restored is None else restored
        start = int(state.step)
        seen = tokens_before(config.seed, start, config.batch_size, run.rows)
        with (MetricsLog(run.output, start, seen, config.on_save_error) as log,
              bar(total=run.steps, initial=start, desc=run.label, unit=" updates") as progress,
              Prefetch(_reader(run), range(start, run.steps)) as batches,
              Watch() as watch):
            if start:
                say(f"{run.label}: continuing from update {start} of {run.steps}"
                    if start < run.steps else
                    f"{run.label}: {start} updates are done, --steps asks for {run.steps}")
            else:
                log.write(0, run.evaluate(state.params))
            report = _Report(run, log, progress, batches)
            for step in range(start, run.steps):
                state, metrics = step_fn(state, teacher_params, run.vocabulary, next(batches))
                report.flush()  # of the step before, while this one runs
                report.take(step + 1, metrics)
                done, figures = step + 1, None
                stops = stop.asked() and done < run.steps
                saves = done % config.save_every == 0 or done == run.steps
                evaluates = saves or done % config.eval_every == 0
                if evaluates or stops:  # neither a figure nor a checkpoint is ahead of the log
                    report.flush()
                if evaluates:
                    figures = run.evaluate(state.params)
                    log.write(done, figures)
                if evaluates or stops:
                    log.publish()
                if stops:
                    raise Interrupted(_stop(checkpoints, state, figures, report, run))
                if saves and (not report.skipped or done == run.steps):
                    checkpoints.save(state, figures)
                checkpoints.poll()
                watch.beat()
    return state


def jit_step(
    train_step: Callable[..., Any], state: TrainState, teacher_params: dict[str, Any], mesh: Mesh
) -> Any:
    """The step as the loop runs it: every argument's place pinned, the old state given away.

    Of `state` and `teacher_params` only the shapes are read.
    """
    places, whole = shardings(state, mesh), replicated(mesh)
    return jax.jit(
        train_step, donate_argnums=0,
        in_shardings=(places, shardings(teacher_params, mesh), whole, by_rows(mesh)),
        out_shardings=(places, whole))


def _reader(run: Run) -> Callable[[int], dict[str, jax.Array]]:
    """A function from a step to its batch, of which this process reads only its own rows."""
    size = run.config.batch_size
    own = local_rows(run.mesh, size)

    def batch(step: int) -> dict[str, jax.Array]:
        indices = row_indices(run.config.seed, step, size, len(run.rows))
        return place_rows(read(run.rows, indices[own]), run.mesh, size)

    return batch


def _stop(checkpoints: Checkpoints, state: TrainState, figures: dict[str, float] | None,
          report: "_Report", run: Run) -> str:
    """Save and wait; what there is to say.

    Amid skipped updates nothing is saved: the continuation has to count them again.
    """
    done, began = int(state.step), time.monotonic()
    if not report.skipped:
        checkpoints.save(state, figures)
    checkpoints.wait()
    newest = max(checkpoints.steps, default=0)
    saved = (f"saved in {time.monotonic() - began:.1f} s" if newest == done else
             f"the last checkpoint is of update {newest}")
    return f"stopped at update {done} of {run.steps}, {saved}; the same command goes on from there"


class _Report:
    """Brings the metrics of each step to the host, into the bar and, now and then, into the log."""

    def __init__(self, run: Run, log: "MetricsLog", progress: "tqdm[Any]", batches: Prefetch):
        self.skipped = 0  # updates in a row without a finite loss and gradient
        self._run, self._log, self._bar, self._batches = run, log, progress, batches
        self._pending: tuple[int, dict[str, Any]] | None = None

    def take(self, step: int, metrics: dict[str, Any]) -> None:
        """Remember what the update that `step` counts gives once it is computed."""
        self._pending = step, metrics

    def flush(self) -> None:
        """Wait for the metrics that were taken, if any, and report them.

        Raises:
            UserError: too many updates in a row were skipped.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._log.count(figures["tokens"])
        rate = self._log.tokens_per_second
        self._bar.set_postfix_str(f"loss {figures['loss']:.3f}, {rate:,.0f} tokens/s",
                                  refresh=False)
        self._bar.update()
        if step % LOG_EVERY == 0 or step == self._run.steps or figures["skipped"]:
            self._log.write(step, {f"train_{name}": value for name, value in figures.items()} | {
                "waiting": self._batches.waiting()})  # share of the time, for data
        self.skipped = self.skipped + 1 if figures["skipped"] else 0
        if self.skipped:
            self._tell(step, figures)

    def _tell(self, step: int, figures: dict[str, float]) -> None:
        config, number = self._run.config, self.skipped
        what = (f"update {step} skipped: loss {figures['loss']}, gradient norm "
                f"{figures['grad_norm']}")
        if number < config.max_skipped:
            say(f"{what} ({number} in a row)")
            return
        rows = row_indices(config.seed, step - 1, config.batch_size, len(self._run.rows))
        raise UserError(
            f"{what}, as the {number - 1} before it (--max-skipped {number}); rows of its batch: "
            f"{', '.join(map(str, rows))}; nothing is saved since, so lower --learning-rate in "
            "another --output, or mend these rows")


class MetricsLog:
    """Figures of a run in `metrics.jsonl` and TensorBoard, cut back to `start` on continuation.

    Under gs:// nothing can be appended: there they are of when `publish` was called last.

    `seen` are the real tokens of the updates before `start`. Where a line cannot be written,
    `on_save_error` "stop" raises a UserError; "continue" keeps it for the next attempt.
    """

    def __init__(self, output: str | Path, start: int, seen: int, on_save_error: str = "stop"):
        first, self._output = jax.process_index() == 0, output
        self._path = store.fetch(_log(output)) if first else Path(os.devnull)
        kept = [line for line in _lines(self._path) if start and line["step"] <= start]
        self._seen, self._before = seen, kept[-1]["seconds"] if kept else 0.0
        self._began, self._recent = time.monotonic(), []
        self._stops, self._unwritten = on_save_error == "stop", b""
        if first:
            new = self._path.with_name("metrics.new")
            new.write_text("".join(json.dumps(line) + "\n" for line in kept))
            new.replace(self._path)
        self._file = self._path.open("ab", buffering=0)
        from tensorboardX import SummaryWriter  # slow to import

        self._board = SummaryWriter(str(store.local(output) / "tensorboard"),
                                    purge_step=start + bool(start), write_to_disk=first)

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
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def publish(self) -> None:
        """Take what is written to gs://, where the run writes there."""
        if not store.is_remote(self._output) or jax.process_index():
            return
        self._board.flush()
        try:
            store.upload(self._output, "metrics.jsonl", "tensorboard")
        except UserError as error:
            if self._stops:
                raise
            say(str(error))


def read_metrics(output: str | Path) -> list[dict[str, int | float]]:
    """All lines of a run's metrics.jsonl, as it is on this machine."""
    return _lines(store.local(_log(output)))


def _log(output: str | Path) -> str:
    return store.join(output, "metrics.jsonl")


def _lines(path: Path) -> list[dict[str, int | float]]:
    """All whole lines; a crash may have cut off the last one."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class _StopSignal:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between updates.

    One of several processes may get the signal alone, or earlier than another; all have to stop at
    the same update. So each gives its flag away at every update, and all act on the largest one.
    """

    def __init__(self, mesh: Mesh):
        self._signal = 0
        self._places = one_each(mesh)
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))
        self._asked: jax.Array | None = None

    def __enter__(self) -> "_StopSignal":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to stop; of several processes each must call it after every update.

        With several the answer is one update old, so that nobody waits for it.
        """
        if jax.process_count() == 1:
            return bool(self._signal)
        asked, devices = self._asked, self._places.mesh.size
        flags = jax.make_array_from_callback(
            (devices,), self._places, lambda _: np.array([self._signal], np.int32))
        self._asked = self._largest(flags)
        return asked is not None and bool(asked)

    def _note(self, number: int, frame: Any) -> None:
        self._signal = number
        signal.signal(number, self._before[number])  # a second one acts at once
