"""Which layers the student keeps, and that it starts as a copy."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distilbert_jax.errors import UserError
from distilbert_jax.models import bert
from distilbert_jax.models.encoder import abstract_params, graphdef
from distilbert_jax.models.student import (
    choose_layers,
    remove_layers,
    student_config,
    student_params,
)


@pytest.mark.parametrize("wish, teacher, layers", [
    ("", 12, [0, 2, 4, 7, 9, 11]),  # those of the paper's code
    ("6", 12, [0, 2, 4, 7, 9, 11]),
    ("3", 12, [0, 6, 11]),  # 5.5 rounds to the even 6
    ("12", 12, list(range(12))),
    ("1", 12, [0]),
    ("", 1, [0]),
    ("1,3,5", 6, [1, 3, 5]),
    ("4,", 6, [4]),
    ("5,0", 6, [0, 5]),
])
def test_choose_layers(wish, teacher, layers):
    assert choose_layers(wish, teacher) == layers


@pytest.mark.parametrize("teacher", range(1, 25))
def test_even_spreading_repeats_no_layer(teacher):
    for count in range(1, teacher + 1):
        layers = choose_layers(str(count), teacher)
        assert len(set(layers)) == count and layers[0] == 0
        assert count == 1 or layers[-1] == teacher - 1


@pytest.mark.parametrize("wish, message", [
    ("0", "teacher has 12 layers"), ("13", "teacher has 12 layers"), ("-1", "12 layers"),
    ("0,12", "0 to 11"), ("-1,3", "0 to 11"), (",", "12 layers"),
    ("1,1", "names a layer twice"), ("six", "must be a number"), ("1;2", "must be a number")])
def test_wishes_that_cannot_be(wish, message):
    with pytest.raises(UserError, match=message) as error:
        choose_layers(wish, 12)
    assert f"--student-layers {wish}" in str(error.value)


@pytest.fixture(scope="module")
def teacher(tiny_model):
    return tiny_model(num_hidden_layers=3, pooler=True)


def test_the_student_shares_the_teachers_values(teacher):
    config, params = teacher
    before = copy.deepcopy(params)
    student = student_params(params, [0, 2], fold_token_type=False)
    assert set(student) == {"embeddings", "layers", "mlm_head"}
    assert set(student["embeddings"]) == {"word", "position", "norm"}
    for ours, theirs in [
            (student["layers"][0], params["layers"][0]), (student["layers"][1],
                                                          params["layers"][2]),
            (student["mlm_head"], params["mlm_head"]),
            (student["embeddings"]["position"], params["embeddings"]["position"])]:
        assert all(a is b for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs),
                                          strict=True))
    _, shape = student_config(bert.FAMILY, config, 2, dropout=0.2)
    assert jax.tree.map(np.shape, student) == jax.tree.map(
        lambda leaf: leaf.shape, abstract_params(shape))
    assert shape.hidden_dropout == shape.attention_dropout == 0.2
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_folding_starts_with_the_teachers_embeddings(teacher, x64, batch_of):
    config, params = teacher
    before = copy.deepcopy(params)
    batch = jax.tree.map(jnp.asarray, batch_of([[5, 6], [9]], 12))

    def embedded(config, params):
        model = nnx.merge(graphdef(config, jnp.float64), params)
        return model.embeddings(batch["input_ids"], batch["position_ids"], None, None)

    expected = embedded(config, params)
    _, shape = student_config(bert.FAMILY, config, 2, 0.0)
    folded, dropped = (embedded(shape, student_params(params, [0, 2], fold))
                       for fold in (True, False))
    np.testing.assert_allclose(folded, expected, rtol=0, atol=1e-13)
    assert abs(dropped - expected).max() > 0.01
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_layers_are_removed_one_by_one_where_it_costs_least():
    worth, asked = [5.0, 1.0, 4.0, 0.5], []

    def change(layers):
        asked.append(layers)
        return sum(worth) - sum(worth[n] for n in layers)

    assert remove_layers(4, 2, change) == [
        ([0, 1, 2, 3], 0.0), ([0, 1, 2], 0.5), ([0, 2], 1.5)]
    assert len(asked) == 4 + 3 + 2 * 2 and remove_layers(2, 2, change) == [([0, 1], 0.0)]


def test_layers_are_exchanged_where_removal_went_astray():
    costs = {(0, 1, 2): 0.2, (0, 1, 3): 0.3, (0, 2, 3): 0.3, (1, 2, 3): 0.1,  # so that 0 goes,
             (2, 3): 1.0, (1, 3): 0.9, (1, 2): 0.8, (0, 1): 0.7, (0, 2): 0.6, (0, 3): 0.5}
    assert remove_layers(4, 2, lambda layers: costs[tuple(layers)]) == [
        ([0, 1, 2, 3], 0.0), ([1, 2, 3], 0.1), ([1, 2], 0.8), ([0, 2], 0.6), ([0, 3], 0.5)]
