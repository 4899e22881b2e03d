"""Pieces of token ids → rows of one length, and the files that hold them.

The third step of the walk. A prepared folder holds two parts, "train" and "valid":

    train-00007.npy   one shard: for each of its rows "row", T token ids in the smallest unsigned
                      type, padded with the tokenizer's pad id, and "segments", the lengths of its
                      pieces as uint16, filled up with 0
    counts.npy        [2, V] int64, occurrences of each token in train and in valid
    manifest.json     what was asked for ("request"), what came out, and every file's SHA-256
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from distilbert_jax.errors import UserError
from distilbert_jax.machine import store

FORMAT = 2  # raise it when the files change their meaning
PARTS = ("train", "valid")
MANIFEST = "manifest.json"
OPEN_SHARDS = 256  # mapped at once; each takes an open file


def best_fit(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose a row for each piece, by best-fit decreasing.

    Each piece, longest first, goes to the row with the least room that still holds it. Rows are
    kept by their free room, and one integer has a bit set for each room that exists, so a piece
    costs a few operations however many rows are open.

    Args:
        sizes: tokens of each piece [P], at least 1.
        length: tokens in a row, T.

    Returns:
        The row of each piece, from 0, and where in the row it begins: int64 [P] each.

    Raises:
        ValueError: a piece is longer than a row.
    """
    if len(sizes) and sizes.max() > length:
        raise ValueError(f"a piece of {sizes.max()} tokens does not fit a row of {length}")
    row_of, begin = np.empty((2, len(sizes)), np.int64)
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit n is set where with_room[n] is not empty
    rows = 0
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row, rows = length, rows, rows + 1
        row_of[piece], begin[piece] = row, length - room
        with_room[room - size].append(row)
        rooms |= 1 << room - size
    return row_of, begin


def pack(ids: np.ndarray, sizes: np.ndarray, length: int, pad_id: int) -> np.ndarray:
    """Fill rows with whole pieces.

    Args:
        ids: the pieces, one after the other, unsigned [N].
        sizes: tokens of each piece [P].
        length: tokens in a row, T.
        pad_id: what rows are filled up with.

    Returns:
        The shard: [R] of "row", T ids, and "segments", as many lengths as the fullest row has.
    """
    row_of, begin = best_fit(sizes, length)
    count = int(row_of.max(initial=-1)) + 1
    order = np.lexsort((begin, row_of))  # pieces as they stand in the rows
    each = np.bincount(row_of, minlength=count)  # pieces of each row
    column = np.arange(len(order)) - np.repeat(each.cumsum() - each, each)

    shard = np.zeros(count, [("row", ids.dtype, length),
                             ("segments", np.uint16, int(each.max(initial=1)))])
    shard["segments"][row_of[order], column] = sizes[order]
    rows = np.full(count * length, pad_id, ids.dtype)
    shift = row_of * length + begin - (sizes.cumsum() - sizes)  # from `ids` to `rows`
    rows[np.repeat(shift, sizes) + np.arange(len(ids))] = ids
    shard["row"] = rows.reshape(count, length)
    return shard


@functools.lru_cache(OPEN_SHARDS)
def _shard(path: pathlib.Path, digest: str) -> np.ndarray:
    """Map a shard into memory; `digest` keeps the cache from answering with an older file."""
    return np.load(path, mmap_mode="r")


