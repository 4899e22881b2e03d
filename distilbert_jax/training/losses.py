"""The losses on logits and hidden states: the readable truth, and what the tests derive from.

Every function returns a weighted sum; the caller divides once by the global weight, so that the
mean is over all devices and micro-batches alike. All are computed in float32 or wider.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def kl_sum(
    student_logits: Float[Array, "*P V"],
    teacher_logits: Float[Array, "*P V"],
    weights: Float[Array, "*P"],
    temperature: float,
) -> Float[Array, ""]:
    """T² · Σ w KL(teacher ‖ student) of the softmaxes at temperature T, in nats.

    T² keeps the gradient's size independent of T (Hinton et al. 2015, section 2); L_ce of Sanh et
    al. 2019.
    """
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    student = jax.nn.log_softmax(student_logits / temperature)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return temperature**2 * jnp.sum(weights * divergence)


def mlm_sum(
    logits: Float[Array, "*P V"], labels: Int[Array, "*P"], weights: Float[Array, "*P"]
) -> Float[Array, ""]:
    """Σ w · cross-entropy of the labels, in nats, at temperature 1 (L_mlm)."""
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - at_label))


def cosine_sum(
    student_hidden: Float[Array, "*P D"],
    teacher_hidden: Float[Array, "*P D"],
    weights: Float[Array, "*P"],
) -> Float[Array, ""]:
    """Σ w · (1 − cos) between last hidden states (L_cos), with torch's 1e-12 under the root."""
    wide = jnp.promote_types(student_hidden.dtype, jnp.float32)
    s, t = student_hidden.astype(wide), teacher_hidden.astype(wide)
    norms = (jnp.sum(s * s, axis=-1) + 1e-12) * (jnp.sum(t * t, axis=-1) + 1e-12)
    return jnp.sum(weights * (1 - jnp.sum(s * t, axis=-1) / jnp.sqrt(norms)))


def mse_sum(
    student_logits: Float[Array, "*P V"],
    teacher_logits: Float[Array, "*P V"],
    weights: Float[Array, "*P"],
) -> Float[Array, ""]:
    """Σ w · Σ_v (student − teacher)² of raw logits: summed over the vocabulary (L_mse, A.7)."""
    return jnp.sum(weights * jnp.sum((student_logits - teacher_logits) ** 2, axis=-1))
