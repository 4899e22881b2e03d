"""Checkpoints: what comes back is what went in, on any mesh; another run and damage are told."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_sharding import mesh_of

from distilbert_jax.checkpoint import Checkpoints, abstract, refuse_other_run
from distilbert_jax.config import UserError
from distilbert_jax.sharding import shardings
from distilbert_jax.train_step import init_state

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
SETTINGS = {"teacher": "a", "corpus": ("x.txt",), "temperature": 2.0}


@pytest.fixture(scope="module")
def state(tiny_model):
    """Parameters, moments that are not 0, and a key."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tiny_model()[1])
    tx = optax.adamw(0.1)
    state = init_state(params, tx, seed=7)
    _, moments = tx.update(params, state.opt_state, params)
    return dataclasses.replace(state, opt_state=moments)


def at(state, step):
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def place(state, shape):
    return jax.device_put(state, shardings(state, mesh_of(shape)))


def like(state, shape="8x1"):
    return abstract(state, shardings(state, mesh_of(shape)))


def save(output, *states):
    with Checkpoints(output, SETTINGS) as checkpoints:
        for state in states:
            checkpoints.save(state)


def restore(output, wanted):
    with Checkpoints(output, SETTINGS) as checkpoints:
        return checkpoints.restore(wanted)


def numbers(state):
    """As NumPy arrays, the key as its data."""
    return jax.tree.map(np.asarray, dataclasses.replace(state, key=jax.random.key_data(state.key)))


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A run that saved updates 3, 5 and 9 from a 8x1 mesh, and left the block at once."""
    output = tmp_path_factory.mktemp("saved")
    save(output, *(place(at(state, step), "8x1") for step in (3, 5, 9)))
    return output


@pytest.mark.parametrize("shape", ["8x1", "4x2", "1x1"])
def test_bit_for_bit_on_any_mesh(shape, state, saved):
    back = restore(saved, like(state, shape))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert back.step == 9
    assert jax.tree.map(lambda x: x.sharding, back) == shardings(state, mesh_of(shape))
    assert back.key.dtype == state.key.dtype
    jax.tree.map(np.testing.assert_array_equal, numbers(back), numbers(at(state, 9)))


def test_two_are_kept(saved):
    assert {path.name for path in (saved / "checkpoints").iterdir()} == {"5", "9"}


def test_saving_the_same_update_twice(state, tmp_path):
    save(tmp_path, at(state, 3), at(state, 3))
    save(tmp_path, at(state, 3))
    assert restore(tmp_path, like(state)).step == 3


def test_the_beginning(state, tmp_path):
    assert restore(tmp_path, like(state)) is None
    refuse_other_run(tmp_path / "absent", SETTINGS)


def test_another_run_is_refused_field_by_field(saved):
    refuse_other_run(saved, SETTINGS)
    with pytest.raises(UserError) as error:
        refuse_other_run(saved, SETTINGS | {"teacher": "b", "temperature": 4.0})
    assert str(error.value) == (
        f"{saved} holds the checkpoints of another run (--teacher was a, is b; --temperature was "
        "2.0, is 4.0); choose another --output, or remove it")


def damage(output, step, part):
    """Cut short every file of one part of a checkpoint."""
    for path in (output / "checkpoints" / str(step) / part).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])


def test_an_unreadable_checkpoint_is_named(state, tmp_path):
    save(tmp_path, at(state, 3), at(state, 5))
    damage(tmp_path, 5, "state")
    newest = tmp_path / "checkpoints" / "5"
    with pytest.raises(UserError) as error:
        restore(tmp_path, like(state))
    assert f"checkpoint {newest} cannot be read" in str(error.value)
    assert "\n" not in str(error.value)

    damage(tmp_path, 5, "settings")
    with pytest.raises(UserError, match=f"damaged .* remove {newest} to go on"):
        refuse_other_run(tmp_path, SETTINGS)


def test_settings_lie_beside_the_state(saved):
    text = (saved / "checkpoints" / "9" / "settings" / "metadata").read_text()
    assert json.loads(text) == SETTINGS | {"corpus": ["x.txt"]}
