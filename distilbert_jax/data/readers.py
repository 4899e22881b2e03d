"""One source → its documents: lines of text, records of JSON lines, parquet, datasets, a hub.

Each reader is given a place and the field that --text-field names ("" for none), and yields a
string for each document, or None for a record that lacks the field. Which field holds the text is
decided once for a source. Libraries are imported only where one is used.
"""

import bz2
import codecs
import contextlib
import functools
import gzip
import importlib
import io
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, BinaryIO

from distilbert_jax.data.python_docs import python_docs
from distilbert_jax.errors import UserError, choose, first_line
from distilbert_jax.machine import store

PARQUET_ROWS = 1024  # records decoded at once

Documents = Iterator[str | None]


def text_file(path: str, _: str) -> Documents:
    """A document a line."""
    return (line for _, line in lines(path))


def paragraphs(path: str, _: str) -> Documents:
    """A sentence a line and an empty line between documents, as BERT's own corpora are laid out."""
    document: list[str] = []
    for _, line in lines(path):
        if line.strip():
            document.append(line.strip())
        elif document:
            yield " ".join(document)
            document = []
    if document:
        yield " ".join(document)


def json_lines(path: str, field: str) -> Documents:
    """A record a line."""
    return _texts(path, records(path), field)


def records(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each record of a JSON-lines file, and where it stands."""
    for number, line in lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number, or nesting, beyond the parser
            raise UserError(f"{where}: JSON that cannot be read: {first_line(error)}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object (one on each line is expected)")
        yield where, record


def _texts(
    source: str, records: Iterable[tuple[str, Mapping[str, Any]]], field: str
) -> Documents:
    """The texts of records, each with the place that errors name; null counts as empty.

    Raises:
        UserError: the first record decides no field, a later one has "text" in place of what the
            first had, a text is no string or holds half a surrogate pair, or no record has the
            field.
    """
    wanted, found, other = field, 0, ""
    for where, record in records:
        wanted = wanted or _choose_field(where, record)
        if wanted not in record and record.get("text") is not None and not field:
            raise UserError(f"{where} has a field 'text', and the first record only {wanted!r}: "
                            "say which holds the text by --text-field")
        if wanted not in record:
            other = other or ", ".join(map(str, record))
            yield None
            continue
        found += 1
        yield _string(record[wanted], wanted, where)
    if other and not found:
        raise UserError(f"{source}: no record has the field {wanted!r} of --text-field (fields: "
                        f"{other})")


def _choose_field(where: str, record: Mapping[str, Any]) -> str:
    """The field that holds the text: "text", or the only one whose value is a string.

    A null may be a string elsewhere, and counts as one.
    """
    strings = [name for name, value in record.items() if isinstance(value, str | bytes | None)]
    if "text" in record or len(strings) != 1:
        if not isinstance(record.get("text", 0), str | bytes | None):
            raise _no_text(where, record)
        return "text"
    return strings[0]


def _string(value: Any, field: str, where: str) -> str:
    if value is None:
        return ""
    text = value.decode() if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise UserError(f"{where}: {field!r} is {type(value).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text holds half a surrogate pair (\\ud800 to \\udfff)"
                        ) from error
    return text


def _no_text(where: str, columns: Iterable[str]) -> UserError:
    return UserError(f"{where}: no column 'text', and not just one that holds a string (columns: "
                     f"{', '.join(map(str, columns)) or 'none'}): name one by --text-field")


def lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, from 1; unpacked by the ending of its name."""
    packed = pathlib.Path(path).suffix.lower()
    unpack = OPENERS[packed][1] if packed in OPENERS else lambda raw: raw
    try:
        with store.open_binary(path) as raw, unpack(raw) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                    if line.count(b"\r") > 10:
                        raise UserError(f"{path}: lines end in carriage returns alone; convert the "
                                        "file")
                if b"\0" in line:
                    raise UserError(f"{path}:{number}: holds NUL bytes, as UTF-16 does; convert "
                                    "the file to UTF-8")
                yield number, line.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}"
        raise UserError(f"{path}:{number}: not UTF-8 ({byte}); convert the file") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path}: {os.strerror(error.errno)}") from error
        if packed not in OPENERS:
            raise UserError(f"{path}: cannot be read ({error})") from error
        raise UserError(f"{path}: damaged {OPENERS[packed][0]} file ({error})") from error


def _open_zst(raw: BinaryIO) -> io.BufferedReader:
    pyarrow = library("pyarrow", "a .zst file")
    return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))


OPENERS: dict[str, tuple[str, Callable[..., Any]]] = {
    ".gz": ("gzip", gzip.open), ".zst": ("zstd", _open_zst), ".bz2": ("bzip2", bz2.open),
    ".xz": ("xz", lzma.open)}


def parquet(path: str, field: str) -> Documents:
    """A record a row; strings of every Arrow type, dictionary-encoded ones too."""
    parquet = library("pyarrow.parquet", path)
    with _errors_about(path), parquet.ParquetFile(
            store.open_binary(path) if store.is_remote(path) else path) as file:
        schema = file.schema_arrow
        strings = [column.name for column in schema if _is_string(column.type)]
        if field and field not in schema.names:
            raise UserError(f"{path}: no column {field!r} of --text-field (columns: "
                            f"{', '.join(schema.names)})")
        columns = [field] if field else ["text"] if "text" in strings else strings
        if len(columns) != 1:
            raise _no_text(path, schema.names)
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
            for value in batch[columns[0]].to_pylist():
                yield _string(value, columns[0], path)


def _is_string(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


def saved_folder(path: str, field: str) -> Documents:
    """A record of a dataset that `datasets` saved, or of its split "train"."""
    datasets = library("datasets", path)
    with _errors_about(path):
        saved = datasets.load_from_disk(store.fetch(path))
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[choose("train", saved, f"split in {path}:")]
        yield from _texts(path, ((path, record) for record in saved), field)


def hub(name: str, field: str) -> Documents:
    """A record of a dataset of the Hugging Face hub, NAME or NAME:CONFIG, streamed."""
    datasets, where = library("datasets", f"hf:{name}"), f"hf:{name}"
    repository, _, config = name.partition(":")
    with _errors_about(where):
        records = datasets.load_dataset(repository, config or None, split="train", streaming=True)
        yield from _texts(where, ((where, record) for record in records), field)


def tensorflow_dataset(name: str, field: str) -> Documents:
    """A record of a TensorFlow dataset; file_format="array_record" needs no TensorFlow."""
    where = f"tfds:{name}"
    tfds = library("tensorflow_datasets", where, "distilbert_jax[tfds]")
    with _errors_about(where):
        records = tfds.data_source(name, split="train")
        yield from _texts(where, ((where, record) for record in records), field)


def documentation(_: str, __: str) -> Documents:
    """The documentation of Python: see python_docs."""
    return iter(_python_docs())


def library(module: str, where: str, package: str = "") -> ModuleType:
    """Import a module that `where` needs and not every installation has.

    Args:
        module: to import.
        where: the source, or kind of source, that is read by it.
        package: that brings it; by default the one of its name.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0].replace("_", "-")
        raise UserError(f"{where}: needs {name} ({error}): pip install \"{package or name}\""
                        ) from error


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
