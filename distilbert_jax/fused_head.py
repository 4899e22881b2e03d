"""The losses of losses.py from hidden states, without ever holding logits of all positions.

Transformed hidden states of both models and their word embeddings come in; the weighted total goes
out, and with it, in the same pass over chunks of positions, its gradients. At [B, T, V] the logits
would be by far the largest tensors of a step.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distilbert_jax.sharding import head_specs

# A device's positions are cut into CHUNKS, which keeps its logits to that share of what they would
# be; but not below LEAST positions, fewer of which leave matrix products and caches no better off.
CHUNKS = 16
LEAST = 256
ALIGNMENT = 8  # the positions of a chunk are a multiple of it

Figures = dict[str, Float[Array, ""]]
Terms = dict[str, tuple[Any, Any]]  # loss → its factor in the total, what its sum is divided by


class Head(NamedTuple):
    """What one model brings to the projection onto its vocabulary; or the gradients of that."""

    states: Float[Array, "B T D"]  # after the head's transform, in the compute dtype
    embedding: Float[Array, "V D"]
    bias: Float[Array, " V"]


class Targets(NamedTuple):
    """Where which loss counts how much."""

    labels: Int[Array, "B T"]
    label_weights: Float[Array, "B T"]  # of mlm
    soft_weights: Float[Array, "B T"]  # of ce and mse


def fused_losses(
    student: Head, teacher: Head | None, targets: Targets, terms: Terms, temperature: float
) -> tuple[Float[Array, ""], Figures]:
    """Σ factor · mean over the losses of `terms`, and the means, of kl_sum, mlm_sum and mse_sum.

    Products are in the compute dtype with float32 accumulation; softmaxes, sums and gradients of
    parameters in float32 (float64 for float64 states). On the mesh in context each device takes
    its own rows, and its own words where the embedding is divided; gradients are added up over
    devices once, after the last chunk.

    Args:
        student: the total is differentiable in it alone.
        teacher: of the same vocabulary; any width; None without one.
        targets: [B, T] as the states, where T may count the masked positions of a row only.
        terms: name → (factor, global weight); names among ce, mlm and mse.
        temperature: of ce.

    Returns:
        The total, and name → sum over global weight, which has no gradient.
    """
    total, means = _fused(student, teacher, targets, terms, temperature)
    return total, jax.lax.stop_gradient(means)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(student, teacher, targets, terms, temperature):
    return _on_mesh(student, teacher, targets, terms, temperature, with_gradients=False)[0]


def _forward(student, teacher, targets, terms, temperature):
    values, gradients = _on_mesh(
        student, teacher, targets, terms, temperature, with_gradients=True)
    dtypes = jax.tree.map(lambda x: jnp.zeros((), x.dtype), student)
    return values, (gradients, dtypes)


def _backward(temperature, residuals, cotangents):
    scaled = jax.tree.map(lambda g, like: (cotangents[0] * g).astype(like.dtype), *residuals)
    return scaled, None, None, None


_fused.defvjp(_forward, _backward)


def _on_mesh(student, teacher, targets, terms, temperature, with_gradients):
    """(Total, means), and gradients if asked for, from the rows and words of each device."""
    wide = jnp.promote_types(student.states.dtype, jnp.float32)
    scales = {name: factor / weight.astype(wide) for name, (factor, weight) in terms.items()}
    over = functools.partial(
        _over_chunks, temperature=temperature, with_gradients=with_gradients)
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if free and mesh.size > 1:
        rows, words = head_specs(mesh, len(student.states), len(student.embedding))
        head, whole = Head(rows, words, words), jax.P()
        over = jax.shard_map(
            functools.partial(over, row_axes=rows[0], word_axis=words[0]),
            in_specs=(head, teacher and head, rows, whole), check_vma=False, axis_names=free,
            out_specs=(whole, head if with_gradients else None))
    sums, gradients = over(student, teacher, targets, scales)
    means = {name: sums[name] / weight for name, (_, weight) in terms.items()}
    return (sum(terms[name][0] * mean for name, mean in means.items()), means), gradients


def _over_chunks(
    student: Head, teacher: Head | None, targets: Targets, scales: Figures, temperature: float,
    with_gradients: bool, row_axes: Any = None, word_axis: Any = None,
) -> tuple[Figures, Head | None]:
    """Sums, and gradients of the total if asked for, added up over the axes named."""
    shape, words = student.states.shape, len(student.embedding)
    wide = jnp.promote_types(student.states.dtype, jnp.float32)
    models = [student] if teacher is None else [student, teacher]
    embeddings = [model.embedding.astype(model.states.dtype) for model in models]
    if word_axis:  # a label of other devices' words is out of range here
        labels = targets.labels - words * jax.lax.axis_index(word_axis)
        targets = targets._replace(labels=labels)

    def chunk(carry, taken):
        states, at = taken  # [P, D] of each model, [P]
        logits = [
            jnp.einsum("PD,VD->PV", x, embedding, preferred_element_type=wide) + model.bias
            for x, embedding, model in zip(states, embeddings, models, strict=True)]
        sums, slope = _losses(logits, at, scales, temperature, word_axis)  # [P, V]
        carry, total = carry[1:], jax.tree.map(jnp.add, carry[0], sums)
        if not with_gradients:
            return (total,), None
        narrow = slope.astype(student.states.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=wide)
        carry = (carry[0] + product("PV,PD->VD", narrow, states[0]), carry[1] + slope.sum(0))
        return (total, *carry), product("PV,VD->PD", narrow, embeddings[0])

    carry = ({name: jnp.zeros((), wide) for name in scales},)
    if with_gradients:
        carry += jnp.zeros(student.embedding.shape, wide), jnp.zeros(words, wide)
    chunks = _cut(([model.states for model in models], targets))
    carry, states = jax.lax.scan(chunk, carry, chunks)
    carry = _added(carry, row_axes)
    if not with_gradients:
        return carry[0], None
    states = _added(states.reshape(-1, shape[-1])[:math.prod(shape[:-1])], word_axis)
    return carry[0], Head(states.reshape(shape), *carry[1:])


def _losses(logits, at, scales, temperature, word_axis):
    """One chunk: sums, and the total's gradient in the student's logits [P, V].

    Both softmaxes subtract the largest logit first. With u = student and v = teacher logits over
    the temperature, less their maxima, KL = Σ_v p (v − u) + log Σ eᵘ − log Σ eᵛ.
    """
    largest = [jax.lax.stop_gradient(x.max(-1)) for x in logits]
    if word_axis:
        largest = jax.lax.pmax(largest, word_axis)
    low = [x - m[:, None] for x, m in zip(logits, largest, strict=True)]
    parts = {}  # sums over words, [P]
    if "mlm" in scales:
        hot = jnp.arange(low[0].shape[1]) == at.labels[:, None]
        parts |= {"mlm": jnp.exp(low[0]).sum(-1), "label": jnp.where(hot, low[0], 0).sum(-1)}
    if "ce" in scales:
        ours, theirs = (x / temperature for x in low)
        parts |= {"ours": jnp.exp(ours).sum(-1), "theirs": jnp.exp(theirs).sum(-1),
                  "apart": (jnp.exp(theirs) * (theirs - ours)).sum(-1)}
    if "mse" in scales:
        parts["mse"] = ((logits[0] - logits[1]) ** 2).sum(-1)
    parts = _added(parts, word_axis)

    sums, slope = {}, 0.0
    if "mlm" in scales:
        sums["mlm"] = (at.label_weights * (jnp.log(parts["mlm"]) - parts["label"])).sum()
        factor = scales["mlm"] * at.label_weights
        slope += (factor / parts["mlm"])[:, None] * jnp.exp(low[0]) - jnp.where(
            hot, factor[:, None], 0)
    if "ce" in scales:
        divergence = parts["apart"] / parts["theirs"] + jnp.log(parts["ours"] / parts["theirs"])
        sums["ce"] = temperature**2 * (at.soft_weights * divergence).sum()
        factor = temperature * scales["ce"] * at.soft_weights
        slope += ((factor / parts["ours"])[:, None] * jnp.exp(ours)
                  - (factor / parts["theirs"])[:, None] * jnp.exp(theirs))
    if "mse" in scales:
        sums["mse"] = (at.soft_weights * parts["mse"]).sum()
        slope += 2 * (scales["mse"] * at.soft_weights)[:, None] * (logits[0] - logits[1])
    return sums, slope


def _cut(tree: Any) -> Any:
    """Flatten rows [B, T, ...] into chunks [n, P, ...]; zeros, which weigh nothing, fill the last.
    """
    positions = math.prod(jax.tree.leaves(tree)[0].shape[:2])
    number = min(CHUNKS, math.ceil(positions / LEAST))
    size = math.ceil(positions / number / ALIGNMENT) * ALIGNMENT

    def cut(x):
        x = x.reshape(positions, *x.shape[2:])
        x = jnp.pad(x, [(0, number * size - positions), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(number, size, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _added(tree: Any, axes: Any) -> Any:
    """The sum over mesh axes, if any."""
    return jax.lax.psum(tree, axes) if axes else tree
