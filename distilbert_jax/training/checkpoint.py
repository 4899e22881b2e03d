"""A TrainState → a sealed folder that Orbax wrote, and back: the newest that is sound.

OUTPUT/checkpoints/STEP holds the state as Orbax wrote it, and

    run.json     the settings that give the run its meaning, and the held-out figures at this step
    sha256.json  the seal: size and SHA-256 of every other file (machine/seal.py)

Orbax writes into STEP.new; then run.json and the seal are written, the folder is renamed to STEP,
and only after that are older ones removed. So whenever a run is killed, what is not complete is
never taken for sound, and neither is a folder of which a bit has changed (Orbax alone restores that
silently).

Under gs:// no folder can be renamed. There Orbax writes into STEP itself, and only the seal, which
is written last and removed first, makes a checkpoint of it.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from distilbert_jax.errors import UserError, first_line
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.store import AnyPath
from distilbert_jax.training.train_step import TrainState

RUN = "run.json"
BEST = ("mlm_loss", "loss")  # the held-out figure whose lowest value is kept: what there is


class Checkpoints:
    """The checkpoints of one run, in `OUTPUT/checkpoints`; use it in a `with` block.

    Saving is asynchronous; leaving the block waits for the last save. With several processes all
    of them call these methods in the same order, and share the folder.
    """

    def __init__(self, output: str | Path, settings: Mapping[str, Any], keep: int = 2,
                 on_save_error: str = "stop"):
        """Open or make the folder.

        Args:
            output: the run's folder; may be a name under gs://.
            settings: what may not change between a run and its continuation: name → JSON.
            keep: how many of the newest are kept, beside the one with the lowest held-out loss.
            on_save_error: "stop" raises a UserError where a save fails, "continue" prints it.

        Raises:
            UserError: the folder cannot be made.
        """
        self._remote = store.is_remote(output)
        self._folder = store.path(output) / "checkpoints"
        if not self._remote:
            self._folder = self._folder.absolute()
        self._settings = json.loads(json.dumps(settings))
        self._keep, self._on_save_error = keep, on_save_error
        self.newest = 0  # update of the newest sound one, as far as this process knows; 0: none
        self._saving: tuple[int, threading.Thread] | None = None
        self._error: Exception | None = None
        try:
            if not self._remote:
                self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._folder} cannot be used: {error.strerror}") from error
        logging.getLogger("absl").setLevel("CRITICAL")  # Orbax logs tracebacks; we raise one line
        self._orbax = ocp.StandardCheckpointer()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.wait()
        except UserError as unsaved:
            if error is None:
                raise
            say(str(unsaved))  # the first error is the one to end with
        finally:
            if isinstance(error, KeyboardInterrupt):
                error.add_note(f"the same command goes on from update {self.newest}" if self.newest
                               else "no update is saved: the same command trains from the first")
            self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """The updates that are saved, oldest first."""
        return sorted(_folders(self._folder))

    def save(self, state: TrainState, figures: Mapping[str, float] | None = None) -> None:
        """Start to save `state` under its step, unless that step is saved already.

        Args:
            state: laid out on its mesh; it may be donated as soon as this returns.
            figures: of this state on the held-out part; without them it is never the best.

        Raises:
            UserError: this save, or the one before, failed (with on_save_error "stop").
        """
        self.wait()
        step = int(state.step)
        new = self._folder / (str(step) if self._remote else f"{step}.new")
        try:
            if step in self.steps:
                return
            self._orbax.save(new, _fields(state), force=not self._remote)
        except Exception as error:  # Orbax and tensorstore have many
            self._unsaved(step, error)
            return
        thread = threading.Thread(target=self._finish, args=(step, new, dict(figures or {})))
        self._saving = step, thread
        thread.start()

    def wait(self) -> None:
        """Wait until the last save, if one was started, is sealed.

        Raises:
            UserError: the save failed (with on_save_error "stop").
        """
        if self._saving is None:
            return
        (step, thread), self._saving = self._saving, None
        thread.join()
        error, self._error = self._error, None
        if error is not None:
            self._unsaved(step, error)

    def poll(self) -> None:
        """Report a save that has ended, as `wait` does, without waiting for one that has not."""
        if self._saving is not None and not self._saving[1].is_alive():
            self.wait()

    def restore(self, like: TrainState, best: bool = False) -> TrainState | None:
        """Read the newest sound checkpoint, or the best.

        Every checkpoint is verified. A damaged one is reported and, if another is sound, removed.

        Args:
            like: ShapeDtypeStructs with shardings; see `abstract`.
            best: read the one with the lowest held-out loss instead.

        Returns:
            The state, laid out as `like`; None where nothing was saved yet.

        Raises:
            UserError: there are checkpoints, but none is sound, or none has the figures that say
                which is best; the one that is read was made with other settings, or its arrays are
                not those of `like`.
        """
        step = self._newest_sound()
        if step is None:
            return None
        self.newest = step
        if best:
            step = _best(_folders(self._folder))  # all of them are sound now
            if step is None:
                raise _none_judged(self._folder)
        folder = self._folder / str(step)
        _refuse(self._folder.parent, seal.read_json(folder, RUN).get("settings", {}),
                self._settings)
        try:
            return TrainState(**self._orbax.restore(folder, _fields(like)))
        except Exception as error:
            raise UserError(f"checkpoint {folder} cannot be read ({_reason(error)}); remove that "
                            "folder to go on from an older one") from error

    def _newest_sound(self) -> int | None:
        """The newest sound update, verified by the first process and sent to all; None for none."""
        try:
            with store.errors_about(self._folder):
                step, fault = self._verified() if jax.process_index() == 0 else (0, "")
        except OSError as error:
            raise UserError(f"{self._folder} cannot be used: {error.strerror}") from error
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step == -1:
            raise _none_sound(self._folder, fault)
        return step or None

    def _verified(self) -> tuple[int, str]:
        """Verify all checkpoints, and remove what is half-written or damaged.

        Returns:
            The newest sound update and "". If none is sound, nothing that was complete is removed:
            0 and "" without any checkpoint, otherwise -1 and what is wrong with the newest.
        """
        for path in _left_over(self._folder):
            seal.delete(path)
        folders = _folders(self._folder)
        faults = {step: fault for step, path in folders.items() if (fault := seal.find_fault(path))}
        if not folders.keys() - faults.keys():
            newest = f" ({folders[max(faults)]}: {faults[max(faults)]})" if faults else ""
            return (-1 if faults else 0), newest
        newest = max(folders.keys() - faults.keys())
        for step, fault in sorted(faults.items()):
            back = f"; going back to update {newest}" if step > newest else ""
            say(f"checkpoint {folders[step]} is not sound: {fault}{back}")
            seal.remove(folders[step])
        return newest, ""

    def _finish(self, step: int, new: AnyPath, figures: dict[str, float]) -> None:
        """Wait for Orbax, then seal and rename the folder; runs in a thread of its own."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                seal.write_json(new / RUN, {"settings": self._settings, "figures": figures})
                seal.seal(new)
                if not self._remote:
                    new.rename(self._folder / str(step))
                    store.sync(self._folder)
                self._prune()
            self.newest = step
        except Exception as error:
            self._error = error

    def _prune(self) -> None:
        """Remove all but the newest and the best."""
        folders = _folders(self._folder)
        kept = {*sorted(folders)[-self._keep:], _best(folders)}
        for step in folders.keys() - kept:
            seal.remove(folders[step])

    def _unsaved(self, step: int, error: Exception) -> None:
        """Remove what a failed save has written, and raise or print one line about it."""
        if jax.process_index() == 0:
            with contextlib.suppress(UserError), store.errors_about(self._folder):
                for path in _left_over(self._folder, step):
                    seal.delete(path)
        try:
            last = f"update {self.steps[-1]} is the last saved"
        except IndexError:
            last = "nothing is saved"
        except UserError:  # of the network, again
            last = "nor can be seen what is saved"
        text = f"update {step} cannot be saved in {self._folder} ({_reason(error)}); {last}"
        if self._on_save_error == "stop":
            raise UserError(f"{text}; when there is room, the same command goes on") from error
        say(f"{text}; going on without")


