"""A corpus → a prepared folder: documents are cut into blocks, and each becomes one shard.

Where a block ends depends on the documents alone, so the bytes are the same for any number of
workers or machines, and a preparation that was stopped goes on with the blocks that are missing.
Until it is complete it lives in FOLDER.partial, which holds beside the shards

    request.json      what was asked for
    block-00007.json  written last: the block's shards are complete, and these are their figures
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbert_jax.config import DataConfig
from distilbert_jax.data import pack, sources, tokenize
from distilbert_jax.errors import UserError
from distilbert_jax.machine import store

if TYPE_CHECKING:
    import transformers

BLOCK_CHARACTERS = 8_000_000  # a block ends with the document that reaches this
REQUEST = "request.json"

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is the same for all blocks; a worker is sent it once."""

    folder: pathlib.Path
    tokenizer: tokenize.Spec
    length: int


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive documents."""

    number: int
    held_out: float  # share of the documents, chosen by their hash, that belong to "valid"
    documents: list[str]


def prepare(config: DataConfig, tokenizer: "transformers.PreTrainedTokenizerFast",
            folder: str | pathlib.Path, progress: Progress | None = None,
            part: tuple[int, int] = (0, 1)) -> pack.Prepared | None:
    """Tokenise and pack a corpus into `folder`, or reuse what is there.

    Reused is: `config.corpus` itself where it is a prepared folder, what an equal request left in
    `folder`, and the blocks that such a request had finished when it was stopped.

    Args:
        config: the corpus, its held-out part, and the length of rows.
        tokenizer: see `tokenize.load_tokenizer`.
        folder: where the prepared data belongs; under gs:// it is prepared on this machine, and
            taken there when it is complete.
        progress: called now and then with the documents and tokens so far.
        part: (i, n): do only the blocks k with k % n == i.

    Returns:
        The prepared data; None where blocks of other parts are still missing.

    Raises:
        UserError: a source cannot be read, a part comes out empty, the disk is full, or a folder
            holds something else: other data, data prepared for another request, or damaged data.
    """
    name, folder, spec = folder, store.local(folder), tokenize.spec(tokenizer)
    rows = _rows(config, spec)
    if is_prepared(config.corpus):
        return _reuse(config, rows)
    request = rows | {
        "corpus": sources.describe(config.corpus), "mix": list(config.mix),
        "valid": sources.describe(config.valid) if config.valid else config.valid_share,
        "block_characters": BLOCK_CHARACTERS}
    partial = pathlib.Path(os.path.abspath(folder) + ".partial")
    if store.is_remote(name) and part != (0, 1):
        raise UserError(f"--shard needs a disk that the machines share, which {name} is not")
    with store.errors_about_copy(name):
        if is_there := store.is_remote(name) and pack.is_prepared(name):
            store.fetch(name)
        try:
            if not _holds(folder, request):
                with _begun(partial, request):
                    job = Job(partial, spec, config.sequence_length)
                    if not _fill(job, config, progress, part):
                        return None
                    _complete(partial, folder)
        except OSError as error:
            if not pack.is_prepared(folder):  # else another machine was quicker
                raise UserError(f"{folder} cannot be written: {error.strerror or error}; mend "
                                "that, and the same command goes on") from error
        prepared = pack.load(folder)
    if not is_there:
        store.upload(name)
    return prepared


def is_prepared(corpus: tuple[str, ...]) -> bool:
    """Whether the words of --corpus are one prepared folder.

    Raises:
        UserError: one of several is.
    """
    found = [name for name in corpus if pack.is_prepared(name)]
    if found and len(corpus) > 1:
        raise UserError(f"--corpus {found[0]} is a prepared folder: give it alone, or give the "
                        "texts that it was made from")
    return bool(found)


def _rows(config: DataConfig, spec: tokenize.Spec) -> dict[str, Any]:
    """What rows must have been made for to be of use to a run."""
    return {
        "format": pack.FORMAT,
        "sequence_length": config.sequence_length,
        "tokenizer": spec.fingerprint,
        "masking vocabulary": {
            "size": spec.size, "special": list(spec.special_ids), "cls": spec.cls_id,
            "sep": spec.sep_id, "pad": spec.pad_id, "mask": spec.mask_id}}


def _reuse(config: DataConfig, rows: dict[str, Any]) -> pack.Prepared:
    """The prepared folder that --corpus names."""
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
    """Whether the request was prepared there before; False where nothing is in the way.

    Raises:
        UserError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not pack.is_prepared(folder):
        raise UserError(f"{folder} exists and is not prepared data: name another folder")
    pack.refuse_other(folder, pack.read_manifest(folder)["request"], request,
                      "delete it or name another folder")
    return True


