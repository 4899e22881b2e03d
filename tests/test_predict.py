"""Fill-mask: the likeliest words of one position, with their probabilities."""

import numpy as np
import pytest
from test_held_out import outputs

from distilbert_jax.export.predict import fill_mask
from distilbert_jax.models.encoder import graphdef


def test_fill_mask(x64, tiny_model, batch_of):
    config, params = tiny_model()
    graph = graphdef(config, "float64", "float64")
    batch, position = batch_of([[12]], 12), 5
    batch["input_ids"][0, position] = 4
    answers = fill_mask(graph, params, batch["input_ids"][0], position, top=4)

    logits = np.asarray(outputs(graph, params, batch)[1])[0, position]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = np.argsort(-shares)[:4]
    assert [word for word, _ in answers] == best.tolist()
    assert [share for _, share in answers] == pytest.approx(shares[best], rel=1e-12)
