"""Distil a sentence encoder: a smaller one whose vectors lie where the teacher's do.

The teacher's vectors are computed once; the student learns them, packed and resumed as everything
here, and is left as a folder for sentence-transformers.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from distilbert_jax.data import sentences as texts
from distilbert_jax.data import sources
from distilbert_jax.data.examples import Examples, Grid
from distilbert_jax.data.sentences import RULE, Sentences
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation.similarity import Embedder, cosines
from distilbert_jax.export.sentence_folder import export_sentence
from distilbert_jax.jobs import embed_report
from distilbert_jax.jobs.kept_layers import kept_layers
from distilbert_jax.jobs.provenance import next_steps, note_call
from distilbert_jax.jobs.sentence_data import Pairs, read_all_pairs, read_titles
from distilbert_jax.jobs.sentence_model import Named, cut_to, on_devices, own_start
from distilbert_jax.jobs.setup import check_folder, models_of_plan, place_of_plan, standing
from distilbert_jax.jobs.ship import check_ship, ship_exported
from distilbert_jax.jobs.task_data import warn_of_unknown
from distilbert_jax.jobs.teacher_vectors import vectors_once
from distilbert_jax.jobs.trials import of_sentences
from distilbert_jax.machine import store
from distilbert_jax.machine.lock import hold
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.seal import fingerprint
from distilbert_jax.machine.sharding import first_process_first, make_mesh, to_host
from distilbert_jax.models import student
from distilbert_jax.training.assemble import Assembly, assemble
from distilbert_jax.training.checkpoint import refuse_other_run, refuse_to_finish
from distilbert_jax.training.objective import Objective
from distilbert_jax.training.train import Run, saved, train

if TYPE_CHECKING:
    from distilbert_jax.jobs.sentence_data import Titles

RATE, WIDTH = 5e-4, 768  # of the learning rate; narrower models take more, as in finetune
SAMPLE = 512  # sentences on which layers are chosen
JUDGED = 2000  # held-out sentences that are judged in the end


@dataclasses.dataclass(frozen=True)
class Job:
    """What the parts of the job share."""

    config: EmbedConfig
    mesh: Mesh
    teacher: Named
    start: Named  # what the student is cut from
    sentences: Sentences
    pairs: list[Pairs]
    titles: "Titles | None"


def embed(config: EmbedConfig) -> Path:
    """Distil `config.teacher` and leave student, figures and report in `config.output`.

    Returns:
        The folder of the student.

    Raises:
        UserError: anything in the settings or files that the user can mend.
        Interrupted: stopped by a signal, state saved.
    """
    if store.is_remote(config.output):
        raise UserError(f"--output {config.output}: sentence encoders are written to a folder of "
                        "this machine")
    check_ship(config)
    teacher = Named.read(config.teacher, config.pooling, config.normalize)
    start = own_start(config, teacher) if config.student else teacher
    layers = student.choose_layers(
        config.student_layers or (str(start.shape.num_hidden_layers) if config.student else ""),
        start.shape.num_hidden_layers)
    rate = config.learning_rate or RATE * WIDTH / start.shape.hidden_size
    config = dataclasses.replace(config, learning_rate=rate)
    _check(config, teacher, cut_to(start, layers))
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    mesh = make_mesh(config.mesh)
    pairs, titles = read_all_pairs(config.sts), read_titles(config.retrieval)
    sources.check(config.corpus + config.valid, config.output)
    found = texts.read(config.corpus, config.valid, config.valid_share, config.sentences,
                       config.text_field)
    say(f"{found.read:,} sentences, each different one once: {len(found.train):,} to learn from, "
        f"{len(found.valid):,} held out" + ("" if config.text_field else f"; {RULE}"))
    if len(found.train) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(found.train)} "
                        "sentences to learn from")
    job = Job(config, mesh, teacher, start, found, pairs, titles)
    with hold(config.output):
        return _distil(job, layers)


def _check(config: EmbedConfig, teacher: Named, start: Named) -> None:
    """Raise a UserError for losses that do not fit the models, files that would be lost, or a
    --finish without a checkpoint."""
    if not config.normalize and teacher.facts.described:
        raise UserError(f"{config.teacher} has a modules.json, which says whether its vectors are "
                        "scaled: leave out --no-normalize")
    objective = Objective.of(config, start.shape, [teacher.shape])
    if objective.mapped and not teacher.reads_as(start):
        raise UserError(f"--alpha-{objective.mapped[0]} compares states token by token, and "
                        "--student has another tokenizer, prompt or length than --teacher: give 0")
    if config.finish:
        refuse_to_finish(config.output, config.finish)
    for made in ("student", *embed_report.FILES):
        check_folder(config.output, made, "metrics.jsonl",
                     {"--teacher": config.teacher, "--student": config.student})


def _distil(job: Job, layers: list[int]) -> Path:
    """Train in a folder that is held, export, and report."""
    config, count = job.config, len(layers)
    if config.greedy and count < job.teacher.shape.num_hidden_layers:
        layers = _choose_layers(job, count)
    start = cut_to(job.start, layers)
    start = dataclasses.replace(start, shape=dataclasses.replace(
        start.shape, hidden_dropout=config.dropout, attention_dropout=config.dropout))
    settings = config.meaning() | {
        "--teacher": fingerprint(job.teacher.params), "--student": fingerprint(start.params),
        "--corpus": job.sentences.digest, "tokenizer": start.tokens}
    refuse_other_run(config.output, settings)
    note_call(config.output)
    examples = start.examples(job.sentences.train, config.max_length)
    warn_of_unknown("--corpus", examples, start.tokenizer)
    given = _teacher_vectors(job, examples)
    steps = config.steps or max(1, math.ceil(config.epochs * len(examples) / config.batch_size))
    assembly = assemble(config, start.family, start.shape, [job.teacher.shape], job.mesh, steps)
    grid = Grid(examples, config.batch_size, steps, config.seed,
                job.mesh.shape["data"] * config.accumulate, given)
    say(f"embed: {models_of_plan(start.params, job.teacher.params)}; {steps:,} updates of "
        f"{config.batch_size} sentences, {steps * config.batch_size / len(examples):.1f} passes "
        f"over {len(examples):,} of {examples.lengths.mean():.1f} tokens on average, "
        f"{examples.cut:,} of which are cut; rows are {grid.filled(min(steps, 100)):.0%} full; "
        f"learning rate {config.learning_rate:.2g}; {place_of_plan(assembly)}")
    run = Run(config=config, steps=steps, settings=settings, output=config.output, batches=grid,
              vocabulary=None, label="embed", assembly=assembly,
              evaluate=_evaluator(job, assembly, start),
              describe=functools.partial(embed_report.line, len(job.sentences.valid)))
    teachers = {}
    if assembly.teacher_graphs:
        teachers = assembly.place(assembly.teachers(job.teacher.params))
    state = assembly.init(assembly.cast(start.params))
    state = saved(run, state, config.finish) if config.finish else train(run, state, teachers)
    trained = dataclasses.replace(start, params=to_host(state.params["student"]))
    return _leave(job, start, trained, layers, (int(state.step), steps))


def _leave(job: Job, start: Named, trained: Named, layers: list[int], updates: tuple[int, int]
           ) -> Path:
    """Judge, report and export; `updates` are those of the student, and those of the run."""
    folder, facts = Path(job.config.output) / "student", trained.facts
    origin = (f"It started as `{Path(job.config.student).name}`." if job.config.student else
              f"It started as the teacher's layers {', '.join(map(str, layers))}.")
    origin = f"{origin} {standing(job.config.finish, *updates)}".rstrip()
    models = {"teacher": job.teacher, "untrained": start, "student": trained}
    trial = (job.sentences.valid[:JUDGED], job.pairs, job.titles)
    encode = embed_report.encoders(job.config, job.mesh, models)
    # Of the int8 file the first process alone judges, and the teacher is on all of them.
    encode["teacher"] = embed_report.remembered(encode["teacher"])
    found = embed_report.judge(models, encode, *trial)
    with first_process_first():
        if jax.process_index() == 0:
            export_sentence(
                folder, trained.params, trained.shape, trained.family, trained.tokenizer,
                embed_report.model_card(job.config, found, origin), facts.max_length,
                facts.modules.prompts, facts.modules.default_prompt)
            embed_report.write(job.config, found, origin, updates[0])
            if job.config.ship:
                ship_exported(folder, of_sentences(
                    trained.examples(job.sentences.valid, job.config.max_length)))
                embed_report.write(job.config, embed_report.with_int8(
                    found, folder, job.config.max_length, trained, encode["teacher"], *trial),
                    origin, updates[0])
            if commands := _next(job.config):
                print(next_steps(*commands))
    return folder


def _next(config: EmbedConfig) -> list[list[str]]:
    """Commands that take the student on."""
    pairs = ["--evaluate", *config.sts] if config.sts else []
    ship = ["ship", "--model", str(Path(config.output, "student")), *pairs]
    # compare.py shows what the students do on scored pairs.
    return ([] if config.ship else [ship]) + ([["compare", config.output]] if pairs else [])


def _teacher_vectors(job: Job, examples: Examples) -> np.ndarray:
    """The teacher's vectors of the sentences that are learnt from, computed once."""
    config, teacher = job.config, job.teacher
    if not teacher.reads_as(job.start):
        examples = teacher.examples(job.sentences.train, config.max_length)
    request = {
        "teacher": fingerprint(teacher.params), "pooling": repr(teacher.shape.sentence),
        "tokenizer": teacher.tokens, "sentences": job.sentences.digest,
        "length": config.max_length, "prompt": teacher.facts.modules.prompt(),
        "dtype": config.vector_dtype if config.dtype != "float64" else "float64"}
    embedder = on_devices(config, job.mesh, teacher)
    folder = Path(config.vectors) if config.vectors else Path(config.output) / "vectors"
    return vectors_once(folder, request, len(examples), teacher.width,
                        lambda numbers: embedder(examples.some(np.array(numbers))))


