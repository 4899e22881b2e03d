"""TrainState, the pure train_step and eval_step; no I/O.

A batch of packed rows and the frozen teacher come in; the next state and the metrics go out.
Without a teacher the same step is masked-language-model training.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from distilbert_jax.config import EVALUATION_MASKING, DistilConfig, Masking
from distilbert_jax.kernels.head import Head, Targets, fused_losses
from distilbert_jax.machine.sharding import on_mesh, sum_over_rows
from distilbert_jax.models.encoder import RowKeys
from distilbert_jax.training import losses
from distilbert_jax.training.labels import Vocabulary, mask_tokens

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

    @classmethod
    def of(cls, config: DistilConfig) -> "Objective":
        """As the settings say."""
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(cls)})

    @property
    def logits_everywhere(self) -> bool:
        """Whether logits are needed at all positions and not only at the masked ones."""
        return bool(self.alpha_ce or self.alpha_mse) and not self.restrict_ce_to_mask


def init_state(params: dict[str, Any], tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key(seed))


def encode(
    model: nnx.Module, batch: Batch, dropout_keys: RowKeys = None
) -> Float[Array, "B T D"]:
    """Last hidden states of a batch."""
    return model(batch["input_ids"], batch["segment_ids"], batch["position_ids"],
                 dropout_keys=dropout_keys)


def at_masked(x: Float[Array, "B T C"], batch: Batch) -> Float[Array, "B K C"]:
    """Gather the masked positions."""
    return jnp.take_along_axis(x, batch["masked_positions"][..., None], axis=1)


def loss_weights(batch: Batch, objective: Objective) -> Metrics:
    """Loss → the number of positions that it is the mean over, at least 1."""
    tokens = jnp.maximum((batch["segment_ids"] > 0).sum().astype(jnp.float32), 1)
    masked = jnp.maximum(batch["label_weights"].sum(), 1)
    soft = masked if objective.restrict_ce_to_mask else tokens
    return {"ce": soft, "mse": soft, "mlm": masked, "cos": tokens}


def total_loss(
    student: nnx.Module, teacher: nnx.Module | None, batch: Batch, objective: Objective,
    weight: Metrics, dropout_keys: RowKeys = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss that is trained (REFERENCE A.7), and the means it is made of.

    KL and squared error run over all real tokens, or only the masked ones; MLM over the masked
    ones; cosine over all real tokens. Logits exist for a few positions at a time only; where no
    loss needs them everywhere, the masked positions are gathered first.

    Args:
        student: trained model, teacher: frozen one or None.
        batch: masked, from mask_tokens.
        objective: weights of the losses; one of weight 0 is not computed.
        weight: from loss_weights, of the whole batch if this is a part of it.
        dropout_keys: [B] of the student's dropout; None for none.

    Returns:
        The total, to be differentiated, and the means, which are not, among ce, mse (per
        position), mlm (per masked position), cos (per token).
    """
    factors = {name: getattr(objective, f"alpha_{name}") for name in weight}
    terms = {name: (factor, weight[name]) for name, factor in factors.items()
             if factor and (teacher or name == "mlm")}
    real = (batch["segment_ids"] > 0).astype(jnp.float32)
    hidden = encode(student, batch, dropout_keys)
    target = jax.lax.stop_gradient(encode(teacher, batch)) if teacher else None
    total, means = jnp.zeros(()), {}
    if "cos" in terms:
        factor, tokens = terms.pop("cos")
        means["cos"] = losses.cosine_sum(hidden, target, real) / tokens
        total = factor * means["cos"]
    if terms:
        everywhere = objective.logits_everywhere

        def head(model, hidden):
            return Head(*model.mlm_projection(hidden if everywhere else at_masked(hidden, batch)))

        soft = head(teacher, target) if terms.keys() & {"ce", "mse"} else None
        fused, projected = fused_losses(
            head(student, hidden), soft, _targets(batch, real, everywhere), terms,
            objective.temperature)
        total, means = total + fused, means | projected
    return total, means


def _targets(batch: Batch, real: Float[Array, "B T"], everywhere: bool) -> Targets:
    """Labels and weights at the masked positions [B, K], or at all [B, T]."""
    labels, weights = batch["labels"], batch["label_weights"]
    if not everywhere:
        return Targets(labels, weights, weights)
    spread = jax.vmap(lambda at, x: jnp.zeros(real.shape[1], x.dtype).at[at].set(x))
    positions = batch["masked_positions"]
    return Targets(spread(positions, labels), spread(positions, weights), real)


def make_train_step(
    student_graph: nnx.GraphDef, teacher_graph: nnx.GraphDef | None,
    tx: optax.GradientTransformation, objective: Objective, masking: Masking, accumulate: int = 1,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, dict[str, Any], Vocabulary, Batch], tuple[TrainState, Metrics]]:
    """Build the pure update function.

    The whole batch is masked first, every row drops out by a key of its own, and every loss is
    divided by its weight over the whole batch, so that micro-batches and devices change nothing
    but rounding. Gradients are added up over the devices of a row's axis once, at the end.

    Args:
        student_graph, teacher_graph: structures; None for no teacher.
        tx: the optimizer.
        objective: weights of the losses.
        masking: rates of masking.
        accumulate: micro-batches per update; divides the rows of the batch.
        mesh: where the arguments of the step lie, if not on one device.

    Returns:
        train_step(state, teacher_params, vocabulary, batch) → (state, metrics); metrics are the
        means of the losses, the total `loss`, `grad_norm`, the `tokens` of the batch, and
        `skipped`: 1 where loss or gradient was not finite, so that only the step went on.
    """

    def gradients(whole, rows):
        params, teacher_params, weight = whole
        teacher = nnx.merge(teacher_graph, teacher_params) if teacher_graph is not None else None

        def loss(params, batch, dropout_keys):
            student = nnx.merge(student_graph, params)
            return total_loss(student, teacher, batch, objective, weight, dropout_keys)

        grad = jax.value_and_grad(loss, has_aux=True)
        return _accumulated(functools.partial(grad, params), rows, accumulate)

    gradients = sum_over_rows(gradients, mesh)

    def train_step(state, teacher_params, vocabulary, batch):
        key = jax.random.fold_in(state.key, state.step)
        mask_key, dropout_key = jax.random.split(key)
        batch = mask_tokens(mask_key, batch, vocabulary, masking)
        weight = loss_weights(batch, objective)
        rows = jnp.arange(len(batch["input_ids"]))
        dropout_keys = jax.vmap(jax.random.fold_in, (None, 0))(dropout_key, rows)
        (total, means), grads = gradients(
            (state.params, teacher_params, weight), (batch, dropout_keys))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state),
            (state.params, state.opt_state))
        metrics = means | {
            "loss": total, "grad_norm": norm, "skipped": 1.0 - finite,
            "tokens": (batch["segment_ids"] > 0).sum().astype(jnp.float32)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return on_mesh(train_step, mesh)


def _accumulated(function: Callable, rows: Any, accumulate: int) -> Any:
    """Sum `function` over micro-batches; each takes every accumulate-th row."""
    if accumulate == 1:
        return function(*rows)
    micros = jax.tree.map(
        lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), rows)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], micros))

    def add(total, micro):
        return jax.tree.map(jnp.add, total, function(*micro)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, micros)[0]


def make_eval_step(
    student_graph: nnx.GraphDef, teacher_graph: nnx.GraphDef | None, mesh: Mesh | None = None
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

    return on_mesh(eval_step, mesh)
