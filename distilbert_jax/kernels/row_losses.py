"""The vocabulary losses of rows of logits for NVIDIA GPUs, as one Pallas kernel.

Logits [P, W] of student and teachers come in as products leave them; the losses of each position
and the gradient in the student's logits go out. XLA reads logits for their maxima, for their sums
and for the gradient, each time from memory, and writes the gradient twice.

One program has the words of one position and takes TILE of them at a time: once for the running
maxima and sums of Milakov and Gimelshein 2018, algorithm 3, and once for losses and gradient. The
second time they come from the cache, if that holds the rows of all programs that run at once: with
WARPS warps, one on each multiprocessor. Two rows of 30,592 words on 132 of them are 32 MB, of 50 in
an H100's.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

TILE = 4096  # words that a program takes at a time
WARPS = 32  # of a program

Numbers = dict[str, Float[Array, " P"]]  # by name of the loss


def row_losses(
    logits: Sequence[Float[Array, "P W"]], words: int, labels: Int[Array, " P"], factors: Numbers,
    temperature: float, shares: tuple[float, ...], dtype: jnp.dtype, interpret: bool = False,
) -> tuple[Numbers, Float[Array, "P W"]]:
    """Compute the losses ce, mlm and mse of each position, and the gradient of their sum.

    Args:
        logits: of the student, and of the teachers; columns from `words` on are padding, which
            is no word and has the gradient 0.
        words: that there are.
        labels: [P], the right words of mlm.
        factors: what each loss of a position counts in the sum; those named are computed.
        temperature: of ce.
        shares: of the teachers.
        dtype: of the gradient.
        interpret: run on any platform, slowly.

    Returns:
        Each loss [P]: KL divergence in nats, cross-entropy in nats, Σ (student − teacher)²; and
        the gradient of Σ factor · loss in the student's logits.
    """
    number, width = logits[0].shape
    one = pl.BlockSpec((1,), lambda row: (row,))
    row = pl.BlockSpec((None, width), lambda row: (row, 0))
    values = jax.ShapeDtypeStruct((number,), logits[0].dtype)
    return pl.pallas_call(
        functools.partial(_kernel, words=words, temperature=temperature, shares=shares),
        grid=(number,),
        in_specs=[one, {name: one for name in factors}, [row] * len(logits)],
        out_specs=({name: one for name in factors}, row),
        out_shape=({name: values for name in factors},
                   jax.ShapeDtypeStruct((number, width), dtype)),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name="row_losses",
        interpret=interpret,
    )(labels, factors, list(logits))


def _kernel(labels, factors, logits, values, gradient, *, words, temperature, shares):
    dtype, tiles = logits[0].dtype, pl.cdiv(gradient.shape[0], TILE)
    least = jnp.finfo(dtype).min
    # What softmaxes are of: 1 / temperature of each, by model.
    cold = [1.0 / temperature] if "ce" in factors else []
    rates = [([1.0] if "mlm" in factors else []) + cold] + [cold] * (len(logits) - 1)

    def tile(number):
        """Where the tile is, its indices, which of them are there, and the logits of each model."""
        part = pl.ds(number * TILE, TILE)
        indices = number * TILE + jnp.arange(TILE, dtype="int32")
        there = indices < gradient.shape[0]
        return part, indices, there, [
            jnp.where(indices < words, triton.load(each.at[part], mask=there, other=least), least)
            for each in logits]

    def add(number, carry):
        after = []
        for x, each, (largest, sums) in zip(tile(number)[-1], rates, carry, strict=True):
            now = jnp.maximum(largest, x.max())
            after.append((now, [total * jnp.exp((largest - now) * rate)
                                + jnp.exp((x - now) * rate).sum()
                                for total, rate in zip(sums, each, strict=True)]))
        return after

    carry = [(jnp.array(least, dtype), [jnp.zeros((), dtype) for _ in each]) for each in rates]
    largest, sums = zip(*jax.lax.fori_loop(0, tiles, add, carry), strict=True)

    def write(number, totals):
        part, indices, there, (own, *theirs) = tile(number)
        cotangent = jnp.zeros(TILE, dtype)
        if "mlm" in factors:
            softmax = jnp.exp(own - largest[0]) / sums[0][0]
            cotangent += factors["mlm"][0] * (softmax - (indices == labels[0]))
        if "ce" in factors:
            softmax = jnp.exp((own - largest[0]) * cold[0]) / sums[0][-1]
        for share, x, most, total in zip(shares, theirs, largest[1:], sums[1:], strict=True):
            if "ce" in factors:
                soft = jnp.exp((x - most) * cold[0]) / total[0]
                # Less the maxima before it is summed: what all have in common would not cancel.
                totals["ce"] += share * (soft * (x - own - (most - largest[0])))
                cotangent += factors["ce"][0] * share / temperature * (softmax - soft)
            if "mse" in factors:
                totals["mse"] += share * (own - x)**2
                cotangent += factors["mse"][0] * 2 * share * (own - x)
        triton.store(gradient.at[part], cotangent.astype(gradient.dtype), mask=there)
        return totals

    totals = jax.lax.fori_loop(0, tiles, write, {
        name: jnp.zeros(TILE, dtype) for name in factors if name != "mlm"})
    if "mlm" in factors:
        values["mlm"][0] = largest[0] + jnp.log(sums[0][0]) - logits[0][labels[0]]
    if "ce" in factors:
        apart = sum(share * jnp.log(sums[0][-1] / total[0])
                    for share, total in zip(shares, sums[1:], strict=True))
        values["ce"][0] = totals["ce"].sum() / temperature + apart
    if "mse" in factors:
        values["mse"][0] = totals["mse"].sum()
