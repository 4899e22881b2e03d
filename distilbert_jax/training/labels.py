"""(key, batch) → masked batch, inside the jitted step.

The number of predictions in a row depends on its real tokens only and fits a fixed width, so the
head can be applied to gathered positions [B, K] instead of [B, T].
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from distilbert_jax.config import Masking


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of the tokenizer; an argument of the step."""

    counts: Any  # [V] float32, occurrences in the training rows; 0: special; or its shape, place
    ordinary_ids: Any  # [O] int32, ids that may replace a token: all but special
    mask_id: Any  # [] int32


def vocabulary(counts: np.ndarray, special_ids: list[int], mask_id: int) -> Vocabulary:
    """Build the table of a tokenizer.

    Args:
        counts: [V] occurrences of each id; an ordinary id that never occurs counts as 1.
        special_ids: ids that are neither masked nor drawn ([CLS], [SEP], [PAD], [UNK], [MASK]).
        mask_id: the id of [MASK].
    """
    counts = np.maximum(counts, 1).astype(np.float32)
    counts[special_ids] = 0
    ordinary = np.flatnonzero(counts).astype(np.int32)
    return Vocabulary(counts, ordinary, np.asarray(mask_id, np.int32))


def num_predictions(length: int, rate: float) -> int:
    """Width K of the gathered positions of rows of `length` tokens."""
    return max(1, int(np.floor(rate * length + 0.5)))


def mask_tokens(
    key: Key[Array, ""],
    batch: dict[str, Int[Array, "B T"]],
    vocabulary: Vocabulary,
    masking: Masking,
) -> dict[str, Array]:
    """Choose positions, remember their ids as labels, and replace them (DistilBERT, A.6).

    In each row round(rate * real tokens) positions, at least one and at most those eligible, are
    drawn without replacement with probability proportional to count**-smoothing. Each becomes
    [MASK], stays, or becomes a uniformly drawn ordinary token. Unlike the reference the number
    is fixed per row, not over the micro-batch, and no special token is ever drawn.

    Args:
        key: of this batch.
        batch: `input_ids`, `segment_ids` (0 on padding), `position_ids`, each [B, T].
        vocabulary: counts and ids.
        masking: rates.

    Returns:
        The batch with replaced `input_ids`, and `masked_positions` [B, K], `labels` [B, K] and
        `label_weights` [B, K] float32, 0 where a row has fewer than K predictions.
    """
    ids, real = batch["input_ids"], batch["segment_ids"] > 0
    draw_key, kind_key, word_key = jax.random.split(key, 3)
    width = num_predictions(ids.shape[1], masking.rate)

    counts = vocabulary.counts[ids]
    eligible = real & (counts > 0)
    log_weight = jnp.where(eligible, -masking.smoothing * jnp.log(jnp.maximum(counts, 1)), -jnp.inf)
    # The largest of log weight + Gumbel noise are a weighted draw without replacement.
    score = log_weight + jax.random.gumbel(draw_key, ids.shape, jnp.float32)
    positions = jax.lax.top_k(score, width)[1]  # [B, K]
    wanted = jnp.floor(masking.rate * real.sum(1) + 0.5).astype(jnp.int32)
    wanted = jnp.minimum(jnp.maximum(wanted, 1), eligible.sum(1))  # [B]
    chosen = jnp.arange(width) < wanted[:, None]  # [B, K]

    labels = jnp.take_along_axis(ids, positions, axis=1)
    kind = jax.random.uniform(kind_key, labels.shape)
    words = vocabulary.ordinary_ids
    random_ids = words[jax.random.randint(word_key, labels.shape, 0, len(words))]
    replaced = jnp.where(
        kind < masking.mask, vocabulary.mask_id,
        jnp.where(kind < masking.mask + masking.keep, labels, random_ids))
    rows = jnp.arange(ids.shape[0])[:, None]
    ids = ids.at[rows, positions].set(jnp.where(chosen, replaced, labels))
    return batch | {
        "input_ids": ids, "masked_positions": positions, "labels": labels,
        "label_weights": chosen.astype(jnp.float32)}
