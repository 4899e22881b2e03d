"""What is trained: each model is observed once, and every loss with a weight sees only that.

A labelled batch, a student and its teachers come in, the total loss and the means that it is made
of go out.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from distilbert_jax.config import DistilConfig
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.errors import UserError, choose
from distilbert_jax.kernels.dropout import RowKeys
from distilbert_jax.kernels.head import Head, Targets, Term, fused_losses, mixed
from distilbert_jax.models.encoder import At, EncoderConfig, Seen, gathered
from distilbert_jax.task_config import FinetuneConfig
from distilbert_jax.training.losses import LOSSES

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
# Loss, for a second teacher "LOSS_2" → layer of the student → {"kernel": [D, E]}
Kernels = dict[str, dict[str, Float[Array | np.ndarray, "_ _"]]]
Projections = dict[str, Kernels]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """How the student is compared with one of its teachers."""

    share: float = 1.0  # of this teacher in every loss that compares with one
    layer_map: tuple[tuple[int, int], ...] = ()  # (layer of the student, of the teacher) from 1
    last_layers: tuple[int, int] = (0, 0)  # of the student, of the teacher, from 1
    relation_heads: int = 1

    @classmethod
    def of(
        cls, config: DistilConfig | FinetuneConfig | EmbedConfig, share: float,
        student: EncoderConfig, teacher: EncoderConfig, name: str,
    ) -> "Pair":
        """The comparison with a teacher of this shape, which a UserError calls `name`."""
        depths = student.num_hidden_layers, teacher.num_hidden_layers
        pair = cls(
            share=share, layer_map=map_layers(config.hidden_map, *depths, name),
            last_layers=depths,
            relation_heads=getattr(config, "relation_heads", 0) or teacher.num_attention_heads)
        widths = student.hidden_size, teacher.hidden_size
        said = f"the student has {widths[0]}, {name} {widths[1]}"
        needs = {LOSSES[loss].needs: loss for loss, alpha in config.alphas.items() if alpha}
        if "qkv" in needs and any(width % pair.relation_heads for width in widths):
            raise UserError(
                f"--relation-heads {pair.relation_heads} must divide the widths: {said}")
        if "last" in needs and widths[0] != widths[1]:
            raise UserError(f"--alpha-{needs['last']} compares states of equal width, and {said}: "
                            "give 0")
        return pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The weights of the losses, and what they take beside states and logits."""

    weights: Mapping[str, float]  # row of LOSSES → its weight; one of weight 0 is not computed
    temperature: float = 2.0
    similarity_temperature: float = 0.05
    restrict_ce_to_mask: bool = False
    of_first: bool = False  # sentence vectors are read from first tokens alone
    pairs: tuple[Pair, ...] = (Pair(),)  # for each teacher; shares sum to 1

    @classmethod
    def of(
        cls, config: DistilConfig | FinetuneConfig | EmbedConfig, student: EncoderConfig,
        teachers: Sequence[EncoderConfig],
    ) -> "Objective":
        """The objective of a distillation.

        Raises:
            UserError: an unknown loss, a map of layers that do not exist or that no loss reads,
                a loss that needs equal widths where they differ, relation heads that do not
                divide the widths, or teachers of vocabularies of other sizes.
        """
        for name in config.alphas:
            choose(name, LOSSES, "loss")
        shares, names = (1.0,), ["the teacher"]
        if len(teachers) > 1:
            shares, names = config.shares, [f"--teacher {name}" for name in config.teacher]
        for teacher, name in zip(teachers, names, strict=True):
            if teacher.vocab_size != teachers[0].vocab_size:
                raise UserError(f"{name} knows {teacher.vocab_size} tokens, {names[0]} "
                                f"{teachers[0].vocab_size}: all must have one tokenizer")
        objective = cls(
            weights={name: config.alphas[name] for name in LOSSES if config.alphas.get(name)},
            temperature=getattr(config, "temperature", 1.0),
            similarity_temperature=getattr(config, "similarity_temperature", 1.0),
            of_first=bool(student.sentence and student.sentence.of_first),
            restrict_ce_to_mask=getattr(config, "restrict_ce_to_mask", False))
        if config.hidden_map and not objective.mapped:
            raise UserError(f"--hidden-map {config.hidden_map} is read by no loss: give "
                            "--alpha-hidden or --alpha-inner above 0, or leave it out")
        if getattr(config, "relation_heads", 0) and not objective.relational:
            raise UserError(f"--relation-heads {config.relation_heads} is read by no loss: give "
                            "--alpha-relation above 0, or leave it out")
        if maskings := getattr(config, "kept_maskings", 0):
            objective._check_kept(f"--kept-maskings {maskings}")
        return dataclasses.replace(objective, pairs=tuple(
            Pair.of(config, share, student, teacher, name)
            for share, teacher, name in zip(shares, teachers, names, strict=True)))

    def _check_kept(self, flag: str) -> None:
        """Raise a UserError unless a teacher's last states are all that the losses need of it."""
        needs = {name: LOSSES[name].needs for name in self.weights}
        if inner := [name for name, need in needs.items() if need in ("hidden", "qkv")]:
            raise UserError(f"--alpha-{inner[0]} compares states of inner layers, and {flag} keeps "
                            "the last ones alone: give 0, or leave it out")
        if not {"last", "logits"} & set(needs.values()):
            raise UserError(f"{flag} keeps states that no loss reads: give --alpha-ce above 0, or "
                            "leave it out")

    @property
    def mapped(self) -> tuple[str, ...]:
        """The losses on hidden states at mapped layers."""
        return tuple(name for name in self.weights if LOSSES[name].needs == "hidden")

    @property
    def relational(self) -> bool:
        """Whether there is a loss on queries, keys and values."""
        return any(LOSSES[name].needs == "qkv" for name in self.weights)

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Layers that the student has to show: those of any pair, since all map the same ones."""
        return tuple(own for own, _ in self.pairs[0].layer_map) if self.mapped else ()

    def teacher_layers(self, pair: Pair) -> tuple[int, ...]:
        """Layers that the teacher of a pair has to show."""
        return tuple(sorted({theirs for _, theirs in pair.layer_map})) if self.mapped else ()

    @property
    def reads(self) -> str | None:
        """The positions in a batch at which alone last states are read; None for everywhere."""
        needs = {LOSSES[name].needs for name in self.weights}
        if needs <= {"targets", "answers"} or (
                needs <= {"vectors", "similarities"} and self.of_first):
            return "target_positions"
        if needs <= {"labels", "logits"} and not self.logits_everywhere:
            return "masked_positions"
        return None

    @property
    def logits_everywhere(self) -> bool:
        """Whether logits are needed at all positions and not only at the masked ones."""
        return not self.restrict_ce_to_mask and any(
            LOSSES[name].needs == "logits" for name in self.weights)

    def init_projections(
        self, student: EncoderConfig, teachers: Sequence[EncoderConfig], seed: int,
        dtype: np.dtype,
    ) -> Projections:
        """A random projection [D, E] for each mapped layer, where the widths D and E differ."""
        random, width = np.random.default_rng(seed), student.hidden_size
        return {_projected(name, number): {
            str(own): {"kernel": random.normal(
                0, width**-0.5, (width, teacher.hidden_size)).astype(dtype)}
            for own, _ in pair.layer_map}
            for number, (pair, teacher) in enumerate(zip(self.pairs, teachers, strict=True), 1)
            if teacher.hidden_size != width for name in self.mapped}


def _projected(loss: str, number: int) -> str:
    """The name under which projections towards a teacher, counted from 1, are trained."""
    return loss if number == 1 else f"{loss}_{number}"


def map_layers(
    wish: str, student: int, teacher: int, name: str = "the teacher"
) -> tuple[tuple[int, int], ...]:
    """Which layer of the teacher each layer of the student is compared with.

    Args:
        wish: "1:4,2:8", the student's layer before its teacher's, each counted from 1, 0 being
            the embeddings; "" maps every layer of the student, evenly: 1:4, 2:8, 3:12 for 3 of 12
            (TinyBERT, Jiao et al. 2020, section 3.1).
        student, teacher: how many layers there are.
        name: what an error calls the teacher.

    Raises:
        UserError: not of that form, or a layer that does not exist or stands there twice.
    """
    if not wish:
        return tuple((own, round(own * teacher / student)) for own in range(1, student + 1))
    try:
        pairs = [tuple(map(int, pair.split(":"))) for pair in wish.split(",")]
        pairs = [(own, theirs) for own, theirs in pairs]
    except ValueError as error:
        raise UserError(f"--hidden-map {wish} must look like 1:4,2:8: a layer of the student, of "
                        "the teacher") from error
    for own, theirs in pairs:
        if not (0 <= own <= student and 0 <= theirs <= teacher):
            raise UserError(f"--hidden-map {wish}: {own}:{theirs} is not there; the student has "
                            f"{student} layers, {name} {teacher}")
    if len({own for own, _ in pairs}) < len(pairs):
        raise UserError(f"--hidden-map {wish} maps a layer of the student twice")
    return tuple(pairs)


def observe(
    model: nnx.Module, batch: Batch, want: tuple[int, ...] = (), dropout_keys: RowKeys = None,
    at: At = None, want_qkv: tuple[int, ...] = (),
) -> Seen:
    """What a model shows of a batch: last hidden states `at` positions, layers in `want`, and
    queries, keys and values of those in `want_qkv`."""
    return model(batch["input_ids"], batch["segment_ids"], batch["position_ids"],
                 batch.get("token_type_ids"), dropout_keys=dropout_keys, want=want, at=at,
                 want_qkv=want_qkv)


def vectors(
    model: nnx.Module, last: Float[Array, "B _ D"], batch: Batch, of_first: bool, everywhere: bool
) -> Float[Array, "B S E"]:
    """The sentence vectors of a batch.

    Args:
        model: with a sentence head.
        last: its last states, as observed.
        batch: `target_positions` [B, S] are the first tokens of its texts.
        of_first: whether the pooling reads those alone.
        everywhere: whether `last` is of all positions, not only of those.
    """
    at = batch["target_positions"]
    states = gathered(last, at) if of_first and everywhere else last
    return model.vectors(states, batch["segment_ids"], at.shape[1])


def at_masked(x: Float[Array, "B T C"], batch: Batch) -> Float[Array, "B K C"]:
    """Gather the positions that are predicted."""
    return gathered(x, batch["masked_positions"])


def loss_counts(batch: Batch, objective: Objective) -> Metrics:
    """The weight that a mean over tokens, masked or soft positions is divided by, at least 1."""
    tokens = jnp.maximum((batch["segment_ids"] > 0).sum().astype(jnp.float32), 1)
    masked = jnp.maximum(batch["label_weights"].sum(), 1)
    answers = jnp.maximum(batch["answer_weights"].sum(), 1) if "answer_weights" in batch else masked
    return {"tokens": tokens, "masked": masked, "labels": masked, "answers": answers,
            "soft": masked if objective.restrict_ce_to_mask else tokens}


def total_loss(
    student: nnx.Module, teachers: Sequence[nnx.Module], batch: Batch, objective: Objective,
    counts: Metrics, projections: Projections, dropout_keys: RowKeys = None,
    others: tuple[Array, Array] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss that is trained (REFERENCE A.7), and the means it is made of.

    A loss that compares with a teacher is Σ share · loss(student, teacher) over the teachers. Of KL
    the gradient is that of the KL from Σ share · p, the mean of the teachers' softmaxes p.

    Logits exist for a few positions at a time only; where no loss needs them everywhere, the
    masked positions are gathered first.

    Args:
        student: trained model, teachers: frozen ones, as many as the objective has pairs, or
            none; where the states of one are kept, its embeddings and head alone.
        batch: labelled, from a row of LABELS; with `teacher_states` where those are kept.
        objective: weights of the losses; a teacher's losses need a teacher.
        counts: from loss_counts, of the whole batch if this is a part of it.
        projections: of the student's states, where the widths differ; {} where they do not.
        dropout_keys: [B] of the student's dropout; None for none.
        others: from whole_answers, for a loss of similarities.

    Returns:
        The total, to be differentiated, and the mean of each loss by name, which is not.
    """
    real = (batch["segment_ids"] > 0).astype(jnp.float32)
    read = None if objective.reads is None else batch[objective.reads]
    own = objective.pairs[0].last_layers[:1] if objective.relational else ()
    seen = observe(student, batch, objective.student_layers, dropout_keys, read, own)
    targets = _targets_of(teachers, batch, objective, read, seen.last.dtype)
    total, means = jnp.zeros(()), {}
    for name, weight in objective.weights.items():
        row = LOSSES[name]
        if row.needs in ("last", "hidden", "qkv"):
            value = mixed((pair.share for pair in objective.pairs), [
                _state_sum(name, number, seen, target, batch, objective, projections)
                for number, target in enumerate(targets, 1)])
        elif row.needs in ("targets", "answers"):
            value = _task_sum(name, student, seen, batch, objective, dropout_keys)
        elif row.needs in ("vectors", "similarities"):
            value = _vector_sum(name, student, seen, batch, objective, others)
        else:
            continue
        means[name] = value / counts[row.over]
        total = total + weight * means[name]
    terms = _terms(objective, counts)
    if terms:
        everywhere = objective.logits_everywhere

        def head(model: nnx.Module, hidden: Float[Array, "B S D"]) -> Head:
            whole = everywhere or objective.reads is not None
            return Head(*model.mlm_projection(hidden if whole else at_masked(hidden, batch)))

        compares = any(LOSSES[name].needs == "logits" for name in terms)
        fused, projected = fused_losses(
            head(student, seen.last),
            [(pair.share, head(teacher, target.last)) for pair, teacher, target in zip(
                objective.pairs, teachers, targets, strict=True)] if compares else [],
            _targets(batch, real, everywhere), terms, objective.temperature)
        total, means = total + fused, means | projected
    return total, means


