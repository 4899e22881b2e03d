"""Distil a teacher, or several: settings → student folder, figures and report.

Everything that can be wrong is checked before the first file is written.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distilbert_jax.benchmark.latency import latencies
from distilbert_jax.config import DistilConfig
from distilbert_jax.data import sources
from distilbert_jax.data.tokenize import load_tokenizer, spec
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.evaluation.held_out import top1_intervals
from distilbert_jax.evaluation.page import FILES as REPORTS
from distilbert_jax.evaluation.page import write_report
from distilbert_jax.evaluation.removal import Shortened
from distilbert_jax.export.card import card, held_out_results
from distilbert_jax.export.huggingface import export
from distilbert_jax.export.predict import fill_mask
from distilbert_jax.jobs.kept_layers import check_kept, kept_layers
from distilbert_jax.jobs.provenance import next_steps, note_call, provenance
from distilbert_jax.jobs.setup import (
    EVALUATION_ROWS,
    Setup,
    check_folder,
    check_job,
    read_data,
    student_shape,
)
from distilbert_jax.jobs.ship import check_ship, ship_held_out
from distilbert_jax.jobs.teacher_states import TeacherStates
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.lock import hold
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.seal import fingerprint
from distilbert_jax.machine.sharding import first_process_first, to_host
from distilbert_jax.models import hub, student
from distilbert_jax.models.start import init_params
from distilbert_jax.training.assemble import TEACHER, Assembly, assemble, jitted_eval_step
from distilbert_jax.training.metrics_log import read_metrics

Judged = tuple[dict[str, float], dict[str, np.ndarray]]  # figures, and the counts of each row


def distil(config: DistilConfig) -> Path:
    """Distil the teachers of `config` and leave student, figures and report in `config.output`.

    Returns:
        The folder of the exported student.

    Raises:
        UserError: anything in the settings or files that the user can mend.
        Interrupted: stopped by a signal, state saved.
    """
    if not config.teacher:
        raise UserError("--teacher is missing: give a Hugging Face folder (or start without "
                        "any flag for the quickstart)")
    check_ship(config)
    given = [_teacher(name) for name in config.teacher]
    settings = config.meaning() | {"--teacher": fingerprint(given[0].params)}
    if len(given) > 1:
        settings |= {"--teacher": [fingerprint(each.params) for each in given],
                     "--teacher-weights": [f"{share:.9g}" for share in config.shares]}
    own = _own_start(config)
    if own:
        settings["--student"] = fingerprint(own)
    mesh = check_job(config, given[0].family, [each.config for each in given], settings)
    for name in config.teacher:
        check_folder(config.output, "student", "checkpoints",
                     {"--teacher": name, "--student": config.student})
    _check_tokenizers(config, given)
    if config.greedy:
        check_kept(config.output)
    with hold(config.output):
        return _distil(config, given, own, mesh, settings)


def _teacher(name: str) -> hub.Pretrained:
    """The teacher in a folder, or on the hub, of this name."""
    found = hub.load(name)
    if not found.config.mlm_head:
        raise UserError(f"{name} has no masked-language-model head to distil from; "
                        f"train one: distilbert-jax pretrain --model {name} ...")
    return found


def _check_tokenizers(config: DistilConfig, given: list[hub.Pretrained]) -> None:
    """Raise a UserError unless all teachers have the tokenizer of the first."""
    if len(given) < 2:
        return
    first, *others = (
        spec(load_tokenizer(name, teacher.config.vocab_size)).fingerprint
        for name, teacher in zip(config.teacher, given, strict=True))
    for name, found in zip(config.teacher[1:], others, strict=True):
        if found != first:
            raise UserError(f"--teacher {config.teacher[0]} and {name} have different tokenizers: "
                            "a student learns the words of one, so give teachers that share it")


def _distil(config: DistilConfig, given: list[hub.Pretrained], own: dict[str, Any], mesh: Mesh,
            settings: dict[str, Any]) -> Path:
    """Distil in a folder that is held; `own` is the student's start if it is not a teacher's."""
    teacher = given[0]
    setup = read_data(config, mesh, load_tokenizer(config.teacher[0], teacher.config.vocab_size),
                      settings)
    family, shape = student_shape(config, teacher.family, teacher.config)
    assembly = assemble(config, family, shape, [each.config for each in given], mesh, setup.steps)

    teachers = assembly.place(assembly.teachers(*(each.params for each in given)))
    layers = student.choose_layers(config.student_layers, teacher.config.num_hidden_layers)
    removals = {}
    if config.greedy and len(layers) < teacher.config.num_hidden_layers:
        removals = _remove_layers(setup, assembly, teacher, teachers[TEACHER], len(layers))
        layers = removals["removals"][-1]["left"]
        setup = dataclasses.replace(
            setup, settings=setup.settings | {"layers of --choose": layers})
    start = own or student.student_params(
        teacher.params, layers, config.fold_token_type, shape.type_vocab_size > 0)
    if config.init == "random":
        start = init_params(shape, config.seed, assembly.param_dtype)
    start = assembly.cast(start)
    states, batches = None, None
    if config.kept_maskings:
        states = TeacherStates(setup, assembly, teachers)
        batches = None if config.finish or states.finished() else states.batches(start)
    note_call(config.output)
    trained, updates = setup.train(assembly, start, teachers, "distil", batches)

    folder = store.local(config.output) / "student"
    alone = {"student at start": (assembly.graph, assembly.place(start))} | {
        name: (graph, teachers[name]) for name, graph in assembly.teacher_graphs.items()
        if name != TEACHER}
    figures = _figures(
        setup.judged(assembly.eval_step, teachers, trained),
        {name: setup.judged(jitted_eval_step(graph, None, mesh), {}, params)
         for name, (graph, params) in alone.items()})
    trained = to_host(trained)
    with first_process_first():
        if jax.process_index() == 0:
            export(folder, trained, shape, family, setup.tokenizer,
                   _card(setup, _origin(config, layers), figures["student"], trained, updates))
            models = {name: (graph, each.params) for (name, graph), each in zip(
                assembly.teacher_graphs.items(), given, strict=True)}
            models |= {"student": (assembly.graph, trained),
                       "student at start": (assembly.graph, start)}
            _write_report(setup, assembly, models, updates, figures, removals, states)
            store.upload(config.output, "student", *REPORTS, "report.json", "losses.png")
            if config.ship:
                ship_held_out(folder, setup)
                store.upload(config.output, "student")
            print(next_steps(*_next(config)))
    return folder


def _next(config: DistilConfig) -> list[list[str]]:
    """Commands that take the student on."""
    model = ["--model", store.join(config.output, "student")]
    texts = ["--evaluate", *config.valid] if config.valid and not config.text_field else []
    ship = [] if config.ship else [["ship", *model, *texts]]
    # compare.py reads folders of this machine.
    return ship + ([] if store.is_remote(config.output) else [["compare", config.output]])


def _figures(student: Judged, alone: dict[str, Judged]) -> dict[str, dict[str, Any]]:
    """Held-out figures of each model in the report, with their intervals.

    Args:
        student: judged beside the first teacher.
        alone: other models by name, judged by themselves on the same rows.
    """
    found, rows = student
    ends = top1_intervals(rows["masked"], {
        TEACHER: rows["teacher_correct"], "student": rows["correct"],
        **{name: counts["correct"] for name, (_, counts) in alone.items()}})
    if "retention" not in found:  # nor, then, has it an interval
        ends = {name: {"top1_interval": pair["top1_interval"]} for name, pair in ends.items()}
    every = {TEACHER: {name: found[f"teacher_{name}"] for name in ("top1", "perplexity")},
             "student": found} | {name: own for name, (own, _) in alone.items()}
    return {name: figures | ends[name] for name, figures in every.items()}


def _remove_layers(setup: Setup, assembly: Assembly, teacher: hub.Pretrained,
                   params: dict[str, Any], count: int) -> dict[str, Any]:
    """Remove layers, each time that without which predictions change least, until `count` are left.

    They are compared at hidden tokens of some training rows, and nothing is trained: see
    evaluation/removal.py. The result is kept in OUTPUT/layers.json, so that a continuation on
    other devices keeps the same layers.

    Args:
        setup: with the training rows.
        assembly: with the mesh and the dtypes.
        teacher: as read; params: its parameters on the mesh.
        count: layers of the student.

    Returns:
        `removals`: a row for each, `left` and `kl` [nats per hidden token]; `evenly`: the KL of as
        many layers evenly chosen; `masked`: how many hidden tokens both are means over.

    Raises:
        UserError: the file holds what was chosen of another teacher, by other rows, or in another
            number.
    """
    total = teacher.config.num_hidden_layers
    request = {"teacher": setup.settings["--teacher"], "corpus": setup.settings["--corpus"],
               "layers": count}

    def removals() -> dict[str, Any]:
        say(f"choosing {count} of {total} layers; nothing is trained yet")
        change = Shortened(teacher.config, (assembly.dtype, assembly.param_dtype), params,
                           setup.vocabulary, setup.data.train, setup.mesh)
        rows = student.remove_layers(total, count, change)
        return {"removals": [{"left": left, "kl": kl} for left, kl in rows],
                "evenly": change(student.choose_layers(str(count), total)),
                "masked": change.masked}

    found = kept_layers(setup.config.output, request, removals)
    print(f"\n{_describe_removals(found)}\n")
    return found


def _describe_removals(found: dict[str, Any]) -> str:
    """The table of removals, and a line on what it says."""
    rows, before = [], found["removals"][0]["left"]
    for row in found["removals"][1:]:
        removed, = set(before) - set(row["left"])
        back = "".join(f" ({n} is back)" for n in set(row["left"]) - set(before))
        before = row["left"]
        rows.append((f"{removed}{back}", ", ".join(map(str, before)), f"{row['kl']:.3f}"))
    return (report.table(rows, ("removed", "layers left", "KL [nats]")) + "\n\nEach time the "
            "layer without which the teacher's predictions change least, at "
            f"{found['masked']:,} hidden tokens of the training data and without any training; "
            f"as many evenly chosen: KL {found['evenly']:.3f}.")


def _own_start(config: DistilConfig) -> dict[str, Any]:
    """The parameters of the folder that --student names; {} without one."""
    if not config.student:
        return {}
    found = hub.load(config.student)
    if not found.config.mlm_head:
        raise UserError(f"--student {config.student} has no masked-language-model head; train one: "
                        f"distilbert-jax pretrain --model {config.student} ...")
    return {name: part for name, part in found.params.items() if name != "pooler"}


def _origin(config: DistilConfig, layers: list[int]) -> str:
    """Where the student began, for its card."""
    if config.student:
        return f"It started as `{Path(config.student).name}`."
    if config.init == "random":
        return "It started at random."
    return f"It started as the teacher's layers {', '.join(map(str, layers))}."


def _card(setup: Setup, origin: str, figures: dict[str, Any], params: dict[str, Any],
          updates: int) -> str:
    """The model card of the student."""
    config, standing = setup.config, setup.standing(updates)
    weights = ", ".join(f"{name} {weight}" for name, weight in config.alphas.items() if weight)
    text = (
        f"Distilled by distilbert_jax from {_teachers(config)}. "
        f"{' '.join(filter(None, (origin, standing)))}\n\n"
        f"- parameters: {report.count_parameters(params):,}\n"
        f"- {report.held_out_line(figures)}\n"
        f"- corpus: {', '.join(map(sources.published, config.corpus))}\n"
        f"- losses: {weights}; temperature {config.temperature}\n"
        f"- {report.versions()}")
    return card("fill-mask", f"{len(params['layers'])}-layer student", text,
                folder="student", origin=config.teacher[0],
                mask=setup.tokenizer.mask_token, corpus=setup.data.words,
                results=held_out_results(figures))


def _teachers(config: DistilConfig) -> str:
    """The teachers' names in words, with the share of each of several."""
    shares = zip(config.teacher, config.shares, strict=True)
    if len(config.teacher) == 1:
        return f"`{Path(config.teacher[0]).name}`"
    return ", ".join(f"`{Path(name).name}` (weight {share:.3g})" for name, share in shares)


