"""Initial parameters: the plain ones of a family, and those for pretraining from nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distilbert_jax.models.encoder import graphdef
from distilbert_jax.models.start import init_params, init_to_pretrain


def test_random_start(tiny_model):
    config, _ = tiny_model(vocab_size=4000, initializer_range=0.02)
    params = init_params(config, seed=3)
    words = params["embeddings"]["word"]["embedding"]
    spread = 0.02 / np.sqrt(2 * words.size)  # standard error of a standard deviation
    assert abs(words.std() - 0.02) < 5 * spread
    assert abs(params["embeddings"]["position"]["embedding"].std() / 0.02 - 1) < 0.2
    layer = params["layers"][0]
    assert abs(layer["attention"]["query"]["kernel"].std() / 0.02 - 1) < 0.2
    assert (layer["ffn"]["up"]["bias"] == 0).all() and (layer["output_norm"]["scale"] == 1).all()
    assert (words != init_params(config, seed=4)["embeddings"]["word"]["embedding"]).any()


def test_for_pretraining_the_first_heads_look_at_their_neighbours(tiny_model):
    """On random words, head by head: one to the left, one to the right, two to the left, ..."""
    config, _ = tiny_model(vocab_size=400, hidden_size=128, max_position_embeddings=60)
    model = nnx.merge(graphdef(config, "float32"), init_to_pretrain(config, seed=3))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 400, (1, 60)))
    x = model.embeddings(ids, jnp.arange(60)[None], None, None)
    first = model.layers[0].attention
    query, key = (f(x).reshape(60, 4, 32) for f in (first.query, first.key))
    found = jnp.einsum("tnh,snh->tns", query, key).argmax(-1)  # [T, N]
    expected = np.arange(60)[:, None] + [-1, 1, -2, 2]
    inside = (expected >= 0) & (expected < 60)
    assert (found == expected)[inside].mean() > 0.95


def test_a_model_too_narrow_to_look_around_starts_at_random(tiny_model):
    config, _ = tiny_model(hidden_size=4)  # heads of one column
    jax.tree.map(np.testing.assert_array_equal, init_to_pretrain(config, 3), init_params(config, 3))
