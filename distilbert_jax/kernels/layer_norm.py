"""Layer normalization for NVIDIA GPUs, with a gradient that reads what it is of once.

The forward pass is left to XLA, which fuses it with the sum that it normalises. Of the gradient XLA
makes three kernels: that of x, and for the scale a product in float32, which it writes and reads
again. The Pallas kernel here is all of it: one program has BLOCK positions, of which it takes ROWS
at a time, and leaves sums over them for scale and bias, which XLA adds up.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

BLOCK = 64  # positions of a program
ROWS = 4  # that it takes at a time
WARPS = 8  # of a program


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: Float[Array, "B *T D"], scale: Float[Array, " D"], bias: Float[Array, " D"], epsilon: float,
    interpret: bool = False,
) -> Float[Array, "B *T D"]:
    """Normalise x over D (Ba, Kiros and Hinton 2016), then scale and shift it.

    Args:
        x: [B, *T, D], in the compute dtype.
        scale, bias: [D], in the dtype that means and variances are computed in.
        epsilon: is added to the variance.
        interpret: run the gradient's kernel on any platform, slowly.

    Returns:
        An array of the shape and dtype of x.
    """
    centred = x.astype(scale.dtype) - x.mean(-1, keepdims=True, dtype=scale.dtype)
    rate = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return (centred * (rate * scale) + bias).astype(x.dtype)


def _layer_norm_forward(
    x: Array, scale: Array, bias: Array, epsilon: float, interpret: bool
) -> tuple[Array, tuple[Array, Array]]:
    return layer_norm(x, scale, bias, epsilon, interpret), (x, scale)


def _layer_norm_backward(
    epsilon: float, interpret: bool, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array, Array]:
    """On a mesh each device takes its own rows, as the compiler does not divide kernels."""
    x, scale = saved
    gradients = functools.partial(_gradients, epsilon=epsilon, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if free and mesh.size > 1:
        axis = "data" if "data" in free and len(x) % mesh.shape["data"] == 0 else None
        rows = P(axis)
        gradients = jax.shard_map(gradients, in_specs=(rows, rows, P()), out_specs=(rows,) * 3,
                                  check_vma=False, axis_names=free)
    to_x, to_scale, to_bias = gradients(x, cotangent, scale)
    return to_x, to_scale.sum(0), to_bias.sum(0)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _gradients(
    x: Array, cotangent: Array, scale: Array, epsilon: float, interpret: bool
) -> tuple[Array, Array, Array]:
    """The gradient of x, and by program those of scale and bias [programs, D]."""
    size = x.shape[-1]
    shape = x.size // size, size
    programs = pl.cdiv(shape[0], BLOCK)
    positions = pl.BlockSpec((BLOCK, size), lambda block: (block, 0))
    sums = pl.BlockSpec((None, size), lambda block: (block, 0))
    result = jax.ShapeDtypeStruct((programs, size), scale.dtype)
    to_x, *others = pl.pallas_call(
        functools.partial(_kernel, number=shape[0], epsilon=epsilon),
        grid=(programs,),
        in_specs=[positions, positions, pl.BlockSpec((size,), lambda block: (0,))],
        out_specs=[positions, sums, sums],
        out_shape=[jax.ShapeDtypeStruct(shape, x.dtype), result, result],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="layer_norm",
        interpret=interpret,
    )(x.reshape(shape), cotangent.reshape(shape), scale)
    return to_x.reshape(x.shape), *others


def _kernel(x, cotangent, scale, to_x, to_scale, to_bias, *, number, epsilon):
    size, dtype = scale.shape[0], scale.dtype
    columns = pl.ds(0, pl.next_power_of_2(size))
    first, inside = pl.program_id(0) * BLOCK, jnp.arange(columns.size, dtype="int32") < size
    weights = triton.load(scale.at[columns], mask=inside, other=0)

    def mean(values):
        return values.sum(-1, keepdims=True) * (1 / size)

    def add(step, sums):
        positions = first + step * ROWS + jnp.arange(ROWS, dtype="int32")
        there = (positions < number)[:, None] & inside
        part = pl.ds(step * ROWS, ROWS), columns
        values, pull = (triton.load(each.at[part], mask=there, other=0).astype(dtype)
                        for each in (x, cotangent))
        centred = jnp.where(there, values - mean(values), 0)
        rate = jax.lax.rsqrt(mean(centred**2) + epsilon)
        normal, scaled = centred * rate, pull * weights
        gradient = rate * (scaled - mean(scaled) - normal * mean(scaled * normal))
        triton.store(to_x.at[part], gradient.astype(to_x.dtype), mask=there)
        return sums[0] + pull * normal, sums[1] + pull

    zeros = jnp.zeros((ROWS, columns.size), dtype)
    totals = jax.lax.fori_loop(0, BLOCK // ROWS, add, (zeros, zeros))
    for total, result in zip(totals, (to_scale, to_bias), strict=True):
        triton.store(result.at[columns], total.sum(0), mask=inside)
