"""A model with a task's head, and examples → its logits, answers and figures.

Examples are packed freely, since each means the same in any row.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distilbert_jax.data.examples import Examples, lay, rows_of
from distilbert_jax.evaluation.metrics import compute
from distilbert_jax.kernels.products import wide
from distilbert_jax.machine.progress import bar
from distilbert_jax.machine.sharding import by_rows, local_rows, on_mesh, place_rows, to_host
from distilbert_jax.training.objective import observe

SHORTEST, BATCH_TOKENS = 128, 4096  # tokens of a row, at least; of a batch, at most
WINDOW = 256  # examples that are laid out together


@functools.cache
def answer_step(graph: nnx.GraphDef, mesh: Mesh) -> Callable[..., jax.Array]:
    """Jitted: (parameters, batch) → logits [R, S, C] of the task."""

    def step(params, batch):
        model = nnx.merge(graph, params)
        return model.task_logits(observe(model, batch, at=batch["target_positions"]).last)

    return jax.jit(on_mesh(step, mesh), out_shardings=by_rows(mesh))


@functools.cache
def states_step(graph: nnx.GraphDef, mesh: Mesh) -> Callable[..., jax.Array]:
    """Jitted: (parameters, batch) → last hidden states [R, S, D] where the task is answered."""

    def step(params, batch):
        model = nnx.merge(graph, params)
        found = observe(model, batch, at=batch["target_positions"]).last
        return found.astype(wide(found.dtype))

    return jax.jit(on_mesh(step, mesh), out_shardings=by_rows(mesh))


def readable(states: np.ndarray, given: np.ndarray) -> float:
    """How well a linear map reads answers from hidden states: R², at most 1.

    Fitted by ridge regression on the first half, its strength chosen there by leave-one-out, and
    judged on the second half.

    Args:
        states: [P, D]; given: [P, C] answers.
    """
    from sklearn.linear_model import RidgeCV

    half = len(states) // 2
    fitted = RidgeCV(np.logspace(0, 4, 9)).fit(states[:half], given[:half])
    share = float(fitted.score(states[half:], given[half:]))
    return share if math.isfinite(share) else 0.0  # too few examples, or constant answers


def logits(
    graph: nnx.GraphDef, params: dict[str, Any], examples: Examples, mesh: Mesh, label: str = ""
) -> np.ndarray:
    """The model's logits at all positions of all examples, in their order.

    Args:
        graph, params: the model, its parameters on the mesh.
        examples: tokenised.
        mesh: where batches are laid.
        label: of the progress bar.

    Returns:
        [P, C] float32 (float64 of a model in float64).
    """
    return collect(answer_step(graph, mesh), params, examples, mesh, label)


def collect(
    step: Callable[..., jax.Array], params: dict[str, Any], examples: Examples, mesh: Mesh,
    label: str = "",
) -> np.ndarray:
    """What a step says at all positions of all examples, in their order.

    Args:
        step: jitted, (parameters, batch) → [R, S, C].
        params: on the mesh.
        examples, mesh, label: as for logits.

    Returns:
        [P, C] of the step's dtype.
    """
    length = max(SHORTEST, int(-(-examples.lengths.max() // 8) * 8))
    rows = _packed(examples, length)
    counts = np.diff(examples.starts)
    width = max(int(sum(counts[i] for i in row)) for row in rows)
    width = -(-width // 8) * 8  # so that few are compiled
    data = mesh.shape["data"]
    taken = max(1, BATCH_TOKENS // length)
    size = math.ceil(min(taken, len(rows)) / data) * data
    found = None
    own = local_rows(mesh, size)
    progress = bar(total=len(rows), desc=label or "answer", unit=" rows", leave=False, delay=2)
    for start in range(0, len(rows), size):
        some = rows[start:start + size]
        mine = [some[i] if i < len(some) else [] for i in own]
        batch = place_rows(rows_of(examples, mine, length, width), mesh, size)
        out = np.asarray(to_host(step(params, batch)))
        if found is None:
            found = np.zeros((examples.starts[-1], out.shape[-1]), out.dtype)
        for row, numbers in zip(out, some, strict=False):
            at = 0
            for number in numbers:
                begin, count = examples.starts[number], counts[number]
                found[begin:begin + count] = row[at:at + count]
                at += count
        progress.update(len(some))
    progress.close()
    return found


def _packed(examples: Examples, length: int) -> list[list[int]]:
    """All examples in rows; in windows, because to look for room takes time."""
    rows = []
    order = np.argsort(-examples.lengths, kind="stable")
    step = -(-len(order) // WINDOW)  # so that every window has long and short ones
    for first in range(step):
        window = order[first::step]
        rows += [[int(window[i]) for i in row] for row in lay(examples.lengths[window], length)]
    return rows


def answers(kind: str, found: np.ndarray, examples: Examples, words: Sequence[int], names:
            Sequence[str]) -> list[Any]:
    """What the logits say: class numbers, numbers, or a tag for each word.

    Args:
        kind: classify, regress or tag.
        found: [P, C] logits.
        examples: they are of.
        words: how many words each sentence has; a word that was cut off gets "O".
        names: of the classes.
    """
    if kind == "regress":
        return [float(value) for value in found[:, 0]]
    best = found.argmax(-1)
    if kind == "classify":
        return [int(number) for number in best]
    tagged = []
    for number, count in enumerate(words):
        tags = ["O"] * count
        for word, at in zip(examples.words[number], range(*examples.starts[number:number + 2]),
                            strict=True):
            tags[word] = names[best[at]]
        tagged.append(tags)
    return tagged


def probabilities(found: np.ndarray) -> np.ndarray:
    """The softmax of logits [P, C]."""
    shifted = np.exp(found - found.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def loss(kind: str, found: np.ndarray, examples: Examples) -> float:
    """The mean loss over the positions that have a label: cross-entropy, or squared error."""
    labels = np.concatenate(examples.labels)
    known = ~np.isnan(labels)
    if kind == "regress":
        return float(np.mean((found[known, 0] - labels[known]) ** 2))
    likely = probabilities(found[known])[np.arange(known.sum()), labels[known].astype(int)]
    return float(-np.mean(np.log(np.maximum(likely, 1e-30))))


def figures(
    kind: str, metrics: Sequence[str], found: np.ndarray, examples: Examples, truth: list[Any],
    names: Sequence[str],
) -> dict[str, float | None]:
    """Loss, metrics and their mean, the score."""
    given = answers(kind, found, examples, [len(t) for t in truth] if kind == "tag" else [], names)
    return {"loss": loss(kind, found, examples)} | compute(metrics, truth, given)
