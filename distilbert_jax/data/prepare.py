"""A corpus → a prepared folder, or the reuse of one that an equal request left.

Blocks of documents (blocks.py) are written as shards by several processes (workers.py). The bytes
are the same for any number of workers or machines, and a preparation that was stopped goes on with
the blocks that are missing. Until all are there the folder is FOLDER.partial, which also holds

    request.json      what was asked for
    block-00007.json  the figures of a block's shards, written after them
"""

import collections
import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbert_jax.config import DataConfig
from distilbert_jax.data import blocks, pack, sources, tokenize, workers
from distilbert_jax.errors import UserError
from distilbert_jax.machine import store

if TYPE_CHECKING:
    import transformers

REQUEST = "request.json"
NAMES = {"train": "training", "valid": "held-out"}

Progress = Callable[[int, int], None]


def prepare(config: DataConfig, tokenizer: "transformers.PreTrainedTokenizerFast",
            folder: str | pathlib.Path, progress: Progress | None = None,
            part: tuple[int, int] = (0, 1)) -> pack.Prepared | None:
    """Tokenise and pack a corpus into `folder`, or reuse what is there.

    What is reused: `config.corpus` itself where it is a prepared folder, what an equal request left
    in `folder`, and the blocks that such a request had finished when it was stopped.

    Args:
        config: the corpus, its held-out part, and the length of rows.
        tokenizer: see `tokenize.load_tokenizer`.
        folder: where the prepared data belongs; under gs:// it is prepared on this machine, and
            uploaded when it is complete.
        progress: called after each block with the documents and tokens so far.
        part: (i, n): write only the blocks k with k % n == i.

    Returns:
        The prepared data; None where blocks of other parts are still missing.

    Raises:
        UserError: a source cannot be read, a part comes out empty, the disk is full, or a folder
            holds something else: other data, data prepared for another request, or damaged data.
    """
    if not is_prepared(config.corpus):
        sources.check([*config.corpus, *config.valid], str(folder))
    name, folder, spec = folder, store.local(folder), tokenize.spec(tokenizer)
    rows = _rows(config, spec)
    if is_prepared(config.corpus):
        return _reuse(config, rows)
    request = rows | {
        "corpus": sources.describe(config.corpus), "mix": list(config.mix),
        "valid": sources.describe(config.valid) if config.valid else config.valid_share,
        "block_characters": blocks.BLOCK_CHARACTERS, "text field": config.text_field or None}
    partial = pathlib.Path(os.path.abspath(folder) + ".partial")
    if store.is_remote(name) and part != (0, 1):
        raise UserError(f"--shard needs a disk that the machines share, which {name} is not")
    with store.errors_about_copy(name):
        if is_there := store.is_remote(name) and pack.has_manifest(name):
            store.fetch(name)
        try:
            if not _holds(folder, request):
                with _begun(partial, request):
                    job = blocks.Job(partial, spec, config.sequence_length)
                    if not _fill(job, config, progress, part):
                        return None
                    _complete(partial, folder)
        except OSError as error:
            if not pack.has_manifest(folder):  # else another machine was quicker
                raise UserError(f"{folder} cannot be written: {error.strerror or error}; mend "
                                "that, and the same command goes on") from error
        prepared = pack.load(folder)
    if not is_there:
        store.upload(name)
    return prepared


def is_prepared(corpus: tuple[str, ...]) -> bool:
    """Whether --corpus names one prepared folder, rather than texts.

    Raises:
        UserError: it names a prepared folder among others.
    """
    found = [name for name in corpus if pack.has_manifest(name)]
    if found and len(corpus) > 1:
        raise UserError(f"--corpus {found[0]} is a prepared folder: give it alone, or give the "
                        "texts that it was made from")
    return bool(found)


def _rows(config: DataConfig, spec: tokenize.Spec) -> dict[str, Any]:
    """The part of a request that decides whether a run can use the rows, wherever they are from."""
    return {
        "format": pack.FORMAT,
        "sequence_length": config.sequence_length,
        "tokenizer": spec.fingerprint,
        "masking vocabulary": {
            "size": spec.size, "special": list(spec.special_ids), "cls": spec.cls_id,
            "sep": spec.sep_id, "pad": spec.pad_id, "mask": spec.mask_id}}


def _reuse(config: DataConfig, rows: dict[str, Any]) -> pack.Prepared:
    """Load the prepared folder that --corpus names, after checking that it suits this run."""
    corpus = config.corpus[0]
    for name in ("valid", "mix"):
        if getattr(config, name):
            raise UserError(f"--{name} does not go with --corpus {corpus}, which is prepared and "
                            "has its held-out part: leave it out")
    with store.errors_about_copy(corpus):
        folder = store.fetch(corpus)
        pack.refuse_other(folder, pack.read_manifest(folder)["request"], rows,
                          "prepare it again for this run")
        return pack.load(folder)


