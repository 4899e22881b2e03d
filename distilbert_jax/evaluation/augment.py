"""Tokenised examples → variants of them in which a masked language model chose some of the tokens.

Nobody labels the variants: a teacher answers them, and its student learns the answers (as in
TinyBERT, Jiao et al. 2020, section 3.2, which replaces words one at a time).
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


def variants(
    graph: nnx.GraphDef, params: dict[str, Any], examples: Examples, mesh: Mesh, copies: int,
    mask_id: int, special_ids: Sequence[int], seed: int,
) -> np.ndarray:
    """Draw variants of all examples: same lengths, other tokens.

    Args:
        graph, params: a model with a masked-language head, its parameters on the mesh.
        examples: tokenised.
        mesh: where batches are laid.
        copies: variants of each example.
        mask_id: the id of [MASK].
        special_ids: ids that are neither replaced nor drawn.
        seed: of the draws.

    Returns:
        int32 [copies, N], the ids of all examples one after the other.
    """
    random = np.random.default_rng(seed)
    step = _draw_step(graph, mesh, tuple(special_ids))
    starts = np.concatenate([[0], np.cumsum(examples.lengths)])
    found = np.tile(np.concatenate(examples.ids), (copies, 1))
    for copy in found:
        hidden = _hidden(examples, mask_id, special_ids, random)
        drawn = collect(step, params, hidden, mesh, "augment")[:, 0]
        at = np.concatenate([begin + own for begin, own in zip(
            starts[:-1], hidden.positions, strict=True)])
        copy[at] = drawn
    return found


def unlabelled(examples: Examples, drawn: np.ndarray) -> list[Examples]:
    """Each copy that `variants` drew, as examples without labels: the old ones may be wrong."""
    ends = np.cumsum(examples.lengths)[:-1]
    return [dataclasses.replace(
        examples, ids=np.split(ids, ends), labels=[np.full(len(own), np.nan) for own in
                                                   examples.labels]) for ids in drawn]


def _hidden(examples: Examples, mask_id: int, special_ids: Sequence[int],
            random: np.random.Generator) -> Examples:
    """The examples with some tokens hidden, which are asked for; in place of a label stands a
    number in [0, 1), by which a token is drawn."""
    ids, positions, draws = [], [], []
    for own in examples.ids:
        ordinary = np.flatnonzero(~np.isin(own, special_ids))
        count = min(len(ordinary), max(1, round(RATE * len(ordinary))))
        at = np.sort(random.choice(ordinary, count, replace=False)).astype(np.int32)
        new = own.copy()
        new[at] = mask_id
        ids.append(new)
        positions.append(at)
        draws.append(random.random(count))
    return dataclasses.replace(examples, ids=ids, positions=positions, labels=draws,
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
