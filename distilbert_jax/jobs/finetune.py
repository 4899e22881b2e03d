"""Train a model for a task: fine-tune it, or distil a fine-tuned teacher, or both in one command.

Each model of a comparison is trained in a folder of its own, OUTPUT/seed-S/ROLE, which goes on
where it was stopped and is not trained again once it is complete.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distilbert_jax.config import flag
from distilbert_jax.data.examples import Grid
from distilbert_jax.data.tokenize import load_tokenizer, spec
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import answers
from distilbert_jax.export.huggingface import export
from distilbert_jax.jobs import task_report
from distilbert_jax.jobs.lessons import Lessons, check_output, choose_layers, lessons_of
from distilbert_jax.jobs.provenance import next_steps, note_call
from distilbert_jax.jobs.setup import check_folder, models_of_plan, place_of_plan, standing
from distilbert_jax.jobs.ship import check_ship, ship_exported
from distilbert_jax.jobs.task_data import read_task
from distilbert_jax.jobs.task_model import (
    Job,
    Trained,
    check_tokenizers,
    judged,
    read_json,
    start_of,
)
from distilbert_jax.jobs.trials import of_task
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.lock import hold
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.seal import fingerprint
from distilbert_jax.machine.sharding import first_process_first, make_mesh, to_host
from distilbert_jax.models import hub, student
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.task_config import FinetuneConfig
from distilbert_jax.training.assemble import Assembly, assemble
from distilbert_jax.training.checkpoint import changed, refuse_other_run, refuse_to_finish
from distilbert_jax.training.objective import Objective
from distilbert_jax.training.train import Run, saved, train

# Of a model as wide as BERT-base (Devlin et al. 2019, appendix A.3); narrower ones take more, as
# Adam's rate falls with the width (Yang et al. 2022, "Tensor Programs V", table 8).
RATE, WIDTH = 5e-5, 768
DONE = "finished.json"  # in the folder of a model that has had its last update
# Settings that a training without a teacher does not depend on.
OF_TEACHING = ("--distil", "--student-layers", "--choose", "--temperature", "--hidden-map",
               "--augment")


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
    check_ship(config)
    start = _load_start(config.model or config.teacher)
    teacher = hub.load_task(config.teacher) if config.teacher else None
    tokenizer = load_tokenizer(config.model or config.teacher, start.config.vocab_size)
    if teacher:
        check_tokenizers(config, tokenizer, teacher)
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    mesh = make_mesh(config.mesh)
    store.check_writable(config.output)
    for made in ("model", *task_report.FILES):
        check_folder(config.output, made, "seed-*/*",
                     {"--model": config.model, "--teacher": config.teacher})
    check_output(config.output)
    known = teacher.labels if teacher else ()
    task = read_task(config, tokenizer, start.config.positions, known, train=config.train,
                     dev=config.dev, test=config.test, unlabelled=config.unlabelled)
    if len(task.parts["train"]) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size} is more than the "
                        f"{len(task.parts['train'])} examples of --train")
    if teacher and teacher.config.task != task.kind:
        raise UserError(f"--teacher {config.teacher} was trained with --kind "
                        f"{teacher.config.task}, and the labels of --train are read as --kind "
                        f"{task.kind}: give --kind {teacher.config.task} if they are of that kind, "
                        "or another --teacher")
    layers = _student_layers(config, start, teacher or start)
    rate = config.learning_rate or RATE * WIDTH / start.config.hidden_size
    job = Job(dataclasses.replace(config, learning_rate=rate), task, tokenizer, mesh)
    with hold(config.output):
        return _compare(job, start, teacher, layers)


def _student_layers(config: FinetuneConfig, start: hub.Pretrained, teacher: hub.Pretrained
                    ) -> list[int]:
    """Which layers are kept of the model that the student starts from, or how many of its
    teacher; checked with what is compared to the teacher's, before anything is trained."""
    own, wish = start.config.num_hidden_layers, config.student_layers
    if not wish and not config.taught:
        return list(range(own))
    layers = student.choose_layers(wish, own)
    if config.taught:
        shape = dataclasses.replace(start.config, num_hidden_layers=len(layers))
        Objective.of(config, shape, [teacher.config])
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