@contextlib.contextmanager
def _begun(partial: pathlib.Path, request: dict[str, Any]) -> Iterator[None]:
    """Make the folder, or go on in it; take it away again if no block gets finished.

    Raises:
        UserError: it holds something else.
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
        _write(path, json.dumps(request))
        yield
    except BaseException:
        if not any(partial.glob("block-*.json")):
            shutil.rmtree(partial, ignore_errors=True)
            for folder in new:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
        raise


def _fill(job: Job, config: DataConfig, progress: Progress | None, part: tuple[int, int]) -> bool:
    """Write the blocks of one part that are missing, and the manifest once all are there."""
    corpus = sources.Documents(config.corpus, config.mix)
    valid = sources.Documents(config.valid)
    counted = collections.Counter[str]()
    blocks = 0

    def missing() -> Iterator[Block]:
        nonlocal blocks
        for block in _blocks(corpus, valid, config):
            blocks += 1
            if block.number % part[1] == part[0]:
                done = _read_block(job.folder, block.number)
                if done is None:
                    yield block
                else:
                    count(done)

    def count(figures: dict[str, Any]) -> None:
        for name in pack.PARTS:
            counted.update({key: figures[name][key] for key in ("documents", "tokens")})
        if progress:
            progress(counted["documents"], counted["tokens"])

    for figures in _each(job, missing(), config.workers or _cores()):
        count(figures)
    taken = zip((*config.corpus, *config.valid), corpus.taken + valid.taken, strict=True)
    return _write_manifest(job, config, blocks, list(taken))


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _blocks(corpus: Iterable[str], valid: Iterable[str], config: DataConfig) -> Iterator[Block]:
    """Cut the corpus, then the held-out corpus."""
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
    """Turns blocks into shards."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encode = tokenize.Encoder(job.tokenizer)

    def write(self, block: Block) -> dict[str, Any]:
        """Write the shards of a block, then its figures, which are returned."""
        texts: dict[str, list[str]] = {name: [] for name in pack.PARTS}
        for document in block.documents:
            held_out = sources.is_held_out(document, block.held_out)
            texts["valid" if held_out else "train"].append(document)
        figures = {name: self._write_part(f"{name}-{block.number:05}.npy", texts[name])
                   for name in pack.PARTS}
        _write(_block_path(self._job.folder, block.number), json.dumps(figures))
        return figures

    def _write_part(self, name: str, documents: list[str]) -> dict[str, Any]:
        job = self._job
        ids, sizes = tokenize.cut(*self._encode(documents), job.length, job.tokenizer)
        shard = pack.pack(ids, sizes, job.length, job.tokenizer.pad_id)
        figures = {"documents": len(documents), "characters": sum(map(len, documents)),
                   "pieces": len(sizes), "tokens": len(ids), "rows": len(shard)}
        if not len(shard):
            return figures | {"shard": None}
        _write(job.folder / name, shard)
        return figures | {"shard": _file(job.folder / name) | {
            "rows": len(shard), "segments": shard["segments"].shape[1]}}


def _each(job: Job, blocks: Iterable[Block], workers: int) -> Iterator[dict[str, Any]]:
    """Write every block; figures come in the order in which blocks are finished.

    A single block is written here, several by processes; twice as many blocks as processes are
    held in memory.
    """
    blocks = iter(blocks)
    first = list(itertools.islice(blocks, 2))
    if len(first) < 2 or workers == 1:
        shards = Shards(job)
        yield from map(shards.write, itertools.chain(first, blocks))
        return
    with _Workers(job) as pool, concurrent.futures.ThreadPoolExecutor(workers) as threads:
        try:
            waiting: set[concurrent.futures.Future[dict[str, Any]]] = set()
            for block in itertools.chain(first, blocks):
                waiting.add(threads.submit(pool.write, block))
                if len(waiting) == 2 * workers:
                    done, waiting = concurrent.futures.wait(
                        waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in concurrent.futures.as_completed(waiting))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            pool.kill()
            raise


