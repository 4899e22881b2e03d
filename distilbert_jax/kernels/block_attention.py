"""Attention with dropout for NVIDIA GPUs as Pallas kernels, block by block, with mask inside.

Queries, keys, values [B, T, N, H] come in as the projections leave them, contexts go out. Neither
scores nor dropout bits are ever in memory, and the elements dropped are those that XLA would drop
(`dropout.py`). `row_attention.py` is the counterpart for TPUs, which hold a whole row of scores.

One program has OWN queries of one head and takes OTHERS keys at a time, with the running maximum
and sum of Dao 2023, FlashAttention-2, algorithm 1. The backward pass computes the probabilities
again, twice: in the order of their keys, of which each program has OWN, and of their queries.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int, UInt32

from distilbert_jax.kernels.attention_mask import AttentionMask, sees
from distilbert_jax.kernels.dropout import kept
from distilbert_jax.kernels.products import wide

OWN = 64  # positions of one program
OTHERS = 32  # positions that it takes at a time; 64 would spill registers in heads of 128
WARPS = 4  # of a program


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def block_attention(
    query: Float[Array, "B T N H"], key: Float[Array, "B T N H"], value: Float[Array, "B T N H"],
    mask: AttentionMask, seeds: UInt32[Array, "B 2"], heads: Int[Array, " N"],
    rate: float, interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Compute the contexts of attention under a mask, with dropout of its probabilities.

    Args:
        query, key, value: [B, T, N, H]; T a multiple of OWN, H a power of 2 from 16.
        mask: who sees whom.
        seeds: [B, 2] of dropout.
        heads: [N] the index of each head among those of the model.
        rate: share of the probabilities that is dropped; 0 for none.
        interpret: run on any platform, slowly.
    """
    return _block_attention_forward(query, key, value, mask, seeds, heads, rate, interpret)[0]


def _block_attention_forward(
    query: Array, key: Array, value: Array, mask: AttentionMask, seeds: Array, heads: Array,
    rate: float, interpret: bool,
) -> tuple[Array, tuple]:
    rows, length, number, _ = query.shape
    log_sum = jax.ShapeDtypeStruct((rows, number, length), wide(query.dtype))
    context, log_sum = _call(_forward, (query, key, value), (), (query, log_sum), mask, seeds,
                             heads, rate, interpret)
    return context, (query, key, value, mask, seeds, heads, context, log_sum)


def _block_attention_backward(
    rate: float, interpret: bool, saved: tuple, cotangent: Array
) -> tuple:
    query, key, value, mask, seeds, heads, context, log_sum = saved
    # Of the cotangents of the probabilities under the probabilities, [B, N, T].
    means = (context.astype(log_sum.dtype) * cotangent).sum(-1).transpose(0, 2, 1)
    gradients = _call(_backward, (query, key, value, cotangent), (log_sum, means),
                      (query, key, value), mask, seeds, heads, rate, interpret)
    return *gradients, None, None, None


block_attention.defvjp(_block_attention_forward, _block_attention_backward)


