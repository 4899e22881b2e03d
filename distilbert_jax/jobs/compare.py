"""Finished runs → one table and one plot: what each student keeps, and how much faster it is.

Figures are those that each job has left, of masked language models, tasks and sentence encoders
alike; nothing is computed again.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.jobs.task_model import read_json

COLUMNS = ("run", "figure", "teacher", "student", "kept", "layers", "parameters", "times as fast")
PLOT = "compare.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of one run."""

    run: str
    figure: str
    teacher: float | None  # None: it had no teacher
    student: float | None  # None: not defined
    interval: Sequence[float] | None = None  # of student / teacher
    layers: tuple[int, ...]  # of the teacher, of the student
    parameters: int  # of the student
    faster: float | None

    @property
    def kept(self) -> float | None:
        """The student's share of the teacher's figure."""
        return self.student / self.teacher if self.teacher and self.student is not None else None


def compare(folders: Sequence[str], output: str = ".") -> str:
    """The table of the runs in these folders; the plot is written to `output`.

    Args:
        folders: outputs of distil, finetune or embed.
        output: folder of compare.png.

    Raises:
        UserError: a folder holds no finished run, or `output` cannot be written.
    """
    lines = [line for folder in folders for line in _lines(folder)]
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


def _masked(folder: str, models: dict[str, Any]) -> Iterator[Line]:
    teacher, student = models["teacher"], models["student"]
    yield Line(run=folder, figure="top-1", teacher=teacher["top1"], student=student["top1"],
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
                student=dev[role]["score"], interval=dev[role].get("retention_interval"),
                layers=tuple(size[name]["layers"] for name in ("teacher", role) if name in size),
                parameters=size[role]["parameters"],
                faster=speed["teacher"] / speed[role] if "teacher" in speed else None)


def _sentences(folder: str, found: dict[str, Any]) -> Iterator[Line]:
    size, speed = found["size"], found["sentences_per_second"]
    for name, part in found["pairs"].items():
        yield Line(
            run=folder, figure=f"Spearman {name}", teacher=part["teacher"]["value"],
            student=part["student"]["value"],
            interval=part["student"].get("retention_interval"),
            layers=(size["teacher"]["layers"], size["student"]["layers"]),
            parameters=size["student"]["parameters"],
            faster=speed["student"][-1] / speed["teacher"][-1])


def _row(line: Line) -> tuple[str, ...]:
    kept = "" if line.kept is None else f"{line.kept:.2%}"
    if kept and line.interval:
        kept += " ({:.2%} to {:.2%})".format(*line.interval)
    return (line.run, line.figure, _percent(line.teacher), _percent(line.student), kept,
            " → ".join(map(str, line.layers)), f"{line.parameters:,}",
            f"{line.faster:.2f}" if line.faster else "")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _plot(lines: list[Line], path: Path) -> bool:
    """Draw what is kept over how much faster the student is; False if there is nothing to draw."""
    from matplotlib.figure import Figure

    if not lines:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        kept = 100 * line.kept
        low, high = (100 * x for x in line.interval or (line.kept, line.kept))
        # An interval by bootstrap need not hold the figure itself.
        error = [[max(0.0, kept - low)], [max(0.0, high - kept)]]
        axes.errorbar(line.faster, kept, yerr=error, fmt="o", capsize=3, label=(
            f"{Path(line.run).name}, {line.figure}, {' → '.join(map(str, line.layers))} layers"))
    axes.axhline(100, color="grey", linewidth=1)
    axes.set(xlabel="times as fast as the teacher", ylabel="kept of the teacher's figure [%]")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return True
