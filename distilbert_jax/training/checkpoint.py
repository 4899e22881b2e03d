"""Orbax save and restore of a run, sealed with checksums.

OUTPUT/checkpoints/STEP holds the TrainState as Orbax wrote it, and

    run.json     the settings that give the run its meaning, and the held-out figures at this step
    sha256.json  size and SHA-256 of every other file

Orbax writes into STEP.new; the folder gets these two files, in this order, and its name last, and
only then are older ones removed. So whatever the moment of a crash, a folder without its seal is
never taken for sound, and neither is one of which a bit has changed (Orbax alone restores that
silently).

Under gs:// nothing can be renamed. There Orbax writes into STEP itself, and the seal alone, written
last and removed first, makes a checkpoint of it.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
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
from distilbert_jax.machine import store
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.store import AnyPath
from distilbert_jax.machine.trees import path_name
from distilbert_jax.training.train_step import TrainState

RUN, SEAL = "run.json", "sha256.json"
BEST = "mlm_loss"  # the held-out figure whose lowest value is kept


class Checkpoints:
    """The checkpoints of one run, in `OUTPUT/checkpoints`; use it in a `with` block.

    Saving is asynchronous; leaving the block waits for the last save. With several processes all
    of them call the same methods, and share the folder.
    """

    def __init__(self, output: str | Path, settings: Mapping[str, Any], keep: int = 2,
                 on_save_error: str = "stop"):
        """Open or make the folder.

        Args:
            output: of the run; may be a name under gs://.
            settings: what may not change between a run and its continuation: name → JSON.
            keep: how many of the newest are kept; the best by held-out loss is, too.
            on_save_error: "stop" raises a UserError, "continue" prints it.

        Raises:
            UserError: the folder cannot be made.
        """
        self._remote = store.is_remote(output)
        self._folder = store.path(output) / "checkpoints"
        if not self._remote:
            self._folder = self._folder.absolute()
        self._settings = json.loads(json.dumps(settings))
        self._keep, self._on_save_error = keep, on_save_error
        self._saving: tuple[int, threading.Thread] | None = None
        self._error: Exception | None = None
        try:
            if not self._remote:
                self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self._folder} cannot be used: {error.strerror}") from error
        logging.getLogger("absl").setLevel("CRITICAL")  # Orbax's tracebacks; one line is ours
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
            self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """The updates that are saved, oldest first."""
        return sorted(_folders(self._folder))

    def save(self, state: TrainState, figures: Mapping[str, float] | None = None) -> None:
        """Start to save `state` under its step, unless that step is saved already.

        Args:
            state: on its mesh; it may be donated as soon as this returns.
            figures: held-out ones of this state; without them it is no candidate for the best.

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
        """Wait until the save that was started is sealed.

        Raises:
            UserError: it failed (with on_save_error "stop").
        """
        if self._saving is None:
            return
        (step, thread), self._saving = self._saving, None
        thread.join()
        error, self._error = self._error, None
        if error is not None:
            self._unsaved(step, error)

    def poll(self) -> None:
        """Like `wait`, but only if there is nothing to wait for."""
        if self._saving is not None and not self._saving[1].is_alive():
            self.wait()

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest sound state, laid out as the ShapeDtypeStructs of `like`.

        Every checkpoint is verified; one that is not sound is named and, when there is a sound
        one, removed.

        Returns:
            None where nothing was saved yet.

        Raises:
            UserError: there are checkpoints, but none is sound; the newest sound one was made
                with other settings, or does not fit `like`.
        """
        step = self._newest_sound()
        if step is None:
            return None
        folder = self._folder / str(step)
        _refuse(self._folder.parent, _run(folder).get("settings", {}), self._settings)
        try:
            return TrainState(**self._orbax.restore(folder, _fields(like)))
        except Exception as error:
            raise UserError(f"checkpoint {folder} cannot be read ({_reason(error)}); remove that "
                            "folder to go on from an older one") from error

    def _newest_sound(self) -> int | None:
        """The same answer in every process; the first one looks."""
        try:
            with store.told(self._folder):
                step, fault = self._verified() if jax.process_index() == 0 else (0, "")
        except OSError as error:
            raise UserError(f"{self._folder} cannot be used: {error.strerror}") from error
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step == -1:
            raise _none_sound(self._folder, fault)
        return step or None

    def _verified(self) -> tuple[int, str]:
        """Remove what is half-written or damaged.

        Returns:
            The newest sound update, 0 without any checkpoint, -1 (and the reason) without a sound
            one.
        """
        for path in _left_over(self._folder):
            _delete(path)
        folders = _folders(self._folder)
        faults = {step: fault for step, path in folders.items() if (fault := find_fault(path))}
        if not folders.keys() - faults.keys():
            newest = f" ({folders[max(faults)]}: {faults[max(faults)]})" if faults else ""
            return (-1 if faults else 0), newest
        newest = max(folders.keys() - faults.keys())
        for step, fault in sorted(faults.items()):
            back = f"; going back to update {newest}" if step > newest else ""
            say(f"checkpoint {folders[step]} is not sound: {fault}{back}")
            _remove(folders[step])
        return newest, ""

    def _finish(self, step: int, new: AnyPath, figures: dict[str, float]) -> None:
        """Wait for Orbax, then seal and name the folder; runs in a thread of its own."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                _write(new / RUN, {"settings": self._settings, "figures": figures})
                for name in _files(new):
                    _sync(new / name)
                _write(new / SEAL, {name: _digest(new / name) for name in _files(new)})
                if not self._remote:
                    new.rename(self._folder / str(step))
                    _sync(self._folder)
                self._prune()
        except Exception as error:
            self._error = error

    def _prune(self) -> None:
        """Remove all but the newest and the best."""
        folders = _folders(self._folder)
        losses = {step: _run(path).get("figures", {}).get(BEST) for step, path in folders.items()}
        ranked = sorted((loss, step) for step, loss in losses.items()
                        if loss is not None and math.isfinite(loss))
        kept = {*sorted(folders)[-self._keep:], *[step for _, step in ranked[:1]]}
        for step in folders.keys() - kept:
            _remove(folders[step])

    def _unsaved(self, step: int, error: Exception) -> None:
        """Say that a save failed; nothing half-written stays."""
        if jax.process_index() == 0:
            with contextlib.suppress(UserError), store.told(self._folder):
                for path in _left_over(self._folder, step):
                    _delete(path)
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


