"""Labelled files → examples: texts, labels as they are written, and where each stands.

Which columns are read is said by the task or the user, or else by the names in the header; nothing
is guessed from values.
"""

import csv
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distilbert_jax.data import readers
from distilbert_jax.errors import UserError, choose, first_line
from distilbert_jax.machine import store

TEXTS = (("text",), ("sentence",), ("sentence1", "sentence2"), ("sentence_A", "sentence_B"),
         ("text1", "text2"), ("premise", "hypothesis"), ("question", "sentence"),
         ("question1", "question2"), ("tokens",), ("words",))
LABELS = ("label", "labels", "score", "relatedness_score", "tags", "ner_tags")
FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".conll")

Row = tuple[str, Mapping[str, Any]]  # where it stands, and its columns


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where text and label of a file stand."""

    text: tuple[str, ...] = ()  # one column or two; (): by the header
    label: str = ""
    header: bool = True  # False: columns are numbers from 0


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Examples in the order of the files."""

    texts: list[tuple[str, ...]]  # a text, a pair, or the words of a sentence that is tagged
    labels: list[Any]  # str, number, or the tags of the words; None where there is none
    where: list[str]  # file:line of each, for messages
    tagged: bool = False
    columns: str = ""  # of the first file, for messages: "sentence1, sentence2 → label"

    def __len__(self) -> int:
        return len(self.texts)

    def some(self, numbers: Sequence[int]) -> "Labelled":
        """The examples with these numbers."""
        texts, labels, where = ([all_[i] for i in numbers]
                                for all_ in (self.texts, self.labels, self.where))
        return dataclasses.replace(self, texts=texts, labels=labels, where=where)


def read(names: Sequence[str], columns: Columns, split: str, labelled: bool | None = True
         ) -> Labelled:
    """Read files, or datasets.

    Args:
        names: .csv, .tsv, .jsonl, .parquet or .conll (a word and its tag a line), packed or not; a
            folder saved by `datasets`, or hf:NAME[:CONFIG].
        columns: of the text and the label.
        split: train, dev or test: which part of a dataset is read.
        labelled: whether each example must have a label; if not, labels are read where there are
            any, but for a column of nothing but -1, as in GLUE's test files; None reads no label.

    Raises:
        UserError: a file is missing, of another form, or damaged; a column or a label is missing.
    """
    texts, labels, where, tagged, said = [], [], [], [], []
    for name in names:
        if not name.startswith("hf:") and not store.exists(name):
            raise UserError(f"{name}: no such file")
        tagged.append(ending(name) == ".conll")
        rows = _sentences(name) if tagged[-1] else _rows(name, columns, split)
        chosen = None
        for place, row in rows:
            if not chosen or not chosen[1]:  # a later record may have a label
                chosen = _choose(row, columns, place, labelled)
            text, label = chosen
            words = len(text) == 1 and isinstance(row.get(text[0]), list)
            texts.append(_text(row, text, place))
            labels.append(_tags(row, label, place, texts[-1], bool(labelled)) if words else
                          _label(row, label, place, bool(labelled)))
            where.append(place)
            tagged[-1] |= words
        said += [(len(chosen[0]), ", ".join(chosen[0]) + (f" → {chosen[1]}" if chosen[1] else ""))
                 ] if chosen else []
    if not texts:
        raise UserError(f"no examples in {' '.join(names)}")
    if any(tagged) != all(tagged):
        raise UserError(f"{' '.join(names)}: some hold tagged words, some texts: give one kind")
    if len({count for count, _ in said}) > 1:
        raise UserError(f"{' '.join(names)}: some hold single texts, some pairs: name the columns "
                        "by --text")
    if not labelled and all(str(label) == "-1" for label in labels):
        labels = [None] * len(labels)
    return Labelled(texts, labels, where, any(tagged), said[0][1])


