"""Vocabulary losses from hidden states, without ever holding logits of all positions.

Transformed hidden states of student and teachers and their word embeddings come in; the weighted
total goes out, and with it, in the same pass over chunks of positions, its gradients. At [B, T, V]
the logits would be by far the largest tensors of a step. The losses in CLOSED have value and
gradient written out here and share their exponentials; any other is differentiated, chunk by chunk.
Unless a mesh divides the words, those in CLOSED are a kernel on NVIDIA's GPUs (`row_losses.py`),
and on some TPUs two with the products in them (`tile_losses.py`).
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distilbert_jax.kernels.products import (
    column_sums,
    has_triton,
    kernels_here,
    opaque,
    product,
    transposed_product,
    wide,
)
from distilbert_jax.machine.sharding import head_specs

# A device's positions are cut into CHUNKS, which keeps its logits to that share of what they would
# be; but not below LEAST positions, fewer of which leave matrix products and caches no better off.
CHUNKS = 16
LEAST = 256
ALIGNMENT = 8  # the positions of a chunk are a multiple of it
WORDS = 128  # so are the words of one on a GPU, which would else fill them up for every product

CLOSED = ("ce", "mlm", "mse")

Figures = dict[str, Float[Array, ""]]
Definition = Callable[..., Float[Array, ""]]  # (student's, teacher's logits [P, V], weights) → sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One loss of the total: factor · sum / weight."""

    factor: Any
    weight: Any  # [] of all positions
    sum: Definition = dataclasses.field(metadata={"static": True})


Terms = dict[str, Term]  # by name of the loss


class Head(NamedTuple):
    """What one model brings to the projection onto its vocabulary; or the gradients of that."""

    states: Float[Array, "B T D"]  # after the head's transform, in the compute dtype
    embedding: Float[Array, "V D"]
    bias: Float[Array, " V"]


class Targets(NamedTuple):
    """Where which loss counts how much."""

    labels: Int[Array, "B T"]
    label_weights: Float[Array, "B T"]  # of mlm
    soft_weights: Float[Array, "B T"]  # of all losses that compare logits


@jax.named_scope("head")
def fused_losses(
    student: Head, teachers: Sequence[tuple[float, Head]], targets: Targets, terms: Terms,
    temperature: float,
) -> tuple[Float[Array, ""], Figures]:
    """Σ factor · mean over the losses of `terms`, and the means.

    A loss that compares logits is Σ share · loss(student, teacher) over the teachers.

    Products are in the compute dtype with float32 accumulation; softmaxes, sums and gradients of
    parameters in float32 (float64 for float64 states). On the mesh in context each device takes
    its own rows, and its own words where the embedding is divided; gradients are added up over
    devices once, after the last chunk.

    Args:
        student: the total is differentiable in it alone.
        teachers: the share of each and what it brings, of the same vocabulary; any width.
        targets: [B, T] as the states, where T may count the masked positions of a row only.
        terms: the losses. Those named mlm read labels, all others compare logits.
        temperature: of ce.

    Returns:
        The total, and name → sum over global weight, which has no gradient.
    """
    shares, heads = tuple(zip(*teachers, strict=True)) or ((), ())
    return _fused(student, heads, targets, terms, temperature, shares)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(student, teachers, targets, terms, temperature, shares):
    return _on_mesh(student, teachers, targets, terms, temperature, shares, with_gradients=False)[0]


def _forward(student, teachers, targets, terms, temperature, shares):
    values, gradients = _on_mesh(
        student, teachers, targets, terms, temperature, shares, with_gradients=True)
    dtypes = jax.tree.map(lambda x: jnp.zeros((), x.dtype), student)
    return values, (gradients, dtypes)


def _backward(temperature, shares, residuals, cotangents):
    scaled = jax.tree.map(lambda g, like: (cotangents[0] * g).astype(like.dtype), *residuals)
    return scaled, None, None, None


_fused.defvjp(_forward, _backward)


