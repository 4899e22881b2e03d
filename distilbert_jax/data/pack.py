"""Pieces of token ids → rows of one length, written to disk once.

The third step of the walk. `folder/train` and `folder/valid` hold, for R rows of T tokens,

    rows.npy      [R, T]  token ids, smallest unsigned type, padded with the tokenizer's pad id
    segments.npy  [R, S]  uint16, lengths of the pieces of each row in tokens, filled up with 0
    counts.npy    [V]     int64, occurrences of each token
    manifest.json         what was asked for ("request") and what came out
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbert_jax.config import UserError
from distilbert_jax.data import sources, tokenize

if TYPE_CHECKING:
    import transformers

FORMAT = 1  # raise it when the files change their meaning
PARTS = ("train", "valid")
SHORTEST_PIECE = 3  # [CLS], one token, [SEP]
COUNT_ROWS = 8192  # rows counted at once
PROGRESS_PIECES = 4096  # pieces between two calls of progress

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """One prepared part, on disk."""

    rows: np.ndarray  # [R, T] unsigned, mapped from disk
    segments: np.ndarray  # [R, S] uint16, mapped from disk
    counts: np.ndarray  # [V] int64
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Both parts of a prepared corpus."""

    train: PackedRows
    valid: PackedRows


def pack(pieces: Iterable[np.ndarray], length: int,
         buffer: int = 65536) -> Iterator[list[np.ndarray]]:
    """Fill rows with whole pieces, best-fit decreasing within each buffer of pieces.

    Each piece, longest first, goes to the row with the least room that still holds it. Rows are
    kept by their free room, and one integer has a bit set for each room that exists, so a piece
    costs a few operations however many rows are open.

    Args:
        pieces: token ids [n] each, n at least 1.
        length: tokens in a row, T.
        buffer: pieces packed together: more fill rows better and take more memory.

    Yields:
        The pieces of one row, in order; their lengths add up to at most `length`.

    Raises:
        ValueError: a piece is longer than a row.
    """
    pieces = iter(pieces)
    while chunk := list(itertools.islice(pieces, buffer)):
        yield from _best_fit_decreasing(chunk, length)


