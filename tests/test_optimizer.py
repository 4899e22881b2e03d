"""The schedule, what decays, what is frozen, what is clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distilbert_jax.config import TrainConfig
from distilbert_jax.training.optimizer import learning_rate, make_optimizer


@pytest.mark.parametrize("steps, share, warmup", [
    (20, 0.25, 5), (20, 0.05, 1), (20, 0.0, 1), (1, 0.5, 1), (7, 0.99, 7)])
def test_the_rate_rises_and_falls_along_two_lines(steps, share, warmup):
    schedule = learning_rate(TrainConfig(learning_rate=0.3, warmup=share), steps)
    for done in range(steps):
        factor = min((done + 1) / warmup, (steps - done) / (steps - warmup + 1))
        np.testing.assert_allclose(schedule(jnp.int32(done)), 0.3 * factor, rtol=1e-6)
        assert schedule(done) > 0
    np.testing.assert_allclose(schedule(steps), 0, atol=1e-7)


def test_the_rate_is_float64_where_all_is(x64):
    schedule = learning_rate(TrainConfig(learning_rate=0.3, warmup=0.5), 14)
    np.testing.assert_allclose(schedule(jnp.int32(2)), 0.3 * 3 / 7, rtol=1e-15)


PARAMS = {
    "embeddings": {"position": {"embedding": jnp.full((3, 2), 0.5)},
                   "word": {"embedding": jnp.full((4, 2), 0.5)}},
    "mlm_head": {"bias": jnp.full(4, 0.5), "transform": {"kernel": jnp.full((2, 2), 0.5)},
                 "norm": {"scale": jnp.full(2, 0.5)}}}


def updated(gradients, frozen=(), steps=3, **settings):
    config = TrainConfig(learning_rate=0.1, warmup=0.0, **settings)
    tx = make_optimizer(config, 10, frozen)
    update, params, state = jax.jit(tx.update), PARAMS, jax.jit(tx.init)(PARAMS)
    for _ in range(steps):
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_matrices_decay_and_vectors_do_not():
    params = updated(jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=0.5)
    rates = [0.1 * (10 - done) / 10 for done in range(3)]
    shrunk = 0.5 * np.prod([1 - rate * 0.5 for rate in rates])

    def check(leaf):
        np.testing.assert_allclose(leaf, shrunk if leaf.ndim > 1 else 0.5, rtol=1e-6)

    jax.tree.map(check, params)


def test_a_frozen_leaf_without_a_gradient_stays():
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    gradients["embeddings"]["position"]["embedding"] *= 0
    params = updated(gradients, ("embeddings/position",), weight_decay=0.5, clip=1.0)
    np.testing.assert_array_equal(params["embeddings"].pop("position")["embedding"], 0.5)
    jax.tree.map(lambda leaf: np.testing.assert_array_less(leaf, 0.5), params)


@pytest.mark.parametrize("clip", [1.0, 1e3])
def test_first_update_after_clipping(clip):
    """Adam's first update is g / (|g| + eps) of the clipped gradient g."""
    gradients = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-3), PARAMS)
    gradients["mlm_head"]["bias"] *= 1e4
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum())
                       for g in map(np.asarray, jax.tree.leaves(gradients))))
    assert 1 < norm < 1e3
    params = updated(gradients, steps=1, clip=clip)
    for after, g in zip(jax.tree.leaves(params), jax.tree.leaves(gradients), strict=True):
        g = np.asarray(g, np.float64) * min(1, clip / norm)
        np.testing.assert_allclose(after, 0.5 - 0.1 * g / (abs(g) + 1e-6), rtol=2e-6)
