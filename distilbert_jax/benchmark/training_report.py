"""What training.py measured: a table, a JSON file, and plots; and the sweep over many shapes."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from distilbert_jax.benchmark.problem import problem_of
from distilbert_jax.benchmark.settings import TrainBenchmark
from distilbert_jax.benchmark.training import Measured, measure

# Panel of the sweep → a field, its values, and what it does to the settings.
BATCHES, LENGTHS, LAYERS = (4, 8, 16, 32), (32, 64, 128, 256), (2, 4, 8)


def run(config: TrainBenchmark) -> str:
    """Measure once, leave `train.json` and `train.png` in `config.output`, and give the table."""
    measured = measure(problem_of(config), config.sides, config.rounds)
    text = table(measured)
    _write(config, "train.json", dataclasses.asdict(measured))
    _bars(measured, Path(config.output) / "train.png", _title(config, measured))
    return text


def table(measured: Measured) -> str:
    """A line for each side, in Markdown."""
    columns = ("side", "tokens/s", "ours is", "padding", "utilisation", "process MB", "device MB",
               "compiled MB", "compile s", "first update s", "dtype", "devices")
    lines = [columns, ("---", *["--:"] * (len(columns) - 1))]
    for name, side in measured.sides.items():
        lines.append((
            name, f"{side.tokens_per_second:,.0f}", f"{measured.ratio(name):.2f} x",
            f"{side.padding:.1%}", f"{side.utilisation:.1%}", f"{side.process_bytes / 1e6:,.0f}",
            f"{side.device_bytes / 1e6:,.0f}", f"{side.compiled_bytes / 1e6:,.0f}",
            f"{side.compile_seconds:.1f}", f"{side.first_update_seconds:.1f}", side.dtype,
            str(side.devices)))
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (f"{rows}\n\nmatrix products: {measured.product_rate / 1e9:,.1f} GFLOP/s; load of the "
            f"machine before: {measured.load:.1f}")


def _title(config: TrainBenchmark, measured: Measured) -> str:
    what = "documents" if config.corpus else "full rows"
    return (f"{config.shape}, {what} of {config.sequence_length} tokens, "
            f"{config.batch_size} rows an update, {measured.sides['ours'].dtype}")


def _bars(measured: Measured, path: Path, title: str) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, side in measured.sides.items():
        bar = axes.bar(name, side.tokens_per_second)
        axes.bar_label(bar, [f"{side.tokens_per_second:,.0f}"])
        axes.plot([name] * len(side.rounds), side.rounds, "k.", markersize=3)
    axes.set(ylabel="real tokens per second (dots: each round)", title=title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sweep(config: TrainBenchmark) -> str:
    """Measure over batch, row length, layers and devices; leave `sweep.json` and `sweep.png`.

    Everything but one is what `config` says. Devices are ours alone: PyTorch has one process.
    """
    problem = problem_of(config)
    layers = {n: dataclasses.replace(problem, teacher=dataclasses.replace(
        problem.teacher, num_hidden_layers=n), student=dataclasses.replace(
        problem.student, num_hidden_layers=n // 2)) for n in LAYERS}
    cores = os.cpu_count() or 1
    panels = {
        "rows an update": {n: problem_of(dataclasses.replace(config, batch_size=n))
                           for n in BATCHES},
        "tokens in a row": {n: problem_of(dataclasses.replace(config, sequence_length=n))
                            for n in LENGTHS},
        "layers of the teacher": layers,
        "devices (cores of one CPU)": {
            n: dataclasses.replace(problem, devices=n) for n in range(1, cores + 1)
            if config.batch_size % n == 0}}
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name, points in panels.items():
        sides = config.sides[:1] if name.startswith("devices") else config.sides
        found[name] = {n: {side: figures.tokens_per_second for side, figures in measure(
            point, sides, config.rounds).sides.items()} for n, point in points.items()}
    _write(config, "sweep.json", {"tokens_per_second": found})
    _panels(found, Path(config.output) / "sweep.png",
            f"{config.shape}: {config.batch_size} rows of {config.sequence_length} tokens, "
            "where nothing else is said")
    return "\n".join(f"{name} {n}: " + ", ".join(
        f"{side} {speed:,.0f} tokens/s" for side, speed in speeds.items())
        for name, points in found.items() for n, speeds in points.items())


def _panels(found: dict[str, dict[int, dict[str, float]]], path: Path, title: str) -> None:
    plt = _pyplot()
    figure, all_axes = plt.subplots(1, len(found), figsize=(14, 3.6), layout="constrained")
    for axes, (name, points) in zip(all_axes, found.items(), strict=True):
        for side in next(iter(points.values())):
            axes.plot(list(points), [speeds[side] for speeds in points.values()], "o-", label=side,
                      clip_on=False)
        axes.set(xlabel=name, ylim=(0, None), xticks=list(points))
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("real tokens per second")
    all_axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _write(config: TrainBenchmark, name: str, found: dict[str, Any]) -> None:
    settings = {"settings": dataclasses.asdict(config)}
    Path(config.output, name).write_text(json.dumps(settings | found, indent=1) + "\n")
