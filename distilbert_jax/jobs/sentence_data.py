"""What sentence encoders are judged on: pairs that people have scored, and titles of texts."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from distilbert_jax.data import labelled, readers, targets
from distilbert_jax.data.labelled import Columns
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation.similarity import cosines
from distilbert_jax.machine import store

ANY = Columns()  # by the header
Encode = Callable[..., np.ndarray]  # texts, and names of a prompt → vectors [n, D]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of sentences with people's scores."""

    name: str
    texts: list[str]  # each different sentence once
    left: np.ndarray  # [n] number of the first sentence of each pair
    right: np.ndarray
    scores: list[float]

    def cosines(self, vectors: np.ndarray) -> np.ndarray:
        """The cosine of each pair, from the vectors of `texts`."""
        return cosines(vectors[self.left], vectors[self.right])


def read_pairs(name: str, columns: Columns = ANY) -> Pairs:
    """Read a file of scored pairs, e.g. with the columns score, sentence1 and sentence2.

    Raises:
        UserError: as for labelled.read; no pairs, a score that is no number, all scores equal.
    """
    found = labelled.read([name], columns, "dev")
    if len(found.texts[0]) != 2 or found.tagged:
        raise UserError(f"{name} holds single texts: name the two columns of the pair by --text, "
                        "or as sentence1 and sentence2 in the header")
    scores = targets.numbers(found)
    if len(set(scores)) < 2:
        raise UserError(f"{name}: all {len(scores)} scores are {scores[0]:g}: no correlation with "
                        "them is defined")
    if empty := [place for texts, place in zip(found.texts, found.where, strict=True)
                 if not all(text.strip() for text in texts)]:
        raise UserError(f"{empty[0]}: a sentence of the pair is empty")
    number = {text: i for i, text in enumerate(dict.fromkeys(
        text for texts in found.texts for text in texts))}
    left, right = (np.array([number[texts[i]] for texts in found.texts]) for i in range(2))
    path = Path(name)
    short = path.name.split(".")[0]
    return Pairs(f"{path.parent.name}/{short}" if path.parent.name else short, list(number),
                 left, right, scores)


def read_all_pairs(names: Sequence[str], columns: Columns = ANY) -> list[Pairs]:
    """Read files of scored pairs; those whose short names are alike are called as they are given.
    """
    found = [read_pairs(name, columns) for name in names]
    short = [part.name for part in found]
    return [dataclasses.replace(part, name=name) if short.count(part.name) > 1 else part
            for name, part in zip(names, found, strict=True)]


@dataclasses.dataclass(frozen=True)
class Titles:
    """Texts and their titles, which look for them."""

    titles: list[str]
    texts: list[str]


def read_titles(names: Sequence[str]) -> Titles | None:
    """Read JSON lines of title and text; None of no files.

    Raises:
        UserError: a file is missing or damaged, or a record has no title or text.
    """
    if not names:
        return None
    found = Titles([], [])
    for name in names:
        if not store.exists(name):
            raise UserError(f"{name}: no such file")
        for where, record in readers.records(name):
            for field, texts in (("title", found.titles), ("text", found.texts)):
                value = record.get(field)
                if not isinstance(value, str) or not value.strip():
                    raise UserError(f"{where}: no text in the field {field!r}")
                texts.append(value)
    if len(found.titles) < 20:
        raise UserError(f"{' '.join(names)}: {len(found.titles)} texts are too few to look among")
    return found
