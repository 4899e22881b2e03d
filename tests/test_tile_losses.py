"""The TPU's kernels of the vocabulary losses are taken where they fit, on every mesh.

Their numbers are compared with the readable truth in test_head.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_forecast import compiled, tpu_compile
from test_head import DEFINITIONS, TERMS, assert_close, make, value_and_gradients
from test_sharding import mesh_of

from distilbert_jax.benchmark.head import dense_losses
from distilbert_jax.kernels import head as fused_head
from distilbert_jax.kernels import tile_losses
from distilbert_jax.kernels.head import Head, Targets, Term, fused_losses
from distilbert_jax.training.losses import LOSSES


@pytest.fixture
def interpreted(monkeypatch):
    """As the CPU's own, in small pieces: calls → how often they were taken."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        return tile_losses.tile_losses(*arguments, interpret=True)

    monkeypatch.setattr(tile_losses, "BLOCK", 16)
    monkeypatch.setattr(tile_losses, "TILE", 32)
    monkeypatch.setattr(fused_head, "_tiles", lambda models: call)
    return calls


def head(width, dtype="bfloat16", rows=(50, 512), words=30522):
    return Head(jax.ShapeDtypeStruct((*rows, width), dtype),
                jax.ShapeDtypeStruct((words, width), "float32"),
                jax.ShapeDtypeStruct((words,), "float32"))


@pytest.mark.parametrize("models, device, takes", [
    ([head(768), head(768)], "TPU v6 lite", True),
    ([head(768), head(1024)], "TPU v5 lite", True),
    ([head(768)], "TPU v6 lite", True),
    ([head(768, "float32"), head(768)], "TPU v6 lite", False),
    ([head(768), head(768)], "TPU v4", False),
    ([head(4096), head(4096)], "TPU v6 lite", False)])
def test_where_they_are_taken(models, device, takes):
    assert tile_losses.takes(models, device) == takes


def test_chunks_leave_few_blocks_empty():
    """100 blocks, of which 33 fit, are four chunks; 34 are two."""
    models = [head(768), head(768)]
    assert tile_losses.room(models) // tile_losses.BLOCK == 33
    for rows, chunks in ((50, 4), (17, 2), (16, 1)):
        of_rows = [model._replace(states=jax.ShapeDtypeStruct((rows, 512, 768), "bfloat16"))
                   for model in models]
        assert tile_losses._chunks(of_rows) == chunks


def test_at_temperature_2_one_power_is_the_square_of_the_other(interpreted, monkeypatch, x64):
    monkeypatch.setattr("test_head.TEMPERATURE", 2.0)
    monkeypatch.setitem(
        DEFINITIONS, "ce", functools.partial(LOSSES["ce"].sum, temperature=2.0))
    found, expected = (value_and_gradients(losses, *make(), TERMS["distilled"])
                       for losses in (fused_losses, dense_losses))
    assert interpreted
    assert_close(found, expected, 1e-10)


def test_logits_far_apart(interpreted, x64):
    """Of which no power could be taken but of the distance to the largest, which is in an early
    tile."""
    (student, transform), teacher, targets = make()
    far = np.where(np.arange(72) < 36, -1000, -3000)
    problem = ((student._replace(bias=student.bias + far), transform),
               teacher._replace(bias=teacher.bias + far),
               targets._replace(labels=targets.labels % 36))
    found, expected = (value_and_gradients(losses, *problem, TERMS["distilled"])
                       for losses in (fused_losses, dense_losses))
    assert interpreted
    assert_close(found, expected, 1e-10)


def test_what_they_are_not_for(interpreted):
    """A loss without closed form, and losses whose gradients nobody asks for."""
    student, teacher, targets = jax.tree.map(jnp.asarray, make(dtype="float32"))
    value_and_gradients(
        fused_losses, student, teacher, targets, TERMS["no closed form"], "float32")
    jax.eval_shape(lambda: fused_losses(student[0], [], targets, {
        "mlm": Term(1.0, jnp.ones(()), DEFINITIONS["mlm"])}, 1.0))
    assert not interpreted


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (JAX_NUM_CPU_DEVICES=8)")
@pytest.mark.parametrize("shape, words, taken", [("8x1", 72, True), ("2x4", 73, True),
                                                 ("2x4", 72, False)])
