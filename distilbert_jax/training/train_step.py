"""TrainState, the pure train_step and eval_step; no I/O.

A batch of packed rows and the frozen teachers come in; the next state and the metrics go out.
Without a teacher the step is masked-language-model training.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key

from distilbert_jax.config import EVALUATION_MASKING
from distilbert_jax.machine.sharding import on_mesh, sum_over_rows
from distilbert_jax.machine.trees import path_name
from distilbert_jax.training import losses
from distilbert_jax.training.labels import Vocabulary, mask_tokens, row_keys
from distilbert_jax.training.objective import (
    Batch,
    Metrics,
    Objective,
    at_masked,
    loss_counts,
    observe,
    total_loss,
    whole_answers,
)

Graphs = Mapping[str, nnx.GraphDef]
Labels = Callable[[Key[Array, " B"], Batch, Vocabulary], Batch]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update reads and writes; what a checkpoint holds."""

    step: Any  # [] int32, completed updates; like the others also its shape or its sharding
    params: dict[str, Any]  # all that is trained: {"student": …, "projections": …}
    opt_state: Any
    key: Any  # [] the run's, from which each row gets its own


def init_state(params: dict[str, Any], tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key(seed))


def label_keys(key: Key[Array, ""], batch: Batch) -> Key[Array, " B"]:
    """The keys by which the rows of a batch are labelled: of the run, the row and its epoch.

    Where the teacher's states are kept, a few maskings are used in turn: `masking` [B] says which,
    and stands for the epoch.
    """
    epoch = batch.get("masking", batch["epoch"])
    return jax.vmap(jax.random.split)(row_keys(key, batch | {"epoch": epoch}))[:, 0]


def make_gradients(
    student_graph: nnx.GraphDef, teacher_graphs: Graphs, objective: Objective,
    labels: Labels, accumulate: int = 1, mesh: Mesh | None = None, frozen: tuple[str, ...] = (),
) -> Callable[..., tuple[tuple[Array, Metrics], dict[str, Any]]]:
    """Build the pure function of the loss of an update, and of its gradients.

    Labels and dropout of a row are drawn from a key of its own, and every loss is divided by its
    weight over the whole batch, so that micro-batches, devices and the rows beside it change
    nothing but rounding. Gradients are added up over the devices of the data axis once, at the end.

    Args:
        student_graph: structure; teacher_graphs: of each teacher, in the order of the objective's
            pairs, by name; {} for no teacher.
        objective: weights of the losses.
        labels: (keys of the rows, batch, vocabulary) → labelled batch: a row of LABELS.
        accumulate: micro-batches per update; divides the rows of the batch.
        mesh: that the arguments are laid out on, if not on one device.
        frozen: beginnings of paths in the parameters, e.g. "student/embeddings/position", that
            get no gradient.

    Returns:
        gradients(params, key, teachers, vocabulary, batch) → ((total, means of the losses by name),
        gradients); `params` are all that is trained, `key` is the run's.
    """

    def of_rows(whole, rows):
        params, teachers, counts, others = whole
        models = [nnx.merge(graph, teachers[name]) for name, graph in teacher_graphs.items()]

        def loss(params, batch, dropout_keys):
            params = _stopped(params, frozen)
            student = nnx.merge(student_graph, params["student"])
            return total_loss(student, models, batch, objective, counts, params["projections"],
                              dropout_keys, others)

        grad = jax.value_and_grad(loss, has_aux=True)
        return _accumulated(functools.partial(grad, params), rows, accumulate)

    of_rows = sum_over_rows(of_rows, mesh)

    def gradients(params, key, teachers, vocabulary, batch):
        dropout_keys = jax.vmap(jax.random.split)(row_keys(key, batch))[:, 1]
        batch = labels(label_keys(key, batch), batch, vocabulary)
        counts = loss_counts(batch, objective)
        return of_rows(
            (params, teachers, counts, whole_answers(batch, objective)), (batch, dropout_keys))

    return on_mesh(gradients, mesh)


