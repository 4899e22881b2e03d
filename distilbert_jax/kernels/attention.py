"""One attention call for every model: queries, keys, values [B, T, N, H] in, contexts out.

A packed row holds several documents; an `AttentionMask` says who sees whom, and every backend
reads it. The platform chooses the backend: XLA everywhere; on NVIDIA our own kernel
(`block_attention.py`) where probabilities are dropped, cuDNN's flash attention where not; on TPU
our own (`row_attention.py`) for rows of up to LONGEST positions, splash attention (Pallas) for
longer ones. What a backend cannot do, it declines with a reason, and XLA does it.
"""

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt32

from distilbert_jax.kernels.attention_mask import AttentionMask
from distilbert_jax.kernels.dropout import Dropout, dropped
from distilbert_jax.kernels.products import kernels_here, product, runs_triton

BLOCKS = (512, 384, 256, 128)  # positions that splash attention takes at a time; one divides T
LONGEST = 1024  # positions that our kernel takes: scores of 128 queries are then 0.5 MB


Query = Array | jax.ShapeDtypeStruct  # only its shape and dtype are read


@jax.named_scope("attention")
def attention(
    query: Float[Array, "B Q N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    mask: AttentionMask,
    drop: Dropout | None = None,
    at: Int[Array, "B Q"] | None = None,
) -> Float[Array, "B Q N H"]:
    """Compute scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) under a mask.

    The kernel of the platform is called if there is one; where it declines, XLA computes the same
    and the reason is logged once.

    Args:
        query: [B, Q, N, H], in the compute dtype.
        key, value: [B, T, N, H], likewise.
        mask: who sees whom.
        drop: dropout of the attention probabilities, which are indexed as an array [N, T, S] in
            each row; None for none.
        at: [B, Q] positions of the queries; None if they stand at all T. XLA computes them: its
            scores are small where they are few.

    Returns:
        Contexts [B, Q, N, H] in the dtype of `value`; the softmax is at least float32.
    """
    mesh = jax.sharding.get_abstract_mesh()
    platform, device = kernels_here()
    if at is not None or platform not in KERNELS:
        return _xla(query, key, value, mask, drop, at)
    kernel, lacks = KERNELS[platform]
    if reason := lacks(query, mask, device, drop is not None):
        _warn_once(f"attention without the kernel for {platform}, which lacks: {reason}")
        return _xla(query, key, value, mask, drop)
    arguments = (query, key, value, mask)
    if drop:
        kernel = functools.partial(kernel, rate=drop.rate)
        arguments += (drop.seeds, jnp.arange(query.shape[2]))
    return _on_mesh(kernel, arguments, mesh)


def _xla(
    query: Array, key: Array, value: Array, mask: AttentionMask, drop: Dropout | None,
    at: Array | None = None,
) -> Array:
    sees = mask.matrix()
    if at is not None:
        sees = jnp.take_along_axis(sees, at[..., None], axis=1)
    # Heads before positions: on CPU the two products are then plain batched matrix products.
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = product(query, key, rows=True) / math.sqrt(query.shape[-1])  # [B, N, Q, T]
    scores = jnp.where(sees[:, None], scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if at is None:
        probabilities = dropped(probabilities, drop)
    else:
        rows = at[:, None] + key.shape[2] * jnp.arange(key.shape[1])[:, None]  # of [N T, T]
        probabilities = dropped(
            probabilities.reshape(len(at), -1, key.shape[2]), drop,
            rows.reshape(len(at), -1)).reshape(scores.shape)
    context = product(probabilities.astype(value.dtype), value)  # [B, N, Q, H]
    return context.astype(value.dtype).transpose(0, 2, 1, 3)


def _gpu(
    query: Array, key: Array, value: Array, mask: AttentionMask,
    seeds: UInt32[Array, "B 2"] | None = None, heads: Int[Array, " N"] | None = None,
    rate: float = 0.0, interpret: bool = False,
) -> Array:
    if not rate:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask.matrix()[:, None], implementation="cudnn")
    from distilbert_jax.kernels.block_attention import block_attention  # slow to import

    return block_attention(query, key, value, mask, seeds, heads, rate, interpret)


def _gpu_lacks(query: Query, mask: AttentionMask, capability: str, drops: bool) -> str:
    """Say why the kernels for NVIDIA decline a call; empty if they accept.

    The rules of cuDNN are those that jax 0.10.2 checks. Ours takes the same dtypes.
    """
    length, _, size = query.shape[1:]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return str(query.dtype)
    if drops and size not in (16, 32, 64, 128):
        return f"dropout in heads of {size} (16, 32, 64 or 128)"
    if drops and length % 64:
        return f"dropout of {length} positions (multiples of 64)"
    if size % 8 or size > 128:
        return f"heads of {size} (multiples of 8 up to 128)"
    if length % 2:
        return f"{length} positions (even numbers)"
    return "" if runs_triton(capability) else f"compute capability {capability} (8.0 or later)"


def _tpu(
    query: Array, key: Array, value: Array, mask: AttentionMask,
    seeds: UInt32[Array, "B 2"] | None = None, heads: Int[Array, " N"] | None = None,
    rate: float = 0.0, interpret: bool = False,
) -> Array:
    if query.shape[1] > LONGEST:
        return _splash(query, key, value, mask, interpret)
    from distilbert_jax.kernels.row_attention import row_attention  # slow to import

    if not rate:
        seeds, heads = jnp.zeros((len(query), 2), jnp.uint32), jnp.arange(query.shape[2])
    return row_attention(query, key, value, mask, seeds, heads, rate, interpret)


def _splash(
    query: Array, key: Array, value: Array, mask: AttentionMask, interpret: bool
) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

    length, heads, size = query.shape[1:]
    block = next(block for block in BLOCKS if length % block == 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((length, length))] * heads), interpret=interpret,
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
            block_q_dq=block, block_kv_dq=block))
    # Splash attention does not scale scores, and takes one row with heads before positions.
    heads_first = [x.transpose(0, 2, 1, 3) for x in (query / size**0.5, key, value)]
    segments = splash.SegmentIds(mask.segment_ids, mask.segment_ids)
    return jax.vmap(kernel)(*heads_first, segments).transpose(0, 2, 1, 3)


