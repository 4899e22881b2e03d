"""Step, data, settings → a trained state: next batch, step, log, evaluate, checkpoint.

The step is pure; whatever prints, writes or waits is in this loop. Of several processes each runs
it with the same numbers, and the first alone prints and logs.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from distilbert_jax.config import LoopConfig
from distilbert_jax.data.batches import Batches, Prefetch
from distilbert_jax.errors import Interrupted, UserError
from distilbert_jax.machine.processes import StopSignal, Watch
from distilbert_jax.machine.progress import bar, say
from distilbert_jax.machine.sharding import (
    local_rows,
    place,
    place_rows,
    shardings,
)
from distilbert_jax.training.assemble import Assembly
from distilbert_jax.training.checkpoint import Checkpoints, abstract
from distilbert_jax.training.labels import Vocabulary
from distilbert_jax.training.metrics_log import MetricsLog, fetch_metrics
from distilbert_jax.training.train_step import TrainState

LOG_EVERY = 10  # updates
# After so many updates without compilation, or seconds of them, the time that is left is said.
ESTIMATE_UPDATES, ESTIMATE_SECONDS = 20, 5


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop needs beside the state and the teacher; a job puts it together."""

    config: LoopConfig
    steps: int
    settings: dict[str, Any]  # what a continuation must share
    output: str | Path
    batches: Batches
    vocabulary: Vocabulary | None  # None where the labels come with the batch
    assembly: Assembly
    evaluate: Callable[[dict[str, Any]], dict[str, float]]  # the student's parameters → figures
    describe: Callable[[dict[str, float]], str]  # figures → a line
    label: str  # of the progress bar


def train(run: Run, state: TrainState, teachers: dict[str, Any]) -> TrainState:
    """Train to the last step, from the newest checkpoint if there is one.

    Args:
        run: the step, its data, and where to write.
        state: before the first update; arrays of it that are on a device are donated.
        teachers: name → parameters, frozen, laid out on the mesh; {} without a teacher.

    Returns:
        The state after `run.steps` updates, saved.

    Raises:
        Interrupted: a signal came; the state is saved.
        UserError: no checkpoint is sound or it is another run's, a file cannot be written, or too
            many updates in a row were skipped.
    """
    config, mesh = run.config, run.assembly.mesh
    layout = shardings(state, mesh)
    step_fn = run.assembly.jitted(state, teachers)
    with (Checkpoints(run.output, run.settings, config.keep, config.on_save_error) as checkpoints,
          StopSignal(mesh) as stop):
        restored = checkpoints.restore(abstract(state, layout))
        state = place(state, layout) if restored is None else restored
        start = int(state.step)
        seen = run.batches.tokens_before(start)
        with (MetricsLog(run.output, start, seen, config.on_save_error, config.log_to,
                         config.meaning()) as log,
              bar(total=run.steps, initial=start, desc=run.label, unit=" updates") as progress,
              Prefetch(_reader(run), range(start, run.steps)) as batches,
              Watch() as watch):
            if start:
                say(f"{run.label}: continuing from update {start} of {run.steps}"
                    if start < run.steps else
                    f"{run.label}: {start} updates are done, --steps asks for {run.steps}")
            else:
                log.write(0, _evaluated(run, state))
            if start < run.steps:
                say("compiling the update, once ...")
            report = _Report(run, log, progress, batches)
            for step in range(start, run.steps):
                began = time.monotonic()
                state, metrics = step_fn(state, teachers, run.vocabulary, next(batches))
                if step == start:
                    say(f"compiled in {time.monotonic() - began:.0f} s")
                report.flush()  # of the step before, while this one runs
                report.take(step + 1, metrics)
                done, figures = step + 1, None
                stop.unsaved = done - checkpoints.newest
                stops = stop.asked() and done < run.steps
                saves = done % config.save_every == 0 or done == run.steps
                evaluates = saves or done % config.eval_every == 0
                if evaluates or stops:  # neither a figure nor a checkpoint is ahead of the log
                    report.flush()
                if evaluates:
                    figures = _evaluated(run, state)
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


