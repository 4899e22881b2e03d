"""Documents → blocks, and a block → one shard of each part, with its figures.

Where a block ends depends on the documents alone, so the shards are the same bytes whoever writes
them (workers.py), and a block whose figures are there is complete.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from distilbert_jax.config import DataConfig
from distilbert_jax.data import pack, sources, tokenize
from distilbert_jax.machine import store

BLOCK_CHARACTERS = 8_000_000  # a block ends with the document that reaches this
SAMPLE = 60  # characters of a document that is shown


@dataclasses.dataclass(frozen=True)
class Job:
    """All that writing a block depends on, beside the block; a worker process gets it once."""

    folder: pathlib.Path
    tokenizer: tokenize.Spec
    length: int


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive documents of the corpus or of the held-out corpus."""

    number: int
    held_out: float  # share of the documents, chosen by their hash, that belong to "valid"
    documents: list[str]


class Apart:
    """The documents of a corpus, without those that --valid holds too.

    Where they are half of the corpus or more, little would be left: then they come at the end, and
    are trained on after all. `overlap` counts them, `trained_on` says which it was.
    """

    def __init__(self, read: Callable[[], Iterable[str]], valid: Iterable[str]) -> None:
        """`read` gives the documents of the corpus, from the first one at each call."""
        self._read, self._held_out = read, set(map(sources.digest, valid))
        self.overlap, self.trained_on = 0, False

    def __iter__(self) -> Iterator[str]:
        total = 0
        for document in self._read():
            total += 1
            if self._is_held_out(document):
                self.overlap += 1
            else:
                yield document
        self.trained_on = 0 < total <= 2 * self.overlap
        if self.trained_on:
            yield from filter(self._is_held_out, self._read())

    def _is_held_out(self, document: str) -> bool:
        return bool(self._held_out) and sources.digest(document) in self._held_out


def cut(corpus: Iterable[str], valid: Iterable[str], config: DataConfig) -> Iterator[Block]:
    """Cut the corpus, and then the held-out corpus, into blocks; each begins a block of its own."""
    numbers = itertools.count()
    for held_out, documents in ((0.0 if config.valid else config.valid_share, corpus),
                                (1.0, valid)):
        block, characters = [], 0
        for document in documents:
            block.append(document)
            characters += len(document)
            if characters >= BLOCK_CHARACTERS:
                yield Block(next(numbers), held_out, block)
                block, characters = [], 0
        if block:
            yield Block(next(numbers), held_out, block)


class Shards:
    """Writes blocks as shards, with one tokenizer for all of them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encode = tokenize.TextEncoder(job.tokenizer)

    def write(self, block: Block) -> dict[str, Any]:
        """Write the shards of a block and then block-N.json, by which it counts as complete.

        Returns:
            The figures in that file, by part: documents, characters, pieces, tokens, rows, shard,
            and the beginning of a document with an unknown token.
        """
        texts: dict[str, list[str]] = {name: [] for name in pack.PARTS}
        for document in block.documents:
            held_out = sources.is_held_out(document, block.held_out)
            texts["valid" if held_out else "train"].append(document)
        figures = {name: self._write_part(f"{name}-{block.number:05}.npy", texts[name])
                   for name in pack.PARTS}
        write(_figures_path(self._job.folder, block.number), json.dumps(figures))
        return figures

    def _write_part(self, name: str, documents: list[str]) -> dict[str, Any]:
        job = self._job
        ids, sizes = self._encode(documents)
        unknown = np.flatnonzero(ids == job.tokenizer.unk_id) if len(ids) else []
        sample = documents[np.searchsorted(sizes.cumsum(), unknown[0], side="right")][
            :SAMPLE] if len(unknown) else ""
        ids, sizes = tokenize.cut(ids, sizes, job.length, job.tokenizer)
        shard = pack.pack(ids, sizes, job.length, job.tokenizer.pad_id)
        figures = {"documents": len(documents), "characters": sum(map(len, documents)),
                   "pieces": len(sizes), "tokens": len(ids), "rows": len(shard),
                   "sample": sample}
        if not len(shard):
            return figures | {"shard": None}
        write(job.folder / name, shard)
        return figures | {"shard": describe_file(job.folder / name) | {
            "rows": len(shard), "segments": shard["segments"].shape[1]}}


def _figures_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"block-{number:05}.json"


def read_figures(folder: pathlib.Path, number: int) -> dict[str, Any] | None:
    """Read the figures of a block; None where the block is not complete."""
    try:
        return json.loads(_figures_path(folder, number).read_bytes())
    except FileNotFoundError:
        return None


def describe_file(path: pathlib.Path) -> dict[str, str | int]:
    """Name, bytes and SHA-256 of a file, for the manifest."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": pack.sha256(path)}


def write(path: pathlib.Path, content: str | np.ndarray) -> None:
    """Write text or a .npy file, whole or not at all."""
    with store.whole_file(path) as new, new.open("wb") as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            np.save(file, content)
