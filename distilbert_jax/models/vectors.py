"""Last hidden states of packed rows → one vector for each text, as sentence-transformers does.

`sentence_modules.Sentence` says how, as part of an EncoderConfig.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distilbert_jax.kernels.products import wide

SMALLEST = 1e-12  # that a norm is divided by, as in torch.nn.functional.normalize

States = Float[Array, "B T D"]
Segments = Int[Array, "B T"]  # 0 on padding, else the number of the text within its row, from 1


def _sums(states: States, segments: Segments, count: int) -> tuple[Array, Array]:
    """The sum over each text [B, S, D] and its tokens [B, S, 1], at least 1."""
    own = segments[:, None, :] == jnp.arange(1, count + 1)[:, None]  # [B, S, T]
    own = own.astype(states.dtype)
    total = jnp.einsum("BST,BTD->BSD", own, states, precision=jax.lax.Precision.HIGHEST)
    return total, jnp.maximum(own.sum(-1, keepdims=True), 1)


def _mean(states: States, segments: Segments, count: int) -> Float[Array, "B S D"]:
    total, tokens = _sums(states, segments, count)
    return total / tokens


def _mean_sqrt_len(states: States, segments: Segments, count: int) -> Float[Array, "B S D"]:
    total, tokens = _sums(states, segments, count)
    return total / jnp.sqrt(tokens)


def _max(states: States, segments: Segments, count: int) -> Float[Array, "B S D"]:
    most = jax.vmap(lambda x, own: jax.ops.segment_max(x, own, count + 1))(states, segments)[:, 1:]
    return jnp.where(jnp.isfinite(most), most, 0)  # of a text that is not there


# (states, segments, texts in a row) → [B, S, D]; None: the state of the first token.
POOLINGS: dict[str, Callable[[States, Segments, int], Float[Array, "B S D"]] | None] = {
    "cls": None, "mean": _mean, "max": _max, "mean_sqrt_len_tokens": _mean_sqrt_len}
DENSE_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Identity": lambda x: x, "Tanh": jnp.tanh, "ReLU": jax.nn.relu,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False)}


def pool(
    pooling: str, states: Float[Array, "B _ D"], segments: Segments, count: int
) -> Float[Array, "B S D"]:
    """One vector for each text of packed rows.

    Args:
        pooling: a key of POOLINGS.
        states: [B, T, D] of all positions; for "cls" those of each text's first token, [B, S, D].
        segments: [B, T] which text each position is of.
        count: texts that a row has room for, S.

    Returns:
        [B, S, D], at least float32: in the row `[CLS] a b [SEP] [CLS] c [SEP] 0` with the segments
        `1 1 1 1 2 2 2 0` the first vector is of the first four states, the second of the next
        three. That of a text which is not there is 0, or for "cls" anything.
    """
    states = states.astype(wide(states.dtype))
    function = POOLINGS[pooling]
    return states if function is None else function(states, segments, count)


def normalized(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Vectors of length 1; 0 stays 0, with a finite gradient."""
    return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), SMALLEST**2))
