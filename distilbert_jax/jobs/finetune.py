"""Train a model for a task: fine-tune it, or distil a fine-tuned teacher, or both in one command.

Each model of a comparison is trained in a folder of its own, OUTPUT/seed-S/ROLE, which goes on
where it was stopped and is not trained again once it is complete.
"""

import dataclasses
import functools
import json
import math
import operator
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from distilbert_jax.config import EvaluateConfig, FinetuneConfig
from distilbert_jax.data.examples import Grid
from distilbert_jax.data.tokenize import load_tokenizer, spec
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import answers, report
from distilbert_jax.export.huggingface import export
from distilbert_jax.jobs import task_report
from distilbert_jax.jobs.setup import check_folder
from distilbert_jax.jobs.task_data import TaskInput, read_task
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.lock import hold
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.seal import fingerprint
from distilbert_jax.machine.sharding import first_process_first, make_mesh, shardings, to_host
from distilbert_jax.models import hub, student
from distilbert_jax.models.encoder import EncoderConfig, graphdef
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.models.start import init_params
from distilbert_jax.training.assemble import Assembly, assemble, dtypes
from distilbert_jax.training.checkpoint import refuse_other_run
from distilbert_jax.training.objective import Objective
from distilbert_jax.training.train import Run, train

if TYPE_CHECKING:
    import transformers

RATE, EPOCHS = 5e-5, 3  # where neither the user nor the task says
SHOWN = 1000  # examples that are judged while training


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model of the comparison: its folder, and its answers."""

    folder: Path
    model: hub.Pretrained
    found: dict[str, np.ndarray]  # part → logits [P, C]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Job:
    """What all trainings of one command share."""

    config: FinetuneConfig
    task: TaskInput
    tokenizer: "transformers.PreTrainedTokenizerFast"
    mesh: Mesh

    def steps(self, examples: int) -> int:
        """Updates of a training."""
        epochs = self.config.epochs or (
            self.task.task.epochs if self.config.task else EPOCHS)
        return self.config.steps or max(1, math.ceil(epochs * examples / self.config.batch_size))


def finetune(config: FinetuneConfig) -> Path:
    """Train for a task and leave model, figures, answers and report in `config.output`.

    Returns:
        The folder of the exported model, `OUTPUT/model`.

    Raises:
        UserError: anything in the settings or files that the user can mend.
        Interrupted: stopped by a signal, state saved.
    """
    if store.is_remote(config.output):
        raise UserError(f"--output {config.output}: fine-tuning writes to a folder of this machine")
    start = _load_start(config.model or config.teacher)
    teacher = hub.load_task(config.teacher) if config.teacher else None
    tokenizer = load_tokenizer(config.model or config.teacher, start.config.vocab_size)
    if teacher:
        _check_tokenizers(config, tokenizer, teacher)
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    mesh = make_mesh(config.mesh)
    store.check_writable(config.output)
    check_folder(config.output, "model", f"seed-{config.seed}",
                 {"--model": config.model, "--teacher": config.teacher})
    known = teacher.labels if teacher else ()
    task = read_task(config, tokenizer, start.config.positions, known, train=config.train,
                     dev=config.dev, test=config.test, unlabelled=config.unlabelled)
    if len(task.parts["train"]) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size} is more than the "
                        f"{len(task.parts['train'])} examples of --train")
    if teacher and teacher.config.task != task.kind:
        raise UserError(f"--teacher {config.teacher} was trained to {teacher.config.task}, the "
                        f"data are there to {task.kind}")
    layers = _student_layers(config, start, teacher or start)
    rate = config.learning_rate or (task.task.learning_rate if config.task else RATE)
    job = Job(dataclasses.replace(config, learning_rate=rate), task, tokenizer, mesh)
    with hold(config.output):
        return _compare(job, start, teacher, layers)


def _student_layers(config: FinetuneConfig, start: hub.Pretrained, teacher: hub.Pretrained
                    ) -> list[int]:
    """Which layers are kept of the model that the student starts from; checked with what is
    compared to the teacher's, before anything is trained."""
    own, wish = start.config.num_hidden_layers, config.student_layers
    if not wish and not (config.teacher or config.distil):
        return list(range(own))
    layers = student.choose_layers(wish, own)
    if config.teacher or config.distil:
        shape = dataclasses.replace(start.config, num_hidden_layers=len(layers))
        Objective.of(config, shape, teacher.config)
    return layers


def _load_start(name: str) -> hub.Pretrained:
    """The model to start from: with its task's head if it has one."""
    try:
        return hub.load_task(name)
    except UserError as task_error:
        try:
            return hub.load(name)
        except UserError as error:
            raise error from task_error


def _check_tokenizers(config: FinetuneConfig, tokenizer: Any, teacher: hub.Pretrained) -> None:
    theirs = load_tokenizer(config.teacher, teacher.config.vocab_size)
    if spec(theirs).fingerprint != spec(tokenizer).fingerprint:
        raise UserError(f"--model {config.model} and --teacher {config.teacher} have different "
                        "tokenizers: a student reads the texts as its teacher does")


