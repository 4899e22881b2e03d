"""Attention for TPUs as Pallas kernels, one row at a time, with mask and dropout inside.

Queries, keys, values [B, T, N, H] come in as the projections leave them, contexts go out. Neither
scores nor dropout bits are ever in HBM, and the elements dropped are those that XLA would drop
(`dropout.py`). Splash attention has no dropout, and wants heads before positions, for which the
compiler copied each of the three twice (jax 0.10.2).

One program has one row and as many heads as fill the lanes, and takes BLOCK queries at a time
against all keys. Before a product, the columns of the other heads are set to 0: that costs the
matrix unit nothing, and results come to lie in the columns of their head. Two heads of size 64:

    lanes                  0 … 63   64 … 127
    keys                   k0       k1
    queries for head 0     q0       0          q0 · k0ᵀ are its scores
    queries for head 1     0        q1         q1 · k1ᵀ are its scores
    values for head 0      v0       0          its context comes to lie in lanes 0 … 63
    values for head 1      0        v1         its context comes to lie in lanes 64 … 127

The backward pass computes the probabilities again.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, UInt32

from distilbert_jax.kernels.attention_mask import AttentionMask, sees
from distilbert_jax.kernels.dropout import kept
from distilbert_jax.kernels.products import wide

BLOCK = 128  # queries at a time
LANES = 128

Columns = Callable[[Array], Array]  # keeps the columns of one head, the others are 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def row_attention(
    query: Float[Array, "B T N H"], key: Float[Array, "B T N H"], value: Float[Array, "B T N H"],
    mask: AttentionMask, seeds: UInt32[Array, "B 2"], heads: Int[Array, " N"],
    rate: float, interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Compute the contexts of attention under a mask, with dropout of its probabilities.

    Args:
        query, key, value: [B, T, N, H]; T a multiple of BLOCK.
        mask: who sees whom.
        seeds: [B, 2] of dropout.
        heads: [N] the index of each head among those of the model.
        rate: share of the probabilities that is dropped; 0 for none.
        interpret: run on any platform, slowly.
    """
    return _call(_forward, (query, key, value), (), mask, seeds, heads, rate, interpret)[0]


def _row_attention_forward(
    query: Array, key: Array, value: Array, mask: AttentionMask, seeds: Array, heads: Array,
    rate: float, interpret: bool,
) -> tuple[Array, tuple]:
    context = row_attention(query, key, value, mask, seeds, heads, rate, interpret)
    return context, (query, key, value, mask, seeds, heads)


def _row_attention_backward(rate: float, interpret: bool, saved: tuple, cotangent: Array) -> tuple:
    query, key, value, mask, seeds, heads = saved
    gradients = _call(_backward, (query, key, value, cotangent), (key, value), mask, seeds, heads,
                      rate, interpret)
    return *gradients, None, None, None


row_attention.defvjp(_row_attention_forward, _row_attention_backward)


