"""The schedule, what decays, what is frozen, what is clipped."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_sharding import mesh_of

from distilbert_jax.config import TrainConfig
from distilbert_jax.machine.sharding import by_rows, replicated, shardings
from distilbert_jax.training.checkpoint import Checkpoints, abstract
from distilbert_jax.training.optimizer import learning_rate, make_optimizer
from distilbert_jax.training.train_step import TrainState, _updated


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


def test_adamw_is_that_of_optax(x64):
    config = TrainConfig(learning_rate=0.1, warmup=0.2, weight_decay=0.5, clip=1.0)
    random = np.random.default_rng(0)
    ours, theirs = make_optimizer(config, 10), optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(
            learning_rate(config, 10), b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.5,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)))
    start = jax.tree.map(lambda x: x.astype(float), PARAMS)
    states, close = [tx.init(start) for tx in (ours, theirs)], functools.partial(
        np.testing.assert_allclose, rtol=1e-13)
    for _ in range(4):
        gradients = jax.tree.map(
            lambda x: jnp.asarray(random.normal(size=x.shape)), PARAMS)
        (found, states[0]), (known, states[1]) = (
            tx.update(gradients, state, start) for tx, state in zip(
                (ours, theirs), states, strict=True))
        jax.tree.map(close, found, known)
    jax.tree.map(close, *map(jax.tree.leaves, states))


@pytest.mark.parametrize("which", ["adamw", "muon"])
def test_no_state_changes_by_an_update_that_is_not_finite(which):
    params = PARAMS | {"layers": {"0": {"up": {"kernel": jnp.ones((4, 6))}}}}
    tx = make_optimizer(TrainConfig(optimizer=which), 10)
    ones = jax.tree.map(jnp.ones_like, params)
    _, before = tx.update(ones, tx.init(params), params, finite=jnp.bool(True))
    _, after = tx.update(jax.tree.map(lambda x: x * jnp.nan, ones), before, params,
                         finite=jnp.bool(False))
    assert jax.tree.leaves(before)[0] == 1
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_on_a_cpu_no_parameters_and_no_moments_are_copied():
    tx, params = make_optimizer(TrainConfig(), 10), {"word": {"embedding": jnp.ones((1000, 300))}}
    state = TrainState(jnp.int32(0), params, tx.init(params), jax.random.key(0))

    def step(state, gradients):
        return _updated(tx, state, jnp.float32(1), gradients)

    program = jax.jit(step, donate_argnums=0).lower(state, params).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1000
    assert not [line for line in program.as_text().splitlines()
                if " copy(" in line and "f32[1000,300]" in line]


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(x64):
    """By the definition of Jordan et al. 2024: Nesterov momentum 0.95, five steps of Newton-Schulz.
    """
    random = np.random.default_rng(0)
    matrices = [random.normal(size=shape) for shape in ((4, 6), (6, 4))]
    layer = {"up": {"kernel": matrices[0], "bias": np.ones(6)}, "down": {"kernel": matrices[1]}}
    params = jax.tree.map(jnp.asarray, PARAMS | {"layers": {0: layer}})
    gradients = [jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape)), params)
                 for _ in range(2)]

    def trained(optimizer):
        config = TrainConfig(learning_rate=0.1, warmup=0.0, weight_decay=0.5, clip=1e3,
                             optimizer=optimizer)
        tx, after = make_optimizer(config, 10), params
        state = tx.init(after)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, after)
            after = optax.apply_updates(after, updates)
        return after

    found, plain = trained("muon"), trained("adamw")
    for name, start in zip(("up", "down"), matrices, strict=True):
        x, mean = start, np.zeros_like(start)
        for done, gradient in enumerate(gradients):
            g = np.asarray(gradient["layers"][0][name]["kernel"])
            mean = 0.95 * mean + 0.05 * g
            ahead = 0.95 * mean / (1 - 0.95 ** (done + 2)) + 0.05 * g / (1 - 0.95 ** (done + 1))
            u = ahead / np.linalg.norm(ahead)
            for _ in range(5):
                square = u @ u.T
                u = 3.4445 * u + (-4.775 * square + 2.0315 * square @ square) @ u
            x = x - 0.1 * (10 - done) / 10 * (0.2 * np.sqrt(6) * u + 0.5 * x)
        np.testing.assert_allclose(found["layers"][0][name].pop("kernel"), x, rtol=1e-6)
        plain["layers"][0][name].pop("kernel")
    jax.tree.map(np.testing.assert_array_equal, found, plain)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
def test_muon_on_a_mesh_and_out_of_a_checkpoint(problem, vocabulary, tmp_path, x64):
    config = TrainConfig(learning_rate=0.01, warmup=0.0, optimizer="muon")
    problem = dataclasses.replace(problem, tx=make_optimizer(config, 4))

    def step(state, shape, number):
        mesh = mesh_of(shape)
        layout, whole = shardings(state, mesh), replicated(mesh)
        return jax.jit(problem.step(mesh=mesh), out_shardings=(layout, whole), in_shardings=(
            layout, shardings(problem.teachers, mesh), whole, by_rows(mesh)))(
            jax.device_put(state, layout), problem.teachers, vocabulary, problem.batches[number])[0]

    alone = step(problem.state(), "1x1", 0)
    divided = step(problem.state(), "4x2", 0)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(divided)
        checkpoints.wait()
        again = checkpoints.restore(abstract(divided, shardings(divided, mesh_of("2x4"))))
    jax.tree.map(np.testing.assert_array_equal, *(
        jax.device_get((state.params, state.opt_state)) for state in (again, divided)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9),
        *(jax.device_get(state.params) for state in (step(alone, "1x1", 1), step(again, "2x4", 1))))
