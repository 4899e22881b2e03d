"""What takes long to compute, computed once: arrays in a folder, part by part, sealed in the end.

A job says what they depend on and how a part is computed; stopped, the same command goes on after
the last whole part. What is there is used for the same request alone, and only undamaged.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from distilbert_jax.errors import UserError
from distilbert_jax.jobs.task_model import read_json
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.progress import bar
from distilbert_jax.machine.sharding import first_process_first


@dataclasses.dataclass(frozen=True)
class KeptParts:
    """A folder of `count` things in files of `each`."""

    folder: Path
    request: dict[str, Any]  # what they depend on
    count: int
    each: int
    what: str  # they are, for messages: vectors
    flag: str  # that names another folder

    @property
    def files(self) -> list[Path]:
        """One for each part, in order."""
        return [self.folder / f"{i:05d}.npy" for i in range(math.ceil(self.count / self.each))]

    def numbers(self, part: int) -> range:
        """The things that a part holds."""
        return range(part * self.each, min(self.count, (part + 1) * self.each))

    def there(self) -> int:
        """How many parts are there.

        Raises:
            UserError: the folder holds something else, or not every process sees the same files.
        """
        self._check()
        there = sum(path.exists() for path in self.files)
        if jax.process_count() > 1:
            seen = multihost_utils.process_allgather(np.int32(there))
            if len(set(seen.tolist())) > 1:
                raise UserError(f"{self.folder} is not the same for all processes: name a folder "
                                f"on a disk that they share by {self.flag}")
        return there

    def complete(self, compute: Callable[[range], np.ndarray], desc: str, unit: str) -> None:
        """Compute the parts that are not there yet, seal the folder, and check it.

        Args:
            compute: numbers of things → an array of them, as it is kept; called by all processes.
            desc, unit: of the progress bar.

        Raises:
            UserError: as of `there`, or the folder is damaged or cannot be written.
        """
        there, sealed = self.there(), (self.folder / seal.SEAL).exists()
        if not sealed:
            with bar(total=self.count, desc=desc, unit=unit, delay=2, leave=False,
                     initial=min(there * self.each, self.count)) as progress:
                for part, path in enumerate(self.files):
                    if not path.exists():
                        self._write(path, compute(self.numbers(part)))
                        self.there()  # by every process, before more is computed in vain
                        progress.update(len(self.numbers(part)))
            with first_process_first():
                if jax.process_index() == 0:
                    seal.seal(self.folder)
        if fault := seal.find_fault(self.folder):
            raise self.damaged(fault)

    def damaged(self, fault: str) -> UserError:
        """The error to raise for what is wrong with the folder."""
        return UserError(f"{self.folder} is damaged ({fault}): remove it, and the teacher is asked "
                         "again")

    def _check(self) -> None:
        """Raise a UserError if there is something else in the folder."""
        if not self.folder.exists():
            return
        before = read_json(self.folder / "request.json")
        if not before:
            raise UserError(f"{self.folder} was not made by this command, or its request.json is "
                            f"damaged: remove it, or name another folder by {self.flag}")
        other = [name + _both(before.get(name), now) for name, now in self.request.items()
                 if now != before.get(name)]
        if other:
            raise UserError(f"{self.folder} holds {self.what} for another {', '.join(other)}: "
                            f"remove it, or name another folder by {self.flag}")

    def _write(self, path: Path, part: np.ndarray) -> None:
        with first_process_first():
            if jax.process_index() == 0:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    seal.write_json(path.parent / "request.json", self.request)
                    with store.whole_file(path) as new, open(new, "wb") as file:
                        np.save(file, part)
                except OSError as error:
                    raise UserError(f"{self.folder} cannot be written ({error.strerror}); when "
                                    "there is room, the same command goes on") from error


def _both(before: Any, now: Any) -> str:
    """Both values of a setting that a person can read; nothing of a digest."""
    short = all(isinstance(x, int | float) or (isinstance(x, str) and len(x) < 20)
                for x in (before, now))
    return f" ({before}, now {now})" if short else ""