def _targets_of(
    teachers: Sequence[nnx.Module], batch: Batch, objective: Objective, read: Array | None,
    dtype: np.dtype,
) -> list[Seen]:
    """What each teacher shows of a batch, or showed of it where its states are kept."""
    if "teacher_states" in batch:
        return [Seen(batch["teacher_states"].astype(dtype), {}, {})]
    if not teachers:
        return []
    if not teachers[0].layers:
        raise ValueError("the teacher has no layers, and the batch no teacher_states")
    return [jax.lax.stop_gradient(observe(
        teacher, batch, objective.teacher_layers(pair), at=read,
        want_qkv=pair.last_layers[1:] if objective.relational else ()))
        for pair, teacher in zip(objective.pairs, teachers, strict=True)]


def _state_sum(
    name: str, number: int, seen: Seen, target: Seen, batch: Batch, objective: Objective,
    projections: Projections,
) -> Float[Array, ""]:
    """A loss on states of the student and of one teacher, counted from 1."""
    row, pair = LOSSES[name], objective.pairs[number - 1]
    real = (batch["segment_ids"] > 0).astype(jnp.float32)
    if row.needs == "last":
        return row.sum(seen.last, target.last, real)
    if row.needs == "hidden":
        return _mapped_sum(
            name, seen, target, real, pair, projections.get(_projected(name, number)))
    settings = {setting: getattr(pair, setting) for setting in row.settings}
    return row.sum(*seen.qkv.values(), *target.qkv.values(), real, batch["segment_ids"],
                   **settings)


