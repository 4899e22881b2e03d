"""Judge a model, trained here or elsewhere: on labelled data, or by the words that it guesses."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax

from distilbert_jax.data.prepare import prepare
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import intervals, report
from distilbert_jax.evaluation.held_out import held_out_rows, top1_intervals
from distilbert_jax.jobs import task_report
from distilbert_jax.jobs.judge_sentences import judge_sentences
from distilbert_jax.jobs.task_data import read_task
from distilbert_jax.jobs.task_model import answered, check_tokenizers, on_devices, read_json
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.lock import hold
from distilbert_jax.machine.sharding import make_mesh, replicated
from distilbert_jax.models import hub
from distilbert_jax.task_config import EvaluateConfig
from distilbert_jax.training.assemble import jitted_eval_step
from distilbert_jax.training.labels import vocabulary


def evaluate(config: EvaluateConfig) -> dict[str, float | None]:
    """Print the figures of `config.model`, and leave them in `config.output`.

    Returns:
        Its metrics by name: of a task, whose own ones `score` is the mean of, or those of
        evaluation/held_out.py.

    Raises:
        UserError: anything in the settings or files that the user can mend.
    """
    if store.is_remote(config.output):
        raise UserError(f"--output {config.output}: figures are written to a folder of this "
                        "machine")
    if config.output:
        _check_output(config.output)
    judge = _on_texts if config.on_texts else (
        _of_sentences if config.task == "sts" else _on_task)
    with hold(config.output) if config.output else contextlib.nullcontext():
        return judge(config)


def _on_task(config: EvaluateConfig) -> dict[str, float | None]:
    """The figures of a model that was trained for a task, and its answers."""
    model = hub.load_task(config.model)
    tokenizer = load_tokenizer(config.model, model.config.vocab_size)
    mesh = make_mesh(config.mesh)
    if not config.kind:
        config = dataclasses.replace(config, kind=model.config.task)
    task = read_task(config, tokenizer, model.config.positions, model.labels, dev=config.dev)
    if task.kind != model.config.task:
        raise UserError(f"--model {config.model} was trained to {model.config.task}, the data are "
                        f"there to {task.kind}")
    found = answered(config, task, mesh, model, "dev")
    figures = task_report.figures(task, "dev", found)
    drawn = intervals.drawn(task.task.metrics, task.parts["dev"].truth,
                            {"model": [task_report.given(task, "dev", found)]})["model"]
    for name, value in figures.items():
        print(f"{name}: " + ("not defined" if value is None else f"{value:.4f}"))
    if pair := intervals.interval(drawn):
        print(f"95 % interval of the score, over examples: {pair[0]:.4f} to {pair[1]:.4f}")
    if output := _write(config, {
            "model": Path(config.model).name, "task": task.name, "metrics": figures,
            "examples": len(task.parts["dev"]), "interval": pair}):
        task_report.write_predictions(output / "predictions.tsv", task, "dev", found)
    return figures


def _of_sentences(config: EvaluateConfig) -> dict[str, float | None]:
    """The figures of a sentence encoder, beside its teacher if one is given."""
    figures, content = judge_sentences(config)
    for name, value in figures.items():
        print(f"{name}: " + ("not defined" if value is None else f"{value:.4f}"))
    _write(config, {"model": Path(config.model).name, "metrics": figures} | content)
    return figures


def _check_output(output: str) -> None:
    """Raise a UserError if files would be replaced that are not those of a judgement."""
    folder = Path(output)
    ours = "model" in read_json(folder / "metrics.json")
    if list(folder.glob("seed-*")) or not ours and any(
            (folder / name).exists() for name in ("metrics.json", "predictions.tsv")):
        raise UserError(f"--output {output} holds files that were not made by this command and "
                        "would be replaced: name another")


def _write(config: EvaluateConfig, content: dict[str, Any]) -> Path | None:
    """Write metrics.json, by one process and where a folder is given, which is returned."""
    if not config.output or jax.process_index():
        return None
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    seal.write_json(output / "metrics.json", content | {"versions": report.versions()})
    return output


def _on_texts(config: EvaluateConfig) -> dict[str, float | None]:
    """The held-out figures of a masked language model, beside a teacher if one is given.

    What is judged on is what a run with the same --corpus and --valid holds out; of --valid alone,
    all of it.
    """
    models = [_language_model(config, name) for name in (config.model, config.teacher) if name]
    tokenizer = load_tokenizer(config.model, models[0].config.vocab_size)
    for teacher in models[1:]:
        check_tokenizers(config, tokenizer, teacher)
    mesh = make_mesh(config.mesh)
    data = dataclasses.replace(config, corpus=config.corpus or config.valid)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(data, tokenizer, folder)
        words = vocabulary(prepared.valid.counts, tokenizer.all_special_ids,
                           tokenizer.mask_token_id)
        graphs, params = zip(*(on_devices(config, mesh, model) for model in models),
                             strict=True)
        step = jitted_eval_step(graphs[0], graphs[1] if config.teacher else None, mesh)
        figures, rows = held_out_rows(
            step, params[0], {"teacher": params[1]} if config.teacher else {},
            jax.device_put(words, replicated(mesh)), prepared.valid, mesh)
    correct = {"model": rows["correct"]}
    if config.teacher:
        correct["teacher"] = rows["teacher_correct"]
    ends = top1_intervals(rows["masked"], correct)["model"]
    print(report.held_out_line(figures | ends))
    print(f"on {int(figures['masked']):,} hidden tokens; intervals by bootstrap over "
          f"{len(rows['masked']):,} rows")
    _write(config, {"model": Path(config.model).name, "metrics": figures, "intervals": ends,
                    "teacher": Path(config.teacher).name if config.teacher else None})
    return figures


def _language_model(config: EvaluateConfig, name: str) -> hub.Pretrained:
    model = hub.load(name)
    if not model.config.mlm_head:
        raise UserError(f"{name} has no masked-language-model head to judge on texts: give --task "
                        "and --data, or --dev, for a model that was trained for a task")
    if config.sequence_length > model.config.positions:
        raise UserError(f"--sequence-length {config.sequence_length} is beyond the "
                        f"{model.config.positions} positions of {name}")
    return model