class _Workers:
    """One process for each thread that writes a block, started when the thread first does.

    `multiprocessing` would import the program that was started, JAX included, again in each.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._own = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.wait()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def write(self, block: Block) -> dict[str, Any]:
        """Have a block written by the process of this thread."""
        try:
            if not hasattr(self._own, "process"):
                self._own.process = self._start()
            _send(self._own.process.stdin, block)
            answer = pickle.load(self._own.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"a process that prepares data ended (code {self._own.process.wait()}): out of "
                "memory? give fewer --workers; the same command goes on") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> "subprocess.Popen[bytes]":
        package = str(pathlib.Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        alone = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from distilbert_jax.data import prepare\n"
             "prepare.serve()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | alone | {"PYTHONPATH": path}, start_new_session=True)
        self._processes.append(process)
        _send(process.stdin, self._job)
        return process


def serve() -> None:
    """A worker: takes a job and then blocks from the standard input until it ends."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    shards = Shards(pickle.load(sys.stdin.buffer))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            block = pickle.load(sys.stdin.buffer)
            try:
                answer: Any = shards.write(block)
            except OSError as error:
                answer = error
            _send(answers, answer)


def _send(stream: Any, value: Any) -> None:
    pickle.dump(value, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()


def _write_manifest(job: Job, config: DataConfig, blocks: int,
                    taken: list[tuple[str, int]]) -> bool:
    """Bring the figures of all blocks together; False where some blocks are missing.

    `taken` are the words of the corpora, and the documents from each.

    Raises:
        UserError: a part is empty.
    """
    found = [_read_block(job.folder, number) for number in range(blocks)]
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
    _write(job.folder / "counts.npy", counts)
    manifest = {"request": json.loads((job.folder / REQUEST).read_bytes()), "documents": taken,
                "counts": _file(job.folder / "counts.npy"), **parts}
    _write(job.folder / pack.MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return True


def _sum(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """One part of all blocks, together."""
    total = {key: sum(block[key] for block in blocks) for key in (
        "documents", "characters", "pieces", "tokens", "rows")}
    return total | {"unknown": 0, "shards": [b["shard"] for b in blocks if b["shard"]]}


def _empty(part: str, config: DataConfig) -> str:
    corpus = " ".join(config.corpus)
    if config.valid:
        return f"no text in {corpus if part == 'train' else ' '.join(config.valid)}"
    if part == "train":
        return f"no text in {corpus} beside the held-out share of {config.valid_share}"
    return (f"no document of {corpus} fell into the held-out share of {config.valid_share}: give "
            "--valid or a larger --valid-share")


def _count(job: Job, part: dict[str, Any]) -> np.ndarray:
    """Occurrences of each id, padding left out: int64 [V]."""
    counts = np.zeros(job.tokenizer.size, np.int64)
    for shard in part["shards"]:
        rows = np.load(job.folder / shard["file"])["row"]
        counts += np.bincount(rows.ravel(), minlength=len(counts))
    counts[job.tokenizer.pad_id] -= part["rows"] * job.length - part["tokens"]
    return counts


def _complete(partial: pathlib.Path, folder: pathlib.Path) -> None:
    """Give the folder its name, then remove what nobody needs any more."""
    if folder.exists():  # and empty
        folder.rmdir()
    partial.rename(folder)
    for path in (*folder.glob("block-*.json"), *folder.glob("*.tmp-*"), folder / REQUEST):
        path.unlink(missing_ok=True)


def _block_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"block-{number:05}.json"


def _read_block(folder: pathlib.Path, number: int) -> dict[str, Any] | None:
    """Figures of a block; None where it is not finished."""
    try:
        return json.loads(_block_path(folder, number).read_bytes())
    except FileNotFoundError:
        return None


def _file(path: pathlib.Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": pack.sha256(path)}


def _write(path: pathlib.Path, content: str | np.ndarray) -> None:
    """Write a file that is whole or absent, whoever else writes it and whenever this is killed."""
    new = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    with new.open("wb") as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            np.save(file, content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