def _compare(job: Job, start: hub.Pretrained, teacher: hub.Pretrained | None, layers: list[int]
             ) -> Path:
    """Train every model of the comparison, for every seed, and report."""
    config, runs = job.config, {}
    first = config.seed
    if config.distil:
        whole = list(range(start.config.num_hidden_layers))
        own = _train(job, start, whole, first, "teacher", None)
        teacher = own.model
        runs["teacher"] = [own]
    elif teacher:
        runs["teacher"] = [_judged(job, teacher)]
    main = "distilled" if teacher else "model"
    lessons = _lessons(job, teacher, runs["teacher"][0]) if teacher else None
    for seed in range(first, first + config.seeds):
        if teacher and config.baseline:
            runs.setdefault("plain", []).append(_train(job, start, layers, seed, "plain", None))
        begun = teacher if config.distil or not config.model else start
        runs.setdefault(main, []).append(_train(job, begun, layers, seed, main, lessons))
    output = Path(config.output)
    with first_process_first():
        if jax.process_index() == 0:
            with store.whole_folder(output / "model") as new:
                shutil.copytree(runs[main][0].folder / "model", new, dirs_exist_ok=True)
            task_report.write(output, job.task, runs, main, config.temperature if teacher else None)
    return output / "model"


@dataclasses.dataclass(frozen=True)
class _Lessons:
    """A teacher and its answers to all examples of the training."""

    teacher: hub.Pretrained
    answers: np.ndarray  # [P, C] logits in the order of our labels
    digest: str


def _lessons(job: Job, teacher: hub.Pretrained, judged: Trained) -> _Lessons:
    """The teacher's answers, computed once and kept beside the data."""
    score = task_report.figures(job.task, "dev", judged.found["dev"])["score"]
    say("teacher: score on dev " + ("not defined" if score is None else f"{100 * score:.2f}"))
    request = {
        "teacher": fingerprint(teacher.params), "tokenizer": spec(job.tokenizer).fingerprint,
        "data": job.task.digest("train", "unlabelled"), "dtype": job.config.dtype}
    folder = Path(job.config.output) / "answers"
    with first_process_first():
        if not folder.exists() and jax.process_index() == 0:
            found = answered(job.config, job.task, job.mesh, teacher, ("train", "unlabelled"))
            with store.whole_folder(folder) as new:
                np.save(new / "logits.npy", found)
                (new / "request.json").write_text(json.dumps(request, indent=1))
                seal.seal(new)
    if fault := seal.find_fault(folder):
        raise UserError(f"{folder} is damaged ({fault}): remove it, and the teacher answers again")
    before = json.loads((folder / "request.json").read_text())
    if other := [name for name in request if request[name] != before.get(name)]:
        raise UserError(f"{folder} holds answers for another {', '.join(other)}: remove it, or "
                        "choose another --output")
    return _Lessons(teacher, np.load(folder / "logits.npy"), json.dumps(request))


def answered(
    config: FinetuneConfig | EvaluateConfig, task: TaskInput, mesh: Mesh, model: hub.Pretrained,
    parts: tuple[str, ...],
) -> np.ndarray:
    """Logits [P, C] of a model for some parts, one after the other, in the order of our labels."""
    dtype, param_dtype = dtypes(config, mesh)
    graph = graphdef(model.config, dtype, param_dtype)
    params = jax.tree.map(lambda x: np.asarray(x, param_dtype), model.params)
    params = jax.device_put(params, shardings(params, mesh))
    found = [answers.logits(graph, params, task.parts[name].examples, mesh, name)
             for name in parts if name in task.parts]
    return np.concatenate(found)[:, order(model.labels, task.labels)]


def order(theirs: tuple[str, ...], ours: tuple[str, ...]) -> list[int]:
    """Which of a model's logits stands for each of our labels, matched by name.

    Names that say nothing (LABEL_0, …) stand for their number.
    """
    if not ours:
        return [0]
    names = [name.lower() for name in theirs]
    if not set(name.lower() for name in ours) <= set(names):
        return list(range(len(ours)))
    return [names.index(name.lower()) for name in ours]


def _judged(job: Job, model: hub.Pretrained, folder: Path | None = None, seconds: float = 0.0
            ) -> Trained:
    """A model that is trained, with its answers."""
    parts = [name for name in ("dev", "test") if name in job.task.parts]
    return Trained(folder or model.folder, model,
                   {name: answered(job.config, job.task, job.mesh, model, (name,))
                    for name in parts}, seconds)


def _train(job: Job, start: hub.Pretrained, layers: list[int], seed: int, role: str,
           lessons: _Lessons | None) -> Trained:
    """Train one model of the comparison in OUTPUT/seed-S/ROLE, or take it from there."""
    config = dataclasses.replace(
        job.config, seed=seed, output=str(Path(job.config.output, f"seed-{seed}", role)))
    shape, params = _start(job, start, layers, seed)
    settings = config.meaning() | {
        "--model": fingerprint(params), "--train": job.task.digest("train"),
        "--unlabelled": job.task.digest("unlabelled") if lessons else "",
        "--steps": job.steps(sum(len(job.task.parts[name]) for name in _taught(job, lessons))),
        "--teacher": lessons.digest if lessons else "",
        "tokenizer": spec(job.tokenizer).fingerprint}
    folder = Path(config.output)
    refuse_other_run(folder, settings)
    done = _finished(folder, settings)
    if done is None:
        done = _trained(job, config, start, shape, params, settings, role, lessons)
    return _judged(job, hub.load_task(str(folder / "model")), folder, done)


