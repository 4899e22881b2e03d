"""Where text comes from: the words of --corpus and --valid → documents, one string each.

The first step of the walk. A word is a path, a glob, `hf:NAME[:CONFIG]`, `tfds:NAME` or
`python-docs`; SOURCES says how each kind is read. Libraries are imported only where one is used.
"""

import codecs
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, BinaryIO

from distilbert_jax.data.python_docs import python_docs
from distilbert_jax.errors import UserError, choose, first_line
from distilbert_jax.machine import store

ENDS = 65536  # bytes at either end of a file that identify it, beside its name and size
PARQUET_ROWS = 1024  # records decoded at once


class Documents:
    """All documents of a corpus, in order; iterate it once.

    They are stripped of surrounding white space, and empty ones are skipped. A text file holds one
    document a line; a JSON-lines file (.jsonl, .json), a parquet file or a dataset one a record,
    under the key "text" or its only key whose value is a string. Text and JSON lines whose names
    end in .gz or .zst are unpacked. Of several corpora one follows the other or, with weights,
    each document comes from the corpus that is furthest behind its share, until that one is used
    up.
    """

    def __init__(self, names: Sequence[str], mix: Sequence[float] = ()) -> None:
        """Look for the sources, without reading them.

        Args:
            names: the words of --corpus.
            mix: a weight for each of them, or none.

        Raises:
            UserError: at once, for a source that does not exist; while iterating, for one that
                cannot be read: not UTF-8, bad JSON, damaged compression, no text column, a
                library or a hub missing.
        """
        self._texts = [_texts(_resolve(name)) for name in names]
        self._mix = [weight / sum(mix) for weight in mix]
        self.taken = [0] * len(names)  # documents, of each word so far

    def __iter__(self) -> Iterator[str]:
        return self._mixed() if self._mix else self._one_by_one()

    def _one_by_one(self) -> Iterator[str]:
        for number, texts in enumerate(self._texts):
            for text in texts:
                self.taken[number] += 1
                yield text

    def _mixed(self) -> Iterator[str]:
        for drawn in itertools.count(1):
            behind = [share * drawn - taken
                      for share, taken in zip(self._mix, self.taken, strict=True)]
            number = behind.index(max(behind))
            text = next(self._texts[number], None)
            if text is None:
                return
            self.taken[number] += 1
            yield text


