"""The Optax chain: clip, AdamW or Muon with decay on matrices, warm-up and linear decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from distilbert_jax.config import LoopConfig
from distilbert_jax.machine.trees import path_name


def learning_rate(config: LoopConfig, steps: int) -> optax.Schedule:
    """Rate of the update after `count` completed ones: linear warm-up, then linear decay.

    The first update has peak / warm-up updates, not the reference's 0 (A.8); the rate would reach
    0 at update number `steps`, one after the last.
    """
    warmup = max(1, round(config.warmup * steps))
    peak = config.learning_rate
    schedule = optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)),
         optax.linear_schedule(peak, 0.0, max(1, steps - warmup + 1))],
        [warmup - 1])
    # An integer count would make the rate float32 even where everything else is float64.
    return lambda count: schedule(jnp.asarray(count, jnp.result_type(float)))


def make_optimizer(
    config: LoopConfig, steps: int, frozen: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """AdamW with the reference's betas (0.9, 0.98) and epsilon 1e-6, or beside it Muon.

    Muon (Jordan et al. 2024) takes the matrices of the layers; embeddings, heads, biases and norms
    stay with AdamW. Its updates are scaled to the size of AdamW's (Liu et al. 2025, section 2.2:
    a root mean square of 0.2), so that one learning rate serves both.

    Args:
        config: which, rate, warm-up, weight decay and clip.
        steps: updates of the whole run.
        frozen: beginnings of parameter paths, e.g. "student/embeddings/position", that do not
            decay; the step gives them no gradient, so they keep their start.

    Weight decay acts on matrices (leaves of two axes) only: no bias, no LayerNorm.
    """
    def decays(params: dict[str, Any]) -> dict[str, Any]:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim > 1 and not path_name(path).startswith(frozen), params)

    def kinds(params: dict[str, Any]) -> dict[str, Any]:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "muon" if leaf.ndim > 1 and "layers/" in path_name(path)
            else "adamw", params)

    rate = learning_rate(config, steps)
    adamw = optax.adamw(rate, b1=0.9, b2=0.98, eps=1e-6, weight_decay=config.weight_decay,
                        mask=decays)
    if config.optimizer == "muon":
        muon = optax.contrib.muon(rate, weight_decay=config.weight_decay, consistent_rms=0.2)
        adamw = optax.partition({"muon": muon, "adamw": adamw}, kinds)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)
