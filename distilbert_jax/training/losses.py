"""The table of losses: each is a weighted sum over positions and a row that says what it compares.

Observed states and logits come in, one number goes out. These are the readable definitions; the
vocabulary losses are computed by kernels/head.py, which never holds logits of all positions. The
caller divides each sum once, by the global weight, so that a mean is over all devices and
micro-batches alike. All are computed in float32 or wider.
"""

import dataclasses
import math
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
    """Σ w · (1 − cos) between hidden states (L_cos), with torch's 1e-12 under the root.

    At inner layers, half of ‖s/‖s‖ − t/‖t‖‖², the loss of PKD (Sun et al. 2019, equation 7; theirs
    is of the first position alone).
    """
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


def skew_sum(
    student_logits: Float[Array, "*P V"],
    teacher_logits: Float[Array, "*P V"],
    weights: Float[Array, "*P"],
    temperature: float,
) -> Float[Array, ""]:
    """T² · Σ w KL(p ‖ α p + (1 − α) q), p the teacher's softmax at T, q the student's, α = 0.1.

    The skew KL divergence of DistiLLM (Ko et al. 2024, section 3.1): as p is part of what it is
    compared with, it is at most −log α, and a word that the student thinks impossible costs a
    bounded gradient. With α = 0 it is ce_sum.
    """
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    student = jax.nn.log_softmax(student_logits / temperature)
    mixed = jnp.logaddexp(teacher + math.log(SKEW), student + math.log1p(-SKEW))
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - mixed), axis=-1)
    return temperature**2 * jnp.sum(weights * divergence)


def relation_sum(
    student: Float[Array, "3 B T D"],
    teacher: Float[Array, "3 B T E"],
    weights: Float[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    relation_heads: int,
) -> Float[Array, ""]:
    """Σ w · mean over q, k, v and heads of KL(R_t ‖ R_s), R = softmax(X_a X_aᵀ / √d) by rows.

    The relations of MiniLMv2 (Wang et al. 2021, section 3.1): of queries with queries, keys with
    keys and values with values. X_a are d = D / heads neighbouring columns of X, of whatever
    attention heads, so that widths and numbers of attention heads may differ. A row R of a
    position goes over its own document. No [B, heads, T, T] exists: heads follow each other, and
    the backward pass computes each again.

    Args:
        student, teacher: queries, keys and values of a layer, all heads beside each other.
        weights: of positions.
        segment_ids: the number of each position's document; 0 on padding.
        relation_heads: divides both widths.
    """
    def heads(x: Float[Array, "3 B T D"]) -> Float[Array, "N B T d"]:
        cut = x.reshape(*x.shape[:3], relation_heads, -1)
        return jnp.moveaxis(cut, 3, 1).reshape(-1, *cut.shape[1:3], cut.shape[-1])

    @jax.checkpoint
    def divergence(own: Float[Array, "B T d"], theirs: Float[Array, "B T e"]
                   ) -> Float[Array, ""]:
        s, t = (_log_relations(x, segment_ids) for x in (own, theirs))
        return jnp.sum(weights * jnp.sum(jnp.exp(t) * (t - s), axis=-1))

    def add(total: Float[Array, ""], pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + divergence(*pair), None

    pairs = heads(student), heads(teacher)
    total = jax.lax.scan(add, jnp.zeros((), wide(student.dtype)), pairs)[0]
    return total / len(pairs[0])


def _log_relations(x: Float[Array, "B T d"], segment_ids: Int[Array, "B T"]
                   ) -> Float[Array, "B T T"]:
    """Log of the softmax of scaled products with the positions of the same document."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    scores = jnp.einsum("BTd,BSd->BTS", x, x, preferred_element_type=wide(x.dtype))
    scores = scores / math.sqrt(x.shape[-1])
    return jax.nn.log_softmax(jnp.where(same, scores, jnp.finfo(scores.dtype).min), axis=-1)


SKEW = 0.1  # share of the teacher in what it is compared with


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
        qkv      sum(queries, keys and values of the student's last layer [3, B, T, D], of the
                 teacher's, weights [B, T], segment_ids [B, T])

        targets  sum(logits of the task [B, S, C], labels [B, S], weights [B, S])
        answers  sum(logits of the task, the teacher's [B, S, C], weights [B, S])
        vectors  sum(sentence vectors [B, S, D], the teacher's, weights [B, S])
        similarities  as vectors, and the teacher's of the whole batch [N, D], 1 where there is one

    and `settings` names fields of the objective (qkv: of its pair) that it takes beside these.
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
    "inner": Loss("hidden", "tokens", cos_sum, "cosine loss on hidden states at mapped layers"),
    "relation": Loss("qkv", "tokens", relation_sum,
                     "KL divergence from the teacher's relations of queries, keys and values in "
                     "the last layer", ("relation_heads",)),
    "skew": Loss("logits", "soft", skew_sum,
                 "KL divergence from the teacher of a mixture of 0.1 teacher and 0.9 student, at "
                 "--temperature", ("temperature",)),
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