def _best_fit_decreasing(pieces: list[np.ndarray], length: int) -> list[list[np.ndarray]]:
    pieces = sorted(pieces, key=len, reverse=True)
    if len(pieces[0]) > length:
        raise ValueError(f"a piece of {len(pieces[0])} tokens does not fit a row of {length}")
    rows: list[list[np.ndarray]] = []
    with_room: list[list[list[np.ndarray]]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit n is set where with_room[n] is not empty
    for piece in pieces:
        size = len(piece)
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = length, []
            rows.append(row)
        row.append(piece)
        with_room[room - size].append(row)
        rooms |= 1 << room - size
    return rows


def prepare(corpus: Sequence[str], valid: Sequence[str], valid_share: float, sequence_length: int,
            tokenizer: "transformers.PreTrainedTokenizerFast", folder: str | pathlib.Path,
            progress: Progress | None = None) -> Prepared:
    """Tokenise and pack a corpus into `folder`, or reuse what an equal request left there.

    The corpus is read once and never held in memory. The work happens in a sibling folder,
    FOLDER.partial, which is renamed when it is complete.

    Args:
        corpus: the words of --corpus.
        valid: the words of --valid; none: documents of the corpus chosen by their hash.
        valid_share: share of the documents held out when `valid` is empty.
        sequence_length: tokens in a row, T.
        tokenizer: see `tokenize.load_tokenizer`.
        folder: where the prepared data belongs.
        progress: called now and then with the documents and tokens so far.

    Raises:
        UserError: a source cannot be read, a part comes out empty, or the folder holds something
            else: other data, data prepared for another request, or damaged data.
    """
    folder = pathlib.Path(folder)
    request = {
        "format": FORMAT,
        "corpus": sources.describe(corpus),
        "valid": sources.describe(valid) if valid else valid_share,
        "tokenizer": tokenize.fingerprint(tokenizer),
        "sequence_length": sequence_length,
    }
    if not _holds(folder, request):
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write_parts(partial, corpus, valid, valid_share, tokenizer, request, progress)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Prepared(*(load(folder / part) for part in PARTS))


def _holds(folder: pathlib.Path, request: dict[str, Any]) -> bool:
    """Whether the request was prepared there before; False where nothing is in the way.

    Raises:
        UserError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not all((folder / part / "manifest.json").is_file() for part in PARTS):
        raise UserError(f"{folder} exists and is not prepared data: name another folder")
    found = _read_manifest(folder / PARTS[0]).get("request", {})
    differ = [name for name in request if found.get(name) != request[name]]
    if differ:
        raise UserError(f"{folder} was prepared with another {', '.join(differ)}: "
                        "delete it or name another folder")
    return True


def _write_parts(folder: pathlib.Path, corpus: Sequence[str], valid: Sequence[str],
                 valid_share: float, tokenizer: "transformers.PreTrainedTokenizerFast",
                 request: dict[str, Any], progress: Progress | None) -> None:
    """Write both parts; held-out documents wait in a file until the training part is done."""
    folder.mkdir(parents=True)
    write = functools.partial(_write_part, tokenizer=tokenizer, request=request)
    aside = folder / "held-out.jsonl"
    documents = sources.documents(corpus)
    empty = f"no text in {' '.join(corpus)}"
    if valid:
        empty_valid = f"no text in {' '.join(valid)}"
    else:
        documents = _set_aside(documents, valid_share, aside)
        empty_valid = (f"no document of {' '.join(corpus)} fell into the held-out share of "
                       f"{valid_share}: give --valid or a larger --valid-share")
        empty += f" beside the held-out share of {valid_share}"
    train = write(folder / "train", documents, empty, progress=progress)

    def progress_valid(documents: int, tokens: int) -> None:
        if progress:
            progress(train["documents"] + documents, train["tokens"] + tokens)

    write(folder / "valid", sources.documents(valid or [str(aside)]), empty_valid,
          progress=progress_valid)
    aside.unlink(missing_ok=True)


def _set_aside(documents: Iterable[str], share: float, path: pathlib.Path) -> Iterator[str]:
    """Pass the documents on, except the held-out ones, which go to a JSON-lines file."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            if sources.is_held_out(document, share):
                file.write(json.dumps({"text": document}) + "\n")
            else:
                yield document


def _write_part(folder: pathlib.Path, documents: Iterable[str], empty: str,
                tokenizer: "transformers.PreTrainedTokenizerFast", request: dict[str, Any],
                progress: Progress | None) -> dict[str, Any]:
    """Write the four files of one part and return its manifest; UserError(empty) if no rows."""
    folder.mkdir()
    length, vocab_size = request["sequence_length"], len(tokenizer)
    tally = _Tally(progress)
    pieces = tokenize.pieces(tokenizer, tally.documents_through(documents), length)
    with (_Growing(folder / "rows.npy", length, np.min_scalar_type(vocab_size - 1),
                   tokenizer.pad_token_id) as rows,
          _Growing(folder / "wide.npy", length // SHORTEST_PIECE, np.dtype(np.uint16),
                   0) as segments):
        for row in pack(tally.pieces_through(pieces), length):
            rows.append(np.concatenate(row))
            segments.append([len(piece) for piece in row])
    if not rows.count:
        raise UserError(empty)
    wide = np.load(folder / "wide.npy", mmap_mode="r")
    np.save(folder / "segments.npy", wide[:, :segments.widest])
    (folder / "wide.npy").unlink()

    counts = _count(np.load(folder / "rows.npy", mmap_mode="r"), vocab_size)
    counts[tokenizer.pad_token_id] -= rows.count * length - tally.tokens
    np.save(folder / "counts.npy", counts)
    manifest = {
        "request": request,
        "vocab_size": vocab_size,
        "documents": tally.documents,
        "characters": tally.characters,
        "pieces": tally.pieces,
        "tokens": tally.tokens,
        "unknown": 0 if tokenizer.unk_token_id is None else int(counts[tokenizer.unk_token_id]),
        "rows": rows.count,
        "utilisation": tally.tokens / (rows.count * length),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _count(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    """Occurrences of each id in rows [R, T], padding included: int64 [V]."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(rows), COUNT_ROWS):
        counts += np.bincount(rows[start:start + COUNT_ROWS].ravel(), minlength=vocab_size)
    return counts


class _Tally:
    """Counts what passes through, and reports it now and then."""

    def __init__(self, progress: Progress | None) -> None:
        self.documents = self.characters = self.pieces = self.tokens = 0
        self._progress = progress

    def documents_through(self, documents: Iterable[str]) -> Iterator[str]:
        for document in documents:
            self.documents += 1
            self.characters += len(document)
            yield document

    def pieces_through(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for piece in pieces:
            self.pieces += 1
            self.tokens += len(piece)
            if self._progress and self.pieces % PROGRESS_PIECES == 0:
                self._progress(self.documents, self.tokens)
            yield piece


class _Growing:
    """A .npy file [rows, width] that is written row by row.

    NumPy leaves room in the header for the number of rows to grow, so it is put right at the end.
    """

    def __init__(self, path: pathlib.Path, width: int, dtype: np.dtype, fill: int) -> None:
        self.count = self.widest = 0
        self._blank = np.full(width, fill, dtype)
        self._path = path

    def __enter__(self) -> "_Growing":
        self._file = self._path.open("wb")
        self._write_header()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def append(self, values: Sequence[int] | np.ndarray) -> None:
        row = self._blank.copy()
        row[:len(values)] = values
        self._file.write(row.tobytes())
        self.count += 1
        self.widest = max(self.widest, len(values))

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(self._file, {
            "descr": np.lib.format.dtype_to_descr(self._blank.dtype), "fortran_order": False,
            "shape": (self.count, len(self._blank))})


def load(folder: str | pathlib.Path) -> PackedRows:
    """Open one prepared part; rows and segments stay on disk.

    Raises:
        UserError: there is none, or its files do not agree with its manifest.
    """
    folder = pathlib.Path(folder)
    manifest = _read_manifest(folder)
    try:
        rows = np.load(folder / "rows.npy", mmap_mode="r")
        segments = np.load(folder / "segments.npy", mmap_mode="r")
        counts = np.load(folder / "counts.npy")
        expected = (manifest["rows"], manifest["request"]["sequence_length"])
        for what, found, wanted in (
                ("rows.npy", rows.shape, expected),
                ("segments.npy", len(segments), manifest["rows"]),
                ("counts.npy", counts.shape, (manifest["vocab_size"],)),
                ("counts.npy", int(counts.sum()), manifest["tokens"])):
            if found != wanted:
                raise ValueError(f"{what} holds {found}, the manifest says {wanted}")
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"prepared data in {folder} are damaged: {error}; delete them") from error
    return PackedRows(rows, segments, counts, manifest)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"no prepared data in {folder}: {path.name} is absent") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete the prepared data") from error