def _on_mesh(student, teachers, targets, terms, temperature, shares, with_gradients):
    """(Total, means), and gradients if asked for, from the rows and words of each device."""
    dtype = wide(student.states.dtype)
    scales = {name: term.factor / term.weight.astype(dtype) for name, term in terms.items()}
    others = {name: term.sum for name, term in terms.items() if name not in CLOSED}
    over = functools.partial(
        _over_chunks, temperature=temperature, shares=shares, with_gradients=with_gradients,
        others=others)
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if free and mesh.size > 1:
        rows, words = head_specs(mesh, len(student.states), len(student.embedding))
        head, whole = Head(rows, words, words), jax.P()
        over = jax.shard_map(
            functools.partial(over, row_axes=rows[0], word_axis=words[0]),
            in_specs=(head, (head,) * len(teachers), rows, whole), check_vma=False, axis_names=free,
            out_specs=(whole, head if with_gradients else None))
    sums, gradients = over(student, teachers, targets, scales)
    means = {name: sums[name] / term.weight for name, term in terms.items()}
    return (sum(terms[name].factor * mean for name, mean in means.items()), means), gradients


def _over_chunks(
    student: Head, teachers: tuple[Head, ...], targets: Targets, scales: Figures,
    temperature: float, shares: tuple[float, ...], with_gradients: bool,
    others: dict[str, Definition], row_axes: Any = None, word_axis: str | None = None,
) -> tuple[Figures, Head | None]:
    """Sums, and gradients of the total if asked for, added up over the axes named."""
    shape, words = student.states.shape, len(student.embedding)
    dtype = wide(student.states.dtype)
    models = [student, *teachers]
    takes = with_gradients and not others and not word_axis
    if takes and (tiles := _tiles(models)):
        sums, gradients = tiles(student, teachers, targets, scales, temperature, shares)
        sums, of_words = _added((sums, gradients._replace(states=None)), row_axes)
        return sums, of_words._replace(states=gradients.states)
    kernel = _kernel(student.states.dtype) if takes else None
    filled = -words % WORDS if kernel else 0
    embeddings = [jnp.pad(model.embedding.astype(model.states.dtype), ((0, filled), (0, 0)))
                  for model in models]
    biases = [jnp.pad(model.bias, (0, filled)) for model in models]
    if word_axis:  # a label of other devices' words is out of range here
        labels = targets.labels - words * jax.lax.axis_index(word_axis)
        targets = targets._replace(labels=labels)

    def chunk(carry, taken):
        states, at = taken  # [P, D] of each model, [P]
        heads = [Head(*parts) for parts in zip(states, embeddings, biases, strict=True)]
        logits = [product(head.states, head.embedding, rows=True) + head.bias for head in heads]
        if kernel:
            sums, cotangent = _losses_by_kernel(
                kernel, logits, words, at, scales, temperature, shares, student.states.dtype)
        else:
            at_label = at_labels(heads[0], at.labels) if "mlm" in scales else None
            sums, cotangent = _losses(
                logits, at_label, at, scales, temperature, shares, word_axis)  # [P, V]
        for name, definition in others.items():
            sums[name], of_logits = _differentiated(definition, logits, at, shares, word_axis)
            cotangent += scales[name] * of_logits
        carry, total = carry[1:], jax.tree.map(jnp.add, carry[0], sums)
        if not with_gradients:
            return (total,), None
        narrow = cotangent.astype(student.states.dtype)
        of_words = carry[0] + transposed_product(states[0], narrow)  # [D, V]
        return ((total, of_words, carry[1] + column_sums(cotangent)),
                product(narrow, embeddings[0]))

    carry = ({name: jnp.zeros((), dtype) for name in scales},)
    if with_gradients:
        carry += jnp.zeros((shape[-1], words + filled), dtype), jnp.zeros(words + filled, dtype)
    number = min(CHUNKS, math.ceil(math.prod(shape[:-1]) / LEAST))
    chunks = cut(([model.states for model in models], targets), number, ALIGNMENT)
    carry, states = jax.lax.scan(chunk, carry, chunks)
    carry = _added(carry, row_axes)
    if not with_gradients:
        return carry[0], None
    states = _added(states.reshape(-1, shape[-1])[:math.prod(shape[:-1])], word_axis)
    return carry[0], Head(states.reshape(shape), carry[1].T[:words], carry[2][:words])


