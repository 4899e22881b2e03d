"""Products and their gradients are right for every dtype, and take the CPU's fast library."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilbert_jax.config import compute_dtype
from distilbert_jax.kernels import products
from distilbert_jax.kernels.products import affine, product, turned_product

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
    slope = normal(WIDE[dtype], *lead, 7, 5, seed=2)
    given = right.mT if rows else right
    found, backward = jax.jit(lambda a, b: jax.vjp(lambda a, b: product(a, b, rows), a, b))(
        left, given)
    of_left, of_right = jax.jit(lambda back, slope: back(slope))(backward, slope)
    assert found.dtype == WIDE[dtype] and of_left.dtype == of_right.dtype == dtype
    a, b, g = (np.asarray(x, np.float64) for x in (left, right, slope))
    assert_close(found, a @ b, "float32" if dtype == "bfloat16" else dtype)  # factors are exact
    assert_close(of_left, g @ b.swapaxes(-1, -2), dtype)
    expected = a.swapaxes(-1, -2) @ g
    assert_close(of_right, expected.swapaxes(-1, -2) if rows else expected, dtype)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradient_of_a_bias_is_not_added_up_in_bfloat16(dtype, platform, monkeypatch, x64):
    monkeypatch.setattr(products, "platform_here", lambda: platform)
    x, slope = normal(dtype, 2, 2000, 4), normal(dtype, 2, 2000, 8, seed=3) + 1
    kernel, bias = normal(WIDE[dtype], 4, 8, seed=1), normal(WIDE[dtype], 8, seed=2)
    found, backward = jax.vjp(lambda bias: affine(x, kernel, bias), bias)
    assert found.dtype == dtype
    expected = np.asarray(slope, np.float64).sum((0, 1))
    assert_close(*backward(slope), expected, "float32" if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("narrow", [4, 9])
def test_affine(narrow, dtype, x64):
    x, slope = normal(dtype, 2, 6, narrow), normal(dtype, 2, 6, 8, seed=3)
    kernel, bias = normal(WIDE[dtype], narrow, 8, seed=1), normal(WIDE[dtype], 8, seed=2)
    found, backward = jax.vjp(affine, x, kernel, bias)
    of_x, of_kernel, of_bias = backward(slope)
    assert found.dtype == of_x.dtype == dtype and of_kernel.dtype == of_bias.dtype == WIDE[dtype]
    a, k, b, g = (np.asarray(y, np.float64) for y in (x, kernel, bias, slope))
    assert_close(found, a @ k + b, dtype)
    assert_close(of_x, g @ k.T, dtype)
    exact = "float32" if dtype == "bfloat16" else dtype  # what is added up is not cut
    assert_close(of_kernel, np.einsum("btd,btf->df", a, g), exact)
    assert_close(of_bias, g.sum((0, 1)), exact)


@pytest.mark.parametrize("turn", [
    lambda a, b: product(a, b).T, lambda a, b: (jnp.zeros((16, 40)) + product(a, b)).T,
    lambda a, b: turned_product(a.T, b).T, lambda a, b: product(a.T.T, b.T.T)])
def test_what_is_turned_over_afterwards(turn):
    """XLA's CPU compiler moves a transposition into a product; of bfloat16 it cannot then run."""
    a, b = jnp.ones((16, 8), "bfloat16"), jnp.ones((8, 40), "bfloat16")
    assert (jax.jit(turn)(a, b) == 8).all()


@pytest.mark.skipif(compute_dtype("auto", "cpu") != "bfloat16", reason="a CPU without AMX")
def test_bfloat16_is_not_widened():
    """No matrix that is multiplied in a layer or its gradient is made float32 before."""
    x, kernel = normal("bfloat16", 256, 128), normal("float32", 128, 512)
    bias, slope = normal("float32", 512), normal("bfloat16", 256, 512)

    def step(x, kernel, bias, slope):
        found, backward = jax.vjp(affine, x, kernel, bias)
        return found, backward(slope)

    text = jax.jit(step).lower(x, kernel, bias, slope).compile().as_text()
    factors = re.findall(r"\[(?!1,)[\d,]*\]\S* dot\((.*?)\)", text)  # beside sums of columns
    types = [re.search(rf"{re.escape(name.strip())} = (\w+)\[", text)[1]
             for pair in factors for name in pair.split(",") if "%" in name]
    assert len(types) == 2 * 3 and set(types) == {"bf16"}