def _call(
    kernel: Callable[..., None], states: tuple[Array, ...], numbers: tuple[Array, ...],
    results: tuple[Array | jax.ShapeDtypeStruct, ...], mask: AttentionMask, seeds: Array,
    heads: Array, rate: float, interpret: bool,
) -> tuple[Array, ...]:
    """Run a kernel over blocks, heads and rows.

    Args:
        kernel: `_forward` or `_backward`.
        states, numbers: arrays [B, T, N, H] and [B, N, T] of which it reads one row and head.
        results: likewise, with the shapes and dtypes of what it writes: OWN positions of each.
        mask, seeds, heads, rate, interpret: as in `block_attention`.
    """
    rows, length, number, size = states[0].shape
    state = pl.BlockSpec((None, length, None, size), lambda block, n, row: (row, 0, n, 0))
    numeric = pl.BlockSpec((None, None, length), lambda block, n, row: (row, n, 0))
    own_state = pl.BlockSpec((None, OWN, None, size), lambda block, n, row: (row, block, n, 0))
    own_numeric = pl.BlockSpec((None, None, OWN), lambda block, n, row: (row, n, block))
    rule = functools.partial(sees, causal=mask.causal, window=mask.window)
    return tuple(pl.pallas_call(
        functools.partial(kernel, rate=rate, rule=rule),
        grid=(length // OWN, number, rows),
        in_specs=[pl.BlockSpec((None, 2), lambda block, n, row: (row, 0)),
                  pl.BlockSpec((1,), lambda block, n, row: (n,)),
                  pl.BlockSpec((None, length), lambda block, n, row: (row, 0)),
                  *[state] * len(states), *[numeric] * len(numbers)],
        out_specs=[own_state if len(x.shape) == 4 else own_numeric for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
        interpret=interpret,
    )(seeds, heads, mask.segment_ids, *states, *numbers))


def _forward(seeds, heads, segments, query, key, value, context, log_sum, *, rate, rule):
    pairs = _pairs(seeds, heads, segments, rate, rule)
    queries, dtype = _own(), log_sum.dtype
    own = query[queries]

    def add(keys, carry):
        total, power_sum, largest = carry
        seen, stays = pairs(queries, keys, 0)
        scores = _scores(own, key[keys], seen)
        now = jnp.maximum(largest, scores.max(-1))
        powers, shrink = jnp.exp2(scores - now[:, None]), jnp.exp2(largest - now)
        dropped = jnp.where(stays, powers, 0).astype(value.dtype)
        total = total * shrink[:, None] + _contract(dropped, value[keys], 1, 0)
        return total, power_sum * shrink + powers.sum(-1), now

    # Keys that are not seen weigh something only until one is: each position sees itself.
    total, power_sum, largest = _over_blocks(add, key.shape[0], (
        jnp.zeros(own.shape, dtype), jnp.zeros(OWN, dtype),
        jnp.full(OWN, jnp.finfo(dtype).min, dtype)))
    context[...] = (total * (1 / (power_sum * (1 - rate)))[:, None]).astype(context.dtype)
    log_sum[...] = largest + jnp.log2(power_sum)


def _backward(seeds, heads, segments, query, key, value, cotangent, log_sum, means,
              query_gradient, key_gradient, value_gradient, *, rate, rule):
    pairs = _pairs(seeds, heads, segments, rate, rule)
    own, narrow = _own(), query.dtype
    zeros = jnp.zeros(query_gradient.shape, log_sum.dtype)

    def of_pairs(left, right, queries, keys, axis):
        """Probabilities after dropout, but for a factor; cotangents of scores, likewise."""
        seen, stays = pairs(queries, keys, axis)
        probabilities = jnp.exp2(
            _scores(left[0], right[0], seen) - _along(axis, log_sum[queries]))
        to_probabilities = jnp.where(
            stays, _contract(left[1], right[1], 1, 1) * (1 / (1 - rate)), 0)
        to_scores = probabilities * (to_probabilities - _along(axis, means[queries]))
        return jnp.where(stays, probabilities, 0).astype(narrow), to_scores.astype(narrow)

    own_keys = key[own], value[own]

    def add_to_keys(queries, carry):
        to_key, to_value = carry
        q, g = query[queries], cotangent[queries]
        dropped, to_scores = of_pairs(own_keys, (q, g), queries, own, 1)  # [S, Q]
        return to_key + _contract(to_scores, q, 1, 0), to_value + _contract(dropped, g, 1, 0)

    to_key, to_value = _over_blocks(add_to_keys, query.shape[0], (zeros, zeros))
    key_gradient[...] = (to_key * query.shape[-1]**-0.5).astype(narrow)
    value_gradient[...] = (to_value * (1 / (1 - rate))).astype(narrow)

    own_queries = query[own], cotangent[own]

    def add_to_queries(keys, to_query):
        k, v = key[keys], value[keys]
        _, to_scores = of_pairs(own_queries, (k, v), own, keys, 0)  # [Q, S]
        return to_query + _contract(to_scores, k, 1, 0)

    to_query = _over_blocks(add_to_queries, key.shape[0], zeros)
    query_gradient[...] = (to_query * query.shape[-1]**-0.5).astype(narrow)


def _own() -> pl.Slice:
    """The positions of this program."""
    return pl.ds(pl.program_id(0) * OWN, OWN)


def _over_blocks(add: Callable[[pl.Slice, Any], Any], length: int, carry: Any) -> Any:
    """Fold `add` over all blocks of OTHERS positions of the row."""
    return jax.lax.fori_loop(
        0, length // OTHERS, lambda block, carry: add(pl.ds(block * OTHERS, OTHERS), carry), carry)


def _along(axis: int, x: Array) -> Array:
    """Lay x [P] along an axis of a matrix: [P, 1] for 0, [1, P] for 1."""
    return jnp.expand_dims(x, 1 - axis)


def _pairs(
    seeds: jax.Ref, heads: jax.Ref, segments: jax.Ref, rate: float, rule: Callable[..., Array]
) -> Callable[[pl.Slice, pl.Slice, int], tuple[Bool[Array, "..."], Bool[Array, "..."]]]:
    """Say of blocks of queries and keys, along which axis the queries lie, which pairs are seen,
    and which stay after dropout: their indices are those of an array [N, T, S].

    `rule` is `sees` of an `AttentionMask`.
    """
    length, first, second, head = segments.shape[0], seeds[0], seeds[1], heads[0]

    def pairs(queries, keys, axis):
        query_index = _along(axis, queries.start + jnp.arange(queries.size, dtype="int32"))
        key_index = _along(1 - axis, keys.start + jnp.arange(keys.size, dtype="int32"))
        seen = rule(_along(axis, segments[queries]), _along(1 - axis, segments[keys]),
                    query_index, key_index)
        indices = (head * length + query_index) * length + key_index
        return seen, kept(indices.astype(jnp.uint32), first, second, rate)

    return pairs


def _scores(
    left: Float[Array, "P H"], right: Float[Array, "O H"], seen: Bool[Array, "P O"]
) -> Float[Array, "P O"]:
    """Scores whose powers of 2 are in the proportions of the probabilities.

    A GPU has no instruction for powers of any other number.
    """
    scores = _contract(left, right, 1, 1) * (math.log2(math.e) * left.shape[-1]**-0.5)
    return jnp.where(seen, scores, jnp.finfo(scores.dtype).min)


def _contract(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Multiply two matrices over the given axis of each, at least in float32."""
    return jax.lax.dot_general(left, right, (((left_axis,), (right_axis,)), ((), ())),
                               preferred_element_type=wide(left.dtype))