def _texts(found: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The documents of some sources, one after the other, stripped, empty ones skipped."""
    for kind, where in found:
        with store.errors_about(where):
            yield from filter(None, map(str.strip, SOURCES[kind].read(where)))


def check(names: Sequence[str]) -> None:
    """Raise a UserError if a source does not exist."""
    for name in names:
        _resolve(name)


def describe(names: Sequence[str]) -> list[list[str | int]]:
    """Identify a corpus by [name, bytes, hash] of each file, and [name] of anything else.

    A copy of a file has the same name, bytes and hash. The hash is of its first and last ENDS
    bytes: a change between them that keeps the length is not seen.

    Raises:
        UserError: a source does not exist, or cannot be read.
    """
    described: list[list[str | int]] = []
    for kind, where in (found for name in names for found in _resolve(name)):
        if SOURCES[kind].endings:
            described.append(_describe_file(where, pathlib.Path(where).name))
        elif kind == "folder":
            path = store.fetch(where)
            files = sorted(file for file in path.rglob("*") if file.is_file())
            described += [_describe_file(file, file.relative_to(path).as_posix())
                          for file in files]
        else:
            described.append([f"{kind}:{where}"])
    return described


def _describe_file(path: str | pathlib.Path, name: str) -> list[str | int]:
    try:
        with store.errors_about(path), store.open_binary(path) as file:
            ends = hashlib.sha256(file.read(ENDS))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - ENDS, 0))
            ends.update(file.read())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return [name, size, ends.hexdigest()]


def is_held_out(document: str, share: float) -> bool:
    """Whether a document belongs to the held-out part, of about `share` of all documents.

    It depends on the text alone: neither order, nor repetition, nor workers change it.
    """
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _resolve(name: str) -> list[tuple[str, str]]:
    """Split a word of --corpus into sources, each a key of SOURCES and its function's argument."""
    if name in SOURCES and SOURCES[name].written == name:
        return [(name, "")]
    paths = [name] if store.exists(name) else store.glob(name)
    if paths:
        return [(_file_kind(path), path) for path in paths]
    prefix, colon, rest = name.partition(":")
    if colon and rest and "/" not in prefix and not store.is_remote(name):
        known = [kind for kind, source in SOURCES.items() if source.written.startswith(f"{kind}:")]
        return [(choose(prefix, known, "kind of corpus"), rest)]
    known = ", ".join(source.written for source in SOURCES.values())
    raise UserError(f"corpus {name!r}: no such file or folder (known: {known})")


def _file_kind(path: str) -> str:
    if store.is_folder(path):
        return "folder"
    ending = pathlib.Path(path.removesuffix(".gz").removesuffix(".zst")).suffix
    return next((kind for kind, source in SOURCES.items() if ending in source.endings), "text")


def _text_file(path: str) -> Iterator[str]:
    return (line for _, line in _lines(path))


def _json_lines(path: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object (one on each line is expected)")
        text = _text(record, where)
        if not _is_unicode(text):
            raise UserError(f"{where}: the text holds half a surrogate pair (\\ud800 to \\udfff)")
        yield text


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, from 1; unpacked if its name ends in .gz or .zst."""
    packed = pathlib.Path(path).suffix
    unpack = OPENERS[packed][1] if packed in OPENERS else lambda raw: raw
    try:
        with store.open_binary(path) as raw, unpack(raw) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, line.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}"
        raise UserError(f"{path}:{number}: not UTF-8 ({byte}); convert the file") from error
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path}: {os.strerror(error.errno)}") from error
        if packed not in OPENERS:
            raise UserError(f"{path}: cannot be read ({error})") from error
        raise UserError(f"{path}: damaged {OPENERS[packed][0]} file ({error})") from error


def _open_zst(raw: BinaryIO) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))


def _parquet(path: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    with _errors_about(path), pyarrow.parquet.ParquetFile(
            store.open_binary(path) if store.is_remote(path) else path) as file:
        fields = file.schema_arrow
        strings = [field.name for field in fields if field.type in (
            pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())]
        columns = ["text"] if "text" in strings else strings
        if len(columns) != 1:
            raise _no_text(path, fields.names)
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
            for text in batch[columns[0]].to_pylist():
                yield text or ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(record: Mapping[str, Any], where: str) -> str:
    """The value of "text", or of the only key whose value is a string; null counts as empty."""
    if "text" in record:
        keys = ["text"]
    else:
        keys = [key for key, value in record.items() if isinstance(value, str | bytes)]
    value = record[keys[0]] if len(keys) == 1 else 0
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise _no_text(where, record)
    return value


def _no_text(where: str, columns: Iterable[str]) -> UserError:
    return UserError(f"{where}: no column 'text', and not just one that holds a string "
                     f"(columns: {', '.join(map(str, columns)) or 'none'})")


def _saved_folder(path: str) -> Iterator[str]:
    datasets = _library("datasets", path)
    with _errors_about(path):
        saved = datasets.load_from_disk(store.fetch(path))
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[choose("train", saved, f"split in {path}:")]
        for record in saved:
            yield _text(record, path)


def _hub(name: str) -> Iterator[str]:
    datasets = _library("datasets", f"hf:{name}")
    repository, _, config = name.partition(":")
    with _errors_about(f"hf:{name}"):
        for record in datasets.load_dataset(
                repository, config or None, split="train", streaming=True):
            yield _text(record, f"hf:{name}")


def _tfds(name: str) -> Iterator[str]:
    """Read a TensorFlow dataset; one in file_format="array_record" needs no TensorFlow."""
    tfds = _library("tensorflow_datasets", f"tfds:{name}")
    with _errors_about(f"tfds:{name}"):
        for record in tfds.data_source(name, split="train"):
            yield _text(record, f"tfds:{name}")


def _library(module: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.replace("_", "-")
        raise UserError(f"{where}: needs {package} ({error}): pip install {package}") from error


@contextlib.contextmanager
def _errors_about(where: str) -> Iterator[None]:
    """Turn what a data library or the hub raises into a UserError of one line about a source."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: cannot be read: {first_line(error)}") from error


@functools.cache
def _python_docs() -> tuple[str, ...]:
    """The texts of python_docs, parsed once, because a run may read its corpus several times."""
    return tuple(python_docs())


OPENERS: dict[str, tuple[str, Callable[..., Any]]] = {
    ".gz": ("gzip", gzip.open), ".zst": ("zstd", _open_zst)}


@dataclasses.dataclass(frozen=True)
class Source:
    """A row of SOURCES: how --corpus names it, and what reads it.

    `written` is either a kind of file or folder, or begins with the row's name and a colon, what
    follows being the place, or is the row's name itself.
    """

    written: str
    read: Callable[[str], Iterator[str]]  # place → documents
    endings: tuple[str, ...] = ()  # of the names of files; all others are text


SOURCES = {
    "text": Source("FILE.txt", _text_file, (".txt",)),
    "json": Source("FILE.jsonl", _json_lines, (".jsonl", ".json")),
    "parquet": Source("FILE.parquet", _parquet, (".parquet",)),
    "folder": Source("a saved datasets folder", _saved_folder),
    "hf": Source("hf:NAME[:CONFIG]", _hub),
    "tfds": Source("tfds:NAME", _tfds),
    "python-docs": Source("python-docs", lambda _: iter(_python_docs())),
}