def _taught(job: Job, lessons: _Lessons | None) -> list[str]:
    """The parts that are trained on: those without labels only where a teacher answers."""
    return ["train"] + (["unlabelled"] if lessons and "unlabelled" in job.task.parts else [])


def _finished(folder: Path, settings: dict[str, Any]) -> float | None:
    """Seconds that a complete training took; None if there is none in the folder."""
    path = folder / "finished.json"
    if not path.exists():
        return None
    before = json.loads(path.read_text())
    now = json.loads(json.dumps(settings))
    if other := [name for name in now if now[name] != before["settings"].get(name)]:
        raise UserError(f"{folder} holds another run ({', '.join(other)} differ): choose another "
                        "--output")
    return before["seconds"]


def _start(job: Job, source: hub.Pretrained, layers: list[int], seed: int
           ) -> tuple[EncoderConfig, dict[str, Any]]:
    """Shape and parameters before the first update; a head that is not there begins at random."""
    config, task = job.config, job.task
    shape = dataclasses.replace(
        source.config, num_hidden_layers=len(layers), task=task.kind, num_labels=task.outputs,
        pooler=False, mlm_head=False, hidden_dropout=config.dropout,
        attention_dropout=config.dropout, head_dropout=config.dropout)
    head = jax.device_get(init_params(shape, seed))["task_head"]
    known = source.config.task == task.kind and (
        {name.lower() for name in source.labels} == {name.lower() for name in task.labels})
    if known:
        columns = order(source.labels, task.labels)
        head = source.params["task_head"] | {"output": jax.tree.map(
            lambda x: x[..., columns], source.params["task_head"]["output"])}
    elif "dense" in head and "pooler" in source.params:
        head = head | {"dense": source.params["pooler"]}
    return shape, {
        "embeddings": source.params["embeddings"], "task_head": head,
        "layers": {i: source.params["layers"][n] for i, n in enumerate(layers)}}


def _trained(job: Job, config: FinetuneConfig, source: hub.Pretrained, shape: EncoderConfig,
             params: dict[str, Any], settings: dict[str, Any], role: str, lessons: _Lessons | None
             ) -> float:
    """Train, export to `config.output`/model, and return the seconds that it took."""
    task, folder = job.task, Path(config.output)
    examples = functools.reduce(
        operator.add, (task.parts[name].examples for name in _taught(job, lessons)))
    steps = job.steps(len(examples))
    teacher = lessons.teacher if lessons else None
    assembly = assemble(config, source.family, shape, teacher.config if teacher else None,
                        job.mesh, steps)
    grid = Grid(examples, config.batch_size, steps, config.seed,
                job.mesh.shape["data"] * config.accumulate, lessons.answers if lessons else None)
    teachers = assembly.place(assembly.teachers(teacher.params)) if assembly.teacher_graph else {}
    passes = steps * config.batch_size / len(examples)
    say(f"{role}, seed {config.seed}: {len(params['layers'])} layers with "
        f"{report.count_parameters(params):,} parameters; {steps:,} updates of "
        f"{config.batch_size} examples, {passes:.1f} passes over {len(examples):,}; rows are "
        f"{grid.filled(min(steps, 100)):.0%} full; {assembly.dtype}")
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(
        config=config, steps=steps, settings=settings, output=config.output, batches=grid,
        vocabulary=None, label=role, assembly=assembly, evaluate=_evaluator(job, assembly),
        describe=task_report.line)
    state = train(run, assembly.init(assembly.cast(params)), teachers)
    found = to_host(state.params["student"])
    seconds = task_report.seconds(folder)
    with first_process_first():
        if jax.process_index() == 0:
            family = FAMILIES[source.family.model_type].for_task(task.kind)
            export(folder / "model", found, shape, family, job.tokenizer,
                   task_report.card(task, role, config), task.labels)
            seal.write_json(folder / "finished.json", {"seconds": seconds, "settings": settings})
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return seconds


def _evaluator(job: Job, assembly: Assembly) -> Any:
    """A function from parameters to figures on the dev part, or on a sample of it."""
    part = job.task.parts["dev"]
    some = np.sort(np.random.default_rng(0).permutation(len(part))[:SHOWN])
    examples = dataclasses.replace(part.examples, cut=0, **{
        name: [getattr(part.examples, name)[i] for i in some]
        for name in ("ids", "types", "positions", "words", "labels")})
    truth = [part.truth[i] for i in some]

    def evaluate(params: dict[str, Any]) -> dict[str, float]:
        found = answers.logits(assembly.graph, params, examples, job.mesh)
        known = answers.figures(job.task.kind, job.task.task.metrics, found, examples, truth,
                                job.task.labels)
        return {name: value for name, value in known.items() if value is not None}

    return evaluate
