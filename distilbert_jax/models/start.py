"""A shape and a seed → initial parameters: the family's plain ones, or a start for pretraining.

`init_params` is what every model of the family starts from at random; `init_to_pretrain` changes
the first layer, for a model that is trained from nothing and with no teacher.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distilbert_jax.models.encoder import Encoder, EncoderConfig

SHARPNESS = 80  # of the first layer's attention at its start: score of the position looked at


def init_params(config: EncoderConfig, seed: int, param_dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters: normal matrices of `initializer_range`, biases 0, LayerNorm scales 1."""
    return jax.jit(lambda: _random(config, seed, param_dtype))()


def init_to_pretrain(
    config: EncoderConfig, seed: int, param_dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Random parameters whose first layer looks at neighbours: see `_look_around`."""
    return jax.jit(lambda: _look_around(_random(config, seed, param_dtype), config))()


def _random(config: EncoderConfig, seed: int, param_dtype: Any) -> dict[str, Any]:
    encoder = Encoder(config, dtype=param_dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.split(encoder)[1])


def _look_around(params: dict[str, Any], config: EncoderConfig) -> dict[str, Any]:
    """Let each head of the first layer attend to the position −1, +1, −2, +2, … from its own.

    A BERT that starts at random learns the frequencies of words and then stands still for
    thousands of updates until its attention finds the neighbours. Here positions start as
    sinusoids (Vaswani et al. 2017, section 3.5) in columns that words leave free, and the query
    of a head as the key that lies so far away. To start attention as what training makes of it
    is the idea of Trockman and Kolter 2023 (arXiv 2305.09828).
    """
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    pairs = min(size, width // 4) // 2  # of columns
    if not pairs:
        return params
    columns = 2 * pairs
    frequency = 10.0 ** -(jnp.arange(pairs) / pairs)  # radians per position
    angle = jnp.arange(config.max_position_embeddings)[:, None] * frequency
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)  # [P, columns]
    as_long_as_a_word = config.initializer_range * math.sqrt(width / pairs)
    tables = params["embeddings"]
    for name in {"word", "position", "token_type"} & set(tables):
        free = tables[name]["embedding"].at[:, :columns].set(0)
        tables[name]["embedding"] = free if name != "position" else (
            0 * free).at[:, :columns].set(as_long_as_a_word * waves)

    gain = math.sqrt(SHARPNESS * math.sqrt(size) / (0.57 * width))  # 0.57: what LayerNorm leaves
    first = params["layers"][0]["attention"]
    for head in range(config.num_attention_heads):
        away = (head // 2 + 1) * (-1) ** (head + 1)
        cos, sin = jnp.diag(jnp.cos(away * frequency)), jnp.diag(jnp.sin(away * frequency))
        turns = {"query": jnp.block([[cos, -sin], [sin, cos]]), "key": jnp.eye(columns)}
        for name, turn in turns.items():
            first[name]["kernel"] = first[name]["kernel"].at[
                :columns, head * size:head * size + columns].add(gain * turn)
    return params