def _write_report(
    setup: Setup, assembly: Assembly, models: dict[str, tuple[nnx.GraphDef, dict[str, Any]]],
    updates: int, figures: dict[str, dict[str, Any]], removals: dict[str, Any],
    states: TeacherStates | None,
) -> None:
    """Print the result, and write the report, report.json and losses.png."""
    config, output = setup.config, store.local(setup.config.output)
    speed = latencies(models, config.sequence_length)
    last = figures["student"]
    whole = last["teacher_top1"] if "retention" in last else None
    text = report.table([report.model_row(name, params, figures[name], whole, speed[name])
                         for name, (_, params) in models.items()])
    cosine = f"cosine of the last hidden states {last['cosine']:.4f}, " if "cosine" in last else ""
    first = "first " if len(config.teacher) > 1 else ""
    against = (f"Against the {first}teacher: KL {last['kl']:.4f} nats per masked token, {cosine}"
               f"latency {speed['teacher'] / speed['student']:.2f} times lower.")
    if whole is None:
        against += f" Retention is {report.retention(last)}."
    against += _ahead(config, last)
    metrics = read_metrics(config.output, updates)
    setup.plot(last, updates, f"{report.names(config.teacher)} → student")
    example = _example(setup, models)
    seconds = metrics[-1]["seconds"] if metrics else 0.0
    tokens = setup.batches.tokens_before(updates)
    where = (f"Held-out: {last['masked']:,.0f} masked tokens of {len(setup.data.valid):,} rows, "
             "the same for every model; intervals by bootstrap over these rows, retention by the "
             f"same rows of both models. Latency: {config.sequence_length} tokens, "
             f"batch 1, {assembly.dtype}, median of 30. Trained {updates:,} updates on "
             f"{tokens:,} tokens in {seconds / 60:.1f} min.")
    if first:
        where += f" Teachers in their order: {_teachers(config)}; retention is against the first."
    if standing := setup.standing(updates):
        where = f"{standing} {where}"
    if states:
        where += f"\n\n{states.describe()}"
    sizes = {name: {"layers": len(part["layers"]), "parameters": report.count_parameters(part),
                    "latency": speed[name]} for name, (_, part) in models.items()}
    seal.write_json(output / "report.json", {
        "models": {name: sizes[name] | figures[name] for name in models},
        "updates": updates, "updates_of_run": max(updates, setup.steps),
        "rows_of_update": config.batch_size, "tokens": tokens, "seconds": seconds,
        "removals": removals, "states": states.figures() if states else {},
        "settings": setup.settings, "versions": report.versions()})
    chosen = f"## Layers\n\n{_describe_removals(removals)}\n\n" if removals else ""
    write_report(
        output, f"# Distillation of {report.names(config.teacher)}\n\n{text}\n\n{against}\n\n"
        f"{where}\n\n![losses](losses.png)\n\n{chosen}## Fill-mask\n\n{example}\n\n"
        f"{provenance(config)}")
    plot, page, folder = (store.join(config.output, name) for name in (
        "losses.png", "report.html", "student"))
    print(f"\n{text}\n\n{against}\n{where}\n\n{example}\n\nplot: {plot}\nreport: {page}\n"
          f"student: {folder}")


