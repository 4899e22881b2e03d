"""Tokenised examples → variants of them in which some of the tokens are others.

A masked language model chooses them (as in TinyBERT, Jiao et al. 2020, section 3.2, which replaces
words one at a time) or, where there is none, they are drawn from the texts themselves (as in Tang
et al. 2019, arXiv 1903.12136, section 3.2). Nobody labels the variants: a teacher answers them, and
its student learns the answers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distilbert_jax.config import Masking
from distilbert_jax.data.examples import Examples
from distilbert_jax.evaluation.answers import collect
from distilbert_jax.machine.sharding import by_rows, on_mesh
from distilbert_jax.training.objective import observe

RATE = Masking().rate  # share of an example's ordinary tokens: what such models are trained with
BELOW_1 = 1 - 2**-24  # the largest number below 1 in float32, to which batches round


# Examples whose `positions` are to be replaced, with a number in [0, 1) for each in place of labels
# → [P] tokens.
Draw = Callable[[Examples], np.ndarray]


def variants(examples: Examples, draw: Draw, copies: int, special_ids: Sequence[int], seed: int
             ) -> np.ndarray:
    """Draw variants of all examples: same lengths, other tokens.

    Args:
        examples: tokenised.
        draw: `by_model` or `by_frequency`.
        copies: variants of each example.
        special_ids: ids that are not replaced.
        seed: of the draws.

    Returns:
        int32 [copies, N], the ids of all examples one after the other.
    """
    random = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(examples.lengths)])
    found = np.tile(np.concatenate(examples.ids), (copies, 1))
    for copy in found:
        chosen = _chosen(examples, special_ids, random)
        at = np.concatenate([begin + own for begin, own in zip(
            starts[:-1], chosen.positions, strict=True)])
        copy[at] = draw(chosen)
    return found


def by_model(graph: nnx.GraphDef, params: dict[str, Any], mesh: Mesh, mask_id: int,
             special_ids: Sequence[int]) -> Draw:
    """Tokens as a masked language model expects them where it sees none.

    Args:
        graph, params: a model with a masked-language head, its parameters on the mesh.
        mesh: where batches are laid.
        mask_id: the id of [MASK].
        special_ids: ids that are not drawn.
    """
    step = _draw_step(graph, mesh, tuple(special_ids))

    def draw(chosen: Examples) -> np.ndarray:
        ids = [own.copy() for own in chosen.ids]
        for own, at in zip(ids, chosen.positions, strict=True):
            own[at] = mask_id
        return collect(step, params, dataclasses.replace(chosen, ids=ids), mesh, "augment")[:, 0]

    return draw


def by_frequency(examples: Examples, special_ids: Sequence[int]) -> Draw:
    """Tokens as often as they occur in some examples, whatever stands around them."""
    ids = np.concatenate(examples.ids)
    ordinary = ids[~np.isin(ids, special_ids)]
    return lambda chosen: ordinary[
        (np.concatenate(chosen.labels) * len(ordinary)).astype(np.int64)]


def unlabelled(examples: Examples, drawn: np.ndarray) -> list[Examples]:
    """Each copy that `variants` drew, as examples without labels: the old ones may be wrong."""
    ends = np.cumsum(examples.lengths)[:-1]
    return [dataclasses.replace(
        examples, ids=np.split(ids, ends), labels=[np.full(len(own), np.nan) for own in
                                                   examples.labels]) for ids in drawn]


def _chosen(examples: Examples, special_ids: Sequence[int], random: np.random.Generator
            ) -> Examples:
    """Which tokens of each example are replaced, and numbers by which others are drawn."""
    positions, draws = [], []
    for ids in examples.ids:
        ordinary = np.flatnonzero(~np.isin(ids, special_ids))
        count = min(len(ordinary), max(1, round(RATE * len(ordinary))))
        positions.append(np.sort(random.choice(ordinary, count, replace=False)).astype(np.int32))
        draws.append(np.minimum(random.random(count), BELOW_1))
    return dataclasses.replace(examples, positions=positions, labels=draws,
                               words=[np.zeros_like(at) for at in positions])


@functools.cache
def _draw_step(graph: nnx.GraphDef, mesh: Mesh, special_ids: tuple[int, ...]
               ) -> Callable[..., jax.Array]:
    """Jitted: (parameters, batch) → token ids [R, S, 1], drawn from the model's distribution."""

    def step(params, batch):
        model = nnx.merge(graph, params)
        states = observe(model, batch, at=batch["target_positions"]).last
        logits = model.mlm_logits(states).at[..., np.array(special_ids)].set(-jnp.inf)
        summed = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
        below = summed <= batch["labels"][..., None] * summed[..., -1:]
        return jnp.sum(below, axis=-1, keepdims=True, dtype=jnp.int32)

    return jax.jit(on_mesh(step, mesh), out_shardings=by_rows(mesh))
