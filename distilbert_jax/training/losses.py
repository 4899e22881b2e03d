"""The table of losses: each is a weighted sum over positions and a row that says what it compares.

Observed states and logits come in, one number goes out. These are the readable definitions; the
vocabulary losses are computed by kernels/head.py, which never holds logits of all positions. The
caller divides each sum once, by the global weight, so that a mean is over all devices and
micro-batches alike. All are computed in float32 or wider.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distilbert_jax.kernels.products import wide


def ce_sum(
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
    """Σ w · cross-entropy of the labels, in nats, at temperature 1 (L_mlm of Sanh et al. 2019)."""
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - at_label))


def cos_sum(
    student_hidden: Float[Array, "*P D"],
    teacher_hidden: Float[Array, "*P D"],
    weights: Float[Array, "*P"],
) -> Float[Array, ""]:
    """Σ w · (1 − cos) between hidden states (L_cos), with torch's 1e-12 under the root."""
    s, t = (x.astype(wide(x.dtype)) for x in (student_hidden, teacher_hidden))
    norms = (jnp.sum(s * s, axis=-1) + 1e-12) * (jnp.sum(t * t, axis=-1) + 1e-12)
    return jnp.sum(weights * (1 - jnp.sum(s * t, axis=-1) / jnp.sqrt(norms)))


def mse_sum(
    student_logits: Float[Array, "*P V"],
    teacher_logits: Float[Array, "*P V"],
    weights: Float[Array, "*P"],
) -> Float[Array, ""]:
    """Σ w · Σ_v (student − teacher)² of raw logits: summed over the vocabulary (L_mse)."""
    return jnp.sum(weights * jnp.sum((student_logits - teacher_logits) ** 2, axis=-1))


def hidden_sum(
    student_hidden: Float[Array, "*P D"],
    teacher_hidden: Float[Array, "*P D"],
    weights: Float[Array, "*P"],
) -> Float[Array, ""]:
    """Σ w · ‖student − teacher‖² / ‖teacher‖² of hidden states.

    The squared error of TinyBERT's hidden-state loss (Jiao et al. 2020, equation 8), relative to
    the size of the teacher's state, so that a weight means as much at every layer.
    """
    s, t = (x.astype(wide(x.dtype)) for x in (student_hidden, teacher_hidden))
    errors = jnp.sum((s - t) ** 2, axis=-1)
    return jnp.sum(weights * errors / (jnp.sum(t * t, axis=-1) + 1e-12))


def hard_sum(
    logits: Float[Array, "B S C"], labels: Float[Array, "B S"], weights: Float[Array, "B S"]
) -> Float[Array, ""]:
    """Σ w · cross-entropy of the label, in nats; of a single logit, its squared error.

    A regression has one logit, as in transformers.
    """
    if logits.shape[-1] == 1:
        return jnp.sum(weights * (logits[..., 0] - labels) ** 2)
    return mlm_sum(logits, labels.astype(jnp.int32), weights)


def soft_sum(
    logits: Float[Array, "B S C"], answers: Float[Array, "B S C"], weights: Float[Array, "B S"],
    temperature: float,
) -> Float[Array, ""]:
    """T² · Σ w KL(teacher ‖ student) of the answers, as ce_sum; of one logit, its squared error."""
    if logits.shape[-1] == 1:
        return jnp.sum(weights * (logits[..., 0] - answers[..., 0]) ** 2)
    return ce_sum(logits, answers, weights, temperature)


def vector_sum(
    student: Float[Array, "B S D"], teacher: Float[Array, "B S D"], weights: Float[Array, "B S"]
) -> Float[Array, ""]:
    """Σ w · ‖student − teacher‖² of sentence vectors.

    D times the MSELoss of sentence-transformers (Reimers and Gurevych 2020, equation 1), whose
    mean is over the dimensions too. Of vectors of length 1 it is 2 (1 − cos).
    """
    return mse_sum(*(x.astype(wide(x.dtype)) for x in (student, teacher)), weights)


