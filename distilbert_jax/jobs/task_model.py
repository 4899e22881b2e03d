"""A model for a task, as every training and judgement has it: how it begins, and its answers."""

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from distilbert_jax.data.tokenize import load_tokenizer, spec, within_texts
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import answers
from distilbert_jax.jobs.task_data import TaskInput
from distilbert_jax.machine.sharding import shardings
from distilbert_jax.machine.store import AnyPath
from distilbert_jax.models import hub
from distilbert_jax.models.encoder import EncoderConfig, graphdef
from distilbert_jax.models.start import init_params
from distilbert_jax.task_config import EvaluateConfig, FinetuneConfig
from distilbert_jax.training.assemble import dtypes

if TYPE_CHECKING:
    import transformers

EPOCHS = 3  # where neither the user nor the task says


@dataclasses.dataclass(frozen=True)
class Job:
    """What all trainings of one command share."""

    config: FinetuneConfig
    task: TaskInput
    tokenizer: "transformers.PreTrainedTokenizerFast"
    mesh: Mesh

    def steps(self, examples: int) -> int:
        """Updates of a training on so many examples."""
        epochs = self.config.epochs or (
            self.task.task.epochs if self.config.task else EPOCHS)
        return self.config.steps or max(1, math.ceil(epochs * examples / self.config.batch_size))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model of the comparison: its folder, and its answers."""

    folder: Path
    model: hub.Pretrained
    found: dict[str, np.ndarray]  # part → logits [P, C]
    seconds: float
    standing: str = ""  # a sentence, if --finish took it before its last update


def check_tokenizers(
    config: FinetuneConfig | EvaluateConfig, tokenizer: "transformers.PreTrainedTokenizerFast",
    teacher: hub.Pretrained,
) -> None:
    """Raise a UserError unless the teacher has the model's tokenizer."""
    theirs = load_tokenizer(config.teacher, teacher.config.vocab_size)
    if teacher.config.task == "tag":  # it may have been left by finetune, which does this
        within_texts(tokenizer)
        within_texts(theirs)
    if spec(theirs).fingerprint != spec(tokenizer).fingerprint:
        raise UserError(f"--model {config.model} and --teacher {config.teacher} have different "
                        "tokenizers: a student reads the texts as its teacher does")


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file; {} if it is missing, damaged or holds something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def answered(
    config: FinetuneConfig | EvaluateConfig, task: TaskInput, mesh: Mesh, model: hub.Pretrained,
    part: str,
) -> np.ndarray:
    """Logits [P, C] of a model for a part of the data, in the order of our labels."""
    graph, params = on_devices(config, mesh, model)
    found = answers.logits(graph, params, task.parts[part].examples, mesh, part)
    return found[:, order(model.labels, task.labels)]


def on_devices(config: FinetuneConfig | EvaluateConfig, mesh: Mesh, model: hub.Pretrained
               ) -> tuple[Any, dict[str, Any]]:
    """A model's structure, and its parameters on the mesh."""
    dtype, param_dtype = dtypes(config, mesh)
    params = jax.tree.map(lambda x: np.asarray(x, param_dtype), model.params)
    return (graphdef(model.config, dtype, param_dtype),
            jax.device_put(params, shardings(params, mesh)))


def order(theirs: tuple[str, ...], ours: tuple[str, ...]) -> list[int]:
    """Which of a model's logits stands for each of our labels, matched by name.

    Names that say nothing (LABEL_0, …) stand for their number.
    """
    if not ours:
        return [0]
    names = [name.lower() for name in theirs]
    if not _named_alike(theirs, ours):
        return list(range(len(ours)))
    return [names.index(name.lower()) for name in ours]


def _named_alike(theirs: tuple[str, ...], ours: tuple[str, ...]) -> bool:
    """Whether each of our labels is one of theirs, in any case."""
    return {name.lower() for name in ours} <= {name.lower() for name in theirs}


def judged(job: Job, model: hub.Pretrained, folder: Path | None = None, seconds: float = 0.0,
           standing: str = "") -> Trained:
    """A model that is trained, with its answers to what it is judged on."""
    parts = [name for name in ("dev", "test") if name in job.task.parts]
    return Trained(folder or model.folder, model,
                   {name: answered(job.config, job.task, job.mesh, model, name) for name in parts},
                   seconds, standing)


def start_of(job: Job, source: hub.Pretrained, layers: list[int], seed: int
             ) -> tuple[EncoderConfig, dict[str, Any]]:
    """Shape and parameters before the first update; a head that is not there begins at random."""
    config, task = job.config, job.task
    shape = dataclasses.replace(
        source.config, num_hidden_layers=len(layers), task=task.kind, num_labels=task.outputs,
        pooler=False, mlm_head=False, hidden_dropout=config.dropout,
        attention_dropout=config.dropout, head_dropout=config.dropout)
    head = jax.device_get(init_params(shape, seed))["task_head"]
    plain = source.labels == tuple(f"LABEL_{i}" for i in range(len(task.labels)))
    if source.config.task == task.kind and len(source.labels) == len(task.labels) and (
            plain or _named_alike(source.labels, task.labels)):
        columns = order(source.labels, task.labels)
        head = source.params["task_head"] | {"output": jax.tree.map(
            lambda x: x[..., columns], source.params["task_head"]["output"])}
    elif "dense" in head and "pooler" in source.params:
        head = head | {"dense": source.params["pooler"]}
    return shape, {
        "embeddings": source.params["embeddings"], "task_head": head,
        "layers": cut(source.params["layers"], layers)}


def cut(layers: dict[int, Any], kept: list[int]) -> dict[int, Any]:
    """Some of a model's layers, numbered anew."""
    return {i: layers[n] for i, n in enumerate(kept)}