def test_rows_on_a_mesh(shape, words, taken, interpreted, x64):
    """Where words are divided, they are not taken."""
    problem = make(words)
    expected = value_and_gradients(dense_losses, *problem, TERMS["all"])
    with jax.set_mesh(mesh_of(shape)):
        found = value_and_gradients(fused_losses, *problem, TERMS["all"])
    assert bool(interpreted) == taken
    assert_close(jax.device_get(found), expected, 1e-10)


def test_no_logits_are_in_memory(monkeypatch):
    """Of the program as it is handed to the TPU's compiler."""
    monkeypatch.setattr(fused_head, "_tiles", lambda models: tile_losses.tile_losses)
    weights = jax.ShapeDtypeStruct((8, 256), "float32")
    targets = Targets(jax.ShapeDtypeStruct((8, 256), "int32"), weights, weights)

    def losses(student, teacher, targets):
        terms = {name: Term(1.0, targets.soft_weights.sum(), DEFINITIONS[name])
                 for name in ("ce", "mlm", "mse")}
        return fused_losses(student, [(1.0, teacher)], targets, terms, 2.0)[0]

    models = head(128, rows=(8, 256), words=5000), head(256, rows=(8, 256), words=5000)
    traced = jax.jit(jax.grad(losses)).trace(*models, targets)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 2
    shapes = {tuple(map(int, shape.split("x"))) for shape in re.findall(
        r"tensor<((?:\d+x)*\d+)x(?:f32|bf16)>", text)}
    assert (5120, 256) in shapes and not [shape for shape in shapes if len(shape) > 1 and (
        5000 in shape or 5120 in shape) and not {128, 256, 1} & set(shape)]


# The head with all its losses and their gradients; words are no round number.
PROJECT = """
import sys
import jax
from distilbert_jax.benchmark import hlo
from distilbert_jax.benchmark.chips import topology
from distilbert_jax.kernels.head import Head, Targets, Term, fused_losses
from distilbert_jax.machine.sharding import by_rows, make_mesh, on_mesh, replicated
mesh = make_mesh("8x1", topology(sys.argv[1])[1])
weights = jax.ShapeDtypeStruct((64, 256), "float32")
student, teacher = (Head(jax.ShapeDtypeStruct((64, 256, width), "bfloat16"),
                         jax.ShapeDtypeStruct((5000, width), "float32"),
                         jax.ShapeDtypeStruct((5000,), "float32")) for width in (128, 256))
targets = Targets(jax.ShapeDtypeStruct((64, 256), "int32"), weights, weights)

def losses(student, teacher, targets):
    terms = {name: Term(1.0, targets.soft_weights.sum(), None) for name in ("ce", "mlm", "mse")}
    return fused_losses(student, [(1.0, teacher)], targets, terms, 2.0)[0]

rows, whole = by_rows(mesh), replicated(mesh)
head = Head(rows, whole, whole)
traced = jax.jit(on_mesh(jax.grad(losses), mesh), in_shardings=(head, head, rows),
                 out_shardings=head).trace(student, teacher, targets)
text = traced.lower().compile().as_text()
program = hlo.read(text, hlo.kernel_flops(traced.jaxpr))
logits = [shape for shape in program.shapes if {5000, 5120} & set(shape)
          and len(shape) > 1 and not {1, 128, 256} & set(shape)]
print(text.count('target="tpu_custom_call"'), len(logits), program.flops)
"""


class TestTPU:
    pytestmark = tpu_compile

    @pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
    def test_they_compile(self, topology):
        """Four products of the student, two of the teacher, and no logits in memory."""
        done = compiled("-c", PROJECT, topology)
        assert not done.returncode, done.stderr
        products = 2 * (8 * 256) * 5120 * (4 * 128 + 2 * 256)
        assert done.stdout.splitlines()[-1] == f"2 0 {products}"
