"""Variants of training texts: what is replaced, and that words are drawn as the model expects."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import SPECIAL, VOCAB

from distilbert_jax.data.examples import Examples
from distilbert_jax.evaluation import augment
from distilbert_jax.evaluation.augment import RATE, by_frequency, by_model, unlabelled, variants
from distilbert_jax.machine.sharding import make_mesh, shardings
from distilbert_jax.models.encoder import EncoderConfig, graphdef
from distilbert_jax.models.start import init_params

SHAPE = EncoderConfig(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
    intermediate_size=24, max_position_embeddings=32, type_vocab_size=2)
CLS, SEP, MASK = SPECIAL[2:]


def examples(count, size):
    random = np.random.default_rng(0)
    ids = [np.concatenate([[CLS], random.integers(len(SPECIAL), VOCAB, size), [SEP]]).astype(
        np.int32) for _ in range(count)]
    one = [np.zeros(1, np.int32)] * count
    return Examples(ids=ids, types=[np.zeros_like(x) for x in ids], positions=one, words=one,
                    labels=[np.ones(1)] * count, cut=0)


def draw(mesh, some, copies, bias, seed=0):
    """Variants by a model whose logits are this bias alone."""
    params = init_params(SHAPE, 0)
    params["embeddings"]["word"]["embedding"] = np.zeros((VOCAB, 16), np.float32)
    params["mlm_head"]["bias"] = np.asarray(bias, np.float32)
    mesh = make_mesh(mesh)
    words = by_model(graphdef(SHAPE, "float32"), jax.device_put(params, shardings(params, mesh)),
                     mesh, MASK, SPECIAL)
    return variants(some, words, copies, SPECIAL, seed)


def test_some_ordinary_tokens_are_others():
    some, bias = examples(30, 20), np.zeros(VOCAB)
    bias[MASK] = 100.0  # a special token is not drawn, however likely
    found = draw("8x1", some, 2, bias)
    whole = np.concatenate(some.ids)
    assert found.shape == (2, len(whole)) and found.dtype == np.int32
    special = np.isin(whole, SPECIAL)
    assert (found[:, special] == whole[special]).all() and not np.isin(
        found[:, ~special], SPECIAL).any()
    changed = (found != whole).reshape(2, 30, 22).sum(-1)
    assert changed.max() <= round(RATE * 20) and changed.mean() > 0.8 * RATE * 20
    assert (found[0] != found[1]).any() and (draw("8x1", some, 2, bias) == found).all()
    assert (draw("2x4", some, 2, bias) == found).all() and (
        draw("8x1", some, 2, bias, seed=1) != found).any()


def test_variants_have_no_labels():
    some = examples(3, 4)
    drawn = np.arange(36, dtype=np.int32).reshape(2, 18)
    copies = unlabelled(some, drawn)
    assert [[list(ids) for ids in copy.ids] for copy in copies] == drawn.reshape(2, 3, 6).tolist()
    assert all(np.isnan(labels).all() for copy in copies for labels in copy.labels)
    assert copies[0].positions == some.positions


def test_words_are_drawn_from_the_model_s_distribution():
    some, bias = examples(600, 20), np.full(VOCAB, -100.0)
    share = {10: 0.6, 11: 0.3, 71: 0.1}  # 71 is the last id
    for word, likely in share.items():
        bias[word] = np.log(likely)
    some = dataclasses.replace(some, ids=[np.where(np.isin(x, list(share)), 30, x).astype(np.int32)
                                          for x in some.ids])
    found = draw("8x1", some, 1, bias)[0]
    drawn = found[np.isin(found, list(share))]
    assert len(drawn) == 600 * 3 and set(drawn) == set(share)
    for word, likely in share.items():
        assert np.mean(drawn == word) == pytest.approx(likely, abs=0.04)  # 4 standard errors


@pytest.mark.parametrize("share", [0.0, 1 - 2**-53])
def test_the_least_and_the_largest_number_draw_words(share, monkeypatch):
    """Neither [PAD], whose share is 0, nor the id after the last, though float32 rounds to 1."""
    class Random(np.random.Generator):
        def random(self, count):
            return np.full(count, share)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Random(np.random.PCG64(seed)))
    some, bias = examples(3, 20), np.zeros(VOCAB)
    found = draw("8x1", some, 1, bias)[0]
    changed = found[found != np.concatenate(some.ids)]
    assert len(changed) == 9 and set(changed) == {len(SPECIAL) if share == 0 else VOCAB - 1}
    for seed in range(3):  # shares that add up to a little more or less than 1
        found = draw("8x1", some, 1, np.random.PCG64(seed).random_raw(VOCAB) / 2**62)
        assert found.max() < VOCAB and (found != np.concatenate(some.ids)).any()


def test_a_short_text_gets_another_word_too():
    found = draw("8x1", examples(8, 2), 1, np.zeros(VOCAB))
    assert (found != np.concatenate(examples(8, 2).ids)).reshape(8, 4).any(1).sum() > 5


def test_the_model_does_not_see_what_it_replaces(monkeypatch):
    seen = []
    monkeypatch.setattr(augment, "collect", lambda step, params, given, mesh, what: (
        seen.append(given), np.full((len(np.concatenate(given.positions)), 1), 9))[1])
    some = examples(3, 20)
    found = draw("8x1", some, 1, np.zeros(VOCAB))[0]
    at = np.concatenate(seen[0].ids) == MASK
    assert at.sum() == 9 and (found[at] == 9).all()
    assert (found[~at] == np.concatenate(some.ids)[~at]).all()


def test_words_are_drawn_as_often_as_they_occur():
    some = examples(600, 20)
    random = np.random.default_rng(1)
    for ids in some.ids:
        ids[1:-1] = random.choice([10, 11, 71], 20, p=[0.6, 0.3, 0.1])
    found = variants(some, by_frequency(some, SPECIAL), 1, SPECIAL, 0)[0]
    whole = np.concatenate(some.ids)
    assert (found == whole)[np.isin(whole, SPECIAL)].all()
    assert not np.isin(found[~np.isin(whole, SPECIAL)], SPECIAL).any()
    replaced = (found != whole)
    # A token is replaced by another one as often as two draws differ: 1 - 0.36 - 0.09 - 0.01.
    assert replaced.sum() == pytest.approx(600 * 3 * 0.54, rel=0.1)
    for word, likely in ((10, 0.6), (11, 0.3), (71, 0.1)):
        assert np.mean(found[~np.isin(found, SPECIAL)] == word) == pytest.approx(likely, abs=0.02)
