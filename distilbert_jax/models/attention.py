"""One attention call for every model: queries, keys, values [B, T, N, H] in, contexts out.

A packed row holds several documents; `segment_ids` keeps each to itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"],
    dropout: Callable[[Array], Array],
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention within segments (Vaswani et al. 2017, section 3.2.1).

    Args:
        query, key, value: [B, T, N, H], in the compute dtype.
        segment_ids: [B, T]; a position attends to the positions of its own number only. Padding
            is segment 0: it attends to padding, so that no row of the softmax is empty.
        dropout: applied to the attention probabilities; the identity outside training.

    Returns:
        Contexts [B, T, N, H] in the dtype of `value`; the softmax is at least float32.
    """
    # Heads before positions: on CPU the two products are then plain batched matrix products.
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("BNTH,BNSH->BNTS", query, key, preferred_element_type=wide)
    scores = scores / jnp.sqrt(jnp.asarray(query.shape[-1], wide))
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [B, 1, T, S]
    probabilities = jax.nn.softmax(jnp.where(same, scores, jnp.finfo(wide).min), axis=-1)
    probabilities = dropout(probabilities).astype(value.dtype)
    return jnp.einsum("BNTS,BNSH->BNTH", probabilities, value).transpose(0, 2, 1, 3)
