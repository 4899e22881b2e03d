"""TrainState, the pure train_step and eval_step; no I/O.

A batch of packed rows and the frozen teacher come in; the next state and the metrics go out.
Without a teacher the same step is masked-language-model training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from distilbert_jax import losses
from distilbert_jax.config import EVALUATION_MASKING, Masking
from distilbert_jax.masking import Vocabulary, mask_tokens

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update reads and writes; what a checkpoint holds."""

    step: Any  # [] int32, completed updates; like the others also its shape or its sharding
    params: dict[str, Any]
    opt_state: Any
    key: Any  # [] the run's; each step folds its number in


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the losses; those of a teacher are 0 without one."""

    alpha_ce: float = 0.0
    alpha_mlm: float = 1.0
    alpha_cos: float = 0.0
    alpha_mse: float = 0.0
    temperature: float = 2.0
    restrict_ce_to_mask: bool = False

    @property
    def logits_everywhere(self) -> bool:
        """Whether logits are needed at all positions and not only at the masked ones."""
        return bool(self.alpha_ce or self.alpha_mse) and not self.restrict_ce_to_mask


def init_state(params: dict[str, Any], tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key(seed))


def encode(model: nnx.Module, batch: Batch, rngs: nnx.Rngs | None = None) -> Float[Array, "B T D"]:
    """Last hidden states of a batch."""
    return model(
        batch["input_ids"], batch["segment_ids"], batch["position_ids"], rngs=rngs)


def at_masked(x: Float[Array, "B T C"], batch: Batch) -> Float[Array, "B K C"]:
    """Gather the masked positions."""
    return jnp.take_along_axis(x, batch["masked_positions"][..., None], axis=1)


def loss_sums(
    student: nnx.Module, teacher: nnx.Module | None, batch: Batch, objective: Objective,
    rngs: nnx.Rngs | None = None,
) -> dict[str, Float[Array, ""]]:
    """The unweighted sums of the losses that `objective` asks for (REFERENCE A.7).

    KL and squared error run over all real tokens, or only the masked ones; MLM over the masked
    ones; cosine over all real tokens.

    Args:
        student: trained model, teacher: frozen one or None.
        batch: masked, from mask_tokens.
        objective: which losses.
        rngs: the student's dropout; None for none.

    Returns:
        Among ce, mse (per position), mlm (per masked position), cos (per token): scalar sums.
    """
    real = (batch["segment_ids"] > 0).astype(jnp.float32)
    masked = batch["label_weights"]
    hidden = encode(student, batch, rngs)
    everywhere = objective.logits_everywhere
    logits = student.mlm_logits(hidden if everywhere else at_masked(hidden, batch))
    sums = {}
    if objective.alpha_mlm:
        at = at_masked(logits, batch) if everywhere else logits
        sums["mlm"] = losses.mlm_sum(at, batch["labels"], masked)
    if teacher is None:
        return sums
    target = jax.lax.stop_gradient(encode(teacher, batch))
    if objective.alpha_ce or objective.alpha_mse:
        weights = real if everywhere else masked
        soft = teacher.mlm_logits(target if everywhere else at_masked(target, batch))
        if objective.alpha_ce:
            sums["ce"] = losses.kl_sum(logits, soft, weights, objective.temperature)
        if objective.alpha_mse:
            sums["mse"] = losses.mse_sum(logits, soft, weights)
    if objective.alpha_cos:
        sums["cos"] = losses.cosine_sum(hidden, target, real)
    return sums


def make_train_step(
    student_graph: nnx.GraphDef, teacher_graph: nnx.GraphDef | None,
    tx: optax.GradientTransformation, objective: Objective, masking: Masking, accumulate: int = 1,
) -> Callable[[TrainState, dict[str, Any], Vocabulary, Batch], tuple[TrainState, Metrics]]:
    """Build the pure update function.

    The whole batch is masked first, and every loss is divided by its weight over the whole batch,
    so that micro-batches and devices change nothing but rounding.

    Args:
        student_graph, teacher_graph: structures; None for no teacher.
        tx: the optimizer.
        objective: weights of the losses.
        masking: rates of masking.
        accumulate: micro-batches per update; divides the rows of the batch.

    Returns:
        train_step(state, teacher_params, vocabulary, batch) → (state, metrics); metrics are the
        means of the losses, the total `loss`, `grad_norm`, the `tokens` of the batch, and
        `skipped`: 1 where loss or gradient was not finite, so that only the step went on.
    """

    def train_step(state, teacher_params, vocabulary, batch):
        key = jax.random.fold_in(state.key, state.step)
        mask_key, dropout_key = jax.random.split(key)
        batch = mask_tokens(mask_key, batch, vocabulary, masking)
        tokens = (batch["segment_ids"] > 0).sum().astype(jnp.float32)
        masked = jnp.maximum(batch["label_weights"].sum(), 1)
        soft = masked if objective.restrict_ce_to_mask else jnp.maximum(tokens, 1)
        weight = {"ce": soft, "mse": soft, "mlm": masked, "cos": jnp.maximum(tokens, 1)}
        teacher = nnx.merge(teacher_graph, teacher_params) if teacher_graph is not None else None

        def loss(params, micro, number):
            rngs = nnx.Rngs(dropout=jax.random.fold_in(dropout_key, number))
            sums = loss_sums(nnx.merge(student_graph, params), teacher, micro, objective, rngs)
            means = {name: value / weight[name] for name, value in sums.items()}
            return sum(getattr(objective, f"alpha_{n}") * v for n, v in means.items()), means

        grad = jax.value_and_grad(loss, has_aux=True)
        (total, means), grads = _accumulated(grad, state.params, batch, accumulate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state),
            (state.params, state.opt_state))
        metrics = means | {"loss": total, "grad_norm": norm, "tokens": tokens,
                           "skipped": 1.0 - finite}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return train_step


def _accumulated(grad: Callable, params: dict[str, Any], batch: Batch, accumulate: int) -> Any:
    """Sum `grad` over micro-batches; each takes every accumulate-th row, so rows stay in place."""
    if accumulate == 1:
        return grad(params, batch, 0)
    micros = jax.tree.map(
        lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micros), 0)

    def add(total, numbered):
        number, micro = numbered
        return jax.tree.map(jnp.add, total, grad(params, micro, number)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(accumulate), micros))[0]


def make_eval_step(
    student_graph: nnx.GraphDef, teacher_graph: nnx.GraphDef | None
) -> Callable[[dict[str, Any], dict[str, Any], Vocabulary, Batch, Array], Metrics]:
    """Build the pure evaluation function.

    Every chosen token is hidden behind [MASK], chosen uniformly; the key decides which, so that
    teacher and student see the same.

    Returns:
        eval_step(params, teacher_params, vocabulary, batch, key) → sums over the batch: `masked`
        and `tokens` (weights), `nll` [nats], `correct`; with a teacher also `teacher_nll`,
        `teacher_correct`, `kl` (at temperature 1, over masked positions) and `cosine` (similarity
        over all real tokens).
    """

    def eval_step(params, teacher_params, vocabulary, batch, key):
        batch = mask_tokens(key, batch, vocabulary, EVALUATION_MASKING)
        real, masked = (batch["segment_ids"] > 0).astype(jnp.float32), batch["label_weights"]

        def predict(graph, params):
            model = nnx.merge(graph, params)
            hidden = encode(model, batch)
            logits = model.mlm_logits(at_masked(hidden, batch))
            hits = (logits.argmax(-1) == batch["labels"]) * masked
            return hidden, logits, losses.mlm_sum(logits, batch["labels"], masked), hits.sum()

        hidden, logits, nll, correct = predict(student_graph, params)
        sums = {"masked": masked.sum(), "tokens": real.sum(), "nll": nll, "correct": correct}
        if teacher_graph is None:
            return sums
        target, soft, teacher_nll, teacher_correct = predict(teacher_graph, teacher_params)
        return sums | {
            "teacher_nll": teacher_nll, "teacher_correct": teacher_correct,
            "kl": losses.kl_sum(logits, soft, masked, 1.0),
            "cosine": real.sum() - losses.cosine_sum(hidden, target, real)}

    return eval_step
