"""Who sees whom in a packed row: the one mask that every model makes and every backend reads.

Segment ids [B, T] of `data/pack.py` come in. XLA and cuDNN take the whole matrix [B, T, S];
`row_attention.py` asks `sees` for the part of it that a kernel holds.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@no_type_check  # JAX also fills pytrees with placeholders, such as shardings
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which positions of its row a position attends to.

    Query position t sees key position s if both have the same segment id; if `causal`, only where
    s ≤ t; if `window` is given, only where |t − s| ≤ window. A document lies in one piece, so
    indices within the row tell distances within the document. Padding is segment 0 and sees
    padding. Every position sees itself, so no row of a softmax is empty.

    A row of segments 1 1 1 1 2 2 0 0 with window 2: `x` is seen, `o` is seen unless `causal`.

        t\\s  1 1 1 1 2 2 0 0
        1    x o o . . . . .
        1    x x o o . . . .
        1    x x x o . . . .
        1    . x x x . . . .
        2    . . . . x o . .
        2    . . . . x x . .
        0    . . . . . . x o
        0    . . . . . . x x

    Attributes:
        segment_ids: [B, T]; 0 on padding, else the number of the document within its row.
        causal: a position sees itself and earlier positions only; static.
        window: positions that are seen on each side, at least 0; None for no limit; static.
    """

    segment_ids: Int[Array, "B T"]
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def matrix(self) -> Bool[Array, "B T S"]:
        """True where query position t sees key position s."""
        segments, index = self.segment_ids, jnp.arange(self.segment_ids.shape[1])
        return sees(segments[:, :, None], segments[:, None], index[:, None], index,
                    self.causal, self.window)


def sees(
    query_segment: Int[Array, "..."], key_segment: Int[Array, "..."],
    query_index: Int[Array, "..."], key_index: Int[Array, "..."],
    causal: bool, window: int | None,
) -> Bool[Array, "..."]:
    """True where a query position sees a key position, by the rule of `AttentionMask`.

    Args:
        query_segment, key_segment: segment ids of the two positions; all four arrays broadcast,
            which jaxtyping 0.3 cannot check where sizes are symbolic, as in an export.
        query_index, key_index: indices of the two positions within their row.
        causal, window: as in `AttentionMask`.
    """
    seen = query_segment == key_segment
    if causal:
        seen &= key_index <= query_index
    if window is not None:
        seen &= jnp.abs(query_index - key_index) <= window
    return seen