def _kernel(dtype: jnp.dtype) -> Callable[..., Any] | None:
    """The kernel for the losses in CLOSED of states of `dtype`, where the platform has one."""
    if not has_triton(dtype):
        return None
    from distilbert_jax.kernels.row_losses import row_losses  # slow to import

    return row_losses


def _losses_by_kernel(kernel, logits, words, at, scales, temperature, shares, dtype):
    """What `_losses` gives, of logits that are filled up beyond `words`, the gradient in `dtype`.
    """
    weights = {name: at.label_weights if name == "mlm" else at.soft_weights for name in scales}
    sizes = {name: temperature**2 if name == "ce" else 1.0 for name in scales}
    factors = {name: sizes[name] * scales[name] * weights[name] for name in scales}
    values, cotangent = kernel(logits, words, at.labels, factors, temperature, shares, dtype)
    return {name: sizes[name] * (weights[name] * values[name]).sum() for name in scales}, cotangent


def _tiles(models: Sequence[Head]) -> Callable[..., tuple[Figures, Head]] | None:
    """The kernels for TPUs that compute the losses in CLOSED, if they take these models here."""
    platform, device = kernels_here()
    if platform != "tpu":
        return None
    from distilbert_jax.kernels.tile_losses import takes, tile_losses  # slow to import

    return tile_losses if takes(models, device) else None


def at_labels(head: Head, labels: Int[Array, " P"]) -> Float[Array, " P"]:
    """Logits of the labels; 0 where a label is not among the words."""
    here = (labels >= 0) & (labels < len(head.bias))
    words = jnp.where(here, labels, 0)
    dtype = wide(head.states.dtype)
    products = head.states.astype(dtype) * head.embedding[words].astype(dtype)
    logits = head.bias[words] + products.sum(-1)
    return jnp.where(here, logits, 0)


def _differentiated(
    definition: Definition, logits: list[Float[Array, "P V"]], at: Targets,
    shares: tuple[float, ...], word_axis: str | None,
) -> tuple[Float[Array, ""], Float[Array, "P V"]]:
    """One chunk of a loss that compares logits: its sum, and its gradient in the student's.

    Where words are divided over devices each gathers all logits of the chunk, and keeps the
    gradient of its own words.
    """
    words = logits[0].shape[1]
    if word_axis:
        logits = [jax.lax.all_gather(x, word_axis, axis=1, tiled=True) for x in logits]

    def over_teachers(own, *theirs):
        return mixed(shares, [definition(own, each, at.soft_weights) for each in theirs])

    value, gradient = jax.value_and_grad(over_teachers)(*logits)
    if word_axis:
        first = words * jax.lax.axis_index(word_axis)
        gradient = jax.lax.dynamic_slice_in_dim(gradient, first, words, axis=1)
    return value, gradient


def mixed(shares: Iterable[float], values: Iterable[Any]) -> Any:
    """Σ share · value over the teachers."""
    return functools.reduce(operator.add, [
        share * value for share, value in zip(shares, values, strict=True)])


