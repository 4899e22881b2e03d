"""The vocabulary losses with their gradients for TPUs as Pallas kernels, tile by tile of words.

Hidden states and word embeddings of student and teachers come in; the losses of all positions and
the gradients of their total go out. Logits, and gradients in them, are made on the chip a tile
[BLOCK, TILE] at a time, and are never in HBM.

The hidden states of a chunk of positions, and the gradient in them, stay on the chip while all
words pass by twice: for the maxima and sums of the softmaxes, then for losses and gradients. Both
times logits are made anew, so that two models take six products, for four with logits in HBM. Every
chunk adds to the gradient in the words, in place.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from distilbert_jax.kernels.head import Figures, Head, Targets, at_labels, cut, sums_of
from distilbert_jax.kernels.products import wide

BLOCK = 256  # positions at a time
TILE = 1024  # words at a time
LANES = 128
# v5e and v6e: their one core takes all tiles in turn, and has 128 MiB of memory of its own.
CHIPS = ("TPU v5 lite", "TPU v6 lite")
MEMORY = 100 * 2**20  # bytes of it that a kernel may take
INSIDE = 24 * 2**20  # bytes of these for the tiles that it is computing with
LEAST = 2048  # positions of a chunk that have to fit, so that words need not pass by too often

Rates = list[dict[str, float]]  # of each model: loss → 1 / temperature of its softmax
# Numbers of each position, by name: in a kernel [BLOCK, 1], and columns of what it reads or writes,
# [P, LANES].
Numbers = Any


def tile_losses(
    student: Head, teachers: Sequence[Head], targets: Targets, scales: Figures,
    temperature: float, shares: tuple[float, ...], interpret: bool = False,
) -> tuple[Figures, Head]:
    """Compute the sums of the losses ce, mlm and mse, and the gradients of Σ scale · sum.

    Args:
        student, teachers, targets, temperature: as in `fused_losses`.
        scales: of the losses that are computed.
        shares: of the teachers.
        interpret: run on any platform, slowly.

    Returns:
        The sums, and the gradients, at least in float32.
    """
    models = [student, *teachers]
    shape, words = student.states.shape, len(student.embedding)
    dtype = wide(student.states.dtype)
    tables = [_filled(model, dtype) for model in models]
    rates = [{name: {"mlm": 1.0, "ce": 1 / temperature}[name] for name in ("mlm", "ce")
              if name in scales and (name == "ce" or model is student)} for model in models]
    compared = {part: [0.0] * len(shares) for part, name in (("apart", "ce"), ("mse", "mse"))
                if name in scales}

    def chunk(carry, taken):
        total, of_words = carry
        states, at = taken
        columns = jax.ShapeDtypeStruct((len(at.labels), LANES), dtype)
        _, (found,) = _call(functools.partial(_sums, rates=rates), (states,), tables, (),
                            (columns,), interpret)
        found = _unpacked(found, _nothing(rates, dtype))
        factors = _factors(found, at, scales, temperature, shares)
        of_words, (of_states, parts) = _call(
            functools.partial(_gradients, rates=rates, factors=jax.tree.map(lambda _: 0.0, factors),
                              compared=compared),
            (states, _packed(factors)), tables, of_words,
            (jax.ShapeDtypeStruct(states[0].shape, dtype), columns), interpret)
        parts = _unpacked(parts, compared)
        if "ce" in scales:
            ours, *theirs = [each["ce"] for each in found]
            parts |= {"ours": ours, "theirs": theirs}
        if "mlm" in scales:
            at_label = at_labels(Head(states[0], tables[0][0], student.bias), at.labels)
            parts |= {"mlm": found[0]["mlm"], "label": at_label}
        sums = sums_of(parts, found[0]["largest"], at, temperature, shares)
        return (jax.tree.map(jnp.add, total, sums), of_words), of_states

    carry = ({name: jnp.zeros((), dtype) for name in scales},
             tuple(jnp.zeros(x.shape, dtype) for x in tables[0]))
    chunks = cut(([model.states for model in models], targets), _chunks(models), BLOCK)
    (total, of_words), of_states = jax.lax.scan(chunk, carry, chunks)
    of_states = of_states.reshape(-1, shape[-1])[:math.prod(shape[:-1])]
    return total, Head(of_states.reshape(shape), of_words[0][:words], of_words[1][0, :words])


def _filled(model: Head, dtype: jnp.dtype) -> tuple[Float[Array, "W D"], Float[Array, "1 W"]]:
    """Words and biases, filled up to whole tiles with what weighs nothing in a softmax, and has one
    logit in all models."""
    fill, least = -len(model.bias) % TILE, jnp.finfo(dtype).min
    return (jnp.pad(model.embedding.astype(model.states.dtype), ((0, fill), (0, 0))),
            jnp.pad(model.bias.astype(dtype), (0, fill), constant_values=least)[None])


def _nothing(rates: Rates, dtype: jnp.dtype) -> Numbers:
    """The largest logit and the sums of softmaxes, of each model, before any word was seen."""
    return [{"largest": float(jnp.finfo(dtype).min)} | dict.fromkeys(each, 0.0) for each in rates]


def _factors(found: Numbers, at: Targets, scales: Figures, temperature: float,
             shares: tuple[float, ...]) -> Numbers:
    """What the powers and differences of a position count in its gradient."""
    factors = {"largest": [each["largest"] for each in found]}
    if "mlm" in scales:
        factor = scales["mlm"] * at.label_weights
        # Numbers of words are exact in float32.
        factors |= {"word": at.labels.astype(factor.dtype), "label": factor,
                    "mlm": factor / found[0]["mlm"]}
    if "ce" in scales:
        ours, *theirs = [temperature * scales["ce"] * at.soft_weights / each["ce"]
                         for each in found]
        factors |= {"ours": math.fsum(shares) * ours, "theirs": [
            share * each for share, each in zip(shares, theirs, strict=True)]}
    if "mse" in scales:
        factors["mse"] = [2 * share * scales["mse"] * at.soft_weights for share in shares]
    return factors


def _call(
    kernel: Callable[..., None], chunk: Any, tables: Any, changed: Any,
    results: tuple[jax.ShapeDtypeStruct, ...], interpret: bool,
) -> tuple[Any, tuple[Array, ...]]:
    """Run a kernel over tiles of words.

    Args:
        kernel: `_sums` or `_gradients`.
        chunk: arrays [P, _] that it reads, and which stay on the chip.
        tables: arrays [W, D] and [1, W] of which it reads one tile at a time.
        changed: likewise, of which it changes one tile at a time.
        results: arrays [P, _] that it writes, and which stay on the chip.
        interpret: as in `tile_losses`.

    Returns:
        `changed`, and the results.
    """
    def whole(x):
        return pl.BlockSpec(x.shape, lambda tile: (0, 0), pipeline_mode=pl.Buffered(1))

    def tiled(x):
        return (pl.BlockSpec((1, TILE), lambda tile: (0, tile)) if len(x) == 1 else
                pl.BlockSpec((TILE, x.shape[1]), lambda tile: (tile, 0)))

    first = len(jax.tree.leaves((chunk, tables)))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), changed)
    return pl.pallas_call(
        kernel, grid=(len(tables[0][0]) // TILE,),
        in_specs=(jax.tree.map(whole, chunk), jax.tree.map(tiled, (tables, changed))),
        out_specs=(jax.tree.map(tiled, changed), jax.tree.map(whole, results)),
        out_shape=(like, results),
        input_output_aliases={first + n: n for n in range(len(changed))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=MEMORY),
        interpret=interpret,
    )(chunk, (tables, changed))


def _sums(chunk, words, _, results, *, rates):
    """For every softmax the largest logit, and the sum of powers of what the others are below."""
    (states,), (tables, _), (result,) = chunk, words, results
    nothing = _nothing(rates, result.dtype)

    @pl.when(pl.program_id(0) == 0)
    def _():
        for number, x in enumerate(jax.tree.leaves(nothing)):
            result[:, number:number + 1] = jnp.full((result.shape[0], 1), x, result.dtype)

    def block(rows):
        after = []
        for x, each, before in zip(_logits(states, tables, rows), rates,
                                   _read(result, rows, nothing), strict=True):
            largest = jnp.maximum(before["largest"], x.max(-1, keepdims=True))
            shrunk = before["largest"] - largest
            after.append({"largest": largest} | {
                name: before[name] * jnp.exp(shrunk * each[name]) + power.sum(-1, keepdims=True)
                for name, power in _powers(x - largest, each).items()})
        _write(result, rows, after)

    _for_each_block(block, result.shape[0])


def _gradients(chunk, words, changed, results, *, rates, factors, compared):
    (states, numbers), (tables, before), (of_states, parts) = chunk, words, results
    of_words, of_bias = changed
    of_words[...], of_bias[...] = before[0][...], before[1][...]
    first = pl.program_id(0) * TILE

    @pl.when(first == 0)
    def _():
        of_states[...], parts[...] = jnp.zeros_like(of_states), jnp.zeros_like(parts)

    def block(rows):
        at, totals = _read(numbers, rows, factors), _read(parts, rows, compared)
        own, *theirs = _logits(states, tables, rows)
        largest, *peaks = at["largest"]
        ours, *softs = [_powers(x - most, each) for x, most, each in zip(
            (own, *theirs), at["largest"], rates, strict=True)]
        cotangent = jnp.zeros_like(own)
        if "mlm" in at:
            word = first + jax.lax.broadcasted_iota(jnp.int32, (1, TILE), 1)
            hot = word == at["word"].astype(jnp.int32)
            cotangent += at["mlm"] * ours["mlm"] - jnp.where(hot, at["label"], 0)
        if "ours" in at:
            cotangent += at["ours"] * ours["ce"]
        for n, (x, most, soft) in enumerate(zip(theirs, peaks, softs, strict=True)):
            apart = x - own
            if "ours" in at:
                cotangent -= at["theirs"][n] * soft["ce"]
                # Less the maxima before it is summed: what all have in common would not cancel.
                totals["apart"][n] += (soft["ce"] * (apart - (most - largest))).sum(
                    -1, keepdims=True)
            if "mse" in at:
                cotangent -= at["mse"][n] * apart
                totals["mse"][n] += (apart ** 2).sum(-1, keepdims=True)
        _write(parts, rows, totals)
        narrow = cotangent.astype(states[0].dtype)
        of_words[...] += _contract(narrow, states[0][rows], 0, 0)
        of_bias[...] += cotangent.sum(0, keepdims=True)
        of_states[rows] += _contract(narrow, tables[0][0][...], 1, 0)

    _for_each_block(block, parts.shape[0])


def _logits(states: Any, tables: Any, rows: pl.Slice) -> list[Float[Array, "P W"]]:
    """Of each model, the logits of a block of positions and a tile of words."""
    return [_contract(x[rows], embedding[...], 1, 1) + bias[...]
            for x, (embedding, bias) in zip(states, tables, strict=True)]


def _powers(below: Float[Array, "P W"], rates: dict[str, float]) -> dict[str, Array]:
    """e to the power of logits less the largest, at each temperature."""
    if rates == {"mlm": 1.0, "ce": 0.5}:  # a square instead of another exponential
        half = jnp.exp(below * 0.5)
        return {"mlm": half ** 2, "ce": half}
    return {name: jnp.exp(below * rate) for name, rate in rates.items()}


def _for_each_block(block: Callable[[pl.Slice], None], positions: int) -> None:
    """Call `block` with every slice of BLOCK positions of the chunk."""
    jax.lax.fori_loop(0, positions // BLOCK,
                      lambda number, _: block(pl.ds(number * BLOCK, BLOCK)), None)


def _packed(numbers: Numbers) -> Float[Array, "P L"]:
    leaves = jax.tree.leaves(numbers)
    return jnp.pad(jnp.stack(leaves, 1), ((0, 0), (0, LANES - len(leaves))))


def _unpacked(packed: Float[Array, "P L"], like: Numbers) -> Numbers:
    structure = jax.tree.structure(like)
    return structure.unflatten([packed[:, n] for n in range(structure.num_leaves)])


def _read(packed: jax.Ref, rows: pl.Slice, like: Numbers) -> Numbers:
    structure = jax.tree.structure(like)
    return structure.unflatten([packed[rows, n:n + 1] for n in range(structure.num_leaves)])


def _write(packed: jax.Ref, rows: pl.Slice, numbers: Numbers) -> None:
    for n, x in enumerate(jax.tree.leaves(numbers)):
        packed[rows, n:n + 1] = x


def _contract(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Multiply two matrices over the given axis of each, at least in float32."""
    return jax.lax.dot_general(left, right, (((left_axis,), (right_axis,)), ((), ())),
                               preferred_element_type=wide(left.dtype))


def _chunks(models: Sequence[Head]) -> int:
    """How many chunks the positions are cut into: as few as fit, or up to twice as many where that
    leaves less of the last blocks empty."""
    blocks = pl.cdiv(math.prod(models[0].states.shape[:2]), BLOCK)
    least = pl.cdiv(blocks, room(models) // BLOCK)
    return min(range(least, 2 * least), key=lambda number: number * pl.cdiv(blocks, number))


def room(models: Sequence[Head]) -> int:
    """How many positions of a chunk fit on the chip."""
    states = sum(model.states.shape[-1] * model.states.dtype.itemsize for model in models)
    gradient = 4 * models[0].states.shape[-1]
    # Of tiles the next ones come and the last ones go while one is computed with.
    tiles = 2 * TILE * (states + 2 * gradient)
    return (MEMORY - INSIDE - tiles) // (states + gradient + 2 * 4 * LANES)


def takes(models: Sequence[Head], device: str) -> bool:
    """Whether the kernels take these models on this kind of device."""
    return (device in CHIPS and room(models) >= LEAST
            and all(model.states.dtype == jnp.bfloat16 for model in models))