def _choose_layers(job: Job, count: int) -> list[int]:
    """Remove the layer without which the vectors change least, until `count` are left.

    No layer is trained for it. The result is kept in OUTPUT/layers.json.

    Raises:
        UserError: the file holds what was chosen of another teacher, by other sentences, or in
            another number.
    """
    teacher, total = job.teacher, job.teacher.shape.num_hidden_layers
    request = {"teacher": fingerprint(teacher.params), "sentences": job.sentences.digest,
               "layers": count}

    def removals() -> dict[str, Any]:
        examples = teacher.examples(job.sentences.train[:SAMPLE], job.config.max_length)
        whole = on_devices(job.config, job.mesh, teacher)(examples, "layers")

        def lost(layers: list[int]) -> float:
            embedder = on_devices(job.config, job.mesh, cut_to(teacher, layers))
            return 1 - float(cosines(embedder(examples, "layers"), whole).mean())

        rows = student.remove_layers(total, count, lost)
        return {"removals": [{"left": left, "cosine": 1 - loss} for left, loss in rows],
                "evenly": 1 - lost(student.choose_layers(str(count), total))}

    found = kept_layers(job.config.output, request, removals)
    last = found["removals"][-1]
    say(f"layers {', '.join(map(str, last['left']))} of the teacher are kept: their vectors have a "
        f"cosine of {last['cosine']:.3f} to the teacher's (evenly chosen: {found['evenly']:.3f})")
    return last["left"]


def _evaluator(job: Job, assembly: Assembly, start: Named) -> Any:
    """A function from parameters to figures on held-out sentences and scored pairs."""
    held = job.sentences.valid[:embed_report.SHOWN]
    theirs = on_devices(job.config, job.mesh, job.teacher)(
        job.teacher.examples(held, job.config.max_length), "teacher")
    examples = start.examples(held, job.config.max_length)
    pairs = [(part, start.examples(part.texts, job.config.max_length)) for part in job.pairs]

    def evaluate(params: dict[str, Any]) -> dict[str, float]:
        embedder = Embedder(assembly.graph, params, job.mesh, start.shape.sentence.of_first)
        own = embedder(examples)
        near = cosines(own, theirs)
        figures = {"loss": float(((own.astype(float) - theirs) ** 2).sum(-1).mean()),
                   "cosine": float(near.mean()), "worst_cosine": float(near.min())}
        for part, tokens in pairs:
            value = embed_report.correlation(part, embedder(tokens))
            figures |= {} if value is None else {f"spearman {part.name}": value}
        return figures

    return evaluate
