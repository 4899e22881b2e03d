"""Where text comes from: the words of --corpus and --valid → documents, one string each.

The first step of the walk. A word is a path, a glob, `paragraphs:FILES`, `hf:NAME[:CONFIG]`,
`tfds:NAME` or `python-docs`; SOURCES says how each kind is read, by a function of readers.py.
"""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

from distilbert_jax.data import readers
from distilbert_jax.errors import UserError, choose
from distilbert_jax.machine import store

ENDS = 65536  # bytes at either end of a file that identify it, beside its name and size
# Endings of files that are no text; what to do about each. All others not in SOURCES are text.
TABLES = (".csv", ".tsv", ".xls", ".xlsx", ".ods", ".arrow", ".feather", ".orc", ".avro", ".sqlite",
          ".db")
BINARY = (".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".br", ".pdf", ".doc", ".docx", ".pkl",
          ".npy", ".npz", ".h5", ".bin", ".safetensors", ".msgpack")


class Documents:
    """All documents of a corpus, in order; iterate it once.

    They are stripped of surrounding white space, and empty ones are skipped. A text file holds one
    document a line; JSON lines, a parquet file or a dataset one a record, in one field: that of
    --text-field or else, decided by the first record, "text" or the only one that holds a string.
    Records without it are counted and skipped. Text and JSON lines whose names end in .gz, .zst,
    .bz2 or .xz are unpacked, and a folder stands for all files in it. Of several corpora one
    follows the other or, with weights, each document comes from the corpus that is furthest behind
    its share, until that one is used up.
    """

    def __init__(self, names: Sequence[str], mix: Sequence[float] = (), field: str = "") -> None:
        """Look for the sources, without reading them.

        Args:
            names: the words of --corpus.
            mix: a weight for each of them, or none.
            field: that holds the text of a record; "" to go by the first record of each source.

        Raises:
            UserError: at once, for a source that does not exist; while iterating, for one that
                cannot be read: not UTF-8, bad JSON, damaged compression, no text column, a
                library or a hub missing.
        """
        self._texts = [self._read(number, _resolve(name), field)
                       for number, name in enumerate(names)]
        self._mix = [weight / sum(mix) for weight in mix]
        self.taken = [0] * len(names)  # documents, of each word so far
        self.skipped = [0] * len(names)  # records without the field

    def __iter__(self) -> Iterator[str]:
        return self._mixed() if self._mix else self._one_by_one()

    def _read(
        self, number: int, found: Sequence[tuple[str, str]], field: str
    ) -> Iterator[str]:
        """The documents of one word, stripped; empty ones and records without text left out."""
        for kind, where in found:
            with store.errors_about(where):
                for text in SOURCES[kind].read(where, field):
                    if text is None:
                        self.skipped[number] += 1
                    elif text := text.strip():
                        yield text

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


def check(names: Sequence[str], output: str = "") -> None:
    """Raise a UserError if a source does not exist, or a folder of texts holds `output`."""
    for name in names:
        _resolve(name)
        if output and os.path.isdir(name) and not store.is_remote(output):
            folder = pathlib.Path(name).resolve()
            if folder in (own := pathlib.Path(output).resolve(), *own.parents):
                raise UserError(f"--output {output} lies in the folder of texts {name}, and would "
                                "be read as one: name another --output")


def hub_dataset(name: str) -> str:
    """The name on the Hugging Face hub of a word hf:NAME[:CONFIG]; "" for any other word."""
    kind, _, where = name.partition(":")
    dataset = where.partition(":")[0]
    return dataset if kind == "hf" and not os.path.exists(dataset) else ""


def published(name: str) -> str:
    """A word of --corpus without the folders of this machine or bucket that it lies in."""
    kind, colon, where = name.partition(":")
    if hub_dataset(name) or (colon and kind == "tfds"):
        return name
    if not colon or kind not in SOURCES:
        return pathlib.PurePath(name).name
    return f"{kind}:{pathlib.PurePath(where).name}"


def published_call(call: str) -> str:
    """A command line, or a call in Python, of which each path is published.

    `distilbert-jax ship --model /home/me/small --evaluate 'my texts/a.txt'` becomes
    `distilbert-jax ship --model small --evaluate 'a.txt'`.
    """
    def short(word: re.Match[str]) -> str:
        quote = word[0][0] if word[0][0] in "'\"" else ""
        name = word[0].strip(quote or None)
        return f"{quote}{published(name)}{quote}" if "/" in name else word[0]

    return re.sub(r"""'[^']*'|"[^"]*"|[^\s'",()\[\]{}=]+""", short, call)


