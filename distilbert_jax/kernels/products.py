"""Matrix products and affine maps with their gradients, in the form each platform is fast at.

Compilers for TPU and GPU find that form themselves, so plain products and their derivatives are
left to them; but XLA adds a bias in the kernel of a GPU's product only before that is rounded (jax
0.10.2). XLA's CPU compiler (jax 0.10.2) calls its fast library, the only code that knows a
CPU's bfloat16, if the rows of both factors are contiguous and the result is float32; so on CPU
products and their gradients are written out in that form. A model that is exported goes to machines
that are not known, so within `any_platform` everything is plain. DISTILBERT_JAX_KERNELS=xla leaves
to XLA what kernels do on GPUs and TPUs, here and in the files beside this one.
"""

import contextlib
import functools
import os

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from distilbert_jax.errors import UserError

SWITCH = "DISTILBERT_JAX_KERNELS"  # an environment variable: xla turns all kernels off


def product(
    left: Float[Array, "*B M K"], right: Float[Array, "*B J L"], rows: bool = False
) -> Float[Array, "*B M N"]:
    """Multiply matrices: left @ right, or left @ right.T if `rows`.

    On CPU the incoming cotangent is rounded to the dtype of the factors, so that the products of
    the gradient are as fast as this one.

    Args:
        left: [*B, M, K].
        right: [*B, K, N]; [*B, N, K] if `rows`.
        rows: whether the vectors that `left` is multiplied with are the rows of `right`.

    Returns:
        [*B, M, N], at least float32.
    """
    return (_on_cpu if platform_here() == "cpu" else _multiply)(left, right, rows)