def make_train_step(
    student_graph: nnx.GraphDef, teacher_graphs: Graphs,
    tx: optax.GradientTransformationExtraArgs, objective: Objective, labels: Labels,
    accumulate: int = 1, mesh: Mesh | None = None, frozen: tuple[str, ...] = (),
) -> Callable[[TrainState, dict[str, Any], Vocabulary, Batch], tuple[TrainState, Metrics]]:
    """Build the pure update function.

    Args:
        tx: from make_optimizer; the others as for make_gradients.

    Returns:
        train_step(state, teachers, vocabulary, batch) → (state, metrics); teachers are the
        parameters of each by name; metrics are the means of the losses by name, the total
        `loss`, `grad_norm`, the `tokens` of the batch, and `skipped`: 1 where loss or gradient was
        not finite, so that only the step went on.
    """
    gradients = make_gradients(
        student_graph, teacher_graphs, objective, labels, accumulate, mesh, frozen)

    def train_step(state, teachers, vocabulary, batch):
        (total, means), grads = gradients(state.params, state.key, teachers, vocabulary, batch)
        params, opt_state, norm, finite = _updated(tx, state, total, grads)
        metrics = means | {
            "loss": total, "grad_norm": norm, "skipped": 1.0 - finite,
            "tokens": (batch["segment_ids"] > 0).sum().astype(jnp.float32)}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return on_mesh(train_step, mesh)


@jax.named_scope("optimizer")
def _updated(
    tx: optax.GradientTransformationExtraArgs, state: TrainState, total: Array,
    grads: dict[str, Any],
) -> tuple[dict[str, Any], Any, Array, Array]:
    """Parameters and moments after an update, the gradient's norm, and whether all is finite.

    Where loss or gradient is not finite, parameters and moments stay as they are.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, finite=finite)
    params = jax.tree.map(lambda new, old: jnp.where(finite, new, old),
                          optax.apply_updates(state.params, updates), state.params)
    return params, opt_state, norm, finite


def make_states_step(
    teacher_graph: nnx.GraphDef, objective: Objective, labels: Labels, mesh: Mesh | None = None
) -> Callable[[dict[str, Any], Vocabulary, Key[Array, ""], Batch], Array]:
    """Build the pure function of what an update takes of a teacher whose states are kept.

    Returns:
        states_step(teachers, vocabulary, key, batch) → last states [B, T, D] of the rows, labelled
        as the update of the run with this key labels them; where losses read masked positions
        alone, theirs [B, K, D].
    """

    def states_step(teachers, vocabulary, key, batch):
        batch = labels(label_keys(key, batch), batch, vocabulary)
        read = None if objective.reads is None else batch[objective.reads]
        return observe(nnx.merge(teacher_graph, teachers["teacher"]), batch, at=read).last

    return on_mesh(states_step, mesh)


def _stopped(params: dict[str, Any], frozen: tuple[str, ...]) -> dict[str, Any]:
    """The parameters, of which those whose path begins with one of `frozen` get no gradient."""
    if not frozen:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.stop_gradient(leaf) if path_name(path).startswith(frozen)
        else leaf, params)


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
    """Build the pure evaluation function, beside a teacher or alone.

    Every chosen token is hidden behind [MASK], chosen uniformly by the key and the number of the
    row, so that teacher and student see the same, on any mesh and in batches of any size.

    Returns:
        eval_step(params, teachers, vocabulary, batch, key) → counts of each row [B] and sums over
        the batch []; `params` are the student's: `masked` and `correct` [B], `tokens`, `nll`
        [nats], `most_frequent` (how often the commonest token of the training rows is right); with
        a teacher also `teacher_correct` [B], `teacher_nll`, `kl` (at temperature 1, over masked
        positions) and, if it is as wide as the student, `cosine` (similarity over all real tokens).
    """

    def eval_step(params, teachers, vocabulary, batch, key):
        batch = mask_tokens(row_keys(key, batch), batch, vocabulary, EVALUATION_MASKING)
        real, masked = (batch["segment_ids"] > 0).astype(jnp.float32), batch["label_weights"]

        def predict(graph, params):
            model = nnx.merge(graph, params)
            hidden = observe(model, batch).last
            logits = model.mlm_logits(at_masked(hidden, batch))
            hits = (logits.argmax(-1) == batch["labels"]) * masked
            return hidden, logits, losses.mlm_sum(logits, batch["labels"], masked), hits.sum(1)

        hidden, logits, nll, correct = predict(student_graph, params)
        frequent = (batch["labels"] == vocabulary.counts.argmax()) * masked
        sums = {"masked": masked.sum(1), "tokens": real.sum(), "nll": nll, "correct": correct,
                "most_frequent": frequent.sum()}
        if teacher_graph is None:
            return sums
        target, soft, teacher_nll, teacher_correct = predict(teacher_graph, teachers["teacher"])
        sums |= {"teacher_nll": teacher_nll, "teacher_correct": teacher_correct,
                 "kl": losses.ce_sum(logits, soft, masked, temperature=1.0)}
        if hidden.shape == target.shape:
            sums["cosine"] = real.sum() - losses.cos_sum(hidden, target, real)
        return sums

    return on_mesh(eval_step, mesh)
