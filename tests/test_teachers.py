"""Several teachers: their losses by definition, on any mesh, and a run from end to end."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import masked
from flax import nnx
from test_losses import DEFINITIONS, TAU
from test_sharding import mesh_of

from distilbert_jax.benchmark import latency
from distilbert_jax.config import DistilConfig
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.export.huggingface import export
from distilbert_jax.jobs import distil
from distilbert_jax.machine.sharding import by_rows, shardings
from distilbert_jax.models import bert, distilbert
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.models.student import student_config
from distilbert_jax.training import train as loop
from distilbert_jax.training.assemble import assemble
from distilbert_jax.training.labels import row_keys
from distilbert_jax.training.metrics_log import read_metrics
from distilbert_jax.training.objective import Objective, loss_counts, total_loss

ROWS = [[9, 7], [16], [5, 5, 6], [11], [3, 12], [16], [8], [2, 14]]
ALPHAS = {"ce": 5.0, "mlm": 2.0, "mse": 0.1, "hidden": 3.0, "inner": 0.5, "relation": 1.5,
          "skew": 0.7}
EQUAL = ALPHAS | {"cos": 1.0}  # of equal widths alone
devices = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")


def config_of(**settings):
    return DistilConfig(**dict(
        teacher=("a", "b"), teacher_weights=(0.7, 0.3), alphas=ALPHAS, temperature=TAU,
        dtype="float64", batch_size=8, sequence_length=16, learning_rate=0.01, warmup=0.0,
        dropout=0.0) | settings)


@pytest.fixture(scope="module")
def models(tiny_model):
    """Function (width of the second teacher) → (student, first, second) as (shape, params)."""
    def build(width):
        first = tiny_model(seed=1, num_hidden_layers=3)
        second = tiny_model(seed=3, num_hidden_layers=4, hidden_size=width, num_attention_heads=2)
        shape, params = tiny_model(seed=2, num_hidden_layers=2, type_vocab_size=0)
        return (student_config(bert.FAMILY, shape, 2, dropout=0.0)[1], params), first, second

    return functools.cache(build)


@pytest.fixture(scope="module")
def batches(batch_of):
    return [batch_of(ROWS, 16, seed) for seed in range(2)]


@functools.partial(jax.jit, static_argnums=0)
def shown(shape, params, batch):
    """All that a model says of a batch: logits, hidden states by layer, and q, k, v of the last."""
    layers = shape.num_hidden_layers
    model = nnx.merge(graphdef(shape, "float64", "float64"), params)
    seen = model(batch["input_ids"], batch["segment_ids"], batch["position_ids"],
                 want=tuple(range(1, layers + 1)), want_qkv=(layers,))
    return model.mlm_logits(seen.last), seen.hidden, seen.qkv[layers]


def related(own, theirs, heads, segments):
    """KL of relations at each real position, by the definition of MiniLMv2."""
    found = []
    for row, at in zip(*np.nonzero(segments), strict=True):
        there = segments[row] == segments[row, at]
        for pair in zip(own, theirs, strict=True):
            for parts in zip(*(np.split(x[row], heads, -1) for x in pair), strict=True):
                q, p = (np.exp(x[there] @ x[at] / np.sqrt(x.shape[-1])) for x in parts)
                p, q = p / p.sum(), q / q.sum()
                found.append((p * np.log(p / q)).sum())
    return np.mean(found)


def by_definition(student, teacher, batch, layer_map, kernels):
    """Each loss against one teacher, as a mean in NumPy float64."""
    real = np.asarray(batch["segment_ids"]) > 0
    (logits, hidden, qkv), (soft, target, theirs) = student, teacher

    def over_layers(name):
        return np.mean([DEFINITIONS[name](
            (hidden[own] @ kernels[name][str(own)]["kernel"] if kernels else hidden[own])[real],
            target[layer][real]).mean() for own, layer in layer_map])

    found = {name: DEFINITIONS[name](logits, soft)[real].mean() for name in ("ce", "mse", "skew")}
    found |= {name: over_layers(name) for name in ("hidden", "inner")}
    found["relation"] = related(qkv, theirs, 2, np.asarray(batch["segment_ids"]))
    last = hidden[len(hidden)][real], target[len(target)][real]
    return found | ({"cos": DEFINITIONS["cos"](*last).mean()}
                    if last[0].shape == last[1].shape else {})


@pytest.mark.parametrize("width", [16, 24])
def test_the_sum_by_its_definition(width, models, batches, vocabulary, x64):
    """Σ share · loss(student, teacher), and MLM once; the gradient against differences of it."""
    (student, params), *teachers = models(width)
    config = config_of(alphas=EQUAL if width == 16 else ALPHAS, relation_heads=2)
    shapes = [shape for shape, _ in teachers]
    objective = Objective.of(config, student, shapes)
    projections = objective.init_projections(student, shapes, 0, np.dtype("float64"))
    assert set(projections) == ({"hidden_2", "inner_2"} if width == 24 else set())
    batch = jax.tree.map(jnp.asarray, batches[0])
    batch = masked(rate=0.3)(row_keys(jax.random.key(0), batch), batch, vocabulary)

    def loss(trained):
        own, *others = (
            nnx.merge(graphdef(shape, "float64", "float64"), jax.tree.map(jnp.asarray, tree))
            for shape, tree in ((student, trained["student"]), *teachers))
        return total_loss(own, others, batch, objective, loss_counts(batch, objective),
                          trained["projections"])

    targets = [jax.device_get(shown(*teacher, batch)) for teacher in teachers]
    maps = [((1, 2), (2, 3)), ((1, 2), (2, 4))]

    def expected(trained):
        own = jax.device_get(shown(student, trained["student"], batch))
        each = [by_definition(own, target, batch, layer_map, {
            name: trained["projections"].get(f"{name}_2") for name in ("hidden", "inner")}
            if number and width == 24 else {})
            for number, (target, layer_map) in enumerate(zip(targets, maps, strict=True))]
        means = {name: 0.7 * each[0][name] + 0.3 * each[1][name]
                 for name in objective.weights if name != "mlm"}
        weights = np.asarray(batch["label_weights"])
        at = np.take_along_axis(own[0], np.asarray(batch["masked_positions"])[..., None], 1)
        nll = np.log(np.exp(at).sum(-1)) - np.take_along_axis(
            at, np.asarray(batch["labels"])[..., None], -1)[..., 0]
        return means | {"mlm": (weights * nll).sum() / weights.sum()}

    def total(trained):
        return sum(objective.weights[name] * mean for name, mean in expected(trained).items())

    trained = {"student": params, "projections": projections}
    (value, means), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    assert jax.device_get(means) == pytest.approx(expected(trained), rel=1e-10)
    assert set(means) == set(objective.weights)
    np.testing.assert_allclose(value, total(trained), rtol=1e-10)
    random = np.random.default_rng(0)
    for _ in range(2):
        direction = jax.tree.map(lambda x: random.normal(size=x.shape), trained)
        up, down = (total(jax.tree.map(lambda x, d, step=step: x + step * d, trained, direction))
                    for step in (1e-6, -1e-6))
        slope = sum(jax.tree.leaves(jax.tree.map(
            lambda g, d: float((g * d).sum()), gradient, direction)))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


def gradients_of(config, models, teachers, batch, vocabulary):
    """((total, means), gradients) of the first update with these of the teachers."""
    student, params = models[0]
    chosen = [models[number] for number in teachers]
    assembly = assemble(config, distilbert.FAMILY, student, [shape for shape, _ in chosen],
                        mesh_of("1x1"), 4)
    state = assembly.init(jax.tree.map(jnp.asarray, params))
    return jax.device_get(jax.jit(assembly.gradients)(
        state.params, state.key, assembly.teachers(*(tree for _, tree in chosen)), vocabulary,
        batch))


def test_a_run_with_both_is_the_weighted_mean_of_runs_with_one(models, batches, vocabulary, x64):
    """Losses and gradients: all are linear in the shares, and they sum to 1."""
    one, other = (gradients_of(config_of(alphas=EQUAL, teacher=name, teacher_weights=()),
                               models(16), (number,), batches[0], vocabulary)
                  for number, name in enumerate("ab", 1))
    for weights in ((0.7, 0.3), (1e-300, 1.0)):
        both = gradients_of(config_of(alphas=EQUAL, teacher_weights=weights), models(16), (1, 2),
                            batches[0], vocabulary)
        jax.tree.map(lambda x, a, b, share=weights[0]: np.testing.assert_allclose(
            x, share * a + (1 - share) * b, rtol=1e-10, atol=1e-12), both, one, other)


def updated(models, batches, vocabulary, shape, accumulate=1):
    """Metrics of two updates on a mesh, dropout on, and the parameters after them."""
    (student, params), *teachers = models
    student = dataclasses.replace(student, hidden_dropout=0.2, attention_dropout=0.2)
    mesh, config = mesh_of(shape), config_of(dropout=0.2, accumulate=accumulate, relation_heads=2)
    assembly = assemble(config, distilbert.FAMILY, student, [shape for shape, _ in teachers], mesh,
                        4)
    state = assembly.init(jax.tree.map(jnp.asarray, params))
    given = assembly.place(assembly.teachers(*(tree for _, tree in teachers)))
    assert list(given) == ["teacher", "teacher 2"]
    step, found = assembly.jitted(state, given), []
    state = jax.device_put(state, shardings(state, mesh))
    for batch in batches:
        state, metrics = step(state, given, vocabulary, jax.device_put(batch, by_rows(mesh)))
        found.append({name: float(value) for name, value in metrics.items()})
    return found, jax.device_get(state.params)


@devices
def test_meshes_and_micro_batches_change_nothing(models, batches, vocabulary, x64):
    """With a second teacher of another width, towards which states are projected."""
    expected, alone = updated(models(24), batches, vocabulary, "1x1")
    for shape, accumulate in (("8x1", 1), ("2x4", 2)):
        found, params = updated(models(24), batches, vocabulary, shape, accumulate)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-11) and ours["skipped"] == 0
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11),
                     params, alone)
        assert set(params["projections"]) == {"hidden_2", "inner_2"}


@pytest.fixture(scope="module")
def two(toy, tmp_path_factory, tiny_model):
    """The toy's teacher, and one of another depth and width with its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("two"), load_tokenizer(str(toy / "teacher"), None)
    config, params = tiny_model(seed=5, num_hidden_layers=3, hidden_size=24,
                                vocab_size=len(tokenizer))
    export(folder / "other", params, config, bert.FAMILY, tokenizer, "Another toy.\n")
    return str(toy / "teacher"), str(folder / "other")