def _compare(job: Job, start: hub.Pretrained, teacher: hub.Pretrained | None, layers: list[int]
             ) -> Path:
    """Train every model of the comparison, for every seed, and report."""
    config, runs = job.config, {}
    main = "distilled" if config.taught else "model"
    roles = ["plain", main] if config.taught and config.baseline else [main]
    seeds = _seeds(config, roles)
    note_call(config.output)
    if config.distil:
        whole = list(range(start.config.num_hidden_layers))
        runs["teacher"] = [_train(job, start, whole, config.seed, "teacher")]
    elif teacher:
        runs["teacher"] = [judged(job, teacher)]
    learnt = None
    if runs:
        teacher = runs["teacher"][0].model
        learnt = lessons_of(job, runs["teacher"][0], start)
        if config.greedy and len(layers) < teacher.config.num_hidden_layers:
            layers = choose_layers(job, teacher, len(layers))
    for seed in seeds:
        if "plain" in roles:
            # As many updates as the distilled one has, so that longer training is no advantage.
            runs.setdefault("plain", []).append(
                _train(job, start, layers, seed, "plain", job.steps(len(learnt.examples))))
        begun = teacher if config.distil or not config.model else start
        runs.setdefault(main, []).append(_train(job, begun, layers, seed, main, lessons=learnt))
    if config.finish and not any(run.standing for own in runs.values() for run in own):
        say(f"--finish {config.finish}: every model has had its last update, and stays as it is")
    output = Path(config.output)
    with first_process_first():
        if jax.process_index() == 0:
            with store.whole_folder(output / "model") as new:
                shutil.copytree(runs[main][0].folder / "model", new, dirs_exist_ok=True)
            task_report.write(config, job.task, runs, main)
            if config.ship:
                ship_exported(output / "model", of_task(job.task, job.task.labels, job.task.name))
            print(next_steps(*_next(config)))
    return output / "model"


def _seeds(config: FinetuneConfig, roles: list[str]) -> list[int]:
    """The seeds to train; with --finish those before the first that has a model not begun.

    Raises:
        UserError: that is the first of all.
    """
    seeds = list(range(config.seed, config.seed + config.seeds))
    for seed in seeds if config.finish else []:
        try:
            for role in roles:
                folder = _folder(config, seed, role)
                if not (folder / DONE).exists():
                    refuse_to_finish(folder, config.finish)
        except UserError as error:
            if seed == config.seed:
                raise
            say(f"left out, from seed {seed} on: {error}")
            return seeds[:seed - config.seed]
    return seeds


def _folder(config: FinetuneConfig, seed: int, role: str) -> Path:
    """Where one model of the comparison is trained."""
    return Path(config.output, f"seed-{seed}", role)


def _next(config: FinetuneConfig) -> list[list[str]]:
    """Commands that take the model on."""
    labelled = []
    if config.dev:
        labelled = ["--evaluate", *config.dev]
        for name in ("task", "text", "label"):
            if value := getattr(config, name):
                labelled += [flag(name), *([value] if isinstance(value, str) else value)]
    ship = ["ship", "--model", str(Path(config.output, "model")), *labelled]
    return ([] if config.ship else [ship]) + [["compare", config.output]]