def _holds(folder: pathlib.Path, request: dict[str, Any]) -> bool:
    """Whether a folder holds what an equal request left; False if it is empty or absent.

    Raises:
        UserError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not pack.has_manifest(folder):
        raise UserError(f"{folder} exists and is not prepared data: name another folder")
    pack.refuse_other(folder, pack.read_manifest(folder)["request"], request,
                      "delete it or name another folder")
    return True


@contextlib.contextmanager
def _begun(partial: pathlib.Path, request: dict[str, Any]) -> Iterator[None]:
    """Make the partial folder or go on in it; remove it on an error if no block was finished.

    Raises:
        UserError: the folder holds something else.
    """
    path = partial / REQUEST
    if path.is_file():
        pack.refuse_other(partial, json.loads(path.read_bytes()), request,
                          "it is unfinished; delete it or name another folder")
    elif partial.exists() and any(
            not found.name.startswith(REQUEST) for found in partial.iterdir()):
        raise UserError(f"{partial} exists and is no unfinished preparation: remove it")
    new = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        blocks.write(path, json.dumps(request))
        yield
    except BaseException:
        if not any(partial.glob("block-*.json")):
            shutil.rmtree(partial, ignore_errors=True)
            for folder in new:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
        raise


def _fill(job: blocks.Job, config: DataConfig, progress: Progress | None,
          part: tuple[int, int]) -> bool:
    """Write the missing blocks of one part; with all parts there, write the manifest too.

    Returns:
        Whether all are there.
    """
    corpora: list[sources.Documents] = []

    def read() -> sources.Documents:
        corpora.append(sources.Documents(config.corpus, config.mix, config.text_field))
        return corpora[-1]

    valid = sources.Documents(config.valid, field=config.text_field)
    apart = blocks.Apart(read, sources.Documents(config.valid, field=config.text_field))
    counted = collections.Counter[str]()
    total = 0

    def missing() -> Iterator[blocks.Block]:
        nonlocal total
        for block in blocks.cut(apart, valid, config):
            total += 1
            if block.number % part[1] == part[0]:
                done = blocks.read_figures(job.folder, block.number)
                if done is None:
                    yield block
                else:
                    count(done)

    def count(figures: dict[str, Any]) -> None:
        for name in pack.PARTS:
            counted.update({key: figures[name][key] for key in ("documents", "tokens")})
        if progress:
            progress(counted["documents"], counted["tokens"])

    for figures in workers.write_blocks(job, missing(), config.workers):
        count(figures)
    words, corpus = (*config.corpus, *config.valid), corpora[0]
    return _write_manifest(job, config, total, {
        "documents": list(zip(words, corpus.taken + valid.taken, strict=True)),
        "skipped": list(zip(words, corpus.skipped + valid.skipped, strict=True)),
        "overlap": apart.overlap, "overlap_trained_on": apart.trained_on})


def _write_manifest(job: blocks.Job, config: DataConfig, total: int,
                    read: dict[str, Any]) -> bool:
    """Sum up the figures of all blocks, and write them as manifest.json.

    Args:
        job: tokenizer, row length and folder.
        config: the corpus, for messages.
        total: how many blocks there must be.
        read: for each word of --corpus and --valid its documents, and the records skipped for
            lack of the field; and how many documents --valid has too, and what became of them.

    Returns:
        False, with nothing written, where some blocks are missing.

    Raises:
        UserError: a part is empty, or holds nothing but unknown tokens.
    """
    found = [blocks.read_figures(job.folder, number) for number in range(total)]
    if None in found:
        return False
    parts = {name: _sum([figures[name] for figures in found]) for name in pack.PARTS}
    for name, part in parts.items():
        if not part["rows"]:
            shutil.rmtree(job.folder)
            raise UserError(_empty(name, config))
    counts = np.stack([_count(job, part) for part in parts.values()])  # [2, V]
    if job.tokenizer.unk_id is not None:
        for part, own in zip(parts.values(), counts, strict=True):
            part["unknown"] = int(own[job.tokenizer.unk_id])
    for name, part in parts.items():
        if part["unknown"] and part["unknown"] == part["tokens"] - 2 * part["pieces"]:
            shutil.rmtree(job.folder)
            raise UserError(f"all {part['unknown']:,} tokens of the {NAMES[name]} documents are "
                            f"unknown to the tokenizer, e.g. of {part['sample']!r}: it was made "
                            "for other text")
    blocks.write(job.folder / "counts.npy", counts)
    manifest = {"request": json.loads((job.folder / REQUEST).read_bytes()), **read,
                "counts": blocks.describe_file(job.folder / "counts.npy"), **parts}
    blocks.write(job.folder / pack.MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return True


def _sum(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the figures of one part over all blocks, and list its shards."""
    total = {key: sum(block[key] for block in figures) for key in (
        "documents", "characters", "pieces", "tokens", "rows")}
    samples = list(filter(None, (block.get("sample") for block in figures)))
    return total | {"unknown": 0, "sample": (samples or [""])[0],
                    "shards": [b["shard"] for b in figures if b["shard"]]}


def _empty(part: str, config: DataConfig) -> str:
    """The message for a part without rows: which texts gave none, and the way out."""
    corpus = " ".join(config.corpus)
    if config.valid:
        return f"no text in {corpus if part == 'train' else ' '.join(config.valid)}"
    if part == "train":
        return f"no text in {corpus} beside the held-out share of {config.valid_share}"
    return (f"no document of {corpus} fell into the held-out share of {config.valid_share}: give "
            "--valid or a larger --valid-share")


def _count(job: blocks.Job, part: dict[str, Any]) -> np.ndarray:
    """Count each token id in the shards of a part, without padding: int64 [V]."""
    counts = np.zeros(job.tokenizer.size, np.int64)
    for shard in part["shards"]:
        rows = np.load(job.folder / shard["file"])["row"]
        counts += np.bincount(rows.ravel(), minlength=len(counts))
    counts[job.tokenizer.pad_id] -= part["rows"] * job.length - part["tokens"]
    return counts


def _complete(partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Rename the partial folder, then remove the files that only an unfinished one needs."""
    if folder.exists():  # and empty
        folder.rmdir()
    partial.rename(folder)
    for pattern in ("block-*.json", f"*{store.UNFINISHED}*", REQUEST):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
