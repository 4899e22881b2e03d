"""Ablation: one distillation several times, each row with other settings, and a table of them.

Each run is a distillation in a folder of its own, which goes on where it was stopped; the corpus is
prepared once for all of them, and a teacher's states are kept once for all runs that need the same.
"""

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from distilbert_jax.config import AblationConfig, DistilConfig
from distilbert_jax.data.prepare import is_prepared, prepare
from distilbert_jax.data.tokenize import load_tokenizer
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.evaluation.page import write_report
from distilbert_jax.jobs.distil import distil
from distilbert_jax.jobs.task_model import read_json
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.lock import hold
from distilbert_jax.machine.progress import say
from distilbert_jax.training.losses import LOSSES
from distilbert_jax.training.objective import Objective

LEVEL = 0.95  # of intervals
Rows = Mapping[str, Mapping[str, Any]]  # name of a row → the settings that it changes


def ablate(config: AblationConfig, rows: Rows) -> Path:
    """Run all rows with all seeds, and leave a report, report.json and ablation.png.

    Args:
        config: of what is not changed.
        rows: the first is what the others are compared with.

    Returns:
        report.md.

    Raises:
        UserError: as for distil; a row that no run can have; a bucket.
        Interrupted: stopped by a signal; the same command goes on.
    """
    if store.is_remote(config.output):
        raise UserError(f"--output {config.output}: an ablation is written to a folder of this "
                        "machine")
    if not config.teacher:
        raise UserError("--teacher is missing: give a Hugging Face folder")
    if not config.corpus:
        raise UserError("--corpus is missing: give text or JSON-lines files, a datasets name ...")
    runs = {(name, seed): _run(config, name, changes, seed)
            for seed in range(config.seed, config.seed + config.seeds)
            for name, changes in rows.items()}
    output = Path(config.output)
    with hold(config.output):
        data = _data(config)
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for number, ((name, seed), run) in enumerate(runs.items(), 1):
        say(f"run {number} of {len(runs)}: {name}, seed {seed}, in {run.output}")
        done[name].append(_figures(dataclasses.replace(run, corpus=data, valid=(), mix=())))
    content = {"rows": {name: dict(rows[name]) | {"figures": found}
                        for name, found in done.items()},
               "command": report.call(), "versions": report.versions()}
    seal.write_json(output / "report.json", content)
    _plot(done, output / "ablation.png")
    page = _page(config, done, content)
    write_report(output, page)
    print(f"\n{page}\nreport: {output / 'report.html'}\nplot: {output / 'ablation.png'}")
    return output / "report.md"


def _run(config: AblationConfig, name: str, changes: Mapping[str, Any], seed: int) -> DistilConfig:
    """The settings of one run; an unknown one, or one that cannot be, is a UserError."""
    known = {field.name: getattr(config, field.name)
             for field in dataclasses.fields(DistilConfig)}
    if unknown := set(changes) - set(known):
        raise UserError(f"row {name} changes {', '.join(sorted(unknown))}, which is no setting of "
                        "distil")
    folder = Path(config.output, name.replace(" ", "-").replace("/", "-"), f"seed-{seed}")
    try:
        run = DistilConfig(**known | dict(changes) | {"seed": seed, "output": str(folder)})
    except UserError as error:
        raise UserError(f"row {name}: {error}") from error
    if not run.kept_maskings or run.states:
        return run
    return dataclasses.replace(run, states=str(Path(config.output, "states", _states(run))))


def _states(run: DistilConfig) -> str:
    """The name of the folder of a run's teacher states: one for all runs that need the same.

    It is made of all that states depend on (their request, see TeacherStates) and a row can change.
    """
    objective = Objective(weights={name: run.alphas[name] for name in LOSSES
                                   if run.alphas.get(name)},
                          restrict_ce_to_mask=run.restrict_ce_to_mask)
    needed = (run.teacher, run.kept_maskings, run.mask_rate, run.dtype, run.state_dtype,
              objective.reads)
    return f"seed-{run.seed}-{hashlib.sha256(json.dumps(needed).encode()).hexdigest()[:12]}"


