"""The gradient of layer normalization in one kernel is that of the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_sharding import mesh_of

from distilbert_jax.kernels import layer_norm as module
from distilbert_jax.kernels.layer_norm import layer_norm
from distilbert_jax.models import encoder

TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 1e-2}
EPSILON = 1e-3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A program then has two steps of 4 positions."""
    monkeypatch.setattr(module, "BLOCK", 8)


def problem(shape, dtype):
    """x, cotangent, scale and bias as float64 numbers of `dtype`, of which each row is about 3."""
    random = np.random.default_rng(0)
    x, cotangent = (random.normal(mean, 2, shape) for mean in (3, 0))
    return [np.asarray(np.asarray(each, jnp.dtype(kind)), np.float64) for each, kind in (
        (x, dtype), (cotangent, dtype), (random.normal(1, 0.5, shape[-1]), "float32"),
        (random.normal(0, 0.5, shape[-1]), "float32"))]


def by_definition(x, cotangent, scale, bias):
    """The result and the three gradients, in NumPy."""
    count = x.shape[-1]
    rate = 1 / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    normal = (x - x.mean(-1, keepdims=True)) * rate
    pull = cotangent * scale
    gradient = rate * (pull - pull.mean(-1, keepdims=True)
                       - normal * (pull * normal).sum(-1, keepdims=True) / count)
    axes = tuple(range(x.ndim - 1))
    return normal * scale + bias, gradient, (cotangent * normal).sum(axes), cotangent.sum(axes)


def found(x, cotangent, scale, bias, dtype):
    wide = jnp.promote_types(dtype, jnp.float32)
    narrow = [jnp.asarray(each, dtype) for each in (x, cotangent)]
    norm = functools.partial(layer_norm, epsilon=EPSILON, interpret=True)

    def call(x, cotangent, scale, bias):
        result, backward = jax.vjp(norm, x, scale, bias)
        return result, *backward(cotangent)

    return jax.jit(call)(*narrow, *(jnp.asarray(each, wide) for each in (scale, bias)))


def assert_close(ours, expected, tolerance):
    for one, other in zip(ours, expected, strict=True):
        one = np.asarray(one, np.float64)
        assert one.shape == other.shape
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 8, 16), (3, 7, 24), (5, 24)])
def test_by_definition(shape, dtype, x64):
    """16 positions are two programs; 21 leave the third one short; 24 columns are taken as 32."""
    values = problem(shape, dtype)
    ours = found(*values, dtype)
    assert [each.dtype for each in ours[:2]] == [dtype] * 2
    assert {each.dtype for each in ours[2:]} == {jnp.promote_types(dtype, jnp.float32)}
    assert_close(ours, by_definition(*values), TOLERANCE[dtype])


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (JAX_NUM_CPU_DEVICES=8)")
@pytest.mark.parametrize("shape", ["8x1", "4x2"])
@pytest.mark.parametrize("rows", [8, 3])  # 3: no mesh divides them
def test_every_mesh(rows, shape, x64):
    values = problem((rows, 5, 24), "float64")
    with jax.set_mesh(mesh_of(shape)):
        ours = jax.device_get(found(*values, "float64"))
    assert_close(ours, by_definition(*values), TOLERANCE["float64"])


def test_models_take_it_where_it_runs(monkeypatch):
    """And it gives them the numbers of Flax."""
    x, cotangent, scale, bias = problem((2, 7, 24), "float32")
    norm = encoder.LayerNorm(24, epsilon=EPSILON, use_fast_variance=False, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(norm)

    def call():
        parameters = nnx.State({"scale": nnx.Param(jnp.asarray(scale, "float32")),
                                "bias": nnx.Param(jnp.asarray(bias, "float32"))})
        result, backward = jax.vjp(lambda x, state: nnx.merge(graph, state)(x),
                                   jnp.asarray(x, "float32"), parameters)
        return jax.tree.leaves((result, backward(jnp.asarray(cotangent, "float32"))))

    plain, taken = call(), []
    monkeypatch.setattr(encoder, "has_triton", lambda dtype: True)
    monkeypatch.setattr(module, "layer_norm", lambda *arguments: taken.append(arguments) or
                        layer_norm(*arguments[:4], interpret=True))
    assert_close(call(), [np.asarray(each) for each in plain], TOLERANCE["float32"])
    assert taken
