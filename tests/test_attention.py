"""Every backend attends as the plain one does; what a kernel cannot do is done without it."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import mesh_of

from distilbert_jax.models import attention as module
from distilbert_jax.models.attention import KERNELS, attention

ROWS, LENGTH, HEADS, SIZE = 4, 128, 2, 64


@pytest.fixture
def rows():
    """Queries, keys, values; rows of several segments, with padding; weights of the outputs."""
    random = np.random.default_rng(0)
    vectors = [jnp.asarray(random.normal(size=(ROWS, LENGTH, HEADS, SIZE)), jnp.float32)
               for _ in range(4)]
    ends = np.sort(random.choice(np.arange(1, LENGTH), (ROWS, 4), replace=False))
    segments = (np.arange(LENGTH)[None, :, None] >= ends[:, None]).sum(-1) + 1
    return vectors[:3], jnp.asarray(segments % 5, jnp.int32), vectors[3]  # the fifth is padding


@pytest.fixture
def splash(monkeypatch):
    """The TPU's kernel, interpreted, as the CPU's own."""
    kernel, lacks = KERNELS["tpu"]
    monkeypatch.setitem(KERNELS, "cpu", (functools.partial(kernel, interpret=True), lacks))
    module._tell.cache_clear()


def contexts_and_gradients(vectors, segments, weights):
    """Of a fresh trace, as what is chosen is chosen while tracing."""
    def call(vectors, segments):
        contexts = attention(*vectors, segments)
        return (weights * contexts).sum(), contexts
    (_, contexts), gradients = jax.jit(jax.value_and_grad(call, has_aux=True))(vectors, segments)
    return contexts, *gradients


def test_one_segment_at_a_time(rows):
    """The plain backend against a softmax over the positions of one segment, written out."""
    (query, key, value), segments, _ = rows
    found = attention(query, key, value, segments)
    for row, head in np.ndindex(ROWS, HEADS):
        for number in range(5):
            at = np.flatnonzero(segments[row] == number)
            q, k, v = (np.asarray(x[row, at, head], np.float64) for x in (query, key, value))
            scores = np.exp(q @ k.T / np.sqrt(SIZE))
            expected = scores / scores.sum(-1, keepdims=True) @ v
            np.testing.assert_allclose(found[row, at, head], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", ["1x1", "2x2", "4x1", "2x4"])  # 4 do not divide the heads
def test_splash_equals_xla(rows, shape, request):
    plain = contexts_and_gradients(*rows)
    request.getfixturevalue("splash")
    if jax.device_count() != 8 and shape != "1x1":
        pytest.skip("needs 8 devices (JAX_NUM_CPU_DEVICES=8)")
    with jax.set_mesh(mesh_of(shape)):
        found = contexts_and_gradients(*rows)
    for ours, expected in zip(found, plain, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert any((a != b).any() for a, b in zip(found, plain, strict=True))  # it was another one


def test_fallback_tells_once(rows, splash, caplog):
    (query, key, value), segments, _ = rows
    plain = module._xla(query, key, value, segments, None)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            halved = attention(query, key, value, segments, lambda x: x / 2)
            odd = attention(query[:, 1:], key[:, 1:], value[:, 1:], segments[:, 1:])
    np.testing.assert_allclose(halved, plain / 2, rtol=1e-6)
    assert odd.shape == (ROWS, LENGTH - 1, HEADS, SIZE)
    assert [record.getMessage() for record in caplog.records] == [
        "attention without the kernel for cpu, which lacks: attention dropout",
        "attention without the kernel for cpu, which lacks: 127 positions (multiples of 128)"]


@pytest.mark.parametrize("platform, dtype, size, length, device, reason", [
    ("gpu", "bfloat16", 64, 512, "9.0", ""),
    ("gpu", "bfloat16", 64, 512, "12.0", ""),
    ("gpu", "float32", 64, 512, "9.0", "float32"),
    ("gpu", "bfloat16", 20, 512, "9.0", "heads of 20 (multiples of 8 up to 128)"),
    ("gpu", "bfloat16", 256, 512, "8.0", "heads of 256 (multiples of 8 up to 128)"),
    ("gpu", "bfloat16", 64, 127, "8.0", "127 positions (even numbers)"),
    ("gpu", "bfloat16", 64, 512, "7.5", "compute capability 7.5 (8.0 or later)"),
    ("gpu", "bfloat16", 64, 512, "gfx90a", "compute capability gfx90a (8.0 or later)"),
    ("tpu", "bfloat16", 64, 512, "TPU v5 lite", ""),
    ("tpu", "float32", 128, 128, "TPU v3", ""),
    ("tpu", "bfloat16", 64, 512, "TPU v3", "bfloat16 on TPU v3"),
    ("tpu", "float64", 64, 512, "TPU v4", "float64"),
    ("tpu", "bfloat16", 32, 512, "TPU v4", "heads of 32 (multiples of 64)"),
    ("tpu", "bfloat16", 64, 200, "TPU v4", "200 positions (multiples of 128)")])
def test_what_kernels_lack(platform, dtype, size, length, device, reason):
    query = jax.ShapeDtypeStruct((2, length, 4, size), jnp.dtype(dtype))
    assert KERNELS[platform][1](query, device) == reason


@pytest.mark.parametrize("platform, calls", [
    ("cuda", ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]),
    ("tpu", ["tpu_custom_call"] * 3)])
def test_kernels_lower_without_their_device(platform, calls, monkeypatch):
    """Forward and gradients on a mesh, each device with its own 2 of 8 rows and 2 of 4 heads."""
    if jax.device_count() != 8:
        pytest.skip("needs 8 devices (JAX_NUM_CPU_DEVICES=8)")
    inside = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(inside, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(inside, "check_compute_capability", lambda least: True)
    monkeypatch.setitem(KERNELS, "cpu", KERNELS["gpu" if platform == "cuda" else "tpu"])
    monkeypatch.setattr(module, "_device", lambda mesh: ("cpu", "9.0"))

    def loss(vectors, segments):
        return attention(*vectors, segments).astype(jnp.float32).sum()

    vectors = [jax.ShapeDtypeStruct((8, 512, 4, 64), jnp.bfloat16)] * 3
    segments = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    with jax.set_mesh(mesh_of("4x2")):
        traced = jax.jit(jax.grad(loss)).trace(vectors, segments)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert re.findall(r"stablehlo.custom_call @(\S+)\(", text) == calls
    assert "tensor<2x512x2x64xbf16>" in text