def refuse_other_run(output: str | Path, settings: Mapping[str, Any]) -> None:
    """Check, by reading run.json alone, that `output` holds no other run's checkpoints.

    Args:
        output: the run's folder.
        settings: those that are known so far, name → JSON.

    Raises:
        UserError: the newest checkpoint was made with other settings, which are listed with both
            values; or none of the checkpoints can be trusted.
    """
    parent = store.path(output) / "checkpoints"
    folders = [path for _, path in sorted(_folders(parent).items(), reverse=True)]
    for folder in folders:
        if before := seal.read_json(folder, RUN):
            known = {name: before.get("settings", {}).get(name) for name in settings}
            _refuse(output, known, json.loads(json.dumps(settings)))
            return
    if folders:
        raise _none_sound(parent, f" ({folders[0]}: {seal.find_fault(folders[0])})")


def refuse_to_finish(output: str | Path, which: str) -> None:
    """Check that `output` holds a checkpoint that a run can be finished from.

    Args:
        output: the run's folder.
        which: "last" or "best".

    Raises:
        UserError: there is no checkpoint, or none has the figures that say which is best.
    """
    parent = store.path(output) / "checkpoints"
    folders = _folders(parent)
    if not folders:
        raise UserError(f"--finish {which}: there is no checkpoint in {parent}; leave it out to "
                        "train")
    if which == "best" and _best(folders) is None:
        raise _none_judged(parent)