def _data(config: AblationConfig) -> tuple[str, ...]:
    """The corpus, prepared once: the word that names it for all runs."""
    folder = store.join(config.output, "data")
    with report.counting("prepare") as progress:
        prepare(config, load_tokenizer(config.teacher[0], None), folder, progress)
    return config.corpus if is_prepared(config.corpus) else (folder,)


def _figures(run: DistilConfig) -> dict[str, Any]:
    """What a run reaches; one that is finished is judged again, and refused if it is another."""
    distil(run)
    found = read_json(Path(run.output) / "report.json")
    return found["models"]["student"] | {
        "start": found["models"]["student at start"]["top1"],
        "teacher": found["models"]["teacher"]["top1"], "tokens": found["tokens"],
        "seconds": found["seconds"], "seed": run.seed}


def difference(one: list[float], other: list[float]) -> tuple[float, tuple[float, float] | None]:
    """The mean of one - other, seed by seed, and its interval (Student's t); None of one seed."""
    gaps = np.subtract(one, other)
    mean = float(gaps.mean())
    if len(gaps) < 2:
        return mean, None
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, len(gaps) - 1) * scipy.stats.sem(gaps)
    return mean, (mean - float(half), mean + float(half))


def _page(
    config: AblationConfig, done: dict[str, list[dict[str, Any]]], content: dict[str, Any]
) -> str:
    """report.md."""
    first = next(iter(done))
    rows, said = [], []
    for name, found in done.items():
        top1 = [100 * run["top1"] for run in found]
        start, teacher = 100 * found[0]["start"], found[0]["teacher"]
        kept = [100 * run["retention"] for run in found if "retention" in run]
        gap, ends = difference(top1, [100 * run["top1"] for run in done[first]])
        interval = f" ({ends[0]:+.2f} to {ends[1]:+.2f})" if ends else ""
        rows.append((
            name, f"{start:.2f}", f"{statistics.median(top1):.2f}",
            f"{min(top1):.2f} to {max(top1):.2f}",
            f"{statistics.median(kept):.2f}" if kept else "not defined",
            f"{gap:+.2f}{interval}" if name != first else "",
            f"{statistics.median(run['tokens'] for run in found) / 1e6:.2f}",
            f"{statistics.median(run['seconds'] for run in found) / 60:.1f}"))
        if ends and name != first:
            said.append(f"- {name}: " + (
                "no difference is shown, the interval holds 0" if ends[0] <= 0 <= ends[1] else
                "better" if gap > 0 else "worse") + ".")
    columns = ("row", "start", "top-1 [%]", "min to max", "kept [%]", f"over {first} [points]",
               "M tokens", "min")
    return (f"# Ablation of {report.names(config.teacher)}\n\n{report.table(rows, columns)}\n\n"
            f"{config.seeds} seed(s), medians; differences are means over pairs of one seed, with "
            f"{LEVEL:.0%} intervals by Student's t; held-out top-1 of {found[0]['masked']:,.0f} "
            f"masked tokens, of which the {'first ' * (len(config.teacher) > 1)}teacher guesses "
            f"{teacher:.2%}.\n\n"
            + "\n".join(said) + f"\n\n![ablation](ablation.png)\n\n`{content['command']}`\n\n"
            f"{content['versions']}\n")


def _plot(done: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A point for each run, a line for each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(done) + 1.5), layout="constrained")
    axes = figure.subplots()
    for place, found in enumerate(done.values()):
        if values := [100 * run["retention"] for run in found if "retention" in run]:
            axes.plot(values, [place] * len(values), "o", alpha=0.6)
            axes.plot(statistics.median(values), place, "k|", markersize=14)
    axes.set_yticks(range(len(done)), list(done))
    axes.invert_yaxis()
    axes.set_xlabel("held-out top-1, student / teacher [%]")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
