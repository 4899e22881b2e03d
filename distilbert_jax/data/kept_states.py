"""Packed rows, and what a teacher shows of them, from the disk → batches that need no teacher.

Beside batches.py: each row has a few maskings, which are used in turn, one in each epoch. Of 3 rows
with 2 maskings the files hold, one after the other,

    number    0      1      2      3      4      5
    masking   0      0      0      1      1      1
    row       0      1      2      0      1      2
"""

import dataclasses
from pathlib import Path

import numpy as np

from distilbert_jax.data.batches import PackedBatches


@dataclasses.dataclass(frozen=True)
class KeptStates:
    """A teacher's last states of packed rows, in files of unsigned integers that hold the bits."""

    files: tuple[Path, ...]
    each: int  # numbers in a file
    rows: int  # of the corpus
    maskings: int  # of each row
    dtype: np.dtype  # of the states

    def masking(self, epochs: np.ndarray) -> np.ndarray:
        """Which masking is used in these epochs."""
        return epochs % self.maskings

    def read(self, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The states of some rows in some epochs, [B] each: [B, S, D]."""
        numbers = self.masking(epochs).astype(np.int64) * self.rows + rows
        return np.stack([
            np.load(self.files[number // self.each], mmap_mode="r")[number % self.each]
            for number in numbers]).view(self.dtype)


@dataclasses.dataclass(frozen=True)
class TaughtBatches(PackedBatches):
    """Batches of packed rows that bring what the teacher showed of them."""

    states: KeptStates

    def read(self, step: int, own: np.ndarray) -> dict[str, np.ndarray]:
        """As of PackedBatches, and `masking` [B] and `teacher_states` [B, S, D]."""
        batch = super().read(step, own)
        return batch | {"masking": self.states.masking(batch["epoch"]),
                        "teacher_states": self.states.read(batch["row"], batch["epoch"])}
