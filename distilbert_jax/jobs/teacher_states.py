"""A teacher's last states of all training rows, computed before the training and kept on disk.

Each row is masked in a few ways that are drawn once, as a run with the teacher in its updates masks
it in its first epochs; so far both runs are the same. Later epochs use these maskings in turn.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from distilbert_jax.config import DistilConfig
from distilbert_jax.data.batches import read
from distilbert_jax.data.kept_states import KeptStates, TaughtBatches
from distilbert_jax.errors import Interrupted, UserError
from distilbert_jax.jobs.kept_parts import KeptParts
from distilbert_jax.jobs.setup import Setup
from distilbert_jax.jobs.task_model import read_json
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.processes import StopSignal
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.sharding import (
    first_process_first,
    local_rows,
    place,
    place_rows,
    replicated,
    to_host,
)
from distilbert_jax.training.assemble import Assembly
from distilbert_jax.training.losses import LOSSES

PART_BYTES = 2**26  # of a file, at most, if a row is not larger
NAME = "states.json"  # in OUTPUT: what was measured of them


class TeacherStates:
    """What is kept of a teacher for a run, and how it is computed."""

    def __init__(self, setup: Setup, assembly: Assembly, teachers: dict[str, Any]):
        """`teachers` are on the mesh, whole."""
        self.setup, self.assembly, self.teachers = setup, assembly, teachers
        config = self.config
        self.rows, self.maskings = len(setup.data.train), config.kept_maskings
        shape = assembly.states_like(
            teachers, setup.vocabulary, read(setup.data.train, np.zeros(1, int)))
        self.dtype, self.row_bytes = np.dtype(shape.dtype), math.prod(shape.shape) * (
            shape.dtype.itemsize)
        # A power of two, as batches are: of them the last one in a file is then full, too.
        each = 2 ** int(math.log2(max(1, PART_BYTES // self.row_bytes)))
        masking = dataclasses.asdict(config.masking)
        request = {
            "teacher": setup.settings["--teacher"], "tokenizer": setup.settings["tokenizer"],
            "corpus": setup.settings["--corpus"], "seed": config.seed,
            "number of maskings": self.maskings, "mask rate": masking.pop("rate"),
            "recipe of maskings": masking, "precision of products": str(assembly.dtype),
            "precision": str(self.dtype), "positions of a row": shape.shape[1]}
        folder = store.local(config.states or store.join(config.output, "states"))
        self.parts = KeptParts(folder, request, self.rows * self.maskings, each, "states",
                               "--states")
        self.path = store.path(store.join(config.output, NAME))
        self._key = place(jax.random.key(config.seed), replicated(assembly.mesh))
        self._step = jax.jit(assembly.states_step)

    @property
    def config(self) -> DistilConfig:
        """Of the job."""
        return self.setup.config

    @property
    def bytes(self) -> int:
        """Of all states."""
        return self.parts.count * self.row_bytes

    @property
    def bytes_per_token(self) -> float:
        """Of a real token in one masking."""
        return self.rows * self.row_bytes / int(self.setup.data.train.counts.sum())

    def batches(self, params: dict[str, Any]) -> TaughtBatches:
        """The batches of the run, once the states that are not there yet are computed.

        Args:
            params: of the student at its start, on the host, to measure errors with.

        Raises:
            UserError: the folder holds something else, is damaged, or its disk has not the room.
            Interrupted: a signal came; whole parts stay.
        """
        self._announce()
        with StopSignal(self.assembly.mesh) as stop:
            self.parts.complete(lambda numbers: self._part(numbers, stop.asked), "teacher", " rows")
        kept = KeptStates(tuple(self.parts.files), self.parts.each, self.rows, self.maskings,
                          self.dtype)
        self._check(kept)
        batches = TaughtBatches(self.setup.data.train, self.config.seed, self.config.batch_size,
                                kept)
        if "errors" not in self.measured():
            self._note({"errors": self._errors(batches, params)})
        say(self.describe())
        return batches

    def finished(self) -> bool:
        """Whether all updates are done, so that no state is needed any more."""
        last = store.join(self.config.output, "checkpoints", str(self.setup.steps))
        return not seal.find_fault(store.path(last))

    def measured(self) -> dict[str, Any]:
        """What OUTPUT/states.json says of these states; {} if nothing."""
        found = read_json(self.path)
        return found if found.get("request") == self.parts.request else {}

    def describe(self) -> str:
        """What is kept and what was measured, for the report."""
        found = self.measured()
        seconds = found.get("seconds", 0.0)
        errors = ", ".join(f"{name} {error:.2g}" for name, error in found.get("errors", {}).items())
        return (f"Teacher states of {self.maskings} masking(s) of each row, kept in {self.dtype}: "
                f"{self.bytes_per_token:.0f} bytes a token, {_gigabytes(self.bytes)}"
                + (f", computed in {seconds / 60:.1f} min" if seconds else "")
                + ". Error against the live teacher, relative, on the rows of the first update: "
                f"{errors}.")

    def figures(self) -> dict[str, Any]:
        """What was measured of the states, for report.json."""
        found = self.measured()
        return {"maskings": self.maskings, "precision": str(self.dtype), "bytes": self.bytes,
                "bytes_per_token": self.bytes_per_token, "seconds": found.get("seconds", 0.0),
                "errors": found.get("errors", {})}

    def _announce(self) -> None:
        """Say how much room the states take; raise a UserError if there is not so much."""
        there, files = self.parts.there(), len(self.parts.files)
        passes = self.setup.steps * self.config.batch_size / self.rows
        say(f"teacher states: {self.maskings} masking(s) of {self.rows:,} rows in {self.dtype}, "
            f"{self.bytes_per_token:.0f} bytes a token, {_gigabytes(self.bytes)} in "
            f"{self.parts.folder}, of which {there} of {files} parts are there; each is used "
            f"{passes / self.maskings:.1f} times")
        needed = (files - there) * self.parts.each * self.row_bytes
        free = shutil.disk_usage(_existing(self.parts.folder)).free
        if min(needed, self.bytes) > free:
            raise UserError(f"--kept-maskings {self.maskings} needs {_gigabytes(needed)} in "
                            f"{self.parts.folder}, where {_gigabytes(free)} are free: name a "
                            "folder on another disk by --states")

    def _part(self, numbers: range, stopped: Callable[[], bool]) -> np.ndarray:
        """The states of a part [n, S, D] as they are kept; their seconds are noted."""
        if stopped():
            raise Interrupted(f"stopped before state {numbers.start:,} of {self.parts.count:,} of "
                              "the teacher; the same command goes on from there")
        began = time.monotonic()
        found = self._states(np.array(numbers)).astype(self.dtype)
        self._note({"seconds": self.measured().get("seconds", 0.0) + time.monotonic() - began})
        return found.view(f"u{self.dtype.itemsize}")

    def _states(self, numbers: np.ndarray) -> np.ndarray:
        """The teacher's states [n, S, D], as it gives them; in micro-batches of the training."""
        mesh, size = self.assembly.mesh, self.config.batch_size // self.config.accumulate
        own, found = local_rows(mesh, size), []
        for first in range(0, len(numbers), size):
            # What the last batch lacks is its last row, again.
            masking, row = np.divmod(numbers[np.minimum(first + own, len(numbers) - 1)], self.rows)
            batch = place_rows(read(self.setup.data.train, row, masking), mesh, size)
            found.append(self._step(self.teachers, self.setup.vocabulary, self._key, batch))
        return np.concatenate([to_host(x) for x in found])[:len(numbers)]

    def _check(self, kept: KeptStates) -> None:
        """Raise a UserError for a file whose array is not the one that is needed."""
        for part, path in enumerate(kept.files):
            needed = len(self.parts.numbers(part)) * self.row_bytes
            try:
                found = np.load(path, mmap_mode="r").nbytes
            except (OSError, ValueError, EOFError) as error:
                raise self.parts.damaged(f"{path.name}: {error}") from error
            if found != needed:
                raise self.parts.damaged(f"{path.name} holds {found} bytes, needed are {needed}")

    def _errors(self, batches: TaughtBatches, params: dict[str, Any]) -> dict[str, float]:
        """How far the losses and the gradient of the first update are from those with the teacher.

        Returns:
            Name of each loss → |kept - live| / |live|; `gradient` → ‖kept - live‖ / ‖live‖.
        """
        mesh, size, assembly = self.assembly.mesh, batches.size(0), self.assembly
        own = local_rows(mesh, size)
        given = batches.read(0, own)
        # In the update they are cast to the dtype of the products; here, so that one is compiled.
        given |= {"teacher_states": given["teacher_states"].astype(assembly.dtype)}
        live = given | {"teacher_states": self._states(batches.names(0))[own]}
        trained = {"student": params, "projections": assembly.projections}
        trained, gradients = assembly.place(trained), jax.jit(assembly.gradients)
        ((_, kept), one), ((_, true), other) = (
            gradients(trained, self._key, assembly.taught(self.teachers), self.setup.vocabulary,
                      place_rows(batch, mesh, size)) for batch in (given, live))
        apart = jax.jit(lambda one, other: optax.tree.norm(optax.tree.sub(one, other))
                        / optax.tree.norm(other))(one, other)
        return {name: abs(float(kept[name]) - float(value)) / max(abs(float(value)), 1e-30)
                for name, value in true.items() if LOSSES[name].needs != "labels"} | {
                    "gradient": float(apart)}

    def _note(self, measured: dict[str, Any]) -> None:
        """Add to OUTPUT/states.json."""
        found = self.measured() | {"request": self.parts.request} | measured
        with first_process_first():
            if jax.process_index() == 0:
                with store.errors_about(self.path):
                    seal.write_json(self.path, found)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
