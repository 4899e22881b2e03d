"""Labelled texts → token ids with the positions that are answered → batches of packed rows.

A batch holds an exact number of examples, laid one after another into as few rows as they fit in,
so that hardly any padding is computed; its rows are of one of a few numbers, each compiled once.
Position ids restart and attention stays within each example, as in every packed row here.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbert_jax.data.batches import row_indices
from distilbert_jax.data.labelled import Labelled

if TYPE_CHECKING:
    import transformers

SHORTEST = 128  # tokens of a row, so that several short examples fill it
SHAPES = 3  # numbers of rows that batches have, each of which is compiled
CHUNK = 1000  # texts handed to the tokenizer at once


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples; of each, `positions` are answered: its first token, or its words'."""

    ids: list[np.ndarray]  # [n] int32 each
    types: list[np.ndarray]  # [n] int32 token types
    positions: list[np.ndarray]  # [p] int32, ascending
    words: list[np.ndarray]  # [p] which word each position stands for; 0 where there are none
    labels: list[np.ndarray]  # [p] float64, NaN where there is none
    cut: int  # how many were longer than allowed

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.array([len(ids) for ids in self.ids])

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where the positions of each example begin among those of all."""
        return np.concatenate([[0], np.cumsum([len(at) for at in self.positions])])

    def some(self, numbers: np.ndarray) -> "Examples":
        """The examples of these numbers, in this order."""
        return Examples(**{
            name: [getattr(self, name)[i] for i in numbers]
            for name in ("ids", "types", "positions", "words", "labels")}, cut=0)

    def __add__(self, other: "Examples") -> "Examples":
        return Examples(*(getattr(self, f.name) + getattr(other, f.name)
                          for f in dataclasses.fields(self)))


def encode(
    texts: Labelled, labels: Sequence[Any] | None,
    tokenizer: "transformers.PreTrainedTokenizerFast", max_length: int,
) -> Examples:
    """Tokenise; the longer text of a pair is cut first where both are too long together.

    Args:
        texts: the examples.
        labels: numbers, one an example, or one a word; None where there are none.
        tokenizer: of the model.
        max_length: tokens of the longest example.
    """
    parts: dict[str, list[np.ndarray]] = {
        name: [] for name in ("ids", "types", "positions", "words", "labels")}
    cut = 0
    for start in range(0, len(texts), CHUNK):
        chunk = texts.texts[start:start + CHUNK]
        some = None if labels is None else labels[start:start + CHUNK]
        given = [[list(t) for t in chunk]] if texts.tagged else [
            list(column) for column in zip(*chunk, strict=True)]
        options = dict(is_split_into_words=texts.tagged, return_token_type_ids=True,
                       verbose=False)  # what is cut is counted and said by us
        whole = tokenizer(*given, **options)
        long = [i for i, ids in enumerate(whole["input_ids"]) if len(ids) > max_length]
        cut += len(long)
        if long:
            whole = tokenizer(*given, truncation=True, max_length=max_length, **options)
            tokenizer.backend_tokenizer.no_truncation()
        for i, ids in enumerate(whole["input_ids"]):
            positions, words = _answered(whole.word_ids(i) if texts.tagged else None)
            own = np.full(len(positions), np.nan)
            if some is not None:
                own = np.asarray(some[i], float).reshape(-1)[words]
            for name, values in (("ids", np.asarray(ids, np.int32)), ("positions", positions),
                                 ("types", np.asarray(whole["token_type_ids"][i], np.int32)),
                                 ("words", words), ("labels", own)):
                parts[name].append(values)
    return Examples(**parts, cut=cut)


def _answered(words: list[int | None] | None) -> tuple[np.ndarray, np.ndarray]:
    """Positions that are answered and their words: the first token, or the first of each word."""
    if words is None:
        return np.zeros(1, np.int32), np.zeros(1, np.int32)
    first = {}
    for position, word in enumerate(words):
        if word is not None:
            first.setdefault(word, position)
    return np.array(list(first.values()), np.int32), np.array(list(first), np.int32)


def unknown(examples: Examples, tokenizer: "transformers.PreTrainedTokenizerFast") -> float:
    """Share of the tokens, but for those that the tokenizer adds, that it does not know."""
    ids = np.concatenate(examples.ids)
    ordinary = ids[~np.isin(ids, [i for i in tokenizer.all_special_ids
                                  if i != tokenizer.unk_token_id])]
    return float(np.mean(ordinary == tokenizer.unk_token_id)) if len(ordinary) else 0.0


def lay(lengths: Iterable[int] | np.ndarray, room: int) -> list[list[int]]:
    """Put examples into rows: each into the first row that has room for it.

    Args:
        lengths: of the examples, none above `room`.
        room: tokens of a row.

    Returns:
        The numbers of the examples of each row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for number, length in enumerate(lengths):
        row = next((i for i, left in enumerate(free) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(room)
        rows[row].append(number)
        free[row] -= length
    return rows


def rows_of(
    examples: Examples, rows: Sequence[Sequence[int]], length: int, width: int,
    answers: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Lay examples out as arrays.

    Args:
        examples: of which some are taken.
        rows: the numbers of the examples of each row, R of them.
        length: tokens of a row, T.
        width: positions of a row that can be answered, S.
        answers: [P, C] a teacher's logits at all positions of all examples; None without one.

    Returns:
        int32 [R, T]: `input_ids`, `token_type_ids`, `segment_ids`, `position_ids`. [R, S]:
        `target_positions` int32, `labels` float32 (0 where there is none), `label_weights`
        float32, 1 where there is one, `answer_weights` float32, 1 at each position; with a
        teacher `answers` [R, S, C].
    """
    out = {name: np.zeros((len(rows), length), np.int32) for name in (
        "input_ids", "token_type_ids", "segment_ids", "position_ids")}
    wide = {name: np.zeros((len(rows), width), np.int32 if name == "target_positions" else
                           np.float32)
            for name in ("target_positions", "labels", "label_weights", "answer_weights")}
    if answers is not None:
        wide["answers"] = np.zeros((len(rows), width, answers.shape[1]), answers.dtype)
    for row, numbers in enumerate(rows):
        at = done = 0
        for segment, number in enumerate(numbers, 1):
            size = len(examples.ids[number])
            here = row, slice(at, at + size)
            out["input_ids"][here] = examples.ids[number]
            out["token_type_ids"][here] = examples.types[number]
            out["segment_ids"][here] = segment
            out["position_ids"][here] = np.arange(size)
            count = len(examples.positions[number])
            there = row, slice(done, done + count)
            labels = examples.labels[number]
            wide["target_positions"][there] = at + examples.positions[number]
            wide["labels"][there] = np.nan_to_num(labels)
            wide["label_weights"][there] = ~np.isnan(labels)
            wide["answer_weights"][there] = 1
            if answers is not None:
                begin = examples.starts[number]
                wide["answers"][there] = answers[begin:begin + count]
            at, done = at + size, done + count
    return out | wide


class Grid:
    """The batches of a training: exactly `batch_size` examples each, a pure function of the step.

    It is a `data.batches.Batches`.
    """

    def __init__(
        self, examples: Examples, batch_size: int, steps: int, seed: int, multiple: int,
        answers: np.ndarray | None = None,
    ) -> None:
        """Plan all batches.

        Args:
            examples: of the training.
            batch_size: examples in a batch.
            steps: updates of the run.
            seed: of the order.
            multiple: that the number of rows of each batch is of.
            answers: [P, C] the teacher's, of all positions; None without one.
        """
        self.length = max(SHORTEST, int(-(-examples.lengths.max() // 8) * 8))
        self.batch_size = batch_size
        self._examples, self._seed, self._answers = examples, seed, answers
        counts = np.diff(examples.starts)
        needed, width = [], 1
        for step in range(steps):
            numbers, rows = self._laid(step)
            needed.append(-(-len(rows) // multiple) * multiple)
            width = max(width, max(sum(counts[numbers[i]] for i in row) for row in rows))
        ranked = sorted(needed)
        self._sizes = sorted({ranked[(len(ranked) - 1) * (i + 1) // SHAPES]
                              for i in range(SHAPES)})
        self._needed, self._width = needed, int(width)

    def _laid(self, step: int) -> tuple[np.ndarray, list[list[int]]]:
        # The longest first, so that short ones fill what is left (first-fit decreasing).
        numbers = self.names(step)
        lengths = self._examples.lengths
        numbers = numbers[np.argsort(-lengths[numbers], kind="stable")]
        return numbers, lay(lengths[numbers], self.length)

    def names(self, step: int) -> np.ndarray:
        """The examples of a batch."""
        return row_indices(self._seed, step, self.batch_size, len(self._examples))

    def size(self, step: int) -> int:
        """Rows of a batch."""
        return next(size for size in self._sizes if size >= self._needed[step])

    def read(self, step: int, own: np.ndarray) -> dict[str, np.ndarray]:
        """Some rows of a batch; `row` and `epoch` are what random draws are made from."""
        numbers, laid = self._laid(step)
        rows = [[int(numbers[i]) for i in laid[row]] if row < len(laid) else [] for row in own]
        batch = rows_of(self._examples, rows, self.length, self._width, self._answers)
        return batch | {"row": np.asarray(step * self._sizes[-1] + own, np.int32),
                        "epoch": np.zeros(len(own), np.int32)}

    def tokens_before(self, step: int) -> int:
        """Real tokens in all batches before a step."""
        return sum(int(self._examples.lengths[self.names(s)].sum()) for s in range(step))

    def filled(self, steps: int) -> float:
        """Share of the computed tokens of so many batches that are real."""
        computed = self.length * sum(self.size(step) for step in range(steps))
        return self.tokens_before(steps) / computed