def _best(folders: Mapping[int, AnyPath]) -> int | None:
    """The update with the lowest held-out loss; None where none has a finite one."""
    found = {step: seal.read_json(path, RUN).get("figures", {}) for step, path in folders.items()}
    losses = {step: next((figures[name] for name in BEST if name in figures), math.nan)
              for step, figures in found.items()}
    return min((step for step, loss in losses.items() if math.isfinite(loss)),
               key=lambda step: (losses[step], step), default=None)


def _none_judged(folder: AnyPath) -> UserError:
    return UserError(f"--finish best: no checkpoint in {folder} has held-out figures (one that a "
                     "signal saved has none); give --finish last")


def _none_sound(folder: AnyPath, fault: str) -> UserError:
    return UserError(f"no checkpoint in {folder} is sound{fault}: put back a copy, or remove that "
                     "folder to train from the beginning")


def _refuse(output: str | AnyPath, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if names := changed(before, now):
        values = [f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}"
                  for name in names]
        raise UserError(f"{output} holds the checkpoints of another run ({'; '.join(values)}); "
                        "choose another --output, or remove it")


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of settings that are not as they were, or are no longer there, sorted."""
    return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def _short(value: Any) -> str:
    """A setting as text; of each SHA-256 the first twelve digits."""
    if value in (None, "", []):
        return "none"
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", str(value))


def abstract(state: TrainState, shardings: TrainState) -> TrainState:
    """Describe a state for `Checkpoints.restore`: ShapeDtypeStructs with shardings of any mesh."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding), state, shardings)


def _fields(state: TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _folders(folder: AnyPath) -> dict[int, AnyPath]:
    """The folder of each checkpoint, sound or not, by its update."""
    if store.is_remote(folder):
        with store.errors_about(folder):
            sealed = [name.split("/")[0] for name in store.files(folder)
                      if re.fullmatch(rf"[1-9]\d*/{seal.SEAL}", name)]
        return {int(name): folder / name for name in sealed}
    if not folder.is_dir():
        return {}
    return {int(path.name): path for path in folder.iterdir()
            if re.fullmatch(r"[1-9]\d*", path.name) and path.is_dir()}


def _left_over(folder: AnyPath, step: int | None = None) -> list[AnyPath]:
    """Folders that an unfinished save or removal left behind: of one update, or of any."""
    number = r"\d+" if step is None else str(step)
    if not store.is_remote(folder):
        return [path for path in folder.iterdir()
                if re.fullmatch(rf"{number}\.(new|old).*", path.name)]
    found = {name.split("/")[0] for name in store.files(folder)}
    return [folder / name for name in found - {str(step) for step in _folders(folder)}
            if re.fullmatch(number, name)]


def _reason(error: Exception) -> str:
    """The system's words for an error, or else the first line of what a library raised."""
    if found := re.search(r"os_error_code='(\d+)'", str(error)):  # in tensorstore's message
        return os.strerror(int(found[1]))
    return getattr(error, "strerror", None) or first_line(error)