class Column:
    """One field of many shards as one array [R, W], read from disk by row number."""

    def __init__(self, folder: pathlib.Path, shards: Sequence[dict[str, Any]], field: str,
                 width: int, dtype: np.dtype) -> None:
        """Open a column.

        Args:
            folder: of the shards.
            shards: their entries in the manifest.
            field: "row" or "segments".
            width: numbers in a row, W; shards with fewer are filled up with 0.
            dtype: of the numbers.
        """
        self._files = [(folder / shard["file"], shard["sha256"]) for shard in shards]
        self._ends = np.cumsum([shard["rows"] for shard in shards])
        self._field = field
        self.shape, self.dtype = (int(self._ends[-1]), width), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: int | np.ndarray) -> np.ndarray:
        """Rows by number: [W] of one, [..., W] of an array of them."""
        flat = np.ravel(indices)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"row {flat.min()} or {flat.max()} of {len(self)}")
        found = np.zeros((len(flat), self.shape[1]), self.dtype)
        which = np.searchsorted(self._ends, flat, side="right")
        for number in np.unique(which):
            here = np.flatnonzero(which == number)
            shard = _shard(*self._files[number])[self._field]
            rows = flat[here] - (self._ends[number] - len(shard))
            found[here, :shard.shape[1]] = shard[rows]
        return found.reshape(*np.shape(indices), self.shape[1])


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """One part of a prepared folder, "train" or "valid"."""

    rows: Column | np.ndarray  # [R, T] unsigned
    segments: Column | np.ndarray  # [R, S] uint16
    counts: np.ndarray  # [V] int64
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """How many rows there are, R."""
        return len(self.rows)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Both parts of a prepared folder, and its manifest."""

    train: PackedRows
    valid: PackedRows
    manifest: dict[str, Any]

    @property
    def words(self) -> list[str]:
        """The words of --corpus and --valid that it was prepared from."""
        return [word for word, _ in self.manifest["documents"]]


def load(folder: str | pathlib.Path, verify: bool = True) -> Prepared:
    """Open a prepared folder; rows are read from disk when they are asked for.

    Args:
        folder: see the head of this file.
        verify: read every file once and compare its SHA-256; sizes are compared in any case.

    Raises:
        UserError: it is no prepared folder, or damaged; the message names the file.
    """
    folder = pathlib.Path(folder)
    manifest = read_manifest(folder)
    try:
        files = [manifest["counts"], *(shard for part in PARTS for shard in
                                       manifest[part]["shards"])]
        _check_files(folder, files, verify)
        counts = np.load(folder / manifest["counts"]["file"])
        parts = [_part(folder, manifest[part], manifest["request"]["sequence_length"], own)
                 for part, own in zip(PARTS, counts, strict=True)]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise _damaged(folder / MANIFEST, f"{type(error).__name__}: {error}") from error
    return Prepared(*parts, manifest)


def _part(folder: pathlib.Path, manifest: dict[str, Any], length: int, counts: np.ndarray
          ) -> PackedRows:
    shards = manifest["shards"]
    rows = sum(shard["rows"] for shard in shards)
    if (rows, counts.sum()) != (manifest["rows"], manifest["tokens"]):
        raise ValueError("rows or tokens do not add up")
    dtype = np.min_scalar_type(len(counts) - 1)
    return PackedRows(
        Column(folder, shards, "row", length, dtype),
        Column(folder, shards, "segments", max(shard["segments"] for shard in shards),
               np.dtype(np.uint16)),
        counts, manifest)


def _check_files(folder: pathlib.Path, files: Sequence[dict[str, Any]], verify: bool) -> None:
    for file in files:
        path = folder / file["file"]
        size = path.stat().st_size if path.is_file() else 0
        if size != file["bytes"]:
            raise _damaged(path, f"{size} bytes, not {file['bytes']}")
    if verify:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            digests = pool.map(lambda file: sha256(folder / file["file"]), files)
            for file, digest in zip(files, digests, strict=True):
                if digest != file["sha256"]:
                    raise _damaged(folder / file["file"], "its SHA-256 is not the manifest's")


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_manifest(folder: str | pathlib.Path) -> bool:
    """Whether a folder, also under gs://, claims to be prepared data."""
    return store.exists(store.join(folder, MANIFEST))


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Read the manifest of a prepared folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"no prepared data in {folder}: {MANIFEST}: {error.strerror}") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("request"), dict):
        raise _damaged(path, "it holds no request")
    return manifest


def refuse_other(folder: pathlib.Path, found: dict[str, Any], wanted: dict[str, Any],
                 way_out: str) -> None:
    """Raise a UserError where the request found in a folder is not what is wanted."""
    differ = []
    for name, now in wanted.items():
        before = found.get(name)
        if before != now:
            short = isinstance(before, int | float) and isinstance(now, int | float)
            differ.append(f"{name} ({before}, now {now})" if short else name)
    if differ:
        raise UserError(f"{folder} was prepared with another {', '.join(differ)}: {way_out}")


def _damaged(path: pathlib.Path, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}): delete {path.parent} and prepare it again")
