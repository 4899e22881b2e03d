"""(keys of the rows, batch) → labelled batch, inside the jitted step; LABELS is the table of ways.

Every row is labelled by a key of its own, so that it means the same beside any others. Labels come
as gathered positions [B, K], so that the head is applied to them alone where no loss needs more.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from distilbert_jax.config import Masking


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of the tokenizer; an argument of the step."""

    counts: Any  # [V] float32, occurrences in the training rows; 0: special; or its sharding
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


def row_keys(key: Key[Array, ""], batch: dict[str, Array]) -> Key[Array, " B"]:
    """A key for each row, from the run's key, the number of the row and its epoch.

    Args:
        key: of the run.
        batch: `row` and `epoch` [B] count among others.

    Returns:
        [B]; neither the row's index in its batch nor the batch's number is in it.
    """
    def fold(row: Array, epoch: Array) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(key, row), epoch)

    return jax.vmap(fold)(batch["row"], batch["epoch"])


def mask_tokens(
    keys: Key[Array, " B"],
    batch: dict[str, Array],
    vocabulary: Vocabulary,
    masking: Masking,
) -> dict[str, Array]:
    """Choose positions, remember their ids as labels, and replace them (DistilBERT, A.6).

    In each row round(rate * real tokens) positions, at least one and at most those eligible, are
    drawn without replacement with probability proportional to count**-smoothing. Each becomes
    [MASK], stays, or becomes a uniformly drawn ordinary token. Unlike the reference the number
    is fixed per row, not over the micro-batch, and no special token is ever drawn.

    Args:
        keys: [B] of the rows.
        batch: `input_ids`, `segment_ids` (0 on padding), `position_ids`, each [B, T].
        vocabulary: counts and ids.
        masking: rates.

    Returns:
        The batch with replaced `input_ids`, and `masked_positions` [B, K], `labels` [B, K] and
        `label_weights` [B, K] float32, 0 where a row has fewer than K predictions.
    """
    ids, real = batch["input_ids"], batch["segment_ids"] > 0
    draw_keys, kind_keys, word_keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys).T
    length, width = ids.shape[1], num_predictions(ids.shape[1], masking.rate)

    counts = vocabulary.counts[ids]
    eligible = real & (counts > 0)
    log_weight = jnp.where(eligible, -masking.smoothing * jnp.log(jnp.maximum(counts, 1)), -jnp.inf)
    # The largest of log weight + Gumbel noise are a weighted draw without replacement.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (length,), jnp.float32))(draw_keys)
    score = log_weight + noise
    positions = jax.lax.top_k(score, width)[1]  # [B, K]
    wanted = jnp.floor(masking.rate * real.sum(1) + 0.5).astype(jnp.int32)
    wanted = jnp.minimum(jnp.maximum(wanted, 1), eligible.sum(1))  # [B]
    chosen = jnp.arange(width) < wanted[:, None]  # [B, K]

    labels = jnp.take_along_axis(ids, positions, axis=1)
    kind = jax.vmap(lambda key: jax.random.uniform(key, (width,)))(kind_keys)
    words = vocabulary.ordinary_ids
    random_ids = words[jax.vmap(
        lambda key: jax.random.randint(key, (width,), 0, len(words)))(word_keys)]
    replaced = jnp.where(
        kind < masking.mask, vocabulary.mask_id,
        jnp.where(kind < masking.mask + masking.keep, labels, random_ids))
    rows = jnp.arange(ids.shape[0])[:, None]
    ids = ids.at[rows, positions].set(jnp.where(chosen, replaced, labels))
    return batch | {
        "input_ids": ids, "masked_positions": positions, "labels": labels,
        "label_weights": chosen.astype(jnp.float32)}


def next_tokens(
    keys: Key[Array, " B"],
    batch: dict[str, Array],
    vocabulary: Vocabulary,
    masking: Masking,
) -> dict[str, Array]:
    """Label each token with the next one of its document, as a causal language model is trained.

    The last token of a document predicts nothing, and neither does padding: of the segments
    `1 1 1 2 2 0` the weights are `1 1 0 1 0 0`.

    Args:
        batch: as for mask_tokens, whose other arguments are not needed.

    Returns:
        The batch with `masked_positions`, all of them, `labels` and `label_weights`, [B, T] each.
    """
    ids, segments = batch["input_ids"], batch["segment_ids"]
    after = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return batch | {
        "masked_positions": jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
        "labels": jnp.pad(ids[:, 1:], ((0, 0), (0, 1))),
        "label_weights": ((segments > 0) & (after == segments)).astype(jnp.float32)}


def given(
    keys: Key[Array, " B"],
    batch: dict[str, Array],
    vocabulary: Vocabulary | None,
    masking: Masking | None,
) -> dict[str, Array]:
    """Leave a batch that comes with its labels as it is."""
    return batch


LABELS: dict[str, Callable[..., dict[str, Array]]] = {
    "mlm": mask_tokens, "clm": next_tokens, "given": given}
