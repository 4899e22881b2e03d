"""Rows on disk → the batch of a given step: a pure function of (seed, step).

The fourth step of the walk; a resumed run needs to know nothing but its step.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from distilbert_jax.data.pack import PackedRows


def row_indices(seed: int, step: int, batch_size: int, num_rows: int) -> np.ndarray:
    """The rows of one batch.

    Over the steps, the batches are an endless run of epochs, each a fresh permutation of all
    rows; a batch may span two epochs or more, and nothing is dropped.

    Args:
        seed: of the order, not negative.
        step: updates done before this one, from 0.
        batch_size: rows in a batch, B.
        num_rows: rows there are.

    Returns:
        int64 [B], each in [0, num_rows).
    """
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // num_rows, (last - 1) // num_rows + 1):
        start = epoch * num_rows
        order = _permutation(seed, epoch, num_rows)
        parts.append(order[max(first - start, 0):last - start])
    return np.concatenate(parts)


def row_epochs(step: int, batch_size: int, num_rows: int) -> np.ndarray:
    """The epoch, from 0, of each row that `row_indices` gives for this step: int64 [B]."""
    return np.arange(step * batch_size, (step + 1) * batch_size) // num_rows


@functools.lru_cache(maxsize=2)  # the epochs on both sides of a batch
def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def tokens_before(seed: int, step: int, batch_size: int, packed: PackedRows) -> int:
    """Real tokens in all batches before `step`: whole epochs, and the rows of the one begun."""
    epochs, begun = divmod(step * batch_size, len(packed))
    begun_rows = np.sort(_permutation(seed, epochs, len(packed))[:begun])
    return epochs * int(packed.counts.sum()) + int(packed.segments[begun_rows].sum())


def read(
    packed: PackedRows, indices: np.ndarray, epochs: np.ndarray | int = 0
) -> dict[str, np.ndarray]:
    """Gather rows as a batch.

    Args:
        packed: rows [R, T] with the lengths of their segments [R, S].
        indices: which rows, [B].
        epochs: in which epoch, [B] or the same for all.

    Returns:
        int32 [B, T] each: `input_ids`; `segment_ids`, 1, 2, … and 0 on padding; `position_ids`,
        from 0 in each segment and 0 on padding. int32 [B]: `row` and `epoch`, from which the
        random draws for a row are made.
    """
    input_ids = packed.rows[indices].astype(np.int32)  # [B, T]
    lengths = packed.segments[indices].astype(np.int32)  # [B, S]
    ends = lengths.cumsum(axis=1)
    row, segment = np.nonzero(lengths)
    starts = (ends - lengths)[row, segment]
    column = np.arange(input_ids.shape[1], dtype=np.int32)  # [T]
    real = column < ends[:, -1:]  # [B, T]

    begins = np.zeros_like(input_ids)
    begins[row, starts] = 1
    first = np.zeros_like(input_ids)
    first[row, starts] = starts
    first = np.maximum.accumulate(first, axis=1)  # where the segment of each token begins
    return {"row": np.asarray(indices, np.int32),
            "epoch": np.broadcast_to(np.asarray(epochs, np.int32), np.shape(indices)),
            "input_ids": input_ids,
            "segment_ids": begins.cumsum(axis=1, dtype=np.int32) * real,
            "position_ids": (column - first) * real}


@runtime_checkable
class Batches(Protocol):
    """The batch of each step, each a pure function of its number."""

    def size(self, step: int) -> int:
        """Rows of the batch of a step."""

    def read(self, step: int, own: np.ndarray) -> dict[str, np.ndarray]:
        """Some rows of it, those numbered `own`."""

    def tokens_before(self, step: int) -> int:
        """Real tokens in all batches before it."""

    def names(self, step: int) -> np.ndarray:
        """Numbers of the rows or examples that the batch is made of, for messages."""


@dataclasses.dataclass(frozen=True)
class PackedBatches:
    """Batches of packed rows, in an order of their own in every epoch."""

    rows: PackedRows
    seed: int
    batch_size: int

    def size(self, step: int) -> int:
        """Rows of a batch: always the same number."""
        return self.batch_size

    def read(self, step: int, own: np.ndarray) -> dict[str, np.ndarray]:
        """The rows numbered `own` of the batch of a step."""
        epochs = row_epochs(step, self.batch_size, len(self.rows))
        return read(self.rows, self.names(step)[own], epochs[own])

    def tokens_before(self, step: int) -> int:
        """Real tokens in all batches before a step."""
        return tokens_before(self.seed, step, self.batch_size, self.rows)

    def names(self, step: int) -> np.ndarray:
        """The rows of the batch of a step."""
        return row_indices(self.seed, step, self.batch_size, len(self.rows))


class Prefetch:
    """The batches of some steps, in order, made by a thread while the steps before them run.

    Use it in a `with` block; leaving it drops what was made ahead. What the thread raises is
    raised where the batch is taken.
    """

    READY = 2  # batches made ahead

    def __init__(self, make: Callable[[int], Any], steps: Iterable[int]) -> None:
        """`make` gives the batch of a step."""
        self._make, self._steps = make, iter(steps)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._ahead: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        self._waited, self._since = 0.0, time.monotonic()

    def __enter__(self) -> "Prefetch":
        self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._ahead:
            raise StopIteration
        began = time.monotonic()
        batch = self._ahead.popleft().result()
        self._waited += time.monotonic() - began
        self._fill()
        return batch

    def waiting(self) -> float:
        """Share of the time since the last call, or the beginning, spent waiting for a batch."""
        now = time.monotonic()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return share

    def _fill(self) -> None:
        while len(self._ahead) < self.READY:
            step = next(self._steps, None)
            if step is None:
                return
            self._ahead.append(self._thread.submit(self._make, step))
