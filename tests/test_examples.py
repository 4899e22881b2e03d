"""Examples laid into rows: which positions are answered; batches of exactly so many examples."""

import dataclasses
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilbert_jax.data.examples import SHAPES, Examples, Grid, encode, lay, rows_of
from distilbert_jax.data.labelled import Labelled
from distilbert_jax.data.tokenize import load_tokenizer


def examples(lengths, positions=None, seed=0):
    """Random examples of these lengths, answered at their first token or where `positions` say."""
    random = np.random.default_rng(seed)
    positions = positions or [[0]] * len(lengths)
    return Examples(
        ids=[random.integers(5, 70, n).astype(np.int32) for n in lengths],
        types=[(np.arange(n) > n // 2).astype(np.int32) for n in lengths],
        positions=[np.array(p, np.int32) for p in positions],
        words=[np.arange(len(p), dtype=np.int32) for p in positions],
        labels=[random.integers(0, 3, len(p)).astype(float) for p in positions], cut=0)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_every_example_lies_in_one_row_with_room(lengths):
    rows = lay(lengths, 20)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[number] for number in row) <= 20 for row in rows)


def test_what_a_row_holds():
    some = examples([5, 3, 4], [[1, 3], [2], [0]])
    answers = np.arange(8.0).reshape(4, 2)
    batch = rows_of(some, [[2, 0], []], 12, 4, answers)
    assert batch["segment_ids"][0].tolist() == [1] * 4 + [2] * 5 + [0] * 3
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0]
    assert batch["input_ids"][0].tolist() == [*some.ids[2], *some.ids[0], 0, 0, 0]
    assert batch["token_type_ids"][0].tolist() == [*some.types[2], *some.types[0], 0, 0, 0]
    assert batch["target_positions"][0].tolist() == [0, 5, 7, 0]
    assert batch["labels"][0, :3].tolist() == [*some.labels[2], *some.labels[0]]
    assert batch["label_weights"][0].tolist() == [1, 1, 1, 0] == batch["answer_weights"][0].tolist()
    assert batch["answers"][0, :3].tolist() == [[6, 7], [0, 1], [2, 3]]
    assert not any(value[1].any() for value in batch.values())


def test_without_a_label_only_the_teacher_s_answer_counts():
    some = dataclasses.replace(examples([4, 4]), labels=[np.array([np.nan]), np.array([1.0])])
    batch = rows_of(some, [[0, 1]], 8, 2)
    assert batch["label_weights"][0].tolist() == [0, 1]
    assert batch["answer_weights"][0].tolist() == [1, 1] and np.isfinite(batch["labels"]).all()


@pytest.mark.parametrize("multiple", [1, 4])
def test_batches_are_exact_and_a_function_of_the_step(multiple):
    some = examples(np.random.default_rng(1).integers(3, 90, 50).tolist())
    grid, again = (Grid(some, 8, 20, 3, multiple) for _ in range(2))
    seen, rows = [], set()
    for step in range(20):
        size = grid.size(step)
        assert size % multiple == 0
        batch = grid.read(step, np.arange(size))
        assert batch["label_weights"].sum() == 8  # examples, not rows
        assert batch["input_ids"].shape == (size, grid.length) and grid.length % 8 == 0
        half = again.read(step, np.arange(size)[size // 2:])  # another process's rows
        for name, value in batch.items():
            np.testing.assert_array_equal(half[name], value[size // 2:])
        seen += list(grid.names(step))
        assert not rows & set(batch["row"].tolist())  # each row draws its own dropout
        rows |= set(batch["row"].tolist())
    assert sorted(seen[:50]) == list(range(50))  # every epoch holds each example once
    assert grid.tokens_before(20) == sum(some.lengths[seen])
    assert len({grid.size(step) for step in range(20)}) <= SHAPES and 0.5 < grid.filled(20) <= 1


def labelled(texts, tagged=False):
    return Labelled(texts, [None] * len(texts), ["x"] * len(texts), tagged)


def test_a_pair_has_token_types_and_the_longer_text_is_cut(toy):
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    pair = labelled([("ba be bu", "da"), ("ba " * 30, "da de")])
    found = encode(pair, [1, 0], tokenizer, 16)
    assert tokenizer.backend_tokenizer.truncation is None  # else it would be saved with it
    assert found.lengths.tolist() == [7, 16] and found.cut == 1
    assert found.types[0].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert found.ids[1].tolist()[-4:] == tokenizer("x", "da de")["input_ids"][-4:]
    assert tokenizer("ba " * 30)["input_ids"][20:]  # it does not truncate from now on
    whole = encode(labelled([("ba " * 14,)]), None, tokenizer, 16)
    assert whole.lengths.tolist() == [16] and whole.cut == 0
    assert [labels.tolist() for labels in found.labels] == [[1], [0]]


def test_a_text_that_is_cut_is_not_warned_of_by_transformers(toy, caplog, monkeypatch):
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    tokenizer.model_max_length = 16
    caplog.set_level("WARNING", "transformers")  # a command before this one may have silenced it
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    encode(labelled([("ba " * 30,)]), None, tokenizer, 16)
    assert not caplog.records
    tokenizer("ba " * 30)
    assert "longer than the specified maximum" in caplog.text  # so this is where it would stand


def test_a_tag_stands_at_the_first_piece_of_its_word(toy):
    tokenizer = load_tokenizer(str(toy / "teacher"), None)
    words = ("ba", "ba-be", "da")
    found = encode(labelled([words], tagged=True), [[2, 0, 1]], tokenizer, 32)
    pieces = [len(tokenizer(word)["input_ids"]) - 2 for word in words]
    assert pieces[1] > 1
    assert found.positions[0].tolist() == [1, 2, 2 + pieces[1]]
    assert found.words[0].tolist() == [0, 1, 2] and found.labels[0].tolist() == [2, 0, 1]
    short = encode(labelled([words], tagged=True), [[2, 0, 1]], tokenizer, 5)
    assert short.words[0].tolist() == [0, 1] and short.cut == 1
