"""Orbax save and restore of a run: the TrainState, and the settings that give it its meaning."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from distilbert_jax.config import UserError, flag
from distilbert_jax.train_step import TrainState

KEPT = 2  # checkpoints


class Checkpoints:
    """The checkpoints of one run, in `OUTPUT/checkpoints`; use it in a `with` block.

    Saving is asynchronous; leaving the block waits for the last save, without which Orbax loses
    it silently.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]):
        """`settings` are the fields that may not change between a run and its continuation."""
        self._settings = json.loads(json.dumps(settings))
        self._manager = ocp.CheckpointManager(
            (output / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Start to save `state` under its step, unless that step is saved already."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(_fields(state)),
                settings=ocp.args.JsonSave(self._settings)))

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state, laid out as the ShapeDtypeStructs of `like`; None at the beginning.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_fields(like))))
        except Exception as error:  # Orbax and tensorstore have many; the folder is the remedy
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"checkpoint {self._manager.directory / str(step)} cannot be read "
                            f"({reason}); remove that folder to go on from an older one") from error
        return TrainState(**read.state)


def refuse_other_run(output: Path, settings: Mapping[str, Any]) -> None:
    """Check that `output` holds no other run.

    Raises:
        UserError: its newest checkpoint was made with other settings, each of which is named with
            both values; or it cannot be read.
    """
    saved = sorted((output / "checkpoints").glob("*/settings/metadata"), key=lambda p: int(
        p.parent.parent.name) if p.parent.parent.name.isdigit() else -1)
    if not saved:
        return
    try:
        before, now = json.loads(saved[-1].read_text()), json.loads(json.dumps(settings))
    except ValueError as error:
        raise UserError(f"{saved[-1]} is damaged ({error}); remove {saved[-1].parents[1]} to go on "
                        "from an older checkpoint") from error
    changed = [f"{flag(name)} was {before.get(name)}, is {now.get(name)}"
               for name in sorted(before | now) if before.get(name) != now.get(name)]
    if changed:
        raise UserError(f"{output} holds the checkpoints of another run ({'; '.join(changed)}); "
                        "choose another --output, or remove it")


def _fields(state: TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def abstract(state: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `state` with `shardings`, for restoring onto any mesh."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding), state, shardings)
