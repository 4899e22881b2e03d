"""Matrix products, in the form that each platform is fast at; and which platform that is.

All give at least float32: what bfloat16 factors are multiplied and added up to is not cut.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    left: Float[Array, "*B M K"], right: Float[Array, "*B J L"], rows: bool = False
) -> Float[Array, "*B M N"]:
    """left @ right or, by its rows, left @ right.T; for each of B.

    The slope that comes back is cut to the dtype of the factors, so that no product of the
    gradient is slower than this one.

    XLA's CPU compiler (jax 0.10.2) hands a product to its fast library, the only one that knows
    a CPU's bfloat16, if rows of the factors lie one after the other; so on CPU they do. The
    barrier keeps it from turning the product over afterwards, which bfloat16 does not survive.
    """
    across = "...mk,...nk->...mn" if rows else "...mk,...kn->...mn"
    multiply = functools.partial(jnp.einsum, across, preferred_element_type=wide(left.dtype))
    if platform_here() != "cpu":
        return multiply(left, right)
    return jax.lax.optimization_barrier(multiply(_in_rows(left), _in_rows(right)))


def _in_rows(x: Array) -> Array:
    """x, laid out in memory row by row."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _forward(left: Array, right: Array, rows: bool) -> tuple[Array, tuple[Array, Array]]:
    return product(left, right, rows), (left, right)


def _backward(rows: bool, saved: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    left, right = saved
    slope = slope.astype(left.dtype)
    of_right = turned_product(slope, left) if rows else turned_product(left, slope)
    return (product(slope, right, not rows).astype(left.dtype), of_right.astype(right.dtype))


product.defvjp(_forward, _backward)


@jax.custom_vjp
def affine(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"]
) -> Float[Array, "*B F"]:
    """x @ kernel + bias in the dtype of x, to which the gradients of the parameters are not cut."""
    flat, narrow = x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype)
    # Elsewhere what is multiplied is cut where it is made, and not written to memory before.
    result = product(flat, narrow) if platform_here() == "cpu" else flat @ narrow
    return (result + bias.astype(result.dtype)).astype(x.dtype).reshape(*x.shape[:-1], -1)


def _affine_backward(saved: tuple[Array, Array, Array], slope: Array) -> tuple[Array, ...]:
    x, kernel, bias = saved
    flat, above = (y.reshape(-1, y.shape[-1]) for y in (x, slope))
    of_x = product(above, kernel.astype(x.dtype), rows=True).astype(x.dtype)
    of_kernel, of_bias = turned_product(flat, above), column_sums(above)
    return of_x.reshape(x.shape), of_kernel.astype(kernel.dtype), of_bias.astype(bias.dtype)


affine.defvjp(lambda *of: (affine(*of), of), _affine_backward)


def column_sums(x: Float[Array, "P F"]) -> Float[Array, " F"]:
    """Sums over P, at least in float32: of bfloat16 as a product, at which CPUs are faster."""
    if platform_here() == "cpu" and x.dtype == jnp.bfloat16:
        return product(jnp.ones((1, len(x)), x.dtype), x)[0]
    return x.sum(0, dtype=wide(x.dtype))


def turned_product(
    left: Float[Array, "*B K M"], right: Float[Array, "*B K N"]
) -> Float[Array, "*B M N"]:
    """left.T @ right for each of B.

    On CPU bfloat16 is turned in memory first, for the reason said above; float32 only where that
    gains more than it costs.
    """
    narrow = left.ndim == 2 and left.shape[1] < right.shape[1]
    if platform_here() == "cpu" and (left.dtype == jnp.bfloat16 or narrow):
        return product(left.mT, right)
    return jnp.einsum("...km,...kn->...mn", left, right, preferred_element_type=wide(left.dtype))


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """What sums of numbers of this dtype are kept in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def platform_here() -> str:
    """Where what is traced will run: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.devices()[0].platform
