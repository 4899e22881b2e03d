"""The Optax chain: clip, AdamW or Muon with decay on matrices, warm-up and linear decay.

Where the loss or the gradient of an update is not finite (`finite`), no state changes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Bool

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
) -> optax.GradientTransformationExtraArgs:
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

    Returns:
        A transformation whose `update` also takes `finite`, a bool: the state stays as it is where
        that is False, whatever the gradient is.
    """
    def decays(params: dict[str, Any]) -> dict[str, Any]:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim > 1 and not path_name(path).startswith(frozen), params)

    def kinds(params: dict[str, Any]) -> dict[str, Any]:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "muon" if leaf.ndim > 1 and "layers/" in path_name(path)
            else "adamw", params)

    rate = learning_rate(config, steps)
    adamw = optax.chain(
        _adam(b1=0.9, b2=0.98, eps=1e-6), optax.add_decayed_weights(config.weight_decay, decays),
        _if_finite(optax.scale_by_learning_rate(rate)))
    if config.optimizer == "muon":
        muon = optax.contrib.muon(rate, weight_decay=config.weight_decay, consistent_rms=0.2)
        adamw = optax.partition({"muon": _if_finite(muon), "adamw": adamw}, kinds)
    return optax.chain(_clip(config.clip), adamw)


def _clip(most: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm by one factor for all, which needs no scaled copy of the gradient.
    """
    def update(updates, state, params=None):
        factor = jnp.minimum(1, most / optax.tree.norm(updates))
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _if_finite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transformation, whose state stays as it is where an update is not finite."""

    def update(updates, state, params=None, *, finite=True, **_):
        updates, new = inner.update(updates, state, params)
        return updates, jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, its state unchanged where an update is not finite.

    The update is taken from the state that is kept. Taken from moments that a later choice may
    discard, XLA's CPU compiler computes these twice and copies the old ones, in up to 5 times as
    long.
    """
    inner = optax.scale_by_adam(b1, b2, eps)

    def update(updates, state, params=None, *, finite: bool | Bool[Array, ""] = True, **_):
        new = optax.ScaleByAdamState(
            optax.safe_increment(state.count), optax.tree.update_moment(updates, state.mu, b1, 1),
            optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2))
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        first = optax.tree.bias_correction(new.mu, b1, new.count)
        second = optax.tree.bias_correction(new.nu, b2, new.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second), new

    return optax.GradientTransformationExtraArgs(inner.init, update)
