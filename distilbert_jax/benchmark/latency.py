"""Latency of one request: several models in turn, so that the machine's moods hit all alike."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

REPEATS = 30


def latencies(
    models: dict[str, tuple[nnx.GraphDef, dict[str, Any]]], length: int
) -> dict[str, float]:
    """Median milliseconds to encode one document of `length` tokens, batch 1, on the first device.

    Args:
        models: name → (structure, parameters).
        length: tokens.

    Returns:
        name → median over 30 runs, the models alternating, compiled and warmed up before.
    """
    ids = jnp.ones((1, length), jnp.int32)
    positions = jnp.arange(length)[None]

    def encode(graph: nnx.GraphDef, params: dict[str, Any]) -> jax.Array:
        return nnx.merge(graph, params)(ids, ids, positions).last

    calls = {}
    for name, (graph, params) in models.items():
        here = jax.device_put(params, jax.local_devices()[0])
        calls[name] = (jax.jit(encode, static_argnums=0), graph, here)
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(REPEATS + 1):
        for name, (call, graph, params) in calls.items():
            began = time.perf_counter()
            call(graph, params).block_until_ready()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}