@devices
def test_a_run_from_end_to_end(two, toy, tmp_path, monkeypatch):
    """Stopped and resumed it ends with the same bytes; its report names both teachers."""
    monkeypatch.setattr(latency, "REPEATS", 1)
    config = DistilConfig(
        corpus=str(toy / "corpus.txt"), valid_share=0.1, sequence_length=16, batch_size=16,
        output=str(tmp_path / "out"), teacher=two, teacher_weights=(0.7, 0.3), steps=4,
        save_every=2, learning_rate=1e-2, alphas={"ce": 5.0, "mlm": 2.0, "hidden": 1.0})
    asked = iter(range(2))
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "asked", lambda self: next(asked, None) is None)
        with pytest.raises(loop.Interrupted, match="stopped at update 3 of 4"):
            distil.distil(config)
    for other, message in ((dict(teacher_weights=(1.0, 1.0)), "--teacher-weights was"),
                           (dict(teacher=two[::-1]), "--teacher was .*….*, is .*…"),
                           (dict(teacher=two[0], teacher_weights=()), "--teacher was .*, is ")):
        with pytest.raises(UserError, match=f"another run .{message}"):
            distil.distil(dataclasses.replace(config, **other))
    folder = distil.distil(dataclasses.replace(config, teacher_weights=(7.0, 3.0)))
    straight = distil.distil(dataclasses.replace(config, output=str(tmp_path / "straight")))
    assert (folder / "model.safetensors").read_bytes() == (
        straight / "model.safetensors").read_bytes()

    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(found["models"]) == ["teacher", "teacher 2", "student", "student at start"]
    assert [model["layers"] for model in found["models"].values()] == [2, 3, 1, 1]
    first, second = found["models"]["teacher"], found["models"]["teacher 2"]
    assert found["models"]["student"]["teacher_top1"] == first["top1"]
    assert first["perplexity"] != second["perplexity"] and second["top1_interval"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "# Distillation of teacher and other\n" in report and "\n| teacher 2 " in report
    assert "`teacher` (weight 0.7), `other` (weight 0.3)" in report
    assert "`other` (weight 0.3)" in (folder / "README.md").read_text()
    assert read_metrics(tmp_path / "out")[-1]["step"] == 4
