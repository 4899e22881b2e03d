"""Held-out figures: what the logits say, for the same hidden tokens, wherever they are computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_checkpoint import place
from test_sharding import mesh_of

from distilbert_jax.config import EVALUATION_MASKING
from distilbert_jax.data.pack import PackedRows
from distilbert_jax.evaluation import held_out as module
from distilbert_jax.evaluation.held_out import (
    _figures,
    held_out,
    held_out_rows,
    top1_intervals,
)
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.training.labels import mask_tokens, row_keys
from distilbert_jax.training.objective import observe
from distilbert_jax.training.train_step import make_eval_step

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")


@pytest.fixture(autouse=True)
def float64_in_batches_of_8_rows(x64, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", 8 * 16)


@pytest.fixture(scope="module")
def packed(batch_of):
    """21 rows: two batches, and one of 5 rows and 3 of padding."""
    lengths = np.random.default_rng(0).integers(3, 9, (21, 2))
    ids = batch_of(lengths, 16)["input_ids"]
    return PackedRows(ids, lengths.astype(np.uint16), np.zeros(72, np.int64), {})


@pytest.fixture(scope="module")
def graphs(problem):
    with jax.enable_x64(True):
        return [graphdef(c, "float64", "float64") for c in (problem.student, problem.teacher)]


@pytest.fixture(scope="module")
def steps(graphs):
    """Evaluation of the student beside the teacher, and of each model alone."""
    both = [(*graphs,), (graphs[1], graphs[1]), (graphs[1], None)]
    return dict(zip(("both", "itself", "teacher"), map(jax.jit, (
        make_eval_step(*pair) for pair in both)), strict=True))


def figures(problem, vocabulary, packed, step, params=None, teacher=None, shape="8x1", rows=None):
    placed = (place(p, shape) for p in (params or problem.params,
                                        problem.teachers if teacher is None else teacher))
    return held_out(step, *placed, vocabulary, packed, mesh_of(shape), rows)


@pytest.fixture
def measured(problem, vocabulary, packed, steps):
    """The figures, and what the step was given: batches and keys."""
    seen = []

    def step(params, teachers, vocabulary, batch, key):
        seen.append((jax.device_get(batch), key))
        return steps["both"](params, teachers, vocabulary, batch, key)

    return figures(problem, vocabulary, packed, step), seen


@functools.partial(jax.jit, static_argnums=0)
def outputs(graph, params, batch):
    model = nnx.merge(graph, params)
    hidden = observe(model, batch).last
    return hidden, model.mlm_logits(hidden)


def test_figures_from_logits(measured, problem, vocabulary, packed, graphs):
    found, seen = measured
    rows = np.concatenate([batch["input_ids"] for batch, _ in seen])
    assert rows.shape == (24, 16)
    real = rows[rows.any(1)]
    assert sorted(map(tuple, real)) == sorted(map(tuple, packed.rows))  # each row once

    nll, hits, kl, cosine, labels = {0: [], 1: []}, {0: [], 1: []}, [], [], []
    for raw, key in seen:
        given = jax.tree.map(jnp.asarray, raw)
        batch = mask_tokens(row_keys(key, given), given, vocabulary, EVALUATION_MASKING)
        row, column = np.nonzero(np.asarray(batch["input_ids"] != raw["input_ids"]))
        assert (np.asarray(batch["input_ids"])[row, column] == 4).all()  # all behind [MASK]
        truth, real = raw["input_ids"][row, column], raw["segment_ids"] > 0
        labels += list(truth)
        hidden, log_p = [], []
        for who, params in enumerate((problem.params, problem.teacher_params)):
            h, logits = map(np.asarray, outputs(graphs[who], params, batch))
            z = logits[row, column]
            z = z - z.max(-1, keepdims=True)
            log_p.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
            hidden.append(h[real])
            nll[who] += list(-log_p[who][np.arange(len(truth)), truth])
            hits[who] += list(log_p[who].argmax(-1) == truth)
        kl += list((np.exp(log_p[1]) * (log_p[1] - log_p[0])).sum(-1))
        cosine += list((hidden[0] * hidden[1]).sum(-1) / np.linalg.norm(hidden[0], axis=-1)
                       / np.linalg.norm(hidden[1], axis=-1))
    expected = {
        "masked": len(kl), "kl": np.mean(kl), "cosine": np.mean(cosine),
        "most_frequent": np.mean(np.array(labels) == vocabulary.counts.argmax())}
    if sum(hits[1]) > sum(np.array(labels) == vocabulary.counts.argmax()):
        expected["retention"] = sum(hits[0]) / sum(hits[1])
    for who, name in enumerate(("", "teacher_")):
        expected |= {f"{name}mlm_loss": np.mean(nll[who]), f"{name}top1": np.mean(hits[who]),
                     f"{name}perplexity": np.exp(np.mean(nll[who]))}
    assert len(cosine) == packed.segments.sum()
    assert found == pytest.approx(expected, rel=1e-6)  # sums come back as float32 weights


def test_a_teacher_as_its_own_student(problem, vocabulary, packed, steps):
    found = figures(problem, vocabulary, packed, steps["itself"], params=problem.teacher_params)
    assert found["kl"] == pytest.approx(0, abs=1e-12)
    assert found["cosine"] == pytest.approx(1, abs=1e-7)
    assert found["top1"] == found["teacher_top1"]
    knows = found["teacher_top1"] > found["most_frequent"]
    assert found.get("retention") == (1 if knows else None)


@pytest.mark.parametrize("hits, retention", [(3, None), (4, None), (5, 0.4)])
def test_retention_needs_a_teacher_that_beats_the_commonest_token(hits, retention):
    total = {"masked": 9.0, "tokens": 60.0, "most_frequent": 4.0, "nll": 9.0, "correct": 2.0,
             "teacher_nll": 9.0, "teacher_correct": float(hits), "kl": 1.0}
    assert _figures(total).get("retention") == retention


def test_the_perplexity_of_a_model_that_is_surely_wrong_is_finite():
    total = {"masked": 1.0, "tokens": 1.0, "most_frequent": 0.0, "nll": 1e4, "correct": 0.0}
    assert 1e300 < _figures(total)["perplexity"] < np.inf


def test_the_same_tokens_are_hidden_from_every_model(
        measured, problem, vocabulary, packed, steps):
    alone = figures(problem, vocabulary, packed, steps["teacher"], params=problem.teacher_params,
                    teacher={})
    assert set(alone) == {"masked", "most_frequent", "mlm_loss", "perplexity", "top1"}
    for name in ("mlm_loss", "perplexity", "top1"):
        assert alone[name] == pytest.approx(measured[0][f"teacher_{name}"], rel=1e-12)
    assert alone["masked"] == measured[0]["masked"]


@pytest.mark.parametrize("shape", ["8x1", "3x2"])
def test_the_counts_of_rows(shape, problem, vocabulary, packed, steps):
    """They add up to the figures, in the same order for every model, without padding."""
    placed = (place(p, shape) for p in (problem.params, problem.teachers))
    found, rows = held_out_rows(steps["both"], *placed, vocabulary, packed, mesh_of(shape))
    assert {name: part.shape for name, part in rows.items()} == dict.fromkeys(
        ("masked", "correct", "teacher_correct"), (21,))
    assert (rows["masked"] > 0).all() and rows["masked"].sum() == found["masked"]
    for who in ("", "teacher_"):
        assert rows[f"{who}correct"].sum() / found["masked"] == found[f"{who}top1"]
    _, own = held_out_rows(steps["teacher"], place(problem.teacher_params, shape), {}, vocabulary,
                           packed, mesh_of(shape))
    np.testing.assert_array_equal(own["correct"], rows["teacher_correct"])
    np.testing.assert_array_equal(own["masked"], rows["masked"])


def test_intervals():
    """Against draws by hand; and a retention is paired, so that what rows share drops out."""
    random = np.random.default_rng(5)
    masked = random.integers(5, 30, 400).astype(np.float32)
    hard = random.uniform(0, 1, 400)
    correct = {"teacher": np.round(masked * hard), "copy": np.round(masked * hard),
               "student": np.round(masked * hard * 0.9), "other": random.permutation(
                   np.round(masked * hard)), "none": 0 * masked}
    found = top1_intervals(masked, correct)
    drawn = np.random.default_rng(9).integers(0, 400, (4000, 400))
    for name, own in correct.items():
        shares = own[drawn].sum(1) / masked[drawn].sum(1)
        assert found[name]["top1_interval"] == pytest.approx(
            np.percentile(shares, [2.5, 97.5]), abs=4e-3)
        if name == "teacher":
            assert "retention_interval" not in found[name]
            continue
        kept = own[drawn].sum(1) / correct["teacher"][drawn].sum(1)
        assert found[name]["retention_interval"] == pytest.approx(
            np.percentile(kept, [2.5, 97.5]), abs=8e-3)
    assert found["copy"]["retention_interval"] == (1.0, 1.0)
    assert np.ptp(found["student"]["retention_interval"]) < 0.2 * np.ptp(
        found["other"]["retention_interval"])
    assert found == top1_intervals(masked, correct)  # seeded
    hopeless = top1_intervals(masked, correct | {"teacher": 0 * masked})
    assert hopeless["student"]["retention_interval"] is None
    one_row = top1_intervals(masked[:1], {name: own[:1] for name, own in correct.items()})
    assert set(one_row["copy"].values()) == {None}  # every draw is the same: not a certainty


@pytest.mark.parametrize("shape", ["1x1", "3x2"])  # batches of 8 rows, and of 8 and a blank one
def test_the_mesh_does_not_matter(shape, measured, problem, vocabulary, packed, steps):
    again = figures(problem, vocabulary, packed, steps["both"], shape=shape)
    assert again == pytest.approx(measured[0], rel=1e-10)


def test_fewer_rows_are_always_the_same_ones(problem, vocabulary, packed, steps):
    few = [figures(problem, vocabulary, packed, steps["both"], rows=5) for _ in range(2)]
    assert few[0] == few[1]
    none = np.zeros((3, 16), packed.rows.dtype), np.zeros((3, 2), np.uint16)
    padded = dataclasses.replace(
        packed, rows=np.concatenate([packed.rows, none[0]]),
        segments=np.concatenate([packed.segments, none[1]]))
    everything = figures(problem, vocabulary, packed, steps["both"], rows=1000)
    assert everything["masked"] == figures(
        problem, vocabulary, padded, steps["both"])["masked"]  # rows of padding count nothing