def _task_sum(
    name: str, student: nnx.Module, seen: Seen, batch: Batch, objective: Objective,
    dropout_keys: RowKeys,
) -> Float[Array, ""]:
    """A loss on the logits of the task's head, at the positions that are to be answered."""
    row = LOSSES[name]
    states = seen.last if objective.reads else gathered(seen.last, batch["target_positions"])
    logits = student.task_logits(states, dropout_keys)
    settings = {setting: getattr(objective, setting) for setting in row.settings}
    given = ((batch["labels"], batch["label_weights"]) if row.needs == "targets" else
             (batch["answers"], batch["answer_weights"]))
    return row.sum(logits, *given, **settings)


def _vector_sum(
    name: str, student: nnx.Module, seen: Seen, batch: Batch, objective: Objective,
    others: tuple[Array, Array] | None,
) -> Float[Array, ""]:
    """A loss on the vectors of sentences."""
    row = LOSSES[name]
    own = vectors(student, seen.last, batch, objective.of_first, objective.reads is None)
    settings = {setting: getattr(objective, setting) for setting in row.settings}
    more = others if row.needs == "similarities" else ()
    return row.sum(own, batch["answers"], batch["answer_weights"], *more, **settings)


def whole_answers(batch: Batch, objective: Objective) -> tuple[Array, Array] | None:
    """The teacher's vectors of the whole batch [N, D], and 1 where there is one [N]; None where no
    loss compares with them."""
    if not any(LOSSES[name].needs == "similarities" for name in objective.weights):
        return None
    return (batch["answers"].reshape(-1, batch["answers"].shape[-1]),
            batch["answer_weights"].reshape(-1))