def _ahead(config: DistilConfig, student: dict[str, Any]) -> str:
    """Why a student can be better than its teacher, where it is; else ""."""
    ahead = [what for what, better in (
        ("retention is above 100 %", student.get("retention", 0) > 1),
        ("perplexity is below its teacher's", student["perplexity"] < student["teacher_perplexity"])
    ) if better]
    if not ahead:
        return ""
    labels = f", with its hidden tokens as labels (--alpha-mlm {config.alphas['mlm']:g})" if (
        config.alphas.get("mlm")) else ""
    return (f" The student's {' and its '.join(ahead)}: it was trained on this corpus{labels}, "
            "while the teacher stayed as it was; and perplexity, unlike top-1, counts how sure a "
            "model is where it is wrong.")


def _example(setup: Setup, models: dict[str, tuple[nnx.GraphDef, dict[str, Any]]]) -> str:
    """Teachers and student fill one hidden token of the first held-out document that has one."""
    tokenizer, valid = setup.tokenizer, setup.data.valid
    for row in range(min(len(valid), EVALUATION_ROWS)):
        ids = np.array(valid.rows[row][:valid.segments[row][0]], np.int32)
        ordinary = np.flatnonzero(~np.isin(ids, tokenizer.all_special_ids))
        if len(ordinary):
            break
    else:
        return "No held-out document begins with a token that could be hidden."
    position = int(ordinary[len(ordinary) // 2])
    truth, ids[position] = tokenizer.decode([int(ids[position])]), tokenizer.mask_token_id
    lines = [f"    {tokenizer.decode(ids[max(1, position - 20):position + 21])}", "",
             f"hidden: {truth}", ""]
    for name, model in models.items():
        if name == "student at start":
            continue
        answers = fill_mask(*model, ids, position)
        lines.append(f"- {name}: " + ", ".join(
            f"{tokenizer.decode([word])} ({share:.1%})" for word, share in answers))
    return "\n".join(lines)
