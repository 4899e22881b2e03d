"""Masking: how many, which, and what becomes of them; derived from the rates, not pasted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distilbert_jax.config import EVALUATION_MASKING, Masking
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.training.labels import (
    LABELS,
    mask_tokens,
    num_predictions,
    row_keys,
    vocabulary,
)
from distilbert_jax.training.objective import Objective, loss_counts, total_loss

# A right sampler fails a statistical test here with this probability (and never flickers: the
# keys are fixed).
UNLIKELY = 1e-6

LENGTH, SPECIAL = 40, [0, 1, 2, 3, 4]
COUNTS = np.arange(72) ** 2
TABLE = vocabulary(COUNTS, SPECIAL, 4)
KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=3)
def masked(key, batch, table, masking):
    return mask_tokens(row_keys(key, batch), batch, table, masking)


def rows(lengths, seed, words=72):
    """Single documents [CLS] … [SEP] of `lengths` tokens, padded to LENGTH."""
    ids = np.random.default_rng(seed).integers(5, words, (len(lengths), LENGTH), dtype=np.int32)
    at, size = np.arange(LENGTH), np.array(lengths)[:, None]
    ids = np.where(at == 0, 2, np.where(at == size - 1, 3, ids)) * (at < size)
    return {"input_ids": jnp.asarray(ids, jnp.int32),
            "segment_ids": jnp.asarray(at < size, jnp.int32),
            "position_ids": jnp.asarray(np.broadcast_to(at, ids.shape), jnp.int32),
            "row": jnp.arange(len(ids)), "epoch": jnp.zeros(len(ids), jnp.int32)}


def expected_number(real, eligible, rate=0.15):
    return min(max(1, int(np.floor(rate * real + 0.5))), eligible)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, LENGTH), min_size=6, max_size=6), st.integers(0, 2**31))
def test_what_is_masked(lengths, seed):
    before = rows(lengths, seed)
    after = jax.device_get(masked(jax.random.key(seed), before, TABLE, Masking()))
    ids = np.asarray(before["input_ids"])
    for row, real in enumerate(lengths):
        chosen = after["masked_positions"][row][after["label_weights"][row] == 1]
        eligible = np.flatnonzero(~np.isin(ids[row, :real], SPECIAL))
        assert len(set(chosen)) == len(chosen) == expected_number(real, len(eligible))
        assert np.isin(chosen, eligible).all()
        np.testing.assert_array_equal(
            after["labels"][row][after["label_weights"][row] == 1], ids[row, chosen])
        untouched = np.setdiff1d(np.arange(LENGTH), chosen)
        np.testing.assert_array_equal(after["input_ids"][row, untouched], ids[row, untouched])
        assert not np.isin(after["input_ids"][row, chosen], [0, 1, 2, 3]).any()
    for name in ("segment_ids", "position_ids"):
        np.testing.assert_array_equal(after[name], before[name])


def test_the_width_holds_every_row():
    """The number of a full row, computed in float32 inside the step, never exceeds the width."""
    for rate in (0.05, 0.15, 0.2, 0.4):
        lengths = np.arange(8, 1025)
        inside = np.floor(np.float32(rate) * lengths.astype(np.float32) + np.float32(0.5))
        assert all(num_predictions(int(n), rate) >= k for n, k in zip(lengths, inside, strict=True))


def test_80_10_10_and_uniform_replacements():
    before = rows([LENGTH] * 4000, 1)
    after = masked(jax.random.key(1), before, TABLE, Masking())
    at = after["masked_positions"]
    got = np.asarray(jnp.take_along_axis(after["input_ids"], at, 1)).ravel()
    was = np.asarray(after["labels"]).ravel()
    hidden, same = (got == 4), (got == was)
    n, ordinary = len(got), len(TABLE.ordinary_ids)
    assert n == 4000 * 6 and ordinary == 72 - len(SPECIAL)
    drawn = got[~hidden & ~same]
    # A random replacement is the original itself once in `ordinary` draws.
    shares = {"mask": (hidden, 0.8), "same": (same, 0.1 + 0.1 / ordinary)}
    for name, (event, share) in shares.items():
        low, high = stats.binom.interval(1 - UNLIKELY, n, share)
        assert low <= event.sum() <= high, (name, event.sum(), low, high)
    # Given its label, a drawn id is uniform over the other ordinary ids.
    words = np.arange(5, 72)
    expected = [(was[~hidden & ~same] != w).sum() / (ordinary - 1) for w in words]
    observed = np.array([(drawn == w).sum() for w in words])
    assert observed.sum() == len(drawn) and observed.all()  # also the first word and the last
    assert stats.chisquare(observed, expected).pvalue > UNLIKELY


@pytest.mark.parametrize("smoothing", [0.7, 0.0])
def test_rare_tokens_are_chosen_more_often(smoothing):
    """One draw per row of 6 words: frequency proportional to count**-smoothing."""
    words = np.array([5, 6, 10, 20, 40, 71], np.int32)
    ids = jnp.asarray(np.tile(words, (20000, 1)))
    batch = {"input_ids": ids, "segment_ids": jnp.ones_like(ids), "position_ids": ids * 0,
             "row": jnp.arange(len(ids)), "epoch": jnp.zeros(len(ids), jnp.int32)}
    after = masked(jax.random.key(2), batch, TABLE, Masking(smoothing=smoothing))
    assert after["labels"].shape == (20000, 1)
    weights = COUNTS[words] ** -smoothing
    observed = (np.asarray(after["labels"]) == words).sum(0)
    expected = 20000 * weights / weights.sum()
    assert stats.chisquare(observed, expected).pvalue > UNLIKELY


def test_evaluation_hides_every_chosen_token():
    after = masked(jax.random.key(3), rows([LENGTH, 25, 9], 3), TABLE, EVALUATION_MASKING)
    at = jnp.take_along_axis(after["input_ids"], after["masked_positions"], 1)
    assert (at[after["label_weights"] == 1] == 4).all() and after["label_weights"].sum() == 6 + 5


def test_rows_without_ordinary_tokens_weigh_nothing_and_stay_finite(tiny_model):
    """[CLS] [SEP] alone, and padding alone; in a batch of nothing else."""
    batch = masked(jax.random.key(4), rows([2, 0], 4), TABLE, Masking())
    assert (batch["label_weights"] == 0).all()
    np.testing.assert_array_equal(batch["input_ids"], rows([2, 0], 4)["input_ids"])
    config, params = tiny_model(max_position_embeddings=LENGTH)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    graph = graphdef(config, jnp.float32)
    student, teacher = (nnx.merge(graph, params) for _ in range(2))
    objective = Objective(weights={"ce": 5.0, "mlm": 2.0, "cos": 1.0, "mse": 1.0})
    total, means = nnx.jit(lambda student, teacher, batch: total_loss(
        student, [teacher], batch, objective, loss_counts(batch, objective), {}))(
        student, teacher, batch)
    assert set(means) == {"ce", "mlm", "cos", "mse"} and means["mlm"] == 0
    assert all(jnp.isfinite(value) for value in (total, *means.values()))


def test_a_pure_function_of_the_key():
    before = rows([LENGTH, 30], 5)
    first, again, other = (masked(jax.random.key(k), before, TABLE, Masking()) for k in (0, 0, 1))
    eager = mask_tokens(row_keys(jax.random.key(0), before), before, TABLE, Masking())
    jax.tree.map(np.testing.assert_array_equal, first, again)
    jax.tree.map(np.testing.assert_array_equal, first, eager)
    assert (first["masked_positions"] != other["masked_positions"]).any()


def test_the_table():
    table = vocabulary(np.array([9, 0, 3, 0]), [0], 0)
    np.testing.assert_array_equal(table.counts, [0, 1, 3, 1])  # what never occurs counts as 1
    np.testing.assert_array_equal(table.ordinary_ids, [1, 2, 3])


def test_a_row_means_the_same_beside_any_others():
    """Its masks depend on its number and epoch alone, not on its position in the batch."""
    before = rows([LENGTH, 30, 21, 9], 6)
    whole = masked(jax.random.key(0), before, TABLE, Masking())
    for picked in ([2], [3, 1], [1, 0, 3]):
        at = np.array(picked)
        some = masked(KEY, {name: x[at] for name, x in before.items()}, TABLE, Masking())
        for name, value in some.items():
            np.testing.assert_array_equal(value, whole[name][at])
    later = masked(jax.random.key(0), before | {"epoch": before["epoch"] + 1}, TABLE, Masking())
    assert (later["masked_positions"] != whole["masked_positions"]).any(1).all()
    other = masked(jax.random.key(0), before | {"row": before["row"] + 4}, TABLE, Masking())
    assert (other["masked_positions"] != whole["masked_positions"]).any(1).all()


def test_next_tokens():
    """Two documents and padding; the last token of each has no successor."""
    batch = {"input_ids": jnp.array([[2, 7, 3, 2, 3, 0], [2, 8, 9, 8, 5, 3]]),
             "segment_ids": jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])}
    after = LABELS["clm"](jax.random.split(KEY, 2), batch, TABLE, Masking())
    assert after["label_weights"].tolist() == [[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert after["labels"][0, :2].tolist() == [7, 3] and after["labels"][0, 3] == 3
    assert after["labels"][1, :5].tolist() == [8, 9, 8, 5, 3]
    assert after["masked_positions"].tolist() == [list(range(6))] * 2
    np.testing.assert_array_equal(after["input_ids"], batch["input_ids"])


def test_labels_that_are_given_stay():
    batch = rows([9], 0) | {"labels": jnp.array([[1]])}
    assert LABELS["given"](jax.random.split(KEY, 1), batch, TABLE, Masking()) is batch
