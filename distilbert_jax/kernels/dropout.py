"""Dropout by a hash of the index: an element is dropped by the key of its row and its index alone.

So a row drops the same elements beside any other rows, on every mesh, and in a kernel that holds
only a part of the row.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

RowKeys = Key[Array, " B"] | None  # None for no dropout


class Dropout(NamedTuple):
    """The share of elements to drop, and 64 random bits for each row."""

    rate: float
    seeds: UInt32[Array, "B 2"]


def dropout(rate: float, keys: RowKeys) -> Dropout | None:
    """Draw the seeds of each row from its key; None if the rate is 0 or there are no keys."""
    if keys is None or not rate:
        return None
    return Dropout(rate, jax.vmap(lambda key: jax.random.bits(key, (2,), "uint32"))(keys))


def dropped(
    x: Float[Array, "B S ..."], drop: Dropout | None, at: Int[Array, "B S"] | None = None
) -> Float[Array, "B S ..."]:
    """Set a random share of x to 0 and scale up the rest, which keeps the expectation of x.

    Args:
        x: [B, S, ...]; an element's index is counted over all axes of its row.
        drop: rate and seeds of B rows; None returns x as it is.
        at: [B, S] where the parts of x stand on the second axis of a longer array, whose
            elements they drop; None if they are all there is.
    """
    if drop is None:
        return x
    size = math.prod(x.shape[2:])
    parts = jnp.arange(x.shape[1])[None] if at is None else at
    indices = (parts.astype(jnp.uint32)[..., None] * jnp.uint32(size)
               + jnp.arange(size, dtype=jnp.uint32)).reshape(-1, *x.shape[1:])
    seeds = (drop.seeds[:, i].reshape(-1, *[1] * (x.ndim - 1)) for i in range(2))
    return jnp.where(kept(indices, *seeds, drop.rate), x / (1 - drop.rate), 0)


def kept(
    indices: UInt32[Array, "..."], first: UInt32[Array, "..."], second: UInt32[Array, "..."],
    rate: float,
) -> Bool[Array, "..."]:
    """True for elements that are not dropped.

    Args:
        indices: index of each element within its row.
        first, second: the two seeds of each element's row; all three arrays broadcast.
        rate: the share of elements that is dropped.
    """
    return bits(indices, first, second) >= np.uint32(rate * 2**32)


def bits(
    indices: UInt32[Array, "..."], first: UInt32[Array, "..."], second: UInt32[Array, "..."]
) -> UInt32[Array, "..."]:
    """Hash an index and two seeds into 32 random bits.

    jax.random would hash every index by threefry, which has eight times the operations and doubles
    the time that the TPU compiler takes.
    """
    return _mixed(_mixed(indices ^ first) + second)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Apply the last step of MurmurHash3 (Appleby 2011): each bit then depends on all bits."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16