def saved(run: Run, state: TrainState, which: str) -> TrainState:
    """The state of a checkpoint, to end the run with; nothing is trained, logged or saved.

    Args:
        run: whose checkpoint it is; there is one, as refuse_to_finish has seen.
        state: before the first update; only its shapes are read.
        which: the "last" checkpoint or the "best".

    Raises:
        UserError: none is sound, or it is another run's.
    """
    layout = shardings(state, run.assembly.mesh)
    with Checkpoints(run.output, run.settings) as checkpoints:
        found = checkpoints.restore(abstract(state, layout), best=which == "best")
    if jax.process_index() == 0:
        fetch_metrics(run.output)
    say(f"{run.label}: update {int(found.step)} of {run.steps}, from the {which} checkpoint; "
        "nothing is trained")
    return found


def _evaluated(run: Run, state: TrainState) -> dict[str, float]:
    """The held-out figures of this state, which are printed too."""
    figures = run.evaluate(state.params["student"])
    say(f"update {int(state.step)}: {run.describe(figures)}")
    return figures


def _reader(run: Run) -> Callable[[int], dict[str, jax.Array]]:
    """A function from a step to its batch; each process reads only the rows of its own devices."""
    mesh = run.assembly.mesh

    def batch(step: int) -> dict[str, jax.Array]:
        size = run.batches.size(step)
        return place_rows(run.batches.read(step, local_rows(mesh, size)), mesh, size)

    return batch


def _stop(checkpoints: Checkpoints, state: TrainState, figures: dict[str, float] | None,
          report: "_Report", run: Run) -> str:
    """Save, wait until it is done, and return the line that the run ends with.

    Amid skipped updates nothing is saved, because the continuation has to count them again.
    """
    done, began = int(state.step), time.monotonic()
    if not report.skipped:
        checkpoints.save(state, figures)
    checkpoints.wait()
    newest = max(checkpoints.steps, default=0)
    saved = (f"saved in {time.monotonic() - began:.1f} s" if newest == done else
             f"the last checkpoint is of update {newest}")
    return f"stopped at update {done} of {run.steps}, {saved}; the same command goes on from there"


class _Rest:
    """Says once how long the rest of a run will take, by the updates after the compiled one."""

    def __init__(self, steps: int):
        self._steps, self._said = steps, False
        self._first: tuple[int, float] | None = None  # the compiled one, and the clock at its end

    def estimate(self, step: int) -> None:
        """Count update `step`, which has just ended."""
        if self._said:
            return
        now, left = time.monotonic(), self._steps - step
        if self._first is None:
            self._first = step, now
        count, seconds = step - self._first[0], now - self._first[1]
        if left and (count >= ESTIMATE_UPDATES or seconds >= ESTIMATE_SECONDS and count):
            self._said = True
            say(f"about {_duration(left * seconds / count)} left: {left:,} updates of "
                f"{seconds / count:.2g} s")


def _duration(seconds: float) -> str:
    """A time in the largest unit of which it has at least two."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


class _Report:
    """Brings the metrics of each step to the host, into the bar and, now and then, into the log."""

    def __init__(self, run: Run, log: MetricsLog, progress: "tqdm[Any]", batches: Prefetch):
        self.skipped = 0  # updates in a row without a finite loss and gradient
        self._run, self._log, self._bar, self._batches = run, log, progress, batches
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._rest = _Rest(run.steps)

    def take(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keep the metrics of update `step`, counted from 1, which may still be being computed."""
        self._pending = step, metrics

    def flush(self) -> None:
        """Wait for the metrics that `take` kept, if any, and report them.

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
        self._rest.estimate(step)
        if step % LOG_EVERY == 0 or step == self._run.steps or figures["skipped"]:
            self._log.write(step, {f"train_{name}": value for name, value in figures.items()} | {
                "waiting": self._batches.waiting()})  # share of the time, for data
        self.skipped = self.skipped + 1 if figures["skipped"] else 0
        if self.skipped:
            self._report_skipped(step, figures)

    def _report_skipped(self, step: int, figures: dict[str, float]) -> None:
        config, number = self._run.config, self.skipped
        what = (f"update {step} skipped: loss {figures['loss']}, gradient norm "
                f"{figures['grad_norm']}")
        if number < config.max_skipped:
            say(f"{what} ({number} in a row)")
            return
        rows = self._run.batches.names(step - 1)
        raise UserError(
            f"{what}, as the {number - 1} before it (--max-skipped {number}); rows of its batch: "
            f"{', '.join(map(str, rows))}; nothing is saved since, so lower --learning-rate in "
            "another --output, or mend these rows")
