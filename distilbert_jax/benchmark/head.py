"""Memory and time of the fused vocabulary head, beside the same losses on all logits at once."""

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distilbert_jax.kernels.head import Figures, Head, Targets, Term, Terms, fused_losses
from distilbert_jax.training import losses

VOCABULARIES = (30522, 128256)  # words: BERT's, and a large one
TEMPERATURE = 2.0


def dense_losses(
    student: Head, teachers: Sequence[tuple[float, Head]], targets: Targets, terms: Terms, _: float
) -> tuple[Float[Array, ""], Figures]:
    """Compute what fused_losses computes from all logits at once, by the rows' definitions."""
    def logits(head: Head) -> Float[Array, "B T V"]:
        wide = jnp.promote_types(head.states.dtype, jnp.float32)
        embedding = head.embedding.astype(head.states.dtype)
        return head.bias + jnp.einsum(
            "BTD,VD->BTV", head.states, embedding, preferred_element_type=wide)

    ours = logits(student)
    theirs = [(share, jax.lax.stop_gradient(logits(head))) for share, head in teachers]
    means = {}
    for name, term in terms.items():
        value = (term.sum(ours, targets.labels, targets.label_weights) if name == "mlm" else
                 sum(share * term.sum(ours, each, targets.soft_weights) for share, each in theirs))
        means[name] = value / term.weight
    return sum(terms[name].factor * mean for name, mean in means.items()), means


def compare(
    rows: int, length: int, words: int, width: int, dtype: str, repeats: int
) -> dict[str, dict[str, float]]:
    """Cost of the losses KL and MLM with all gradients on [rows, length] positions, on one device.

    Args:
        rows, length, words, width: B, T, V and D of both models.
        dtype: of the states; parameters are float32.
        repeats: timed runs, the two in turn; 0 compiles only and allocates nothing.

    Returns:
        dense, fused → `bytes`: the compiled program's peak of temporary memory; and `ms`: the
        median time, where timed.
    """
    ce_sum = functools.partial(losses.ce_sum, temperature=TEMPERATURE)
    shapes = jax.eval_shape(lambda: _problem(rows, length, words, width, dtype))
    calls = {}
    for name, function in (("dense", dense_losses), ("fused", fused_losses)):
        def step(student: Head, teacher: Head, targets: Targets, function: Any = function) -> Any:
            terms = {"ce": Term(5.0, targets.soft_weights.sum(), ce_sum),
                     "mlm": Term(2.0, targets.label_weights.sum(), losses.mlm_sum)}
            return jax.value_and_grad(function, has_aux=True)(
                student, [(1.0, teacher)], targets, terms, TEMPERATURE)

        calls[name] = jax.jit(step).lower(*shapes).compile()
    found = {name: {"bytes": float(call.memory_analysis().temp_size_in_bytes)}
             for name, call in calls.items()}
    problem = _problem(rows, length, words, width, dtype) if repeats else None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call(*problem))
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: figures | ({"ms": statistics.median(times[name])} if repeats else {})
            for name, figures in found.items()}


def table(rows: int, length: int, width: int, repeats: int) -> str:
    """`compare` for both dtypes and VOCABULARIES, in Markdown."""
    lines = ["| words | dtype | dense MB | fused MB | less | dense ms | fused ms |",
             "|--:|---|--:|--:|--:|--:|--:|"]
    for words in VOCABULARIES:
        for dtype in ("float32", "bfloat16"):
            found = compare(rows, length, words, width, dtype, repeats)
            dense, fused = found["dense"], found["fused"]
            times = [f"{side['ms']:,.0f}" if repeats else "" for side in (dense, fused)]
            lines.append(
                f"| {words:,} | {dtype} | {dense['bytes'] / 1e6:,.0f} | {fused['bytes'] / 1e6:,.0f}"
                f" | {dense['bytes'] / fused['bytes']:.1f} x | {times[0]} | {times[1]} |")
    return "\n".join(lines)


def _problem(rows: int, length: int, words: int, width: int, dtype: str) -> tuple[Any, ...]:
    """Random student and teacher; every sixth position is masked."""
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def head() -> Head:
        return Head(
            jax.random.normal(next(keys), (rows, length, width), dtype),
            jax.random.normal(next(keys), (words, width)) / width**0.5, jnp.zeros(words))

    labels = jax.random.randint(next(keys), (rows, length), 0, words)
    masked = jnp.broadcast_to(1.0 * (jnp.arange(length) % 6 == 0), labels.shape)
    return head(), head(), Targets(labels, masked, jnp.ones(labels.shape))