def _tpu_lacks(query: Query, mask: AttentionMask, device: str, drops: bool) -> str:
    """Say why the kernels for TPU decline a call; empty if they accept."""
    length, _, size = query.shape[1:]
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return str(query.dtype)
    if query.dtype == jnp.bfloat16 and device in ("TPU v2", "TPU v3"):
        return f"bfloat16 on {device}"
    if size % 64 and (length > LONGEST or 128 % size):
        divisors = "" if length > LONGEST else " or divisors of 128"
        return f"heads of {size} (multiples of 64{divisors})"
    if drops and length > LONGEST:
        return f"dropout of {length} positions (up to {LONGEST})"
    if length > LONGEST and (mask.causal or mask.window is not None):
        return f"a causal or windowed mask of {length} positions (up to {LONGEST})"
    return f"{length} positions (multiples of 128)" if length % BLOCKS[-1] else ""


# Platform → its kernel, and a function (query, mask, compute capability or kind of the device,
# whether there is dropout) → why the kernel declines.
KERNELS: dict[
    str, tuple[Callable[..., Array], Callable[[Query, AttentionMask, str, bool], str]]
] = {"gpu": (_gpu, _gpu_lacks), "tpu": (_tpu, _tpu_lacks)}


def _on_mesh(
    kernel: Callable[..., Array], arguments: tuple[Array | AttentionMask, ...], mesh: AbstractMesh
) -> Array:
    """Call a kernel on each device's own rows and heads, as the compiler does not divide kernels.

    Args:
        arguments: query, key, value, mask; with dropout also seeds [B, 2] and head numbers [N].
    """
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if not free or mesh.size == 1:
        return kernel(*arguments)

    def divides(axis: str, size: int) -> str | None:
        return axis if axis in free and size % mesh.shape[axis] == 0 else None

    batch, _, number, _ = arguments[0].shape
    rows, heads = divides("data", batch), divides("model", number)
    states = P(rows, None, heads, None)
    specs = (states, states, states, P(rows), P(rows), P(heads))
    return jax.shard_map(
        kernel, in_specs=specs[:len(arguments)], out_specs=states, check_vma=False,
        axis_names=free)(*arguments)


@functools.cache
def _warn_once(line: str) -> None:
    """Log a warning, once for each line."""
    logging.getLogger(__name__).warning(line)
