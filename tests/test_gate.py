"""The gate lets a right file through and stops each kind of wrong one, in words that say why."""

import dataclasses

import jax
import numpy as np
import pytest
from test_onnx import calm

from distilbert_jax.data.examples import Examples
from distilbert_jax.export import gate, onnx, onnx_int8
from distilbert_jax.export.formats import FORMATS
from distilbert_jax.export.gate import FLOAT32, INT8, Gate, Limit, Trial
from distilbert_jax.export.onnx_runtime import OnnxModel

pytest.importorskip("onnxruntime", reason="pip install 'distilbert_jax[serve]'")
library = pytest.importorskip("onnx", reason="pip install 'distilbert_jax[serve]'")


def examples(model, count=12, hidden=2):
    """Rows of several lengths; of a masked language model some tokens are answered."""
    random = np.random.default_rng(1)
    lengths = random.integers(4, model.config.positions, count)
    ids = [random.integers(2, model.config.vocab_size, n).astype(np.int32) for n in lengths]
    at = [np.sort(random.choice(n, hidden, replace=False)).astype(np.int32) if model.output in (
        "mlm", "tag") else np.zeros(1, np.int32) for n in lengths]
    return Examples(ids, [np.zeros_like(row) for row in ids], at, [np.zeros_like(a) for a in at],
                    [random.integers(2, 72, len(a)).astype(float) for a in at], 0)


def gate_of(model, score=None, count=12):
    return Gate(model, Trial("some rows", examples(model, count), score))


@pytest.fixture(scope="module")
def judged(exportable, tmp_path_factory):
    """Function (output) → a gate and the model in it; made once for each output."""
    made = {}

    def build(output):
        if output not in made:
            model = exportable("bert", output, layer_norm_eps=1e-12)
            made[output] = gate_of(model)
        return made[output]

    return build


def query(model, change):
    """The model with another query or key in its first layer."""
    params = jax.tree.map(np.array, model.params)
    attention = params["layers"][0]["attention"]
    attention |= change(attention)
    return dataclasses.replace(model, params=params)


def size_of_heads(model):
    return np.sqrt(model.config.hidden_size // model.config.num_attention_heads).astype(np.float32)


MUTANTS = {  # what is wrong → the model that is written instead
    "transposed query kernel": lambda model: query(model, lambda a: {
        "query": a["query"] | {"kernel": a["query"]["kernel"].T}}),
    "query and key swapped": lambda model: query(model, lambda a: {
        "query": a["key"], "key": a["query"]}),
    "scores not divided by the root of H": lambda model: query(model, lambda a: {
        "query": {name: part * size_of_heads(model) for name, part in a["query"].items()}}),
    "tanh for erf in GELU": lambda model: dataclasses.replace(
        model, config=dataclasses.replace(model.config, hidden_act="gelu_new")),
    "another epsilon": lambda model: dataclasses.replace(
        model, config=dataclasses.replace(model.config, layer_norm_eps=1e-5)),
    "no token types": lambda model: dataclasses.replace(model, params=model.params | {
        "embeddings": model.params["embeddings"] | {"token_type": jax.tree.map(
            np.zeros_like, model.params["embeddings"]["token_type"])}}),
}


def judge(found, path, limits=FLOAT32):
    return found.judge(OnnxModel(path), limits, path.stat().st_size)


@pytest.mark.parametrize("output", ["mlm", "states", "regress", "classify", "tag"])
def test_a_right_file_passes(output, judged, tmp_path):
    found = judged(output)
    figures, problems = judge(found, onnx.write(found.model, tmp_path))
    assert not problems
    assert 0 < figures["difference"] < 1e-5 and figures["padding"] < 1e-5
    expected = {"mlm": {"same": 1, "top1_lost": 0}, "states": {"cosine_worst": 1},
                "regress": {"correlation": 1}, "classify": {"same": 1}, "tag": {"same": 1}}[output]
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_stopped(name, judged, tmp_path):
    found = judged("mlm")
    figures, problems = judge(found, onnx.write(MUTANTS[name](found.model), tmp_path))
    assert problems and problems[0].startswith("the largest difference of an answer is "), problems
    assert problems[0].endswith("at most 0.0001 is allowed") and figures["difference"] > 1e-4


@pytest.mark.parametrize("format", ["onnx", "int8"])
def test_an_ignored_mask_is_stopped(format, judged, tmp_path):
    found = judged("states")
    path = FORMATS[format].write(found.model, tmp_path)
    file = library.load(path)
    (node,) = [node for node in file.graph.node if node.name == "mask_bias"]
    node.input[2] = node.input[1]  # 0 wherever padding stands
    library.save(file, path)
    figures, problems = judge(found, path, FORMATS[format].limits)
    assert problems and figures["cosine_worst"] < 0.97
    if "padding" in FORMATS[format].limits:
        assert any("difference that padding makes" in problem for problem in problems)


@pytest.fixture(scope="module")
def uneven(exportable):
    """A gate of a sentence encoder that survives 8 bits, with two vectors larger than others."""
    model = exportable("bert", "states", hidden_size=64, intermediate_size=128)
    params = jax.tree.map(np.array, calm(model.params))
    params["embeddings"]["word"]["embedding"][:2] *= 1000
    return gate_of(dataclasses.replace(model, params=params), count=24)


def test_int8_with_a_scale_for_each_column_passes(uneven, tmp_path):
    figures, problems = judge(uneven, onnx_int8.write(uneven.model, tmp_path, True), INT8)
    assert not problems, figures


def test_int8_with_one_scale_for_a_kernel_is_stopped(uneven, tmp_path, monkeypatch):
    right = onnx_int8.rounded

    def per_tensor(weights, axis, largest):
        values, scale = right(weights.reshape(-1, 1), 0, largest)
        return values.reshape(weights.shape), np.broadcast_to(
            scale, [1 if i == axis else n for i, n in enumerate(weights.shape)])

    monkeypatch.setattr(onnx_int8, "rounded", per_tensor)
    figures, problems = judge(uneven, onnx_int8.write(uneven.model, tmp_path, True), INT8)
    assert any("cosine of pooled states" in problem for problem in problems), figures


ANSWERS = {  # what a runtime may do wrong → how it answers, and the problem
    "it raises": (lambda run: 1 / 0, "it fails: division by zero"),
    "another shape": (lambda found: found[:, :1], "tokens give an answer of"),
    "not a number": (lambda found: found * np.nan, "is not finite"),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("limits", [FLOAT32, INT8])
def test_a_runtime_that_fails_is_stopped(name, limits, judged, tmp_path):
    change, expected = ANSWERS[name]
    run = OnnxModel(onnx.write(judged("states").model, tmp_path))
    figures, problems = judged("states").judge(lambda *batch: change(run(*batch)), limits, 0)
    assert len(problems) == 1 and expected in problems[0]


@pytest.mark.parametrize("limits", [FLOAT32, INT8])
def test_a_file_that_answers_a_row_too_long_is_stopped(limits, judged, tmp_path):
    found = judged("states")
    run = OnnxModel(onnx.write(found.model, tmp_path))
    most = found.model.config.positions

    def cut(ids, mask, types):
        answer = run(ids[:, :most], mask[:, :most], types[:, :most])
        return np.pad(answer, ((0, 0), (0, ids.shape[1] - answer.shape[1]), (0, 0)))

    assert found.judge(cut, limits, 0)[1] == [
        f"a row of {most + 1} tokens is answered, and there are {most} positions"]


def test_scores_and_sizes_have_limits(exportable, tmp_path):
    model = exportable("bert", "classify")
    found = gate_of(model, score=lambda logits: float(logits[:, 0].mean()), count=400)
    run = OnnxModel(onnx.write(model, tmp_path))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))

    def worse(*batch):
        return run(*batch) - np.float32(0.01)

    figures, problems = found.judge(worse, INT8, weights + gate.GRAPH_BYTES)
    assert figures["score_lost"] == pytest.approx(0.01, abs=1e-5) and figures["same"] == 1
    assert problems == ["the loss of score is 0.01, at most 0.008 is allowed",
                        "the size, over float32's, is 1, at most 0.27 is allowed"]


