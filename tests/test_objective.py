"""Maps of layers, and learned projections where teacher and student differ in width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from test_sharding import mesh_of

from distilbert_jax.config import DistilConfig
from distilbert_jax.errors import UserError
from distilbert_jax.machine.sharding import by_rows, shardings
from distilbert_jax.models import bert, distilbert
from distilbert_jax.models.student import student_config
from distilbert_jax.training.assemble import assemble
from distilbert_jax.training.checkpoint import Checkpoints, abstract
from distilbert_jax.training.labels import mask_tokens, row_keys
from distilbert_jax.training.objective import Objective, map_layers

HIDDEN = {"mlm": 1.0, "hidden": 3.0}


@pytest.mark.parametrize("wish, student, teacher, expected", [
    ("", 3, 12, ((1, 4), (2, 8), (3, 12))), ("", 6, 12, tuple((n, 2 * n) for n in range(1, 7))),
    ("", 2, 3, ((1, 2), (2, 3))), ("1:4,2:8", 3, 12, ((1, 4), (2, 8))),
    ("0:0,3:12", 3, 12, ((0, 0), (3, 12)))])
def test_which_layers_are_compared(wish, student, teacher, expected):
    assert map_layers(wish, student, teacher) == expected


@pytest.mark.parametrize("wish, message", [
    ("4", "must look like 1:4,2:8"), ("1:2:3", "must look like"), ("a:b", "must look like"),
    ("1:", "must look like"), ("4:1", "4:1 is not there; the student has 3 layers, the teacher 12"),
    ("1:13", "1:13 is not there"), ("-1:1", "-1:1 is not there"), ("1:4,1:5", "twice")])
def test_maps_that_cannot_be(wish, message):
    with pytest.raises(UserError, match=message) as error:
        map_layers(wish, 3, 12)
    assert f"--hidden-map {wish}" in str(error.value)


def config_of(**settings):
    return DistilConfig(**dict(
        alphas=HIDDEN, dtype="float64", batch_size=8, sequence_length=16, learning_rate=0.01,
        warmup=0.0) | settings)


@pytest.fixture(scope="module")
def wide(tiny_model, batch_of):
    """A teacher of 3 layers and width 24, a student of 2 layers and width 16, and batches."""
    teacher, teacher_params = tiny_model(seed=1, num_hidden_layers=3, hidden_size=24)
    shape, params = tiny_model(seed=2, num_hidden_layers=2, type_vocab_size=0)
    _, student = student_config(bert.FAMILY, shape, 2, dropout=0.1)
    rows = [[9, 7], [16], [5, 5, 6], [11], [3, 12], [16], [8], [2, 14]]
    return (student, teacher), params, teacher_params, [batch_of(rows, 16, n) for n in range(2)]


@pytest.mark.parametrize("config, message", [
    (dict(alphas=HIDDEN | {"cos": 1.0}), "--alpha-cos compares states of equal width, and the "
     "student has 16, the teacher 24: give 0"),
    (dict(alphas={"mlm": 1.0}, hidden_map="1:1"), "--hidden-map 1:1 is read by no loss"),
    (dict(alphas={"mlm": 1.0}, relation_heads=4), "--relation-heads 4 is read by no loss"),
    (dict(alphas={"relation": 1.0}, relation_heads=3), "--relation-heads 3 must divide the widths: "
     "the student has 16, the teacher 24"),
    (dict(alphas={"mlm": 1.0, "hiden": 1.0}), "unknown loss 'hiden'; did you mean hidden")])
def test_objectives_that_cannot_be(config, message, wide):
    with pytest.raises(UserError, match=message):
        student, teacher = wide[0]
        Objective.of(config_of(**config), student, [teacher])


def test_what_a_pair_takes_where_nothing_is_said(wide):
    """The teacher's number of heads; projections that keep the size of states."""
    student, teacher = wide[0]
    teacher = dataclasses.replace(teacher, num_attention_heads=2)
    objective = Objective.of(config_of(alphas=HIDDEN | {"relation": 1.0}), student, [teacher])
    assert objective.pairs[0].relation_heads == 2 != student.num_attention_heads
    found = objective.init_projections(student, [teacher], 0, np.dtype("float64"))["hidden"]
    assert [kernel["kernel"].std() for kernel in found.values()] == pytest.approx(
        [16**-0.5] * 2, rel=0.1)  # 3 standard errors