def ending(name: str) -> str:
    """How the name of a file ends, in small letters and without .gz and the like."""
    path = pathlib.PurePath(name.lower())
    return pathlib.PurePath(path.stem).suffix if path.suffix in readers.OPENERS else path.suffix


def _rows(name: str, columns: Columns, split: str) -> Iterator[Row]:
    """The records of a file or dataset."""
    kind = ending(name)
    if name.startswith("hf:") or (not store.is_remote(name) and pathlib.Path(name).is_dir()):
        yield from _dataset(name, split)
        return
    if kind in (".csv", ".tsv"):
        yield from _table(name, "," if kind == ".csv" else "\t", columns.header)
    elif kind in (".jsonl", ".ndjson", ".jsonlines"):
        yield from readers.records(name)
    elif kind == ".parquet":
        yield from _parquet(name)
    else:
        raise UserError(f"{name}: labelled data is read from {' '.join(FORMATS)} (also packed: "
                        f"{' '.join(readers.OPENERS)}), a folder saved by datasets, or hf:NAME")


def _table(name: str, delimiter: str, header: bool) -> Iterator[Row]:
    """The rows of a table; quotes are literal where tabs divide the columns, as in GLUE's files."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader((line for _, line in readers.lines(name)), delimiter=delimiter,
                      quoting=quoting, strict=True)
    names: list[str] = []
    try:
        for row in rows:
            if not row:
                continue
            if not names:
                names = row if header else [str(i) for i in range(len(row))]
                if len(set(names)) < len(names):
                    raise UserError(f"{name}:1: two columns have one name: {', '.join(names)}")
                if header:
                    continue
            if len(row) != len(names):
                raise UserError(f"{name}:{rows.line_num}: {len(row)} columns, where the first line "
                                f"has {len(names)}")
            yield f"{name}:{rows.line_num}", dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{name}:{rows.line_num}: not a table: {error}") from error


def _parquet(name: str) -> Iterator[Row]:
    pyarrow = readers.library("pyarrow", name)
    parquet = readers.library("pyarrow.parquet", name)
    try:
        with store.open_binary(name) as file:
            records = parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: cannot be read: {first_line(error)}") from error
    yield from ((f"{name}:{number}", record) for number, record in enumerate(records, 1))


def _dataset(name: str, split: str) -> Iterator[Row]:
    """A part of a saved dataset or of one on the hub; classes are given by name."""
    datasets = readers.library("datasets", name)
    try:
        if name.startswith("hf:"):
            repository, _, config = name[3:].partition(":")
            parts = datasets.load_dataset(repository, config or None)
        else:
            parts = datasets.load_from_disk(name)
    except Exception as error:  # the library has a dozen kinds
        raise UserError(f"{name}: cannot be read: {first_line(error)}") from error
    if isinstance(parts, datasets.DatasetDict):
        wanted = {"dev": ("dev", "validation"),
                  "unlabelled": ("unlabelled", "unsupervised", "train")}.get(split, (split,))
        wanted = next((part for part in wanted if part in parts), wanted[-1])
        parts = parts[choose(wanted, parts, f"split in {name}:")]
    for number, record in enumerate(parts, 1):
        yield f"{name}:{number}", {
            column: _named(value, parts.features[column]) for column, value in record.items()}


def _named(value: Any, feature: Any) -> Any:
    """A class number, or a list of them, by name; None for the -1 of a label that is missing."""
    if isinstance(value, list) and hasattr(getattr(feature, "feature", None), "int2str"):
        return [_named(one, feature.feature) for one in value]
    if hasattr(feature, "int2str") and isinstance(value, int):
        return feature.int2str(value) if value >= 0 else None
    return value


def _sentences(name: str) -> Iterator[Row]:
    """Sentences of words and tags: a word and, in the last column, its tag a line."""
    words, tags, first = [], [], 0
    for number, line in readers.lines(name):
        # A word may hold a space that is no ASCII or, between tabs, any.
        parts = [part for part in re.split(r"[\t\r\n]" if "\t" in line else r"[ \r\n]", line)
                 if part.strip()]
        if parts and parts[0] != "-DOCSTART-":
            if len(parts) < 2:
                raise UserError(f"{name}:{number}: a line has a word and its tag; found {line!r} "
                                "(words without tags: .jsonl with a list of them as \"tokens\")")
            first = first or number
            words.append(parts[0])
            tags.append(parts[-1])
        elif words:
            yield f"{name}:{first}", {"words": words, "tags": tags}
            words, tags, first = [], [], 0
    if words:
        yield f"{name}:{first}", {"words": words, "tags": tags}


def _choose(
    row: Mapping[str, Any], columns: Columns, place: str, labelled: bool | None
) -> tuple[tuple[str, ...], str]:
    """The columns of the text and of the label; "" where there is none and none is needed."""
    known = f"(columns: {', '.join(map(str, row))})"
    texts = [columns.text] if columns.text else [t for t in TEXTS if set(t) <= set(row)]
    if columns.text and (missing := set(columns.text) - set(row)):
        raise UserError(f"{place}: no column {', '.join(sorted(missing))} of --text {known}")
    texts = [t for t in texts if not any(set(t) < set(other) for other in texts)]
    if len(texts) != 1:
        raise UserError(f"{place}: name the column of the text, or the two of a pair, by --text, "
                        f"or as text, or sentence1 and sentence2, in the header {known}")
    if labelled is None:
        return texts[0], ""
    labels = [columns.label] if columns.label else [label for label in LABELS if label in row]
    if len(labels) > 1:
        raise UserError(f"{place}: name the column of the label by --label, or leave one of "
                        f"{', '.join(labels)} in the file {known}")
    if labelled and not (labels and labels[0] in row):
        raise UserError(f"{place}: no column {labels[0] if labels else 'label'}: name it by "
                        f"--label {known}")
    if labels and labels[0] in texts[0]:
        raise UserError(f"{place}: --text and --label both name the column {labels[0]}")
    return texts[0], labels[0] if labels and labels[0] in row else ""


def _text(row: Mapping[str, Any], columns: tuple[str, ...], place: str) -> tuple[str, ...]:
    values = [row.get(column) for column in columns]
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    for value in values:
        if not isinstance(value, str):
            raise UserError(f"{place}: {' '.join(columns)} is " + (
                "missing" if value is None else f"{type(value).__name__}, not text"))
        _check_characters(value, place)
    if not any(value.strip() for value in values):
        raise UserError(f"{place}: the text is empty")
    return tuple(values)


def _label(row: Mapping[str, Any], column: str, place: str, needed: bool) -> Any:
    """A label as it is written; None where there is none."""
    value = row.get(column) if column else None
    if isinstance(value, str):
        value = value.strip()
        _check_characters(value, place)
    if isinstance(value, (list, dict)):
        raise UserError(f"{place}: {column} is a {type(value).__name__}: one label for each text "
                        "is supported")
    if isinstance(value, float) and math.isinf(value):
        raise UserError(f"{place}: label {value} is not finite")
    missing = value is None or value == "" or value != value  # NaN
    if missing and needed:
        raise UserError(f"{place}: no label in column {column}")
    return None if missing else value


def _tags(row: Mapping[str, Any], column: str, place: str, words: tuple[str, ...], needed: bool
          ) -> list[str] | None:
    """The tags of a sentence, one a word."""
    tags = row.get(column) if column else None
    if tags is None and not needed:
        return None
    if not isinstance(tags, list) or len(tags) != len(words) or any(
            isinstance(tag, bool) or not isinstance(tag, (str, int)) for tag in tags):
        raise UserError(f"{place}: {len(words)} words need a list of as many tags in column "
                        f"{column}, found {str(tags)[:80]}")
    return [str(tag) for tag in tags]


def _check_characters(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: half a surrogate pair (\\ud800 to \\udfff) is no character"
                        ) from error