def find_fault(folder: AnyPath) -> str:
    """What is wrong with the files of a checkpoint, in a few words; "" if it is sound."""
    try:
        sealed = json.loads((folder / SEAL).read_bytes())
        sealed = {name: (size, sha256) for name, (size, sha256) in sealed.items()}
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if store.is_remote(folder) and isinstance(error, OSError):
            raise  # of the network: it says nothing about the checkpoint
        return f"{SEAL} is damaged"
    found = set(_files(folder))
    for name in sorted(found | sealed.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in sealed:
            return f"{name} does not belong to it"
        try:
            size, sha256 = _digest(folder / name)
        except OSError as error:
            if store.is_remote(folder):
                raise
            return f"{name} cannot be read ({error.strerror})"
        if size != sealed[name][0]:
            return f"{name} has {size} bytes, not {sealed[name][0]}"
        if sha256 != sealed[name][1]:
            return f"{name} is damaged (its SHA-256 differs)"
    return ""


def refuse_other_run(output: str | Path, settings: Mapping[str, Any]) -> None:
    """Check, without reading much, that `output` holds no other run.

    Args:
        output: of the run.
        settings: those that are known so far.

    Raises:
        UserError: its newest checkpoint was made with other settings, each of which is named with
            both values; or none of its checkpoints can be trusted.
    """
    place = store.path(output) / "checkpoints"
    folders = [path for _, path in sorted(_folders(place).items(), reverse=True)]
    for folder in folders:
        if before := _run(folder):
            _refuse(output, before.get("settings", {}), json.loads(json.dumps(settings)))
            return
    if folders:
        raise _none_sound(place, f" ({folders[0]}: {find_fault(folders[0])})")


def _none_sound(folder: AnyPath, fault: str) -> UserError:
    return UserError(f"no checkpoint in {folder} is sound{fault}: put back a copy, or remove that "
                     "folder to train from the beginning")


def _refuse(output: str | AnyPath, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [f"{name} was {_short(before.get(name))}, is {_short(value)}"
               for name, value in sorted(now.items()) if before.get(name) != value]
    if changed:
        raise UserError(f"{output} holds the checkpoints of another run ({'; '.join(changed)}); "
                        "choose another --output, or remove it")


def _short(value: Any) -> str:
    """As it is, but the first twelve digits of a SHA-256."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{52}$", r"\1…", str(value))


def fingerprint(tree: Any) -> str:
    """SHA-256 of the names, types, shapes and values of host arrays, wherever they are stored."""
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.ascontiguousarray(leaf)
        whole.update(f"{path_name(path)} {leaf.dtype} {leaf.shape}\n".encode())
        whole.update(leaf.reshape(-1).view(np.uint8))
    return whole.hexdigest()


def abstract(state: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `state` with `shardings`, for restoring onto any mesh."""
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding), state, shardings)