def _multiply(left: Array, right: Array, rows: bool) -> Array:
    equation = "...mk,...nk->...mn" if rows else "...mk,...kn->...mn"
    return jnp.einsum(equation, left, right, preferred_element_type=wide(left.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2)  # a layout can be set on traced arrays only
def _on_cpu(left: Array, right: Array, rows: bool) -> Array:
    left, right = (with_layout_constraint(x, Layout(tuple(range(x.ndim)))) for x in (left, right))
    # The barrier keeps XLA from folding a transpose of the result into the product, which it then
    # cannot run in bfloat16 (jax 0.10.2: Unsupported element type for DotThunk).
    return jax.lax.optimization_barrier(_multiply(left, right, rows))


def _on_cpu_forward(left: Array, right: Array, rows: bool) -> tuple[Array, tuple[Array, Array]]:
    return _on_cpu(left, right, rows), (left, right)


def _on_cpu_backward(
    rows: bool, factors: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    left, right = factors
    cotangent = cotangent.astype(left.dtype)
    to_right = (transposed_product(cotangent, left) if rows
                else transposed_product(left, cotangent))
    to_left = _on_cpu(cotangent, right, not rows)
    return to_left.astype(left.dtype), to_right.astype(right.dtype)


_on_cpu.defvjp(_on_cpu_forward, _on_cpu_backward)


def transposed_product(
    left: Float[Array, "*B K M"], right: Float[Array, "*B K N"]
) -> Float[Array, "*B M N"]:
    """Multiply the transpose of `left` with `right`: left.T @ right, at least in float32.

    On CPU bfloat16 is always transposed in memory first; float32 only if `left` is one matrix with
    fewer columns than `right`, where the faster product makes up for the copy.
    """
    narrow = left.ndim == 2 and left.shape[1] < right.shape[1]
    if platform_here() == "cpu" and (left.dtype == jnp.bfloat16 or narrow):
        return _on_cpu(left.mT, right, False)
    return jnp.einsum("...km,...kn->...mn", left, right, preferred_element_type=wide(left.dtype))


def column_sums(x: Float[Array, "P F"]) -> Float[Array, " F"]:
    """Sum x [P, F] over P, at least in float32.

    On CPU this is a product with a row of ones, which is several times as fast as a reduction.
    """
    if platform_here() == "cpu":
        return _on_cpu(jnp.ones((1, len(x)), x.dtype), x, False)[0]
    return x.sum(0, dtype=wide(x.dtype))


def affine(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"]
) -> Float[Array, "*B F"]:
    """Compute x @ kernel + bias in the dtype of x.

    Args:
        x: [*B, D].
        kernel: [D, F].
        bias: [F]; its gradient is summed over *B in at least float32, whatever the dtype of x.
    """
    if platform_here() in ("cpu", "gpu"):
        return _affine(x.reshape(-1, x.shape[-1]), kernel, bias).reshape(*x.shape[:-1], -1)
    return _add_bias(x @ kernel.astype(x.dtype), bias)


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    """Compute x + bias in the dtype of x; the gradient of bias is summed in at least float32."""
    return x + bias.astype(x.dtype)


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return _add_bias(x, bias), bias


def _add_bias_backward(bias: Array, cotangent: Array) -> tuple[Array, Array]:
    sums = column_sums(cotangent.reshape(-1, len(bias)))
    return cotangent, sums.astype(bias.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    """Compute `affine` of x [P, D]; the gradients of kernel and bias are never in x.dtype."""
    result = product(x, kernel.astype(x.dtype))
    return (result + bias.astype(result.dtype)).astype(x.dtype)


def _affine_forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    return _affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(saved: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    x, kernel, bias = saved
    return (product(cotangent, kernel.astype(x.dtype), rows=True).astype(x.dtype),
            transposed_product(x, cotangent).astype(kernel.dtype),
            column_sums(cotangent).astype(bias.dtype))


_affine.defvjp(_affine_forward, _affine_backward)


def opaque(x: Array) -> Array:
    """x, which XLA's CPU compiler takes for an array of which nothing is known.

    It then neither rewrites what is computed of x (the square of an exponential into another
    exponential, jax 0.10.2) nor keeps it in memory for a second use.
    """
    return jax.lax.optimization_barrier(x) if platform_here() == "cpu" else x


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype for sums of numbers of `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def any_platform() -> contextlib.AbstractContextManager:
    """A context in which code is traced that has to run on every platform.

    `platform_here` is then "any", for which there are neither layouts nor kernels of attention:
    jax.export refuses both ("custom calls whose targets have no compatibility guarantees").
    """
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform="any")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), (), abstract_device=device))


def platform_here() -> str:
    """The platform that the code being traced will run on: "cpu", "gpu", "tpu", or "any"."""
    return device_here()[0]


def device_here() -> tuple[str, str]:
    """That platform, and the compute capability (GPU) or kind of its device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if device.platform == "gpu":
        # Of a card that is not here the name alone is known: those of benchmark/chips.py have 8.0.
        return "gpu", getattr(jax.devices()[0], "compute_capability", "8.0")
    return device.platform, device.device_kind


def takes_kernels() -> bool:
    """Whether kernels that XLA did not make may be called: ours, splash attention and cuDNN's.

    Raises:
        UserError: the environment variable that turns them off has an unknown value.
    """
    said = os.environ.get(SWITCH, "")
    if said not in ("", "xla"):
        raise UserError(f"{SWITCH}={said} must be xla, which turns the kernels for GPUs and TPUs "
                        "off, or not be set")
    return not said


def kernels_here() -> tuple[str, str]:
    """`device_here` for the choice of a kernel: platform "xla" where all are turned off."""
    return device_here() if takes_kernels() else ("xla", "")


def runs_triton(capability: str) -> bool:
    """Whether a GPU of this compute capability runs our Pallas kernels: NVIDIA's from 8.0 on."""
    major = capability.split(".")[0]  # AMD's are called gfx90a
    return major.isdigit() and int(major) >= 8


def has_triton(dtype: jnp.dtype) -> bool:
    """Whether the code being traced will run where our Pallas kernels for GPUs do, which compute
    in float32 what is of `dtype`."""
    platform, capability = kernels_here()
    return platform == "gpu" and runs_triton(capability) and wide(dtype) == jnp.float32
