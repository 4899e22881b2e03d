"""Dropout by a hash of place: what is dropped in a row depends on its key and the place alone.

So it is the same beside other rows, on every mesh and in a kernel that holds only a part of a row.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt32

RowKeys = Key[Array, " B"] | None  # None for no dropout


class Dropout(NamedTuple):
    """How much is dropped, and 64 random bits of each row."""

    rate: float
    seeds: UInt32[Array, "B 2"]


def dropout(rate: float, keys: RowKeys) -> Dropout | None:
    """None where nothing is dropped."""
    if keys is None or not rate:
        return None
    return Dropout(rate, jax.vmap(lambda key: jax.random.bits(key, (2,), "uint32"))(keys))


def dropped(x: Float[Array, "B ..."], drop: Dropout | None) -> Float[Array, "B ..."]:
    """x with some of it 0 and the rest larger, so that its expectation is the same."""
    if drop is None:
        return x
    places = jnp.arange(math.prod(x.shape[1:]), dtype=jnp.uint32).reshape(x.shape[1:])
    seeds = (drop.seeds[:, i].reshape(-1, *[1] * places.ndim) for i in range(2))
    return jnp.where(kept(places, *seeds, drop.rate), x / (1 - drop.rate), 0)


def kept(
    places: UInt32[Array, "..."], first: UInt32[Array, "..."], second: UInt32[Array, "..."],
    rate: float,
) -> Bool[Array, "..."]:
    """What is not dropped, by the numbers of places in a row and the seeds of that row."""
    return bits(places, first, second) >= np.uint32(rate * 2**32)  # of all numbers


def bits(
    places: UInt32[Array, "..."], first: UInt32[Array, "..."], second: UInt32[Array, "..."]
) -> UInt32[Array, "..."]:
    """Random bits for every place.

    jax.random would hash every place by threefry, which has eight times the operations and makes
    the TPU compiler's work twice as long.
    """
    return _mixed(_mixed(places ^ first) + second)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The last step of MurmurHash3 (Appleby 2011), after which each bit depends on all."""
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16
