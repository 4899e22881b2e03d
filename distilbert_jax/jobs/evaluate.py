"""Judge a model that was trained for a task, here or elsewhere, on labelled data."""

import dataclasses
from pathlib import Path

import jax

from distilbert_jax.config import EvaluateConfig
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import intervals, report
from distilbert_jax.jobs import task_report
from distilbert_jax.jobs.task_data import read_task
from distilbert_jax.jobs.task_model import answered
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.sharding import make_mesh
from distilbert_jax.models import hub


def evaluate(config: EvaluateConfig) -> dict[str, float | None]:
    """Print the figures of `config.model`, and leave them and its answers in `config.output`.

    Returns:
        Its metrics by name; `score` is the mean of the task's own.

    Raises:
        UserError: anything in the settings or files that the user can mend.
    """
    if not config.model:
        raise UserError("--model is missing: give the folder of a model trained for a task")
    model = hub.load_task(config.model)
    tokenizer = load_tokenizer(config.model, model.config.vocab_size)
    mesh = make_mesh(config.mesh)
    if config.output:
        store.check_writable(config.output)
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
    if config.output and jax.process_index() == 0:
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        seal.write_json(output / "metrics.json", {
            "model": Path(config.model).name, "task": task.name, "examples": len(task.parts["dev"]),
            "metrics": figures, "interval": pair, "versions": report.versions()})
        task_report.write_predictions(output / "predictions.tsv", task, "dev", found)
    return figures