def _fields(state: TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}


def _folders(folder: AnyPath) -> dict[int, AnyPath]:
    """Update → folder of its checkpoint, sound or not."""
    if store.is_remote(folder):
        with store.told(folder):
            sealed = [name.split("/")[0] for name in store.files(folder)
                      if re.fullmatch(rf"[1-9]\d*/{SEAL}", name)]
        return {int(name): folder / name for name in sealed}
    if not folder.is_dir():
        return {}
    return {int(path.name): path for path in folder.iterdir()
            if re.fullmatch(r"[1-9]\d*", path.name) and path.is_dir()}


def _left_over(folder: AnyPath, step: int | None = None) -> list[AnyPath]:
    """What a save or removal that was cut short left behind: of one update, or of any."""
    number = r"\d+" if step is None else str(step)
    if not store.is_remote(folder):
        return [path for path in folder.iterdir()
                if re.fullmatch(rf"{number}\.(new|old).*", path.name)]
    found = {name.split("/")[0] for name in store.files(folder)}
    return [folder / name for name in found - {str(step) for step in _folders(folder)}
            if re.fullmatch(number, name)]


def _files(folder: AnyPath) -> list[str]:
    """All files of a checkpoint but its seal."""
    return [name for name in store.files(folder) if name != SEAL]


def _run(folder: AnyPath) -> dict[str, Any]:
    """The run.json of a checkpoint; {} if it is not as it was sealed."""
    try:
        text = (folder / RUN).read_bytes()
        _, sealed = json.loads((folder / SEAL).read_bytes())[RUN]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if store.is_remote(folder) and type(error) is OSError:
            raise
        return {}
    return json.loads(text) if hashlib.sha256(text).hexdigest() == sealed else {}


def _digest(path: AnyPath) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256


def _sync(path: AnyPath) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if store.is_remote(path):
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _write(path: AnyPath, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all; without a newline, so that its last byte counts too."""
    if store.is_remote(path):
        path.write_text(json.dumps(content, indent=1))
        return
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=1))
    _sync(new)
    new.rename(path)
    _sync(path.parent)


def _remove(folder: AnyPath) -> None:
    """Delete a checkpoint; cut short, it leaves nothing that looks like one."""
    if store.is_remote(folder):
        store.remove(folder, SEAL)
        return
    old = folder.with_name(folder.name + ".old")
    folder.rename(old)
    _delete(old)


def _delete(folder: AnyPath) -> None:
    """Delete what is no checkpoint."""
    if store.is_remote(folder):
        store.remove(folder, SEAL)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(error: Exception) -> str:
    """What the system said, or else the first line of what a library raised, within reason."""
    if found := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore's
        return os.strerror(int(found[1]))
    return getattr(error, "strerror", None) or first_line(error)
