"""A sentence encoder and texts → vectors, and what these are worth.

Pairs that people have scored, distance to a teacher, and titles that look for their texts; texts
are packed freely, since each means the same in any row.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distilbert_jax.data.examples import Examples
from distilbert_jax.evaluation import answers, intervals
from distilbert_jax.machine.sharding import by_rows, on_mesh
from distilbert_jax.training.objective import observe, vectors

FIRST = 10  # texts that a query is answered with
Interval = tuple[float, float] | None
Figures = dict[str, float | None]


@functools.cache
def vector_step(graph: nnx.GraphDef, mesh: Mesh, of_first: bool) -> Callable[..., jax.Array]:
    """Jitted: (parameters, batch) → vectors [R, S, D] of the texts in its rows."""

    def step(params, batch):
        model = nnx.merge(graph, params)
        at = batch["target_positions"] if of_first else None
        return vectors(model, observe(model, batch, at=at).last, batch, of_first, False)

    return jax.jit(on_mesh(step, mesh), out_shardings=by_rows(mesh))


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A sentence encoder with its parameters on the mesh."""

    graph: nnx.GraphDef
    params: dict[str, Any]
    mesh: Mesh
    of_first: bool

    def __call__(self, examples: Examples, label: str = "") -> np.ndarray:
        """The vector of each example, [n, D], at least float32."""
        return answers.collect(vector_step(self.graph, self.mesh, self.of_first), self.params,
                               examples, self.mesh, label)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, float64; 0 stays 0."""
    x = vectors.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The cosine of each pair of rows, [n]."""
    return (unit(one) * unit(other)).sum(-1)


def spearman(scores: Sequence[float], models: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Spearman's correlation of cosines with people's scores, of several models, as `judged`.

    Args:
        scores: of the pairs.
        models: name → cosines of the pairs.
    """
    from distilbert_jax.evaluation.metrics import score

    drawn = intervals.drawn(("spearman",), scores, {name: [x] for name, x in models.items()})
    return judged({name: score(("spearman",), scores, x) for name, x in models.items()}, drawn)


def judged(values: Figures, drawn: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Figures with intervals and, of every model but the teacher, the share of its figure kept.

    Args:
        values: model → figure; drawn: model → the figure in each bootstrap draw.

    Returns:
        Model → `value`, `interval`; beside a teacher whose figure is above 0 `retention`,
        `retention_interval`.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found[name] = {"value": value, "interval": intervals.interval(drawn[name])}
        if name != "teacher" and (values.get("teacher") or 0) > 0 and value is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                share = drawn[name] / drawn["teacher"]
            found[name] |= {"retention": value / values["teacher"],
                            "retention_interval": intervals.interval(share)}
    return found


def retrieved(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The ten documents nearest to each query by cosine, nearest first, [n, 10]."""
    near = unit(queries) @ unit(documents).T
    return np.argsort(-near, axis=1, kind="stable")[:, :FIRST]


def retrieval(first: np.ndarray, teacher: np.ndarray) -> dict[str, np.ndarray]:
    """What the ten documents found for each query are worth.

    Args:
        first: [n, 10] documents found; query i belongs to document i.
        teacher: [n, 10] those that the teacher finds.

    Returns:
        Figure → its value for each query: `recall@10` and `ndcg@10` of the query's own document,
        and the same against the teacher's ranking, whose first document is worth most: its gain
        is 10, that of the tenth 1.
    """
    own = first == np.arange(len(first))[:, None]
    discount = 1 / np.log2(np.arange(2, FIRST + 2))
    width = first.shape[1]
    match = first[:, :, None] == teacher[:, None, :]  # [n, found, teacher's]
    gains = np.arange(FIRST, FIRST - width, -1)
    best = (gains * discount[:width]).sum()
    return {
        "recall@10": own.any(1).astype(float),
        "ndcg@10": (own * discount[:width]).sum(1),
        "recall@10 of the teacher's": match.any(2).mean(1),
        "ndcg@10 of the teacher's": ((match * gains).sum(2) * discount[:width]).sum(1) / best}
