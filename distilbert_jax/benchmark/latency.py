"""Latency of one request: several models in turn, so that the machine's moods hit all alike.

`serving.py` is the long form, with a process for each.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distilbert_jax.export.exportable import Run

REPEATS = 30


def latencies(
    models: dict[str, tuple[nnx.GraphDef, dict[str, Any]]], length: int, rows: int = 1
) -> dict[str, float]:
    """Median milliseconds to encode documents of `length` tokens together, on the first device.

    Args:
        models: name → (structure, parameters).
        length: tokens.
        rows: documents in a batch.

    Returns:
        name → median over 30 runs, the models alternating, compiled and warmed up before.
    """
    ids = jnp.ones((rows, length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)

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


def file_latencies(
    runs: Mapping[str, Run], length: int, vocabulary: int, rows: int = 1
) -> dict[str, tuple[float, float]]:
    """Milliseconds in which files that were shipped answer rows of `length` tokens.

    Args:
        runs: name → the file in its runtime.
        length: tokens.
        vocabulary: of the model; the tokens are drawn from it.
        rows: in a batch.

    Returns:
        name → median and 95th percentile of 30 runs, the files in turn, warmed up before.
    """
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run(ids, np.ones_like(ids), np.zeros_like(ids))
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: (float(np.median(values)), float(np.percentile(values, 95)))
            for name, values in times.items()}