def _mapped_sum(
    name: str, seen: Seen, target: Seen, real: Float[Array, "B T"], pair: Pair,
    projections: Kernels | None,
) -> Float[Array, ""]:
    """The mean of a loss over the pairs of mapped layers."""
    def projected(own: int) -> Float[Array, "B T E"]:
        states = seen.hidden[own]
        if projections is None:
            return states
        return states @ projections[str(own)]["kernel"].astype(states.dtype)

    layers = pair.layer_map
    return sum(LOSSES[name].sum(projected(own), target.hidden[theirs], real)
               for own, theirs in layers) / len(layers)


def _terms(objective: Objective, counts: Metrics) -> dict[str, Term]:
    """The vocabulary losses, as the fused head takes them."""
    terms = {}
    for name, weight in objective.weights.items():
        row = LOSSES[name]
        if row.needs in ("labels", "logits"):
            settings = {setting: getattr(objective, setting) for setting in row.settings}
            terms[name] = Term(weight, counts[row.over], functools.partial(row.sum, **settings))
    return terms


def _targets(batch: Batch, real: Float[Array, "B T"], everywhere: bool) -> Targets:
    """Labels and weights at the masked positions [B, K], or at all [B, T]."""
    labels, weights = batch["labels"], batch["label_weights"]
    if not everywhere:
        return Targets(labels, weights, weights)
    spread = jax.vmap(lambda at, x: jnp.zeros(real.shape[1], x.dtype).at[at].set(x))
    positions = batch["masked_positions"]
    return Targets(spread(positions, labels), spread(positions, weights), real)
