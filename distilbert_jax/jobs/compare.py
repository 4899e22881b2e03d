"""Finished runs → one table and one plot: what each student keeps, and how much faster it is.

Figures are those that each job has left, of masked language models, tasks and sentence encoders
alike, or that a JSON file lists, of runs that are gone; nothing is computed again.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distilbert_jax.errors import UserError, choose, first_line
from distilbert_jax.evaluation import report
from distilbert_jax.jobs.task_model import read_json

COLUMNS = ("run", "figure", "teacher", "student", "kept", "layers", "parameters", "times as fast")
PLOT = "compare.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of one run; in a JSON file of runs an object with these names."""

    run: str
    figure: str
    teacher: float | None  # None: it had no teacher
    student: float | None  # None: not defined
    kept: float | None  # of the teacher's figure; None: its report does not define it
    interval: Sequence[float] | None = None  # of what is kept
    layers: Sequence[int]  # of the teacher, of the student
    parameters: int | None = None  # of the student
    faster: float | None
    source: str = ""  # where the command of a listed run stands


def compare(folders: Sequence[str], output: str = ".") -> str:
    """The table of the runs in these folders; the plot is written to `output`.

    Args:
        folders: outputs of distil, finetune or embed, or JSON files that list runs.
        output: folder of compare.png.

    Raises:
        UserError: a folder holds no finished run, a file no list of runs, or `output` cannot be
            written.
    """
    lines = [line for folder in folders for line in (
        _listed(folder) if folder.endswith(".json") else _lines(folder))]
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        plotted = _plot([line for line in lines if line.kept and line.faster], Path(output, PLOT))
    except OSError as error:
        raise UserError(f"--output {output} cannot be used: {error.strerror}") from error
    table = report.table([_row(line) for line in lines], COLUMNS)
    return f"{table}\n\nplot: {Path(output, PLOT)}" if plotted else table


def _lines(folder: str) -> Iterator[Line]:
    """The figures of a run, whichever job has made it."""
    own = read_json(Path(folder, "report.json"))
    found = read_json(Path(folder, "metrics.json"))
    if "student at start" in own.get("models", {}):
        yield from _masked(folder, own["models"])
    elif "latency_ms" in found:
        yield from _task(folder, found)
    elif "sentences_per_second" in found:
        yield from _sentences(folder, found)
    else:
        raise UserError(f"{folder} holds no finished run of distil, finetune or embed: name "
                        "the --output of one")


def _listed(path: str) -> Iterator[Line]:
    """The runs in a JSON file: a list of objects that are each a Line."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from error
    fields = {field.name: field.default is dataclasses.MISSING
              for field in dataclasses.fields(Line)}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        where = f"{path}, run {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {entry!r}: an object is expected")
        for name in entry:
            choose(name, fields, f"figure in {where}:")
        if missing := [name for name, needed in fields.items() if needed and name not in entry]:
            raise UserError(f"{where} lacks {', '.join(missing)}")
        for name, value in entry.items():
            _check(f"{where}: {name}", name, value)
        yield Line(**entry)


def _check(what: str, name: str, value: Any) -> None:
    """Raise a UserError unless a figure of a listed run is what a Line has there."""
    if name in ("interval", "layers"):
        if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
            raise UserError(f"{what} is {value!r}: two numbers are expected, as in [1, 2]")
    elif name in ("run", "figure", "source"):
        if not isinstance(value, str):
            raise UserError(f"{what} is {value!r}: a text is expected")
    elif not _is_number(value):
        raise UserError(f"{what} is {value!r}: a number is expected")


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and math.isfinite(value))


def _masked(folder: str, models: dict[str, Any]) -> Iterator[Line]:
    teacher, student = models["teacher"], models["student"]
    yield Line(run=folder, figure="top-1", teacher=teacher["top1"], student=student["top1"],
               kept=student.get("retention"),
               interval=student.get("retention_interval"),
               layers=(teacher["layers"], student["layers"]), parameters=student["parameters"],
               faster=teacher["latency"] / student["latency"])


def _task(folder: str, found: dict[str, Any]) -> Iterator[Line]:
    dev, speed, size = found["parts"]["dev"], found["latency_ms"], found["size"]
    for role in dev:
        if role != "teacher":
            teacher = dev.get("teacher", {}).get("score")
            yield Line(
                run=folder if role in ("distilled", "model") else f"{folder}, {role}",
                figure=f"{found['task']}: {', '.join(found['score'])}", teacher=teacher,
                student=dev[role]["score"], kept=dev[role].get("retention"),
                interval=dev[role].get("retention_interval"),
                layers=tuple(size[name]["layers"] for name in ("teacher", role) if name in size),
                parameters=size[role]["parameters"],
                faster=speed["teacher"] / speed[role] if "teacher" in speed else None)


def _sentences(folder: str, found: dict[str, Any]) -> Iterator[Line]:
    size, speed = found["size"], found["sentences_per_second"]
    for name, part in found["pairs"].items():
        yield Line(
            run=folder, figure=f"Spearman {name}", teacher=part["teacher"]["value"],
            student=part["student"]["value"],
            kept=part["student"].get("retention"),
            interval=part["student"].get("retention_interval"),
            layers=(size["teacher"]["layers"], size["student"]["layers"]),
            parameters=size["student"]["parameters"],
            faster=speed["student"][-1] / speed["teacher"][-1])


def _row(line: Line) -> tuple[str, ...]:
    kept = "" if line.kept is None else f"{line.kept:.2%}"
    if kept and line.interval:
        kept += " ({:.2%} to {:.2%})".format(*line.interval)
    return (line.run, line.figure, _percent(line.teacher), _percent(line.student), kept,
            " → ".join(map(str, line.layers)), f"{line.parameters:,}" if line.parameters else "",
            f"{line.faster:.2f}" if line.faster else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _plot(lines: list[Line], path: Path) -> bool:
    """Draw what is kept over how much faster the student is; False if there is nothing to draw."""
    from matplotlib.figure import Figure

    if not lines:
        return False
    figure = Figure(figsize=(8, 4 + 0.2 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        kept = 100 * line.kept
        low, high = (100 * x for x in line.interval or (line.kept, line.kept))
        # An interval by bootstrap need not hold the figure itself.
        error = [[max(0.0, kept - low)], [max(0.0, high - kept)]]
        axes.errorbar(
            line.faster, kept, yerr=error if line.interval else None, fmt="o", capsize=4,
            fillstyle="full" if line.interval else "none", label=(
                f"{Path(line.run).name}, {line.figure}, {' → '.join(map(str, line.layers))} "
                "layers" + ("" if line.interval else "; no interval")))
    axes.axhline(100, color="grey", linewidth=1)
    axes.set(xlabel="times as fast as the teacher", ylabel="kept of the teacher's figure [%]")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center")
    figure.savefig(path, dpi=120)
    return True
