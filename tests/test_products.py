"""Products and their gradients are right for every dtype, and take the CPU's fast library."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilbert_jax.config import compute_dtype
from distilbert_jax.kernels import products
from distilbert_jax.kernels.products import affine, product, transposed_product

TOLERANCE = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-2}
WIDE = {"float64": "float64", "float32": "float32", "bfloat16": "float32"}


def normal(dtype, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(found, expected, dtype):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= TOLERANCE[dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("rows", [False, True])
def test_products_and_gradients(rows, lead, dtype, x64):
    """Against NumPy in float64 on the same, rounded, factors."""
    left, right = normal(dtype, *lead, 7, 24), normal(dtype, *lead, 24, 5, seed=1)
    cotangent = normal(WIDE[dtype], *lead, 7, 5, seed=2)
    given = right.mT if rows else right
    found, backward = jax.jit(lambda a, b: jax.vjp(lambda a, b: product(a, b, rows), a, b))(
        left, given)
    left_gradient, right_gradient = jax.jit(lambda pull, g: pull(g))(backward, cotangent)
    assert found.dtype == WIDE[dtype] and left_gradient.dtype == right_gradient.dtype == dtype
    a, b, g = (np.asarray(x, np.float64) for x in (left, right, cotangent))
    assert_close(found, a @ b, "float32" if dtype == "bfloat16" else dtype)  # factors are exact
    assert_close(left_gradient, g @ b.swapaxes(-1, -2), dtype)
    expected = a.swapaxes(-1, -2) @ g
    assert_close(right_gradient, expected.swapaxes(-1, -2) if rows else expected, dtype)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradient_of_a_bias_is_not_summed_in_bfloat16(dtype, platform, monkeypatch, x64):
    monkeypatch.setattr(products, "platform_here", lambda: platform)
    x, cotangent = normal(dtype, 2, 2000, 4), normal(dtype, 2, 2000, 8, seed=3) + 1
    kernel, bias = normal(WIDE[dtype], 4, 8, seed=1), normal(WIDE[dtype], 8, seed=2)
    found, backward = jax.vjp(lambda bias: affine(x, kernel, bias), bias)
    assert found.dtype == dtype
    expected = np.asarray(cotangent, np.float64).sum((0, 1))
    assert_close(*backward(cotangent), expected, "float32" if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("narrow", [4, 9])
def test_affine(narrow, dtype, platform, monkeypatch, x64):
    monkeypatch.setattr(products, "platform_here", lambda: platform)
    x, cotangent = normal(dtype, 2, 6, narrow), normal(dtype, 2, 6, 8, seed=3)
    kernel, bias = normal(WIDE[dtype], narrow, 8, seed=1), normal(WIDE[dtype], 8, seed=2)
    found, backward = jax.vjp(affine, x, kernel, bias)
    x_gradient, kernel_gradient, bias_gradient = backward(cotangent)
    assert found.dtype == x_gradient.dtype == dtype
    assert kernel_gradient.dtype == bias_gradient.dtype == WIDE[dtype]
    a, k, b, g = (np.asarray(y, np.float64) for y in (x, kernel, bias, cotangent))
    assert_close(found, a @ k + b, dtype)
    once = jnp.asarray(a @ np.asarray(kernel.astype(dtype), np.float64) + b, dtype)
    assert dtype != "bfloat16" or np.mean(found == once) > 0.95  # rounded after the bias alone
    assert_close(x_gradient, g @ k.T, dtype)
    exact = "float32" if dtype == "bfloat16" else dtype  # sums are not rounded
    assert_close(kernel_gradient, np.einsum("btd,btf->df", a, g), exact)
    assert_close(bias_gradient, g.sum((0, 1)), exact)


@pytest.mark.parametrize("transposed", [
    lambda a, b: product(a, b).T, lambda a, b: (jnp.zeros((16, 40)) + product(a, b)).T,
    lambda a, b: transposed_product(a.T, b).T, lambda a, b: product(a.T.T, b.T.T)])
def test_a_result_may_be_transposed_afterwards(transposed):
    """XLA's CPU compiler folds a transpose into a product, which it cannot then run in bfloat16."""
    a, b = jnp.ones((16, 8), "bfloat16"), jnp.ones((8, 40), "bfloat16")
    assert (jax.jit(transposed)(a, b) == 8).all()


@pytest.mark.skipif(compute_dtype("auto", "cpu") != "bfloat16", reason="no bfloat16 products")
def test_bfloat16_is_not_widened():
    """No matrix that is multiplied in a layer or its gradient is made float32 before."""
    x, kernel = normal("bfloat16", 256, 128), normal("float32", 128, 512)
    bias, cotangent = normal("float32", 512), normal("bfloat16", 256, 512)

    def step(x, kernel, bias, cotangent):
        found, backward = jax.vjp(affine, x, kernel, bias)
        return found, backward(cotangent)

    text = jax.jit(step).lower(x, kernel, bias, cotangent).compile().as_text()
    factors = re.findall(r"\[(?!1,)[\d,]*\]\S* dot\((.*?)\)", text)  # beside sums of columns
    types = [re.search(rf"{re.escape(name.strip())} = (\w+)\[", text)[1]
             for pair in factors for name in pair.split(",") if "%" in name]
    assert len(types) == 2 * 3 and set(types) == {"bf16"}


@pytest.mark.parametrize("platform, device, dtype, has", [
    ("gpu", "9.0", "bfloat16", True), ("gpu", "8.0", "float32", True),
    ("gpu", "7.5", "bfloat16", False), ("gpu", "gfx90a", "bfloat16", False),
    ("gpu", "9.0", "float64", False), ("tpu", "9.0", "bfloat16", False)])
def test_where_our_gpu_kernels_run(platform, device, dtype, has, monkeypatch):
    monkeypatch.setattr(products, "device_here", lambda: (platform, device))
    assert products.has_triton(jnp.dtype(dtype)) == has
