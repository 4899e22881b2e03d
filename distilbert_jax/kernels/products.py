"""Matrix products, in the form that each platform is fast at; and which platform that is.

Compilers for TPU and GPU find that form themselves, and what they make of plain products and their
derivatives is left to them. XLA's CPU compiler (jax 0.10.2) hands a product to its fast library,
the only one that knows a CPU's bfloat16, if rows of both factors lie one after the other and the
result is float32; so on CPU products and their gradients are written out, in that form.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def product(
    left: Float[Array, "*B M K"], right: Float[Array, "*B J L"], rows: bool = False
) -> Float[Array, "*B M N"]:
    """left @ right or, by its rows, left @ right.T, for each of B; at least in float32.

    On CPU the slope that comes back is cut to the dtype of the factors, so that no product of the
    gradient is slower than this one.
    """
    return (_on_cpu if platform_here() == "cpu" else _multiply)(left, right, rows)


def _multiply(left: Array, right: Array, rows: bool) -> Array:
    across = "...mk,...nk->...mn" if rows else "...mk,...kn->...mn"
    return jnp.einsum(across, left, right, preferred_element_type=wide(left.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)  # only what is traced can be given a layout
def _on_cpu(left: Array, right: Array, rows: bool) -> Array:
    left, right = (with_layout_constraint(x, Layout(tuple(range(x.ndim)))) for x in (left, right))
    # Without the barrier the product may be turned over, which bfloat16 does not survive.
    return jax.lax.optimization_barrier(_multiply(left, right, rows))


def _slopes(rows: bool, saved: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    left, right = saved
    slope = slope.astype(left.dtype)
    of_right = turned_product(slope, left) if rows else turned_product(left, slope)
    return _on_cpu(slope, right, not rows).astype(left.dtype), of_right.astype(right.dtype)


_on_cpu.defvjp(lambda *of: (_on_cpu(*of), of[:2]), _slopes)


def turned_product(
    left: Float[Array, "*B K M"], right: Float[Array, "*B K N"]
) -> Float[Array, "*B M N"]:
    """left.T @ right for each of B; at least in float32.

    On CPU bfloat16 is turned in memory first; float32 only where that gains more than it costs.
    """
    narrow = left.ndim == 2 and left.shape[1] < right.shape[1]
    if platform_here() == "cpu" and (left.dtype == jnp.bfloat16 or narrow):
        return _on_cpu(left.mT, right, False)
    return jnp.einsum("...km,...kn->...mn", left, right, preferred_element_type=wide(left.dtype))


def column_sums(x: Float[Array, "P F"]) -> Float[Array, " F"]:
    """Sums over P; at least in float32. On CPU as a product, which is several times as fast."""
    if platform_here() == "cpu":
        return _on_cpu(jnp.ones((1, len(x)), x.dtype), x, False)[0]
    return x.sum(0, dtype=wide(x.dtype))


def affine(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"]
) -> Float[Array, "*B F"]:
    """x @ kernel + bias in the dtype of x."""
    if platform_here() != "cpu":
        return _plus(x @ kernel.astype(x.dtype), bias)
    return _affine(x.reshape(-1, x.shape[-1]), kernel, bias).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _plus(x: Array, bias: Array) -> Array:
    """x + bias in the dtype of x, in which the gradient of the bias is not added up."""
    return x + bias.astype(x.dtype)


_plus.defvjp(lambda x, bias: (_plus(x, bias), bias), lambda bias, slope: (
    slope, column_sums(slope.reshape(-1, len(bias))).astype(bias.dtype)))


@jax.custom_vjp
def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    """Of rows, on CPU; the gradients of kernel and bias are not cut to the dtype of x."""
    result = _on_cpu(x, kernel.astype(x.dtype), False)
    return (result + bias.astype(result.dtype)).astype(x.dtype)


def _affine_slopes(saved: tuple[Array, Array, Array], slope: Array) -> tuple[Array, ...]:
    x, kernel, bias = saved
    return (_on_cpu(slope, kernel.astype(x.dtype), True).astype(x.dtype),
            turned_product(x, slope).astype(kernel.dtype), column_sums(slope).astype(bias.dtype))


_affine.defvjp(lambda *of: (_affine(*of), of), _affine_slopes)


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """What sums of numbers of this dtype are kept in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def platform_here() -> str:
    """Where what is traced will run: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.devices()[0].platform
