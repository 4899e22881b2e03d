"""Batches: a pure function of (seed, step) that drops nothing and restores every segment."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilbert_jax.data import batches, pack


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 30), st.integers(1, 20))
def test_epochs_are_permutations_in_any_batch_size(seed, batch_size, num_rows, steps):
    run = [batches.row_indices(seed, step, batch_size, num_rows) for step in range(steps)]
    assert all(indices.shape == (batch_size,) for indices in run)
    stream = np.concatenate(run)
    for start in range(0, len(stream), num_rows):
        epoch = stream[start:start + num_rows]
        assert len(set(epoch.tolist())) == len(epoch)
        assert set(epoch.tolist()) <= set(range(num_rows))
    one_by_one = [batches.row_indices(seed, i, 1, num_rows)[0] for i in range(len(stream))]
    np.testing.assert_array_equal(stream, one_by_one)


def test_order_depends_on_seed_and_epoch():
    def epoch(seed, number):
        return batches.row_indices(seed, number, 100, 100).tolist()

    assert epoch(1, 0) == epoch(1, 0)
    assert epoch(1, 0) != epoch(1, 1)
    assert epoch(1, 0) != epoch(2, 0)


def test_far_step_is_as_near_as_the_first():
    batches._permutation.cache_clear()
    batches.row_indices(0, 10**9, 4, 10)
    assert batches._permutation.cache_info().misses <= 2


@given(st.lists(st.integers(1, 8), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_read_restores_every_piece_once(lengths, random):
    pieces = [[random.randint(1, 99) for _ in range(n)] for n in lengths]
    shard = pack.pack(np.array(sum(pieces, []), np.uint8), np.array(lengths), 8, pad_id=0)
    packed = pack.PackedRows(shard["row"], shard["segments"], np.zeros(100, np.int64), {})

    batch = batches.read(packed, np.arange(len(packed)))
    assert {v.dtype for v in batch.values()} == {np.dtype(np.int32)}
    assert batch.pop("row").tolist() == list(range(len(shard))) and not batch.pop("epoch").any()
    assert {v.shape for v in batch.values()} == {(len(shard), 8)}
    padding = batch["segment_ids"] == 0
    assert (~padding).sum() == sum(lengths)
    assert not batch["input_ids"][padding].any() and not batch["position_ids"][padding].any()
    found = []
    for ids, segments, positions in zip(*batch.values(), strict=True):
        for number in range(1, segments.max() + 1):
            own = segments == number
            found.append(ids[own].tolist())
            np.testing.assert_array_equal(positions[own], np.arange(own.sum()))
    assert sorted(found) == sorted(pieces)


def test_read_gathers_in_the_order_asked():
    rows = np.arange(12, dtype=np.uint16).reshape(3, 4)
    packed = pack.PackedRows(rows, np.full((3, 1), 4, np.uint16), np.zeros(12, np.int64), {})
    batch = batches.read(packed, np.array([2, 0, 2]))
    np.testing.assert_array_equal(batch["input_ids"], rows[[2, 0, 2]])
    assert batch["row"].tolist() == [2, 0, 2]


def test_a_row_is_drawn_once_an_epoch():
    """So its number and its epoch, from which its random draws are made, never come twice."""
    drawn = [(row, epoch) for step in range(12) for row, epoch in zip(
        batches.row_indices(3, step, 5, 12), batches.row_epochs(step, 5, 12), strict=True)]
    assert len(set(drawn)) == len(drawn) == 60
    assert {epoch for _, epoch in drawn} == {0, 1, 2, 3, 4}


def test_tokens_before_a_step_are_those_of_its_batches():
    """In the second and third epoch, too, whose orders are others."""
    segments = np.arange(1, 8, dtype=np.uint16)[:, None]
    packed = pack.PackedRows(np.ones((7, 7), np.uint8), segments, np.array([0, 28]), {})
    run, seen = batches.PackedBatches(packed, 3, 4), 0
    for step in range(6):
        assert run.tokens_before(step) == seen
        seen += int((run.read(step, np.arange(4))["segment_ids"] > 0).sum())


def test_some_rows_of_a_batch_are_those_of_the_whole():
    """Also of one that spans two epochs."""
    packed = pack.PackedRows(np.ones((7, 7), np.uint8), np.full((7, 1), 7, np.uint16),
                             np.array([0, 49]), {})
    run, own = batches.PackedBatches(packed, 3, 4), np.array([2, 3])
    whole, some = run.read(1, np.arange(4)), run.read(1, own)
    assert set(whole["epoch"]) == {0, 1}
    for name, value in whole.items():
        np.testing.assert_array_equal(some[name], value[own])


def test_prefetch_is_ahead_by_two_and_in_order():
    made = []

    def make(step):
        made.append(step)
        return step

    with batches.Prefetch(make, range(3, 8)) as ahead:
        assert next(ahead) == 3
        ahead._ahead[-1].result()
        assert made == [3, 4, 5]
        assert list(ahead) == [4, 5, 6, 7]
    assert made == [3, 4, 5, 6, 7]


def test_prefetch_raises_where_the_batch_is_taken():
    with batches.Prefetch(lambda step: 1 // (step - 1), range(5)) as ahead:
        assert next(ahead) == -1
        with pytest.raises(ZeroDivisionError):
            next(ahead)


def test_prefetch_tells_how_long_it_was_waited_for(monkeypatch):
    clock = iter([0, 1, 9, 10, 20, 21, 30])  # made; taken from, to, asked; and again
    monkeypatch.setattr(batches, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with batches.Prefetch(lambda step: step, range(3)) as ahead:
        next(ahead)
        assert ahead.waiting() == 8 / 10
        next(ahead)
        assert ahead.waiting() == 1 / 20
