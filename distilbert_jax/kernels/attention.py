"""One attention call for every model: queries, keys, values [B, T, N, H] in, contexts out.

A packed row holds several documents; `segment_ids` keeps each to itself. The platform chooses the
backend: XLA everywhere, cuDNN's flash attention on NVIDIA; on TPU a kernel of our own for rows of
usual length, and splash attention (Pallas) beyond.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from distilbert_jax.kernels.dropout import Dropout, dropped
from distilbert_jax.kernels.products import product

BLOCKS = (512, 384, 256, 128)  # positions that splash attention takes at a time; one divides T
LONGEST = 1024  # positions that our kernel takes: scores of 128 queries are then 0.5 MB


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"],
    drop: Dropout | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention within segments (Vaswani et al. 2017, section 3.2.1).

    Where the platform has a kernel of its own, that is taken; what it cannot do is done by XLA,
    with one line in the log.

    Args:
        query, key, value: [B, T, N, H], in the compute dtype.
        segment_ids: [B, T]; a position attends to the positions of its own number only. Padding
            is segment 0: it attends to padding, so that no row of the softmax is empty.
        drop: dropout of the attention probabilities, whose places are those of an array
            [N, T, T] in each row; None for none.

    Returns:
        Contexts [B, T, N, H] in the dtype of `value`; the softmax is at least float32.
    """
    mesh = jax.sharding.get_abstract_mesh()
    platform, device = _device(mesh)
    if platform not in KERNELS:
        return _xla(query, key, value, segment_ids, drop)
    kernel, lacks = KERNELS[platform]
    if reason := lacks(query, device, drop is not None):
        _tell(f"attention without the kernel for {platform}, which lacks: {reason}")
        return _xla(query, key, value, segment_ids, drop)
    given = (query, key, value, segment_ids)
    if drop:
        kernel = functools.partial(kernel, rate=drop.rate)
        given += (drop.seeds, jnp.arange(query.shape[2]))
    return _on_mesh(kernel, given, mesh)


def _xla(query, key, value, segment_ids, drop):
    # Heads before positions: on CPU the two products are then plain batched matrix products.
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = product(query, key, rows=True) / math.sqrt(query.shape[-1])  # [B, N, T, S]
    scores = jnp.where(_same_segment(segment_ids), scores, jnp.finfo(scores.dtype).min)
    probabilities = dropped(jax.nn.softmax(scores, axis=-1), drop)
    context = product(probabilities.astype(value.dtype), value)  # [B, N, T, H]
    return context.astype(value.dtype).transpose(0, 2, 1, 3)


def _cudnn(query, key, value, segment_ids):
    # It takes segments as a mask, not by number.
    return jax.nn.dot_product_attention(
        query, key, value, mask=_same_segment(segment_ids), implementation="cudnn")


def _cudnn_lacks(query: Any, capability: str, drops: bool) -> str:
    """Why cuDNN cannot take it, by the rules that jax 0.10.2 checks; empty if it can."""
    length, _, size = query.shape[1:]
    if drops:
        return "attention dropout"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return str(query.dtype)
    if size % 8 or size > 128:
        return f"heads of {size} (multiples of 8 up to 128)"
    if length % 2:
        return f"{length} positions (even numbers)"
    major = capability.split(".")[0]  # AMD's are called gfx90a
    modern = major.isdigit() and int(major) >= 8
    return "" if modern else f"compute capability {capability} (8.0 or later)"


def _pallas(query, key, value, segment_ids, seeds=None, heads=None, rate=0.0, interpret=False):
    if query.shape[1] > LONGEST:
        return _splash(query, key, value, segment_ids, interpret)
    from distilbert_jax.kernels.row_attention import row_attention  # slow to import

    if not rate:
        seeds, heads = jnp.zeros((len(query), 2), jnp.uint32), jnp.arange(query.shape[2])
    return row_attention(query, key, value, segment_ids, seeds, heads, rate, interpret)


def _splash(query, key, value, segment_ids, interpret):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

    length, heads, size = query.shape[1:]
    block = next(block for block in BLOCKS if length % block == 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((length, length))] * heads), interpret=interpret,
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
            block_q_dq=block, block_kv_dq=block))
    # It does not scale, and takes heads before positions, one row at a time.
    heads_first = [x.transpose(0, 2, 1, 3) for x in (query / size**0.5, key, value)]
    segments = splash.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(*heads_first, segments).transpose(0, 2, 1, 3)


def _pallas_lacks(query: Any, device: str, drops: bool) -> str:
    """Why the kernels for TPU cannot take it; empty if they can."""
    length, _, size = query.shape[1:]
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return str(query.dtype)
    if query.dtype == jnp.bfloat16 and device in ("TPU v2", "TPU v3"):
        return f"bfloat16 on {device}"
    if size % 64 and (length > LONGEST or 128 % size):
        own = "" if length > LONGEST else " or divisors of 128"
        return f"heads of {size} (multiples of 64{own})"
    if drops and length > LONGEST:
        return f"dropout of {length} positions (up to {LONGEST})"
    return f"{length} positions (multiples of 128)" if length % BLOCKS[-1] else ""


# Platform → its kernel, and a function (query, what the device is, whether something is dropped)
# → what the kernel lacks for it.
KERNELS: dict[str, tuple[Callable[..., Array], Callable[[Any, str, bool], str]]] = {
    "gpu": (_cudnn, _cudnn_lacks), "tpu": (_pallas, _pallas_lacks)}


def _same_segment(segment_ids: Int[Array, "B T"]) -> Array:
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, T, S]


def _device(mesh: AbstractMesh) -> tuple[str, str]:
    """Platform, and compute capability or kind, of the mesh in context or else of any device."""
    device = mesh.abstract_device or jax.devices()[0]
    if device.platform == "gpu":
        return "gpu", jax.devices()[0].compute_capability
    return device.platform, device.device_kind


def _on_mesh(kernel: Callable[..., Array], given: tuple[Array, ...], mesh: AbstractMesh) -> Array:
    """Kernels are not divided by the compiler: each device takes its own rows and heads."""
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if not free or mesh.size == 1:
        return kernel(*given)

    def divides(axis: str, size: int) -> str | None:
        return axis if axis in free and size % mesh.shape[axis] == 0 else None

    rows, heads = divides("data", given[0].shape[0]), divides("model", given[0].shape[2])
    states = P(rows, None, heads, None)
    specs = (states, states, states, P(rows), P(rows), P(heads))  # the last two with dropout
    return jax.shard_map(
        kernel, in_specs=specs[:len(given)], out_specs=states, check_vma=False,
        axis_names=free)(*given)


@functools.cache
def _tell(line: str) -> None:
    """Log a line once."""
    logging.getLogger(__name__).warning(line)