def test_two_of_few_answers_may_differ():
    limit = INT8["same"]
    assert not limit.refuses("same", {"same": 0.9, "answers": 20})
    assert limit.refuses("same", {"same": 0.89, "answers": 20}) == (
        "the share of equal answers is 0.89, at least 0.895 is allowed")
    assert not limit.refuses("top1_lost", {"same": 0.0})
    for bound in ({"most": 1.0}, {"least": 1.0}):
        assert Limit("x", **bound).refuses("x", {"x": float("nan")}).startswith("x is nan, at ")


def test_figures_of_hidden_tokens_by_their_definition(judged):
    """Top-1 and perplexity of our own model, from its logits one row at a time."""
    found = judged("mlm")
    rows, losses, right = found.trial.examples, [], []
    from distilbert_jax.export.exportable import reference

    run = reference(found.model)
    for ids, at, labels in zip(rows.ids, rows.positions, rows.labels, strict=True):
        ids = ids[None].astype(np.int64)
        logits = run(ids, np.ones_like(ids), np.zeros_like(ids))[0, at].astype(np.float64)
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        losses += list(-np.log(shares[np.arange(len(at)), labels.astype(int)]))
        right += list(logits.argmax(-1) == labels)
    assert found.own["top1"] == np.mean(right)
    assert found.own["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    uniform, _ = found.judge(lambda *batch: 0 * run(*batch), INT8, 0)
    assert uniform["perplexity"] == pytest.approx(72)  # of as many words
    assert uniform["perplexity_ratio"] == pytest.approx(72 / found.own["perplexity"])
    shifted, _ = found.judge(lambda *batch: run(*batch) + 200, INT8, 0)
    assert shifted["perplexity_ratio"] == pytest.approx(1, rel=1e-4)


def test_a_constant_answer_has_no_correlation():
    numbers = np.arange(3.0)[:, None]
    assert gate._relative("regress", 0 * numbers, numbers) == {}
    assert gate._relative("regress", numbers, 2 * numbers) == {"correlation": pytest.approx(1)}


def test_a_row_as_long_as_the_model_takes_is_tried(exportable):
    model = exportable(max_position_embeddings=200)
    assert max(ids.shape[1] for ids, _, _ in gate._shapes(model)) == 200


def test_the_mean_state_of_a_row_is_without_its_padding():
    some = Examples([np.array([2, 7, 3], np.int32)], [], [], [], [], 0)
    states = np.array([[1.0], [2.0], [6.0], [99.0]])
    assert gate._kept("states", states, some, 0).tolist() == [[3.0]]
