"""KL of a model without some layers: by its definition, in any order of calls, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import place
from test_held_out import outputs
from test_sharding import mesh_of

from distilbert_jax.config import EVALUATION_MASKING
from distilbert_jax.data.batches import read
from distilbert_jax.data.pack import PackedRows
from distilbert_jax.evaluation import held_out, removal
from distilbert_jax.evaluation.removal import Shortened
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.training.labels import mask_tokens, row_keys

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")


@pytest.fixture(autouse=True)
def float64_in_batches_of_8_rows(x64, monkeypatch):
    monkeypatch.setattr(held_out, "BATCH_TOKENS", 8 * 16)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(seed=3, num_hidden_layers=4)


@pytest.fixture(scope="module")
def packed(batch_of):
    """21 rows: two batches, and one of 5 rows and 3 of padding."""
    lengths = np.random.default_rng(0).integers(3, 9, (21, 2))
    return PackedRows(batch_of(lengths, 16)["input_ids"], lengths.astype(np.uint16),
                      np.zeros(72, np.int64), {})


@pytest.fixture
def shortened(model, packed, vocabulary):
    def make(shape="1x1", packed=packed):
        config, params = model
        return Shortened(config, ("float64", "float64"), place(params, shape), vocabulary, packed,
                         mesh_of(shape))
    return make


def kl(model, packed, vocabulary, layers):
    """Of the logits of two models that are put together as any other is."""
    config, params = model
    given = jax.tree.map(jnp.asarray, read(packed, np.arange(len(packed))))
    batch = mask_tokens(row_keys(jax.random.key(held_out.SEED), given), given, vocabulary,
                        EVALUATION_MASKING)
    row, column = np.nonzero(np.asarray(batch["input_ids"] != given["input_ids"]))
    log_p = []
    for numbers in (range(config.num_hidden_layers), layers):
        shape = dataclasses.replace(config, num_hidden_layers=len(numbers))
        some = params | {"layers": {i: params["layers"][n] for i, n in enumerate(numbers)}}
        logits = np.asarray(outputs(graphdef(shape, "float64", "float64"), some, batch)[1])
        z = logits[row, column]
        log_p.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
    return (np.exp(log_p[0]) * (log_p[0] - log_p[1])).sum(-1).mean(), len(row)


def test_kl_by_its_definition_in_any_order_of_calls(model, packed, vocabulary, shortened):
    """States of the last call are kept where the next one begins alike."""
    found = shortened()
    for layers in ([1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0], [0, 1], [3], [1, 3], [1, 2]):
        expected, masked = kl(model, packed, vocabulary, layers)
        assert found(layers) == pytest.approx(expected, rel=1e-6)  # counts are float32
        assert found.masked == masked
    assert found([0, 1, 2, 3]) == pytest.approx(0, abs=1e-12)


def test_what_is_shared_is_not_computed_again(shortened, monkeypatch):
    found, ran = shortened(), []
    layer = found._steps.layer
    monkeypatch.setattr(found, "_steps", dataclasses.replace(
        found._steps, layer=lambda *given: ran.append(1) or layer(*given)))
    found([0, 1, 2])
    assert not ran  # as the whole model begins
    found([0, 1, 3])
    assert len(ran) == 3  # batches
    assert found([0, 1, 3]) and len(ran) == 3


@pytest.mark.parametrize("shape", ["4x2", "3x2"])  # batches of 8 rows, and of 8 and a blank one
def test_the_mesh_does_not_matter(shape, shortened):
    alone, divided = shortened(), shortened(shape)
    for layers in ([1, 2, 3], [0, 3]):
        assert divided(layers) == pytest.approx(alone(layers), rel=1e-10)
    assert divided.masked == alone.masked


def test_how_many_rows_are_taken(shortened, monkeypatch):
    def rows(found):
        return sum(int((batch["label_weights"].sum(1) > 0).sum()) for batch in found._batches)

    assert rows(shortened()) == 21
    monkeypatch.setattr(removal, "TOKENS", 5 * 16)
    few = [shortened(), shortened()]
    assert rows(few[0]) == 5 and few[0]([0]) == few[1]([0])