def _train(job: Job, source: hub.Pretrained, layers: list[int], seed: int, role: str,
           steps: int | None = None, lessons: Lessons | None = None) -> Trained:
    """Train one model of the comparison in OUTPUT/seed-S/ROLE, or take it from there."""
    folder = _folder(job.config, seed, role)
    config = dataclasses.replace(job.config, seed=seed, output=str(folder))
    shape, params = start_of(job, source, layers, seed)
    examples = lessons.examples if lessons else job.task.parts["train"].examples
    steps = steps or job.steps(len(examples))
    settings = _settings(job, config, lessons) | {
        "--model or --student-layers": fingerprint(params), "--steps": steps}
    refuse_other_run(folder, settings)
    done, stands = _finished(folder, settings), ""
    if done is None:
        assembly = assemble(config, source.family, shape,
                            [lessons.teacher.config] if lessons else [], job.mesh, steps)
        grid = Grid(examples, config.batch_size, steps, config.seed,
                    job.mesh.shape["data"] * config.accumulate, lessons and lessons.answers)
        run = Run(
            config=config, steps=steps, settings=settings, output=config.output, batches=grid,
            vocabulary=None, label=role, assembly=assembly, evaluate=_evaluator(job, assembly),
            describe=functools.partial(task_report.line, len(job.task.parts["dev"])))
        teachers = [lessons.teacher.params] if lessons else []
        say(f"{role}, seed {seed}: {models_of_plan(params, *teachers)}; {steps:,} updates "
            f"of {config.batch_size} examples, {steps * config.batch_size / len(examples):.1f} "
            f"passes over {len(examples):,}; rows are {grid.filled(min(steps, 100)):.0%} full; "
            f"learning rate {config.learning_rate:.2g}; {place_of_plan(assembly)}")
        done, stands = _trained(job, run, source, shape, params, lessons)
    elif not (folder / "model").is_dir():
        raise UserError(f"{folder / 'model'} is gone: remove {folder}, and it is trained again")
    return judged(job, hub.load_task(str(folder / "model")), folder, done, stands)


def _settings(job: Job, config: FinetuneConfig, lessons: Lessons | None) -> dict[str, Any]:
    """What a continuation of a training must share; of a teacher only where there is one."""
    shared = config.meaning()
    if not lessons:
        shared = {name: value for name, value in shared.items()
                  if name not in OF_TEACHING and not name.startswith("--alpha-")}
    return shared | {
        "--train": job.task.digest("train"), "--teacher": lessons.digest if lessons else "",
        "tokenizer": spec(job.tokenizer).fingerprint}


def _finished(folder: Path, settings: dict[str, Any]) -> float | None:
    """Seconds that a complete training took; None if there is none in the folder."""
    path = folder / DONE
    if not path.exists():
        return None
    before = read_json(path)
    if "settings" not in before:
        raise UserError(f"{path} is damaged: remove {folder}, and it is trained again")
    if other := changed(before["settings"], json.loads(json.dumps(settings))):
        raise UserError(f"{folder} holds another run ({', '.join(other)} differ): choose another "
                        "--output")
    return before["seconds"]


def _trained(job: Job, run: Run, source: hub.Pretrained, shape: EncoderConfig,
             params: dict[str, Any], lessons: Lessons | None) -> tuple[float, str]:
    """Train, or with --finish take a checkpoint, and export to OUTPUT/seed-S/ROLE/model.

    Returns:
        The seconds that it took, and where it stands if that is not its end.
    """
    folder, assembly, finish = Path(run.output), run.assembly, job.config.finish
    teachers = {}
    if assembly.teacher_graphs:
        teachers = assembly.place(assembly.teachers(lessons.teacher.params))
    folder.mkdir(parents=True, exist_ok=True)
    start = assembly.init(assembly.cast(params))
    state = saved(run, start, finish) if finish else train(run, start, teachers)
    found, updates = to_host(state.params["student"]), int(state.step)
    seconds, stands = task_report.seconds(folder), standing(finish, updates, run.steps)
    with first_process_first():
        if jax.process_index() == 0:
            family = FAMILIES[source.family.model_type].for_task(job.task.kind)
            export(folder / "model", found, shape, family, job.tokenizer,
                   task_report.model_card(job.task, run.label, run.config, stands),
                   job.task.labels)
            if not finish:
                seal.write_json(folder / DONE, {"seconds": seconds, "settings": run.settings})
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return seconds, stands


def _evaluator(job: Job, assembly: Assembly) -> Any:
    """A function from parameters to figures on the dev part, or on a sample of it."""
    part = job.task.parts["dev"]
    some = np.sort(np.random.default_rng(0).permutation(len(part))[:task_report.SHOWN])
    examples = part.examples.some(some)
    truth = [part.truth[i] for i in some]

    def evaluate(params: dict[str, Any]) -> dict[str, float]:
        found = answers.logits(assembly.graph, params, examples, job.mesh)
        known = answers.figures(job.task.kind, job.task.task.metrics, found, examples, truth,
                                job.task.labels)
        return {name: value for name, value in known.items() if value is not None}

    return evaluate