def _losses(logits, at_label, at, scales, temperature, shares, word_axis):
    """One chunk of the losses in CLOSED: sums, and their gradient in the student's logits [P, V].

    All softmaxes subtract the largest logit first. With s = student and t = teacher logits and m
    their maxima, p the teacher's softmax and E the sums of e^((x − m)/T) over words,
    KL = Σ p (t − s − (m_t − m_s))/T + log E_s − log E_t. Of several teachers, the student's own
    part of the gradient is computed once.
    """
    largest = [jax.lax.stop_gradient(x.max(-1)) for x in logits]
    if word_axis:
        largest = jax.lax.pmax(largest, word_axis)
    powers = [jnp.exp((x - m[:, None]) * (1 / temperature))
              for x, m in zip(logits, largest, strict=True)]
    powers[0] = opaque(powers[0])

    def whole(ours):
        """The student's powers at temperature 1: a square costs less than an exponential."""
        return ours ** 2 if temperature == 2 else jnp.exp(logits[0] - largest[0][:, None])

    parts = {}  # sums over words, [P]
    if "mlm" in scales:
        # Opaque again, so that the squares below are not these, kept in memory.
        parts |= {"mlm": whole(opaque(powers[0])).sum(-1), "label": at_label}
    if "ce" in scales:
        ours, *theirs = powers
        # Less the maxima before it is summed: what all logits have in common would not cancel.
        parts |= {"ours": ours.sum(-1), "theirs": [each.sum(-1) for each in theirs],
                  "apart": [(each * (x - logits[0] - (m - largest[0])[:, None])).sum(-1)
                            for each, x, m in zip(theirs, logits[1:], largest[1:], strict=True)]}
    if "mse" in scales:
        parts["mse"] = [((logits[0] - x) ** 2).sum(-1) for x in logits[1:]]
    parts = _added(parts, word_axis)

    cotangent = jnp.zeros((), logits[0].dtype)
    if "mlm" in scales:
        factor = (scales["mlm"] * at.label_weights)[:, None]
        hot = jnp.arange(logits[0].shape[1]) == at.labels[:, None]
        cotangent += factor / parts["mlm"][:, None] * whole(powers[0]) - jnp.where(hot, factor, 0)
    if "ce" in scales:
        factor = temperature * scales["ce"] * at.soft_weights
        cotangent += ((math.fsum(shares) * factor / parts["ours"])[:, None] * ours
                      - mixed(shares, [(factor / total)[:, None] * each for total, each in zip(
                          parts["theirs"], theirs, strict=True)]))
    if "mse" in scales:
        cotangent += 2 * (scales["mse"] * at.soft_weights)[:, None] * mixed(
            shares, [logits[0] - x for x in logits[1:]])
    return sums_of(parts, largest[0], at, temperature, shares), cotangent


def sums_of(
    parts: dict[str, Any], largest: Float[Array, " P"], at: Targets, temperature: float,
    shares: tuple[float, ...],
) -> Figures:
    """The sums of the losses in CLOSED over positions.

    Args:
        parts: sums over words, as in `_losses`, of the losses that are asked for.
        largest: the student's largest logits.
        at, temperature, shares: as in `_losses`.
    """
    sums = {}
    if "mlm" in parts:
        nll = largest + jnp.log(parts["mlm"]) - parts["label"]
        sums["mlm"] = (at.label_weights * nll).sum()
    if "ours" in parts:
        divergences = [apart / total / temperature + jnp.log(parts["ours"] / total)
                       for apart, total in zip(parts["apart"], parts["theirs"], strict=True)]
        sums["ce"] = temperature**2 * (at.soft_weights * mixed(shares, divergences)).sum()
    if "mse" in parts:
        sums["mse"] = (at.soft_weights * mixed(shares, parts["mse"])).sum()
    return sums


def cut(tree: Any, number: int, alignment: int) -> Any:
    """Flatten rows [B, T, ...] into chunks [number, P, ...], P a multiple of `alignment`; zeros,
    which weigh nothing, fill the last."""
    positions = math.prod(jax.tree.leaves(tree)[0].shape[:2])
    size = math.ceil(positions / number / alignment) * alignment

    def divided(x):
        x = x.reshape(positions, *x.shape[2:])
        x = jnp.pad(x, [(0, number * size - positions), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(number, size, *x.shape[1:])

    return jax.tree.map(divided, tree)


def _added(tree: Any, axes: Any) -> Any:
    """The sum over mesh axes, if any."""
    return jax.lax.psum(tree, axes) if axes else tree