def similarity_sum(
    student: Float[Array, "B S D"], teacher: Float[Array, "B S D"], weights: Float[Array, "B S"],
    others: Float[Array, "N D"], known: Float[Array, " N"], similarity_temperature: float,
) -> Float[Array, ""]:
    """Σ w · KL(teacher ‖ student) of each sentence's similarities to the batch, in nats.

    A row of similarities is the softmax of the cosines to the teacher's vectors of the whole batch,
    at a temperature: how a search with the teacher's index ranks. So the student's vectors of one
    device or micro-batch need none of another's.

    Args:
        student, teacher, weights: as for vector_sum.
        others: the teacher's vectors of the whole batch; known: 1 where there is one, else 0.
        similarity_temperature: that the cosines are divided by.
    """
    def log_rows(x: Float[Array, "B S D"]) -> Float[Array, "B S N"]:
        cosines = jnp.einsum("BSD,ND->BSN", _unit(x), _unit(others),
                             precision=jax.lax.Precision.HIGHEST)
        return jax.nn.log_softmax(jnp.where(
            known > 0, cosines / similarity_temperature, FAR), axis=-1)

    own, theirs = log_rows(student), log_rows(teacher)
    return jnp.sum(weights * jnp.sum(jnp.exp(theirs) * (theirs - own), axis=-1))


FAR = -1e9  # the similarity to a sentence that is not there


def _unit(x: Float[Array, "*P D"]) -> Float[Array, "*P D"]:
    x = x.astype(wide(x.dtype))
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A row of LOSSES.

    `sum` is called by what the loss needs:

        labels   sum(student's logits [P, V], labels [P], weights [P])
        logits   sum(student's logits [P, V], teacher's logits [P, V], weights [P])
        last     sum(student's last hidden states [B, T, D], teacher's, weights [B, T])
        hidden   as last, once for each pair of mapped layers, of which the mean is taken; where
                 the widths differ, the student's states go through a learned projection first

        targets  sum(logits of the task [B, S, C], labels [B, S], weights [B, S])
        answers  sum(logits of the task, the teacher's [B, S, C], weights [B, S])
        vectors  sum(sentence vectors [B, S, D], the teacher's, weights [B, S])
        similarities  as vectors, and the teacher's of the whole batch [N, D], 1 where there is one

    and `settings` names fields of the objective that it takes beside these.
    """

    needs: str
    # Its mean is over: tokens, masked, soft (tokens unless restricted to masked), labels, answers
    over: str
    sum: Callable[..., Float[Array, ""]]
    text: str  # help of its flag --alpha-NAME
    settings: tuple[str, ...] = ()


LOSSES = {
    "ce": Loss("logits", "soft", ce_sum, "KL divergence from the teacher at --temperature",
               ("temperature",)),
    "mlm": Loss("labels", "masked", mlm_sum, "masked-language-model loss"),
    "cos": Loss("last", "tokens", cos_sum, "cosine loss on last hidden states"),
    "mse": Loss("logits", "soft", mse_sum, "squared error between logits"),
    "hidden": Loss("hidden", "tokens", hidden_sum,
                   "relative squared error of hidden states at mapped layers"),
    "hard": Loss("targets", "labels", hard_sum, "loss on the labels, beside a teacher"),
    "soft": Loss("answers", "answers", soft_sum,
                 "KL divergence from the teacher's answers at --temperature (of numbers: squared "
                 "error)", ("temperature",)),
    "vector": Loss("vectors", "answers", vector_sum,
                   "squared error to the teacher's sentence vectors"),
    "angle": Loss("vectors", "answers", cos_sum, "1 - cosine to the teacher's sentence vectors"),
    "similarity": Loss("similarities", "answers", similarity_sum,
                       "KL divergence from the teacher's similarities within the batch",
                       ("similarity_temperature",)),
}
