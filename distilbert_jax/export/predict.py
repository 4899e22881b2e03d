"""A trained model answers: fill-mask."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def fill_mask(
    graph: nnx.GraphDef, params: dict[str, Any], input_ids: np.ndarray, position: int, top: int = 3
) -> list[tuple[int, float]]:
    """The likeliest tokens at one position.

    Args:
        graph, params: the model.
        input_ids: [T] ids of one document, [MASK] at `position`.
        position: which.
        top: how many answers.

    Returns:
        (token id, probability), likeliest first.
    """
    ids = jnp.asarray(input_ids, jnp.int32)[None]

    @jax.jit
    def answer(params: dict[str, Any]) -> list[jax.Array]:
        model = nnx.merge(graph, params)
        hidden = model(ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None]).last
        return jax.lax.top_k(jax.nn.softmax(model.mlm_logits(hidden[0, position])), top)

    share, words = answer(params)
    return [(int(w), float(p)) for w, p in zip(words, share, strict=True)]
