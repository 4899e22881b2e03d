"""Batches: a pure function of (seed, step) that drops nothing and restores every segment."""

import numpy as np
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
    pieces = [np.array([random.randint(1, 99) for _ in range(n)], np.uint8) for n in lengths]
    packed_rows = list(pack.pack(pieces, 8))
    rows = np.zeros((len(packed_rows), 8), np.uint8)
    segments = np.zeros((len(packed_rows), max(map(len, packed_rows))), np.uint16)
    for r, row in enumerate(packed_rows):
        rows[r, :sum(map(len, row))] = np.concatenate(row)
        segments[r, :len(row)] = [len(piece) for piece in row]
    packed = pack.PackedRows(rows, segments, np.zeros(100, np.int64), {})

    batch = batches.read(packed, np.arange(len(packed)))
    assert {(v.dtype, v.shape) for v in batch.values()} == {(np.dtype(np.int32), rows.shape)}
    padding = batch["segment_ids"] == 0
    assert (~padding).sum() == sum(lengths)
    assert not batch["input_ids"][padding].any() and not batch["position_ids"][padding].any()
    for r, row in enumerate(packed_rows):
        for number, piece in enumerate(row, 1):
            own = batch["segment_ids"][r] == number
            np.testing.assert_array_equal(batch["input_ids"][r][own], piece)
            np.testing.assert_array_equal(batch["position_ids"][r][own], np.arange(len(piece)))


def test_read_gathers_in_the_order_asked():
    rows = np.arange(12, dtype=np.uint16).reshape(3, 4)
    packed = pack.PackedRows(rows, np.full((3, 1), 4, np.uint16), np.zeros(12, np.int64), {})
    batch = batches.read(packed, np.array([2, 0, 2]))
    np.testing.assert_array_equal(batch["input_ids"], rows[[2, 0, 2]])