def run(wide, vocabulary, shape):
    """Two updates on a mesh: the states before and after, and metrics."""
    shapes, params, teacher_params, batches = wide
    mesh = mesh_of(shape)
    student, *teachers = shapes
    assembly = assemble(config_of(), distilbert.FAMILY, student, teachers, mesh, 4)
    state = assembly.init(jax.tree.map(jnp.asarray, params))
    teachers = assembly.place(assembly.teachers(teacher_params))
    step, before = assembly.jitted(state, teachers), jax.device_get(state.params)
    state = jax.device_put(state, shardings(state, mesh))
    found = []
    for batch in batches:
        state, metrics = step(state, teachers, vocabulary, jax.device_put(batch, by_rows(mesh)))
        found.append({name: float(value) for name, value in metrics.items()})
    return before, state, found


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
def test_projections_are_trained_alike_on_every_mesh(wide, vocabulary, x64, tmp_path):
    before, alone, expected = run(wide, vocabulary, "1x1")
    _, state, metrics = run(wide, vocabulary, "4x2")
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-11)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11),
                 jax.device_get(state.params), jax.device_get(alone.params))
    kernels = state.params["projections"]["hidden"]
    assert set(kernels) == {"1", "2"}
    for own, kernel in kernels.items():
        assert kernel["kernel"].shape == (16, 24)
        assert kernel["kernel"].sharding.spec == PartitionSpec(None, "model")
        start = before["projections"]["hidden"][own]["kernel"]
        assert 1e-3 < np.abs(np.asarray(kernel["kernel"]) - start).max() < 0.1

    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        again = checkpoints.restore(abstract(state, shardings(state, mesh_of("4x2"))))
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)


def test_the_loss_of_projected_states_by_its_definition(wide, vocabulary, x64):
    (student, teacher), params, teacher_params, batches = wide
    assembly = assemble(config_of(dropout=0.0), distilbert.FAMILY, dataclasses.replace(
        student, hidden_dropout=0.0, attention_dropout=0.0), [teacher], mesh_of("1x1"), 4)
    state = assembly.init(jax.tree.map(jnp.asarray, params))
    batch = jax.tree.map(jnp.asarray, batches[0])
    _, metrics = jax.jit(assembly.train_step)(
        state, assembly.teachers(teacher_params), vocabulary, batch)

    keys = jax.vmap(jax.random.split)(row_keys(state.key, batch))[:, 0]
    labelled = mask_tokens(keys, batch, vocabulary, assembly.config.masking)
    given = [labelled[name] for name in ("input_ids", "segment_ids", "position_ids")]
    real, errors = np.asarray(labelled["segment_ids"]) > 0, []
    for own, theirs in ((1, 2), (2, 3)):  # evenly: 1.5 is rounded to an even number
        x, y = (np.asarray(nnx.merge(graph, tree)(*given, want=(layer,)).hidden[layer])[real]
                for graph, tree, layer in (
                    (assembly.graph, params, own),
                    (assembly.teacher_graphs["teacher"], teacher_params, theirs)))
        x = x @ state.params["projections"]["hidden"][str(own)]["kernel"]
        errors.append((((x - y) ** 2).sum(-1) / (y ** 2).sum(-1)).mean())
    np.testing.assert_allclose(metrics["hidden"], np.mean(errors), rtol=1e-10)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
def test_relations_by_their_definition_on_every_mesh(wide, vocabulary, x64):
    """Of the last layers' own projections, between models of other widths and depths."""
    (student, teacher), params, teacher_params, batches = wide
    student = dataclasses.replace(student, hidden_dropout=0.0, attention_dropout=0.0)
    config = config_of(dropout=0.0, alphas={"mlm": 1.0, "relation": 2.0, "inner": 1.0},
                       relation_heads=2)
    batch, found, states = jax.tree.map(jnp.asarray, batches[0]), [], []
    for shape in ("1x1", "4x2"):
        mesh = mesh_of(shape)
        assembly = assemble(config, distilbert.FAMILY, student, [teacher], mesh, 4)
        state = assembly.init(jax.tree.map(jnp.asarray, params))
        teachers = assembly.place(assembly.teachers(teacher_params))
        step = assembly.jitted(state, teachers)
        state = jax.device_put(state, shardings(state, mesh))
        state, metrics = step(state, teachers, vocabulary, jax.device_put(batch, by_rows(mesh)))
        found.append({name: float(value) for name, value in metrics.items()})
        states.append(jax.device_get(state.params))
    assert set(states[0]["projections"]) == {"inner"}  # relations need none
    assert found[1] == pytest.approx(found[0], rel=1e-11)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), *states)

    keys = jax.vmap(jax.random.split)(row_keys(jax.random.key(config.seed), batch))[:, 0]
    labelled = mask_tokens(keys, batch, vocabulary, config.masking)
    given = [labelled[name] for name in ("input_ids", "segment_ids", "position_ids")]
    parts = []
    for graph, tree, layers in ((assembly.graph, params, 2),
                                (assembly.teacher_graphs["teacher"], teacher_params, 3)):
        x = np.asarray(nnx.merge(graph, tree)(*given, want=(layers - 1,)).hidden[layers - 1])
        attention = tree["layers"][layers - 1]["attention"]
        parts.append([x @ attention[name]["kernel"] + attention[name]["bias"]
                      for name in ("query", "key", "value")])
    total, segments = [], np.asarray(labelled["segment_ids"])
    for row, at in zip(*np.nonzero(segments), strict=True):
        there = segments[row] == segments[row, at]
        for own, theirs in zip(*parts, strict=True):
            for s, t in zip(np.split(own[row], 2, -1), np.split(theirs[row], 2, -1), strict=True):
                q, p = (np.exp(x[there] @ x[at] / np.sqrt(x.shape[-1])) for x in (s, t))
                total.append((p / p.sum() * np.log(p / p.sum() / (q / q.sum()))).sum())
    np.testing.assert_allclose(found[0]["relation"], np.mean(total), rtol=1e-10)
