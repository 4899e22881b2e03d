"""What every job does first and last: check all that can be wrong, read the data, train, evaluate.

Settings come in; packed rows, a mesh and a trained state go out. What differs between the jobs is
in their own files.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from distilbert_jax.config import DistilConfig, TrainConfig, check
from distilbert_jax.data import pack, sources
from distilbert_jax.data.batches import PackedBatches
from distilbert_jax.data.prepare import is_prepared, prepare
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.evaluation.held_out import held_out, held_out_rows
from distilbert_jax.machine import store
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.seal import fingerprint
from distilbert_jax.machine.sharding import first_process_first, make_mesh, replicated, rows_each
from distilbert_jax.models import hub, student
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.family import Family
from distilbert_jax.training.assemble import Assembly
from distilbert_jax.training.checkpoint import refuse_other_run, refuse_to_finish
from distilbert_jax.training.labels import Vocabulary, vocabulary
from distilbert_jax.training.metrics_log import read_metrics
from distilbert_jax.training.objective import Objective
from distilbert_jax.training.train import Run, saved, train

if TYPE_CHECKING:
    import transformers

EVALUATION_ROWS = 128  # while training; the report takes all of them


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a job has once its input is read."""

    config: TrainConfig
    mesh: Mesh
    tokenizer: "transformers.PreTrainedTokenizerFast"
    data: pack.Prepared
    vocabulary: Vocabulary
    steps: int
    settings: dict[str, Any]  # what a continuation must share

    def train(self, assembly: Assembly, start: dict[str, Any], teachers: dict[str, Any],
              label: str, batches: PackedBatches | None = None) -> tuple[dict[str, Any], int]:
        """Train from the parameters `start` to the last update; with --finish, take a checkpoint.

        Args:
            assembly: the step.
            start: parameters on the host.
            teachers: name → parameters, on the mesh; {} without a teacher.
            label: of the progress bar.
            batches: that bring the teacher's states; default: rows alone.

        Returns:
            The trained model's parameters, on the mesh, and after how many updates.
        """
        config = self.config
        run = Run(
            config=config, steps=self.steps, settings=self.settings,
            output=config.output, vocabulary=self.vocabulary, batches=batches or self.batches,
            label=label, assembly=assembly, describe=self._describe,
            evaluate=self.evaluator(assembly.eval_step, teachers, EVALUATION_ROWS))
        if config.finish:
            state = saved(run, assembly.init(start), config.finish)
        else:
            say(self._plan(assembly, start, teachers, label))
            state = train(run, assembly.init(start), assembly.taught(teachers))
        return state.params["student"], int(state.step)

    @property
    def batches(self) -> PackedBatches:
        """The rows of each update."""
        return PackedBatches(self.data.train, self.config.seed, self.config.batch_size)

    def plot(self, end: Mapping[str, Any], updates: int, title: str) -> None:
        """Draw OUTPUT/losses.png: the log of so many updates, and the figures `end` on all rows."""
        report.plot(
            read_metrics(self.config.output, updates),
            {"tokens_seen": self.batches.tokens_before(updates), **end},
            self._rows_judged, store.local(self.config.output) / "losses.png", title)

    def _describe(self, figures: Mapping[str, Any]) -> str:
        """Figures of an evaluation while training, in words."""
        return report.held_out_line(figures) + " ({:,} of {:,} rows)".format(*self._rows_judged)

    @property
    def _rows_judged(self) -> tuple[int, int]:
        """Held-out rows that are judged while training, and all that there are."""
        rows = len(self.data.valid)
        return min(EVALUATION_ROWS, rows), rows

    def standing(self, updates: int) -> str:
        """A sentence on a model after so many updates, if they are not all of them; else ""."""
        return standing(self.config.finish, updates, self.steps)

    def _plan(self, assembly: Assembly, start: dict[str, Any], teachers: dict[str, Any],
              label: str) -> str:
        """What will be done, with what, where, in one line."""
        config, rows = self.config, len(self.data.train)
        passes = self.steps * config.batch_size / rows
        return (f"{label}: {models_of_plan(start, *teachers.values())}; {self.steps:,} updates of "
                f"{config.batch_size} rows of {config.sequence_length} tokens, {passes:.1f} passes "
                f"over {rows:,} rows; {place_of_plan(assembly)}")

    def evaluator(
        self, eval_step: Callable[..., dict[str, jax.Array]], teachers: dict[str, Any],
        rows: int | None = None,
    ) -> Callable[[dict[str, Any]], dict[str, float]]:
        """A function from parameters to held-out figures, on `rows` rows or all."""
        return functools.partial(
            held_out, eval_step, teachers=teachers, vocabulary=self.vocabulary,
            packed=self.data.valid, mesh=self.mesh, rows=rows)

    def judged(
        self, eval_step: Callable[..., dict[str, jax.Array]], teachers: dict[str, Any],
        params: dict[str, Any],
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Held-out figures on all rows, and the counts of each row."""
        return held_out_rows(eval_step, params, teachers, self.vocabulary, self.data.valid,
                             self.mesh)


def standing(finish: str, updates: int, steps: int) -> str:
    """A sentence on a model that --finish took after some of a run's updates; "" after all."""
    if updates >= steps:
        return ""
    which = {"last": "its last checkpoint",
             "best": "its checkpoint with the lowest held-out loss"}[finish]
    return f"The run is not at its end: this is update {updates:,} of {steps:,}, {which}."


def models_of_plan(own: dict[str, Any], *teachers: dict[str, Any]) -> str:
    """The models of a run by their parameters, for the line that says what it will do."""
    taught = " + ".join(map(report.describe_params, teachers))
    return f"{taught} → {report.describe_params(own)}" if taught else report.describe_params(own)


def place_of_plan(assembly: Assembly) -> str:
    """Where a run computes and what it writes to, for the line that says what it will do."""
    devices = assembly.mesh.devices.flat
    return (f"{assembly.dtype} on {len(devices)} x {devices[0].device_kind}, into "
            f"{assembly.config.output}")


def check_job(
    config: TrainConfig, family: Family, shapes: Sequence[EncoderConfig],
    settings: dict[str, Any] | None = None,
) -> Mesh:
    """Check all that can be known before tokenizer and corpus are read.

    Args:
        config: of the job.
        family: of the first teacher or, without one, of the trained model.
        shapes: of the teachers or, without one, of the trained model.
        settings: what a continuation must share, as far as it is known; default: of `config`.

    Raises:
        UserError: about layers, positions, corpus, an earlier run, or devices.
    """
    models = list(shapes)
    if isinstance(config, DistilConfig):
        models.append(student_shape(config, family, shapes[0])[1])
        Objective.of(config, student=models[-1], teachers=shapes)
    if not config.corpus:
        raise UserError("--corpus is missing: give text or JSON-lines files, a datasets name ...")
    positions = min(each.positions for each in models)
    check(config, "sequence_length", config.sequence_length <= positions,
          f"is beyond the model's {positions} positions")
    sources.check([*([] if is_prepared(config.corpus) else config.corpus), *config.valid],
                  config.output)
    store.check_writable(config.output)
    with _errors_about_output(config.output):
        refuse_other_run(config.output, settings or config.meaning())
        if config.finish:
            refuse_to_finish(config.output, config.finish)
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    mesh = make_mesh(config.mesh)
    rows_each(config, mesh)
    return mesh


def check_folder(output: str, made: str, mark: str, inputs: dict[str, str]) -> None:
    """Refuse a folder in which files that are not this job's would be lost.

    Args:
        output: of the job.
        made: the folder or file in it that the job replaces.
        mark: pattern of what lies beside it wherever a run of this job has made it.
        inputs: flag → model that the job reads; none may be what it writes.

    Raises:
        UserError: `made` is not of such a run, or a model would be replaced by its own student.
    """
    for flag, name in inputs.items():
        same = store.join(output, made)
        if name and not store.is_remote(name) and not store.is_remote(output):
            if os.path.realpath(name) in (os.path.realpath(output), os.path.realpath(same)):
                raise UserError(f"{flag} {name} would be written over by --output {output}: name "
                                "another --output")
    target = store.join(output, made)
    if store.exists(target) and not (
            store.is_folder(target) == ("." not in made)
            and store.glob(store.join(output, mark))):
        raise UserError(f"{target} was not made by this command and would be replaced: remove it, "
                        "or name another --output")


def student_shape(
    config: DistilConfig, family: Family, teacher: EncoderConfig
) -> tuple[Family, EncoderConfig]:
    """Family and shape of the student: some layers of the teacher, or the folder that is given.

    Raises:
        UserError: the layers are not there, or the folder's vocabulary is not the teacher's.
    """
    if not config.student:
        layers = student.choose_layers(config.student_layers, teacher.num_hidden_layers)
        return student.student_config(family, teacher, len(layers), config.dropout)
    family, shape = hub.load_shape(config.student)
    if shape.vocab_size != teacher.vocab_size:
        raise UserError(f"--student {config.student} knows {shape.vocab_size} tokens, the teacher "
                        f"{teacher.vocab_size}: both must have one tokenizer")
    return family, dataclasses.replace(
        shape, pooler=False, mlm_head=True, hidden_dropout=config.dropout,
        attention_dropout=config.dropout)


def read_data(
    config: TrainConfig, mesh: Mesh, tokenizer: "transformers.PreTrainedTokenizerFast",
    settings: dict[str, Any],
) -> Setup:
    """Bring the corpus into packed rows, in `config.output`/data.

    Args:
        config: of the job.
        mesh: from check_job.
        tokenizer: of the model.
        settings: what a continuation must share; those of the data are added.
    """
    with (_folder(store.local(config.output)), first_process_first(),
          report.counting("prepare") as progress):
        data = prepare(config, tokenizer, store.join(config.output, "data"), progress)
    print(report.describe_data(data.manifest))
    words = vocabulary(data.train.counts, tokenizer.all_special_ids, tokenizer.mask_token_id)
    return Setup(config, mesh, tokenizer, data, jax.device_put(words, replicated(mesh)),
                 config.updates(len(data.train)), settings | _data_settings(data))


def _data_settings(data: pack.Prepared) -> dict[str, str]:
    """A corpus as a continuation compares it: what came out of it, not where it was read."""
    def outcome(part: pack.PackedRows) -> str:
        return fingerprint(np.frombuffer(json.dumps(part.manifest, sort_keys=True).encode(),
                                         np.uint8))

    return {"--corpus": outcome(data.train), "--valid": outcome(data.valid),
            "tokenizer": data.manifest["request"]["tokenizer"]}


@contextlib.contextmanager
def _errors_about_output(output: str) -> Iterator[None]:
    """Turn what the file system raises into one line that names the flag."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {output} cannot be used: {error.strerror}") from error


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make the folder; take it away again if what follows fails and leaves it empty."""
    new = []
    try:
        with _errors_about_output(str(path)):
            new = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield
    except BaseException:
        for folder in new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        raise