def _call(
    kernel: Callable[..., None], states: tuple[Array, ...], summed: tuple[Array, ...],
    mask: AttentionMask, seeds: Array, heads: Array, rate: float, interpret: bool,
) -> list[Array]:
    """Run a kernel over rows and groups of heads.

    Args:
        kernel: `_forward` or `_backward`.
        states: arrays [B, T, N, H] that it reads; the query first.
        summed: arrays with whose shapes and dtypes it returns sums over blocks of queries.
        mask, seeds, heads, rate, interpret: as in `row_attention`.

    Returns:
        An array like the query, and one like each of `summed`.
    """
    rows, length, number, size = states[0].shape
    fitting = [n for n in range(1, number) if number % n == 0 and n * size % LANES == 0]
    together = min(fitting, default=number)  # heads of one program
    width = together * size
    state = pl.BlockSpec((1, length, width), lambda row, column, *_: (row, 0, column))
    per_query = pl.BlockSpec((1, length, 1), lambda row, *_: (row, 0, 0))
    per_key = pl.BlockSpec((1, 1, length), lambda row, *_: (row, 0, 0))
    results = [states[0], *summed]
    rule = functools.partial(sees, causal=mask.causal, window=mask.window)
    outputs = pl.pallas_call(
        functools.partial(kernel, size=size, rate=rate, rule=rule),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(rows, number // together),
            in_specs=[per_query, per_key, *[state] * len(states)],
            out_specs=[state] * len(results),
            scratch_shapes=[pltpu.VMEM((length, width), wide(x.dtype)) for x in summed]),
        out_shape=[jax.ShapeDtypeStruct((rows, length, number * size), x.dtype) for x in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(seeds.reshape(-1), heads, mask.segment_ids[:, :, None], mask.segment_ids[:, None],
      *(x.reshape(rows, length, -1) for x in states))
    return [x.reshape(states[0].shape) for x in outputs]


def _forward(seeds, heads, query_segments, key_segments, query, key, value, context,
             *, size, rate, rule):
    row_seeds, own_heads = _row_and_heads(seeds, heads, query.shape[-1], size)

    def block(queries):
        seen = _seen(queries, query_segments, key_segments, rule)
        total = 0.0
        for columns, head in own_heads:
            probabilities = _probabilities(columns(query[0, queries]), key[0], seen, size)
            factors = _dropout_factors(row_seeds, head, queries, key.shape[1], rate)
            dropped = (probabilities * factors).astype(value.dtype)
            total += _contract(dropped, columns(value[0]), 1, 0)
        context[0, queries] = total.astype(context.dtype)

    _for_each_block(block, query.shape[1])


def _backward(seeds, heads, query_segments, key_segments, query, key, value, cotangent,
              query_gradient, key_gradient, value_gradient, key_sum, value_sum,
              *, size, rate, rule):
    row_seeds, own_heads = _row_and_heads(seeds, heads, query.shape[-1], size)
    key_sum[...], value_sum[...] = jnp.zeros_like(key_sum), jnp.zeros_like(value_sum)

    def block(queries):
        seen = _seen(queries, query_segments, key_segments, rule)
        total = 0.0
        for columns, head in own_heads:
            q, g = columns(query[0, queries]), columns(cotangent[0, queries])
            probabilities = _probabilities(q, key[0], seen, size)
            factors = _dropout_factors(row_seeds, head, queries, key.shape[1], rate)
            value_sum[...] += _contract((probabilities * factors).astype(q.dtype), g, 0, 0)
            to_probabilities = factors * _contract(g, value[0], 1, 1)  # cotangents [BLOCK, T]
            mean = (probabilities * to_probabilities).sum(-1, keepdims=True)
            to_scores = probabilities * (to_probabilities - mean) * size**-0.5
            to_scores = to_scores.astype(q.dtype)
            key_sum[...] += _contract(to_scores, q, 0, 0)
            total += _contract(to_scores, columns(key[0]), 1, 0)
        query_gradient[0, queries] = total.astype(query_gradient.dtype)

    _for_each_block(block, query.shape[1])
    key_gradient[0] = key_sum[...].astype(key_gradient.dtype)
    value_gradient[0] = value_sum[...].astype(value_gradient.dtype)


def _for_each_block(block: Callable[[pl.Slice], None], length: int) -> None:
    """Call `block` with every slice of BLOCK queries of the row."""
    jax.lax.fori_loop(0, length // BLOCK, lambda number, _: block(pl.ds(number * BLOCK, BLOCK)),
                      None)


def _row_and_heads(
    seeds: jax.Ref, heads: jax.Ref, width: int, size: int
) -> tuple[tuple[Array, Array], list[tuple[Columns, Array]]]:
    """Seeds of this program's row; for each of its heads the columns, and the index in the model.
    """
    row, first = pl.program_id(0), pl.program_id(1) * (width // size)
    column = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)

    def columns(number: int, x: Array) -> Array:
        own = (column >= number * size) & (column < (number + 1) * size)
        return jnp.where(own, x, jnp.zeros_like(x))

    return (seeds[2 * row], seeds[2 * row + 1]), [
        (functools.partial(columns, number), heads[first + number])
        for number in range(width // size)]


def _indices(queries: pl.Slice, length: int) -> tuple[Int[Array, "Q S"], Int[Array, "Q S"]]:
    """Indices within the row of the query and of the key, for each of BLOCK × T pairs."""
    query_index, key_index = (
        jax.lax.broadcasted_iota(jnp.int32, (BLOCK, length), axis) for axis in (0, 1))
    return queries.start + query_index, key_index


def _seen(
    queries: pl.Slice, query_segments: jax.Ref, key_segments: jax.Ref, rule: Callable[..., Array]
) -> Bool[Array, "Q S"]:
    """The part of the mask of these queries: `rule` is `sees` of an `AttentionMask`."""
    indices = _indices(queries, key_segments.shape[-1])
    return rule(query_segments[0, queries], key_segments[0], *indices)


def _probabilities(
    query: Float[Array, "Q W"], key: Float[Array, "S W"], seen: Bool[Array, "Q S"], size: int
) -> Float[Array, "Q S"]:
    scores = _contract(query, key, 1, 1) * size**-0.5
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    powers = jnp.exp(scores - scores.max(-1, keepdims=True))
    return powers * (1 / powers.sum(-1, keepdims=True))


def _dropout_factors(
    seeds: tuple[Array, Array], head: Array, queries: pl.Slice, length: int, rate: float
) -> Float[Array, "Q S"] | float:
    """Factors of the probabilities: 0, or 1 / (1 - rate); indexed as an array [N, T, S]."""
    if not rate:
        return 1.0
    query_index, key_index = _indices(queries, length)
    indices = (head * length + query_index) * length + key_index
    return jnp.where(kept(indices.astype(jnp.uint32), *seeds, rate), 1 / (1 - rate), 0)


def _contract(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Multiply two matrices over the given axis of each, at least in float32."""
    return jax.lax.dot_general(left, right, (((left_axis,), (right_axis,)), ((), ())),
                               preferred_element_type=wide(left.dtype))
