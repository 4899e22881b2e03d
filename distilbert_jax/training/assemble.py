"""Settings, shapes and a mesh → the update and its evaluation, put together in this one place.

The run, the forecast for absent chips and the benchmark all take their step from here, so that what
is compiled, timed and trained is one program.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from distilbert_jax.config import DistilConfig, LoopConfig, compute_dtype
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.machine.sharding import by_rows, replicated, shardings
from distilbert_jax.models.encoder import EncoderConfig, graphdef
from distilbert_jax.models.family import Family
from distilbert_jax.task_config import EvaluateConfig, FinetuneConfig
from distilbert_jax.training.labels import LABELS, Vocabulary
from distilbert_jax.training.objective import Objective, Projections
from distilbert_jax.training.optimizer import make_optimizer
from distilbert_jax.training.train_step import (
    TrainState,
    init_state,
    make_eval_step,
    make_gradients,
    make_states_step,
    make_train_step,
)

TEACHER = "teacher"  # the name of the first, against which students are judged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembly:
    """The pure steps of one job, and how its arrays are laid out."""

    config: LoopConfig
    mesh: Mesh
    dtype: Any  # of the matrix products
    param_dtype: Any
    graph: nnx.GraphDef  # of the trained model
    teacher_graphs: dict[str, nnx.GraphDef]  # "teacher", "teacher 2", … → its structure
    projections: Projections
    tx: optax.GradientTransformationExtraArgs
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., dict[str, jax.Array]]  # jitted; of the first teacher
    gradients: Callable[..., Any]  # of the train step
    states_step: Callable[..., jax.Array] | None = None  # where the teacher's states are kept

    def init(self, params: dict[str, Any]) -> TrainState:
        """The state before the first update, from the parameters of the trained model."""
        trained = {"student": params, "projections": self.projections}
        return init_state(trained, self.tx, self.config.seed)

    def teachers(self, *params: dict[str, Any]) -> dict[str, Any]:
        """Teachers as the step takes them: matrices in the compute dtype, vectors as they are."""
        return {name: jax.tree.map(lambda x: x.astype(self.dtype) if x.ndim > 1 else x, each)
                for name, each in zip(self.teacher_graphs, params, strict=True)}

    def taught(self, teachers: dict[str, Any]) -> dict[str, Any]:
        """What the train step takes of `teachers`: where states are kept, embeddings and head."""
        if not self.states_step:
            return teachers
        return {TEACHER: {name: teachers[TEACHER][name] for name in ("embeddings", "mlm_head")}}

    def states_like(
        self, teachers: dict[str, Any], vocabulary: Vocabulary, batch: dict[str, Any]
    ) -> jax.ShapeDtypeStruct:
        """The states of a batch as they are kept; nothing is computed."""
        found = jax.eval_shape(self.states_step, teachers, vocabulary, jax.random.key(0), batch)
        kept = jnp.bfloat16 if self.config.state_dtype == "bfloat16" else found.dtype
        return jax.ShapeDtypeStruct(found.shape, kept)

    def jitted(self, state: TrainState, teachers: dict[str, Any]) -> jax.stages.Wrapped:
        """The train step for arguments of these shapes: shardings pinned, the old state donated."""
        layout, whole = shardings(state, self.mesh), replicated(self.mesh)
        return jax.jit(
            self.train_step, donate_argnums=0,
            in_shardings=(layout, shardings(teachers, self.mesh), whole, by_rows(self.mesh)),
            out_shardings=(layout, whole))

    def place(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters on the mesh."""
        return jax.device_put(params, shardings(params, self.mesh))

    def cast(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters in the dtype of training, on the host, so that the step may donate them."""
        return jax.tree.map(lambda x: np.asarray(x, self.param_dtype), params)


def assemble(
    config: LoopConfig, family: Family, student: EncoderConfig,
    teachers: Sequence[EncoderConfig], mesh: Mesh, steps: int,
) -> Assembly:
    """Put the update of a job together.

    Args:
        config: of the job; a DistilConfig says which losses there are, and a FinetuneConfig if
            there is a teacher; others have the masked-language-model loss, or that of the labels.
        family, student: of the trained model; the family says what is predicted.
        teachers: shapes of the frozen ones; () for no teacher. One for a task or for sentences is
            part of the step only if its hidden states are compared: its answers come with the
            batch.
        mesh: of devices that are here, or of absent ones to compile for.
        steps: updates of the whole run, over which the learning rate falls.
    """
    dtype, param_dtype = dtypes(config, mesh)
    objective, projections, frozen = Objective(weights={"mlm": 1.0}), {}, ()
    if isinstance(config, FinetuneConfig) and not teachers:
        objective = Objective(weights={"hard": 1.0})
    elif isinstance(config, DistilConfig | FinetuneConfig | EmbedConfig):
        objective = Objective.of(config, student, teachers)
        frozen = getattr(config, "frozen", ())
        projections = objective.init_projections(student, teachers, config.seed, param_dtype)
    graph = graphdef(student, dtype, param_dtype, config.remat)
    answers = isinstance(config, FinetuneConfig | EmbedConfig)
    live = teachers if objective.mapped or not answers else ()
    teacher_graphs = {
        TEACHER if number == 1 else f"{TEACHER} {number}": graphdef(each, dtype, param_dtype)
        for number, each in enumerate(live, 1)}
    kept, taught = getattr(config, "kept_maskings", 0), teacher_graphs
    if kept:
        head = dataclasses.replace(teachers[0], num_hidden_layers=0, pooler=False)
        taught = {TEACHER: graphdef(head, dtype, param_dtype)}
    tx = make_optimizer(config, steps, frozen)
    predicts = "given" if student.task or student.sentence else family.predicts
    labels = functools.partial(LABELS[predicts], masking=getattr(config, "masking", None))
    return Assembly(
        config=config, mesh=mesh, dtype=dtype, param_dtype=param_dtype, graph=graph,
        teacher_graphs=teacher_graphs, projections=projections, tx=tx,
        train_step=make_train_step(
            graph, taught, tx, objective, labels, config.accumulate, mesh, frozen),
        gradients=make_gradients(
            graph, taught, objective, labels, config.accumulate, mesh, frozen),
        states_step=make_states_step(
            teacher_graphs[TEACHER], objective, labels, mesh) if kept else None,
        eval_step=jitted_eval_step(graph, teacher_graphs.get(TEACHER), mesh))


def dtypes(config: LoopConfig | EvaluateConfig, mesh: Mesh) -> tuple[Any, Any]:
    """Dtypes of matrix products and of parameters, on the platform of the mesh."""
    dtype = jnp.dtype(compute_dtype(config.dtype, mesh.devices.flat[0].platform))
    return dtype, jnp.promote_types(dtype, jnp.float32)


@functools.cache  # so that the loop and the report compile it once
def jitted_eval_step(
    graph: nnx.GraphDef, teacher_graph: nnx.GraphDef | None, mesh: Mesh
) -> Callable[..., dict[str, jax.Array]]:
    """The evaluation, jitted, whole on every device: see make_eval_step."""
    return jax.jit(make_eval_step(graph, teacher_graph, mesh), out_shardings=replicated(mesh))
