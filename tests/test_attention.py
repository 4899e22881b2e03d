"""Every backend attends as the plain one does; what a kernel cannot do is done without it."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import mesh_of

from distilbert_jax.kernels import attention as module
from distilbert_jax.kernels.attention import KERNELS, AttentionMask, attention
from distilbert_jax.kernels.dropout import Dropout

ROWS, LENGTH, HEADS, SIZE = 4, 128, 2, 64
RULES = {"plain": {}, "causal": {"causal": True}, "window": {"window": 9},
         "both": {"causal": True, "window": 9}}


@pytest.fixture
def rows():
    """Queries, keys, values; segments of packed rows with padding; weights of the outputs."""
    random = np.random.default_rng(0)
    vectors = [jnp.asarray(random.normal(size=(ROWS, LENGTH, HEADS, SIZE)), jnp.float32)
               for _ in range(4)]
    ends = np.sort(random.choice(np.arange(1, LENGTH), (ROWS, 4), replace=False))
    segments = (np.arange(LENGTH)[None, :, None] >= ends[:, None]).sum(-1) + 1
    return vectors[:3], jnp.asarray(segments % 5, jnp.int32), vectors[3]  # the fifth is padding


@pytest.fixture
def pallas(monkeypatch):
    """The TPU's kernels, interpreted, as the CPU's own."""
    kernel, lacks = KERNELS["tpu"]
    monkeypatch.setitem(KERNELS, "cpu", (functools.partial(kernel, interpret=True), lacks))
    module._warn_once.cache_clear()


@pytest.fixture
def splash(pallas, monkeypatch):
    """As if rows were too long for the row kernel."""
    monkeypatch.setattr(module, "LONGEST", 0)


@pytest.fixture
def blocks(monkeypatch):
    """The GPU's kernel for dropout, interpreted, as the CPU's own, in every dtype."""
    kernel = functools.partial(KERNELS["gpu"][0], interpret=True)
    monkeypatch.setitem(KERNELS, "cpu", (kernel, lambda *_: ""))


@pytest.fixture
def drop():
    return Dropout(0.3, jax.random.bits(jax.random.key(1), (ROWS, 2), "uint32"))


def contexts_and_gradients(vectors, segments, weights, drop=None, **rule):
    """Contexts, and gradients of vectors; traced anew, as a backend is chosen while tracing."""
    def call(vectors, segments):
        contexts = attention(*vectors, AttentionMask(segments, **rule), drop)
        return (weights * contexts).sum(), contexts
    (_, contexts), gradients = jax.jit(jax.value_and_grad(call, has_aux=True))(vectors, segments)
    return contexts, *gradients


def seen(segments, causal=False, window=None):
    """Who sees whom in rows [B, T], by definition: [B, T, S]."""
    return np.array([[[row[t] == row[s] and (not causal or s <= t)
                       and (window is None or abs(t - s) <= window)
                       for s in range(len(row))] for t in range(len(row))]
                     for row in np.asarray(segments)])


def test_the_drawing_of_the_mask():
    lines = [line.split() for line in AttentionMask.__doc__.split("t\\s")[1].splitlines()[:9]]
    segments, drawn = lines[0], np.array([line[1:] for line in lines[1:]])
    assert [line[0] for line in lines[1:]] == segments
    segments = jnp.asarray([segments], jnp.int32)
    for causal in (False, True):
        found = AttentionMask(segments, causal, window=2).matrix()[0]
        np.testing.assert_array_equal(found, np.isin(drawn, ["x"] if causal else ["x", "o"]))


@pytest.mark.parametrize("rule", RULES)
def test_xla_by_definition(rows, rule):
    """Against a softmax in float64 over the positions that are seen, written out."""
    vectors, segments, _ = rows
    found = jax.jit(attention)(*vectors, AttentionMask(segments, **RULES[rule]))
    query, key, value = (np.asarray(x, np.float64) for x in vectors)
    scores = np.exp(np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(SIZE))
    scores *= seen(segments, **RULES[rule])[:, None]
    expected = np.einsum("bnts,bsnh->btnh", scores / scores.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_cudnn_is_given_the_mask(rows, rule, monkeypatch):
    vectors, segments, _ = rows
    given = {}
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *_, **options: given.update(options) or vectors[0])
    KERNELS["gpu"][0](*vectors, AttentionMask(segments, **RULES[rule]))
    assert given.pop("implementation") == "cudnn" and set(given) == {"mask"}
    np.testing.assert_array_equal(given["mask"], seen(segments, **RULES[rule])[:, None])


def assert_close(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
    assert any((a != b).any() for a, b in zip(found, expected, strict=True))  # two backends


@pytest.mark.parametrize("shape", ["1x1", "2x2", "4x1", "2x4"])  # 4 do not divide the heads
@pytest.mark.parametrize("kernel", ["pallas", "splash", "dropout", "masked", "blocks"])
def test_kernels_equal_xla(rows, drop, shape, kernel, request):
    drop = drop if kernel in ("dropout", "blocks") else None
    rule = RULES["both"] if kernel == "masked" else {}
    plain = contexts_and_gradients(*rows, drop, **rule)
    request.getfixturevalue(kernel if kernel in ("splash", "blocks") else "pallas")
    if jax.device_count() != 8 and shape != "1x1":
        pytest.skip("needs 8 devices (JAX_NUM_CPU_DEVICES=8)")
    with jax.set_mesh(mesh_of(shape)):
        found = contexts_and_gradients(*rows, drop, **rule)
    assert_close(found, plain, 2e-5)


@pytest.mark.parametrize("kernel, rate", [("pallas", 0.0), ("pallas", 0.3), ("blocks", 0.3)])
@pytest.mark.parametrize("rule", RULES)
def test_kernels_read_the_mask(rule, kernel, rate, drop, request):
    """Two blocks of queries; documents and padding on both sides of where the blocks meet."""
    random, drop = np.random.default_rng(0), drop._replace(rate=rate) if rate else None
    *vectors, weights = jnp.asarray(random.normal(size=(4, ROWS, 256, HEADS, SIZE)), "float32")
    lengths = [[256], [100, 120, 36], [128, 20, 108], [7, 113, 136]]  # the last is padding
    segments = jnp.asarray([np.repeat([*range(1, len(row)), 0], row) for row in lengths], jnp.int32)
    plain = contexts_and_gradients(vectors, segments, weights, drop, **RULES[rule])
    request.getfixturevalue(kernel)
    found = contexts_and_gradients(vectors, segments, weights, drop, **RULES[rule])
    assert_close(found, plain, 2e-5)


@pytest.mark.parametrize("kernel, length, heads, size, dtype, tolerance", [
    ("pallas", 384, 4, 64, "float32", 2e-5),  # two blocks of heads, three of queries
    ("pallas", 128, 3, 64, "float32", 2e-5),  # all at once, as no smaller number fills the lanes
    ("pallas", 128, 2, 128, "float32", 2e-5),
    ("pallas", 128, 8, 32, "float32", 2e-5),
    ("pallas", 256, 2, 64, "bfloat16", 1e-2),
    ("blocks", 192, 3, 64, "float32", 2e-5),
    ("blocks", 128, 2, 128, "float32", 2e-5),
    ("blocks", 128, 8, 16, "float32", 2e-5),
    ("blocks", 256, 2, 64, "bfloat16", 1e-2)])
def test_kernels_drop_the_same(kernel, length, heads, size, dtype, tolerance, drop, request):
    """Each block of a kernel drops the elements that XLA drops in the whole row."""
    random = np.random.default_rng(0)
    *vectors, weights = jnp.asarray(random.normal(size=(4, ROWS, length, heads, size)), dtype)
    segments = jnp.asarray(np.sort(random.integers(0, 4, (ROWS, length))), jnp.int32)
    plain = contexts_and_gradients(vectors, segments, weights, drop)
    request.getfixturevalue(kernel)
    found = contexts_and_gradients(vectors, segments, weights, drop)
    assert_close(found, plain, tolerance)


def test_fallback_warns_once(rows, drop, splash, caplog):
    (query, key, value), segments, _ = rows
    mask, causal = AttentionMask(segments), AttentionMask(segments, causal=True)
    plain = module._xla(query, key, value, mask, drop)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            dropped = attention(query, key, value, mask, drop)
            masked = attention(query, key, value, causal)
            odd = attention(*(x[:, 1:] for x in (query, key, value)),
                            AttentionMask(segments[:, 1:]))
    np.testing.assert_array_equal(dropped, plain)
    np.testing.assert_array_equal(masked, module._xla(query, key, value, causal, None))
    assert odd.shape == (ROWS, LENGTH - 1, HEADS, SIZE)
    assert [record.getMessage() for record in caplog.records] == [
        "attention without the kernel for cpu, which lacks: dropout of 128 positions (up to 0)",
        "attention without the kernel for cpu, which lacks: "
        "a causal or windowed mask of 128 positions (up to 0)",
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
    ("tpu", "float32", 128, 2048, "TPU v3", ""),
    ("tpu", "bfloat16", 64, 512, "TPU v3", "bfloat16 on TPU v3"),
    ("tpu", "float64", 64, 512, "TPU v4", "float64"),
    ("tpu", "bfloat16", 32, 512, "TPU v4", ""),
    ("tpu", "bfloat16", 48, 512, "TPU v4", "heads of 48 (multiples of 64 or divisors of 128)"),
    ("tpu", "bfloat16", 32, 2048, "TPU v4", "heads of 32 (multiples of 64)"),
    ("tpu", "bfloat16", 64, 200, "TPU v4", "200 positions (multiples of 128)")])
def test_what_kernels_lack(platform, dtype, size, length, device, reason):
    query = jax.ShapeDtypeStruct((2, length, 4, size), jnp.dtype(dtype))
    mask = AttentionMask(jnp.ones((2, length), jnp.int32))
    assert KERNELS[platform][1](query, mask, device, False) == reason


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("platform, length", [("gpu", 2048), ("tpu", 1024), ("tpu", 2048)])
def test_only_splash_declines_causal_and_windowed_masks(platform, length, rule):
    query = jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16)
    mask = AttentionMask(jnp.ones((2, length), jnp.int32), **RULES[rule])
    declines = platform == "tpu" and length == 2048 and rule != "plain"
    assert KERNELS[platform][1](query, mask, "9.0", False) == (
        "a causal or windowed mask of 2048 positions (up to 1024)" if declines else "")


@pytest.mark.parametrize("platform, length, size, reason", [
    ("gpu", 512, 64, ""), ("gpu", 2048, 16, ""),
    ("gpu", 480, 64, "dropout of 480 positions (multiples of 64)"),
    ("gpu", 512, 48, "dropout in heads of 48 (16, 32, 64 or 128)"), ("tpu", 1024, 64, ""),
    ("tpu", 1152, 64, "dropout of 1152 positions (up to 1024)")])
def test_what_kernels_lack_for_dropout(platform, length, size, reason):
    query = jax.ShapeDtypeStruct((2, length, 4, size), jnp.bfloat16)
    mask = AttentionMask(jnp.ones((2, length), jnp.int32))
    assert KERNELS[platform][1](query, mask, "9.0", True) == reason


@pytest.mark.parametrize("platform, length, rule, rate, calls", [
    ("cuda", 512, "plain", 0.0,
     ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]),
    ("cuda", 512, "plain", 0.1, ["__gpu$xla.gpu.triton"] * 2),
    ("cuda", 512, "both", 0.1, ["__gpu$xla.gpu.triton"] * 2),
    ("tpu", 512, "plain", 0.0, ["tpu_custom_call"]),
    ("tpu", 512, "plain", 0.1, ["tpu_custom_call"]),
    ("tpu", 512, "both", 0.1, ["tpu_custom_call"]),
    ("tpu", 2048, "plain", 0.0, ["tpu_custom_call"] * 3)])
def test_kernels_lower_without_their_device(platform, length, rule, rate, calls, monkeypatch):
    """Gradients on a mesh, each device with its own 2 of 8 rows and 2 of 4 heads."""
    if jax.device_count() != 8:
        pytest.skip("needs 8 devices (JAX_NUM_CPU_DEVICES=8)")
    inside = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(inside, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(inside, "check_compute_capability", lambda least: True)
    monkeypatch.setitem(KERNELS, "cpu", KERNELS["gpu" if platform == "cuda" else "tpu"])
    monkeypatch.setattr(module, "kernels_here", lambda: ("cpu", "9.0"))

    def loss(vectors, segments, seeds):
        drop = Dropout(rate, seeds) if rate else None
        mask = AttentionMask(segments, **RULES[rule])
        return attention(*vectors, mask, drop).astype(jnp.float32).sum()

    vectors = [jax.ShapeDtypeStruct((8, length, 4, 64), jnp.bfloat16)] * 3
    segments = jax.ShapeDtypeStruct((8, length), jnp.int32)
    seeds = jax.ShapeDtypeStruct((8, 2), jnp.uint32)
    with jax.set_mesh(mesh_of("4x2")):
        traced = jax.jit(jax.grad(loss)).trace(vectors, segments, seeds)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert re.findall(r"stablehlo.custom_call @(\S+)\(", text) == calls
    assert f"tensor<2x{length}x2x64xbf16>" in text
