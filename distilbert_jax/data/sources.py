"""Where text comes from: the words of --corpus and --valid → documents, one string each.

The first step of the walk. A word is a path, a glob, `hf:NAME[:CONFIG]`, `tfds:NAME` or
`python-docs`; SOURCES says how each kind is read. Libraries are imported only where one is used.
"""

import codecs
import contextlib
import functools
import glob
import gzip
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from distilbert_jax.config import UserError, choose
from distilbert_jax.data.python_docs import python_docs


def documents(names: Sequence[str]) -> Iterator[str]:
    """All documents of a corpus, in order, stripped of surrounding white space, empty ones skipped.

    Args:
        names: the words of --corpus. A text file holds one document a line; a JSON-lines file
            (.jsonl, .json) or a dataset holds one a record, under the key "text" or its only
            key whose value is a string. Files that end in .gz are unpacked.

    Raises:
        UserError: at once, for a source that does not exist; on the way, for one that cannot be
            read: not UTF-8, bad JSON, damaged gzip, no text column, a library or a hub missing.
    """
    found = _resolve(names)
    texts = itertools.chain.from_iterable(SOURCES[kind](where) for kind, where in found)
    return (text for text in map(str.strip, texts) if text)


def describe(names: Sequence[str]) -> list[list[str | int]]:
    """What identifies a corpus: [path, bytes, newest modification in ns] on disk, else [name].

    Raises:
        UserError: a source does not exist.
    """
    described: list[list[str | int]] = []
    for kind, where in _resolve(names):
        if kind in ("text", "json", "folder"):
            path = pathlib.Path(where).absolute()
            files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
            stats = [file.stat() for file in files]
            described.append([str(path), sum(stat.st_size for stat in stats),
                              max((stat.st_mtime_ns for stat in stats), default=0)])
        else:
            described.append([f"{kind}:{where}"])
    return described


def is_held_out(document: str, share: float) -> bool:
    """Whether a document belongs to the held-out part, of about `share` of all documents.

    It depends on the text alone: neither order, nor repetition, nor workers change it.
    """
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _resolve(names: Sequence[str]) -> list[tuple[str, str]]:
    """The words as (a key of SOURCES, what its function is given), globs spelled out."""
    return [found for name in names for found in _resolve_one(name)]


def _resolve_one(name: str) -> list[tuple[str, str]]:
    if name == "python-docs":
        return [("python-docs", "")]
    paths = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
    if paths:
        return [(_file_kind(path), path) for path in paths]
    prefix, colon, rest = name.partition(":")
    if colon and rest and "/" not in prefix:
        return [(choose(prefix, ("hf", "tfds"), "kind of corpus"), rest)]
    raise UserError(f"corpus {name!r}: no such file or folder (known: FILE.txt, FILE.jsonl, "
                    "a saved datasets folder, hf:NAME[:CONFIG], tfds:NAME, python-docs)")


def _file_kind(path: str) -> str:
    if os.path.isdir(path):
        return "folder"
    return "json" if path.removesuffix(".gz").endswith((".jsonl", ".json")) else "text"


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
    """Numbered lines of a file, from 1, unpacked when its name ends in .gz."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, line.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}"
        raise UserError(f"{path}:{number}: not UTF-8 ({byte}); convert the file") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


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
        raise UserError(f"{where}: no column 'text', and not just one that holds a string "
                        f"(columns: {', '.join(map(str, record)) or 'none'})")
    return value


def _saved_folder(path: str) -> Iterator[str]:
    datasets = _library("datasets", path)
    with _told(path):
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[choose("train", saved, f"split in {path}:")]
        for record in saved:
            yield _text(record, path)


def _hub(name: str) -> Iterator[str]:
    datasets = _library("datasets", f"hf:{name}")
    repository, _, config = name.partition(":")
    with _told(f"hf:{name}"):
        for record in datasets.load_dataset(
                repository, config or None, split="train", streaming=True):
            yield _text(record, f"hf:{name}")


def _tfds(name: str) -> Iterator[str]:
    """Needs no TensorFlow where the dataset was prepared with file_format="array_record"."""
    tfds = _library("tensorflow_datasets", f"tfds:{name}")
    with _told(f"tfds:{name}"):
        for record in tfds.data_source(name, split="train"):
            yield _text(record, f"tfds:{name}")


def _library(module: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.replace("_", "-")
        raise UserError(f"{where}: needs {package} ({error}): pip install {package}") from error


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Turn whatever a data library or the hub raises into one line that names the source."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: cannot be read: {line}") from error


@functools.cache
def _python_docs() -> tuple[str, ...]:
    """Kept, because parsing costs seconds and one run may read the corpus several times."""
    return tuple(python_docs())


SOURCES: dict[str, Callable[[str], Iterator[str]]] = {
    "text": _text_file,
    "json": _json_lines,
    "folder": _saved_folder,
    "hf": _hub,
    "tfds": _tfds,
    "python-docs": lambda _: iter(_python_docs()),
}