def describe(names: Sequence[str]) -> list[list[str | int]]:
    """Identify a corpus by [name, bytes, hash] of each file, and [name] of anything else.

    A copy of a file has the same name, bytes and hash. The hash is of its first and last ENDS
    bytes: a change between them that keeps the length is not seen.

    Raises:
        UserError: a source does not exist, or cannot be read.
    """
    described: list[list[str | int]] = []
    for kind, where in (found for name in names for found in _resolve(name)):
        if SOURCES[kind].files:
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
    if not store.is_remote(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a regular file, and cannot be read twice: save it to one")
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
    return digest(document) < share * 2**64


def digest(document: str) -> int:
    """64 bits that tell documents apart."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big")


def _resolve(name: str) -> list[tuple[str, str]]:
    """Split a word of --corpus into sources, each a key of SOURCES and its function's argument."""
    if name in SOURCES and SOURCES[name].written == name:
        return [(name, "")]
    if paths := _paths(name):
        return [found for path in paths for found in _in_path(path)]
    prefix, colon, rest = name.partition(":")
    if colon and rest and "/" not in prefix and not store.is_remote(name):
        known = [kind for kind, source in SOURCES.items() if source.written.startswith(f"{kind}:")]
        kind = choose(prefix, known, "kind of corpus")
        if not SOURCES[kind].files:
            return [(kind, rest)]
        if paths := _paths(rest):
            return [(kind, path) for path in paths]
    raise UserError(f"corpus {name!r}: no such file or folder (known: {_known()})")


def _paths(name: str) -> list[str]:
    """The file or folder of this name, or those that match it as a glob."""
    return [name] if store.exists(name) else store.glob(name)


def _in_path(path: str) -> list[tuple[str, str]]:
    """The sources in a file or folder; a folder that `datasets` saved is one."""
    if not store.is_folder(path):
        return [(_file_kind(path), path)]
    inside = store.files(store.path(path))
    if SAVED.intersection(inside) or store.is_remote(path):
        return [("folder", path)]
    found = [store.join(path, name) for name in inside if not any(
        part.startswith(".") for part in pathlib.Path(name).parts)]
    if not found:
        raise UserError(f"corpus {path!r}: the folder holds no files")
    return [(_file_kind(file), file) for file in found]


def _file_kind(path: str) -> str:
    """Key of SOURCES of a file, by the ending of its name in any case.

    Raises:
        UserError: an ending that is known to be neither text nor readable here.
    """
    name = pathlib.Path(path.lower())
    ending = name.with_suffix("").suffix if name.suffix in readers.OPENERS else name.suffix
    if ending in TABLES:
        raise UserError(f"{path}: a table; save its column of text as JSON lines (.jsonl) or "
                        "parquet, or as text (.txt), one document a line")
    if ending in BINARY:
        raise UserError(f"{path}: no text; unpack or convert it (known: {_known()}, packed as "
                        f"{', '.join(readers.OPENERS)})")
    return next((kind for kind, source in SOURCES.items() if ending in source.endings), "text")


def _known() -> str:
    return ", ".join(source.written for source in SOURCES.values())


@dataclasses.dataclass(frozen=True)
class Source:
    """A row of SOURCES: how --corpus names it, and what reads it.

    `written` is either a kind of file or folder, or begins with the row's name and a colon, what
    follows being the place, or is the row's name itself.
    """

    written: str
    read: Callable[[str, str], readers.Documents]  # (place, field) → documents
    endings: tuple[str, ...] = ()  # of the names of files
    files: bool = True  # whether its places are files


SAVED = {"dataset_info.json", "state.json", "dataset_dict.json"}  # of a folder saved by datasets
SOURCES = {
    "text": Source("FILE.txt", readers.text_file, (".txt",)),
    "json": Source("FILE.jsonl", readers.json_lines,
                   (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")),
    "parquet": Source("FILE.parquet", readers.parquet, (".parquet", ".pq")),
    "folder": Source("a folder of these or saved by datasets", readers.saved_folder, files=False),
    "paragraphs": Source("paragraphs:FILE", readers.paragraphs),
    "hf": Source("hf:NAME[:CONFIG]", readers.hub, files=False),
    "tfds": Source("tfds:NAME", readers.tensorflow_dataset, files=False),
    "python-docs": Source("python-docs", readers.documentation, files=False),
}
