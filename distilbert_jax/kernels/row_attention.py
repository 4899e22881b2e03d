"""Attention for TPUs as Pallas kernels, dropout within: neither scores nor what is dropped of them
is ever in main memory, and what is dropped is the same as without them (dropout.py).

Queries, keys and values are taken as the projections leave them; splash attention has no dropout,
and wants heads before positions, for which the compiler copied each of them twice (jax 0.10.2).

One program has one row and as many heads as fill the lanes, and takes BLOCK queries at a time
against all keys. Before a product, columns of the other heads are set to 0: that costs the matrix
unit nothing, and results come to lie in the columns of their head. The gradient computes
probabilities again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from distilbert_jax.kernels.dropout import kept
from distilbert_jax.kernels.products import wide

BLOCK = 128  # queries at a time
LANES = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def row_attention(
    query: Float[Array, "B T N H"], key: Float[Array, "B T N H"], value: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"], seeds: UInt32[Array, "B 2"], heads: Int[Array, " N"],
    rate: float, interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Contexts of attention within segments, its probabilities dropped out.

    Args:
        query, key, value: [B, T, N, H]; T a multiple of BLOCK.
        segment_ids: [B, T]; a position attends to the positions of its own number.
        seeds: [B, 2] of dropout.
        heads: [N] the number of each head among those of the model.
        rate: share of the probabilities that is dropped; 0 for none.
        interpret: run on any platform, slowly.
    """
    return _call(_forward, (query, key, value), (), segment_ids, seeds, heads, rate, interpret)[0]


def _save(*given: Any) -> tuple[Array, tuple[Array, ...]]:
    return row_attention(*given), given[:6]


def _slopes(rate: float, interpret: bool, saved: tuple[Array, ...], slope: Array) -> tuple:
    query, key, value, *rest = saved
    slopes = _call(_backward, (query, key, value, slope), (key, value), *rest, rate, interpret)
    return *slopes, None, None, None


row_attention.defvjp(_save, _slopes)


def _call(kernel: Any, states: tuple[Array, ...], summed: tuple[Array, ...], segment_ids: Array,
          seeds: Array, heads: Array, rate: float, interpret: bool) -> list[Array]:
    """Run a kernel over rows and blocks of heads; the results are like the query and `summed`."""
    rows, length, number, size = states[0].shape
    fitting = [n for n in range(1, number) if number % n == 0 and n * size % LANES == 0]
    together = min(fitting, default=number)  # heads
    width = together * size
    block = pl.BlockSpec((1, length, width), lambda row, column, *_: (row, 0, column))
    of_queries = pl.BlockSpec((1, length, 1), lambda row, *_: (row, 0, 0))
    of_keys = pl.BlockSpec((1, 1, length), lambda row, *_: (row, 0, 0))
    results = [states[0], *summed]
    found = pl.pallas_call(
        functools.partial(kernel, size=size, rate=rate),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(rows, number // together),
            in_specs=[of_queries, of_keys, *[block] * len(states)],
            out_specs=[block] * len(results),
            scratch_shapes=[pltpu.VMEM((length, width), wide(x.dtype)) for x in summed]),
        out_shape=[jax.ShapeDtypeStruct((rows, length, number * size), x.dtype) for x in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(seeds.reshape(-1), heads, segment_ids[:, :, None], segment_ids[:, None],
      *(x.reshape(rows, length, -1) for x in states))
    return [x.reshape(states[0].shape) for x in found]


def _forward(seeds, heads, own, other, query, key, value, context, *, size, rate):
    own_seeds, own_heads = _own(seeds, heads, query.shape[-1], size)

    def block(queries, _):
        total = 0.0
        for mine, head in own_heads:
            scores = _scores(mine(query[0, queries]), key[0], own[0, queries], other[0], size)
            share = _share(own_seeds, head, queries, key.shape[1], rate)
            left = (_softmax(scores) * share).astype(value.dtype)
            total += _product(left, mine(value[0]), 1, 0)
        context[0, queries] = total.astype(context.dtype)

    _blocks(block, query.shape[1])


def _backward(seeds, heads, own, other, query, key, value, slope,
              of_query, of_key, of_value, key_sum, value_sum, *, size, rate):
    own_seeds, own_heads = _own(seeds, heads, query.shape[-1], size)
    key_sum[...], value_sum[...] = jnp.zeros_like(key_sum), jnp.zeros_like(value_sum)

    def block(queries, _):
        total = 0.0
        for mine, head in own_heads:
            q, above = mine(query[0, queries]), mine(slope[0, queries])
            probabilities = _softmax(_scores(q, key[0], own[0, queries], other[0], size))
            share = _share(own_seeds, head, queries, key.shape[1], rate)
            value_sum[...] += _product((probabilities * share).astype(q.dtype), above, 0, 0)
            of_probabilities = share * _product(above, value[0], 1, 1)
            mean = (probabilities * of_probabilities).sum(-1, keepdims=True)
            of_scores = probabilities * (of_probabilities - mean) * size**-0.5
            of_scores = of_scores.astype(q.dtype)
            key_sum[...] += _product(of_scores, q, 0, 0)
            total += _product(of_scores, mine(key[0]), 1, 0)
        of_query[0, queries] = total.astype(of_query.dtype)

    _blocks(block, query.shape[1])
    of_key[0] = key_sum[...].astype(of_key.dtype)
    of_value[0] = value_sum[...].astype(of_value.dtype)


def _blocks(block: Any, length: int) -> None:
    """Do all queries, BLOCK at a time."""
    jax.lax.fori_loop(
        0, length // BLOCK, lambda number, _: block(pl.ds(number * BLOCK, BLOCK), _), None)


def _own(seeds: Any, heads: Any, width: int, size: int) -> tuple[Any, list[Any]]:
    """Seeds of this program's row; of each of its heads a function that keeps the head's columns
    only, and the head's number."""
    row, first = pl.program_id(0), pl.program_id(1) * (width // size)
    column = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)

    def only(place: int, x: Array) -> Array:
        mine = (column >= place * size) & (column < (place + 1) * size)
        return jnp.where(mine, x, jnp.zeros_like(x))

    return (seeds[2 * row], seeds[2 * row + 1]), [
        (functools.partial(only, place), heads[first + place]) for place in range(width // size)]


def _scores(query: Array, key: Array, own: Array, other: Array, size: int) -> Array:
    """[BLOCK, T], within segments."""
    scores = _product(query, key, 1, 1) * size**-0.5
    return jnp.where(own == other, scores, jnp.finfo(scores.dtype).min)


def _softmax(scores: Array) -> Array:
    powers = jnp.exp(scores - scores.max(-1, keepdims=True))
    return powers * (1 / powers.sum(-1, keepdims=True))


def _share(seeds: tuple[Array, Array], head: Array, queries: Any, length: int, rate: float) -> Any:
    """What probabilities are multiplied by, 0 or what makes up for it; the places are those of an
    array [N, T, T]."""
    if not rate:
        return 1.0
    shape = (BLOCK, length)
    at = head * length + queries.start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    places = at * length + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.where(kept(places.astype(jnp.uint32), *seeds, rate), 1 / (1 - rate), 0)


def _product(left: Array, right: Array, of_left: int, of_right: int) -> Array:
    """Over these axes of the factors; at least in float32."""
    return jax.lax.dot_general(left, right, (((of_left,), (of_right,)), ((), ())),
                               preferred_element_type=wide(left.dtype))
