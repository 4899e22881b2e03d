"""What a run reached: figures in, a table for the terminal, losses.png out."""

import contextlib
import contextvars
import datetime
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from distilbert_jax.machine.progress import bar
from distilbert_jax.training.losses import LOSSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CALL: contextvars.ContextVar[str] = contextvars.ContextVar("call", default="")
UNKNOWN = 0.03  # share of unknown tokens that is warned of
COLUMNS = ("model", "layers", "parameters", "size [MB]", "top-1 [%]", "95 % interval", "perplexity",
           "retention [%]", "latency [ms]")


def count_parameters(params: dict[str, Any]) -> int:
    """Numbers in a nested dict of arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def describe_params(params: dict[str, Any]) -> str:
    """How deep and how large a model is, in words."""
    layers = len(params["layers"])
    return (f"{layers} layer{'s' * (layers != 1)} with {count_parameters(params):,} parameters")


def model_row(
    name: str, params: dict[str, Any], figures: Mapping[str, Any], teacher_top1: float | None,
    latency: float,
) -> tuple[str, ...]:
    """One line of the table.

    Args:
        name: of the model.
        params: its parameters, counted; the size is that of float32.
        figures: `top1` and `perplexity` from held_out, with the intervals of top1_intervals.
        teacher_top1: what 100 % retention is; None where retention is not defined.
        latency: milliseconds.
    """
    count, top1 = count_parameters(params), figures["top1"]
    retention = f"{100 * top1 / teacher_top1:.2f}" if teacher_top1 else "not defined"
    if teacher_top1 and "retention_interval" in figures:
        retention += f" ({between(figures['retention_interval'])})"
    return (name, str(len(params["layers"])), f"{count:,}", f"{4 * count / 1e6:.1f}",
            f"{100 * top1:.2f}", between(figures["top1_interval"]), f"{figures['perplexity']:.3f}",
            retention, f"{latency:.2f}")


def names(folders: Sequence[str]) -> str:
    """The names of models, without their places: a, b and c."""
    *others, last = (Path(folder).name for folder in folders)
    return f"{', '.join(others)} and {last}" if others else last


def between(pair: Sequence[float] | None) -> str:
    """The ends of an interval of shares, in per cent."""
    return "not defined" if pair is None else f"{100 * pair[0]:.2f} to {100 * pair[1]:.2f}"


def table(rows: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> str:
    """A Markdown table, aligned so that it also reads in a terminal."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    align = [str.ljust] + [str.rjust] * (len(columns) - 1)

    def line(cells: tuple[str, ...]) -> str:
        padded = (f(c, w) for f, c, w in zip(align, cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def plot(
    metrics: list[dict[str, int | float]], end: Mapping[str, Any], rows: tuple[int, int],
    path: Path, title: str,
) -> None:
    """Draw training losses, and held-out retention (without a teacher: top-1), over tokens seen.

    Args:
        metrics: lines of the log; their held-out figures are of a sample of the rows.
        end: `tokens_seen`, and figures of all rows with their intervals, at which the curve ends.
        rows: how many held-out rows there are in the sample, and in all.
        path: of the picture.
        title: of it.
    """
    names = {"train_loss": "total"} | {f"train_{name}": name for name in LOSSES}
    figure, left, right = _two_axes()
    for key, label in names.items():
        _draw(left, metrics, key, label)
    left.set_ylabel("training loss [nats; weighted total]")
    held = [m for m in metrics if "top1" in m and m["tokens_seen"] < end["tokens_seen"]] + [end]
    what = "retention" if all("retention" in m for m in held) else "top1"
    right.plot([m["tokens_seen"] for m in held], [100 * m[what] for m in held],
               marker="o", markersize=3, label=f"in training: {rows[0]:,} of {rows[1]:,} rows")
    low, high = end[f"{what}_interval"] or (end[what], end[what])
    # An interval by bootstrap need not hold the figure itself.
    error = [[max(0.0, 100 * (end[what] - low))], [max(0.0, 100 * (high - end[what]))]]
    right.errorbar(end["tokens_seen"], 100 * end[what], yerr=error, fmt="s", capsize=3,
                   label=f"at its end: all {rows[1]:,} rows, with the 95 % interval")
    right.set_ylabel({"retention": "held-out top-1, student / teacher [%]",
                      "top1": "held-out masked tokens guessed right [%]"}[what])
    _save(figure, path, title)


def plot_runs(
    runs: Mapping[str, list[dict[str, int | float]]], held_out: tuple[str, str], path: Path,
    title: str,
) -> None:
    """Draw the training loss of some runs, and one of their held-out figures, over tokens seen.

    Args:
        runs: name → lines of its log.
        held_out: the figure's name in these lines, and what is written beside the axis.
        path: of the picture.
        title: of it.
    """
    figure, left, right = _two_axes()
    for name, metrics in runs.items():
        _draw(left, metrics, "train_loss", name)
        _draw(right, metrics, held_out[0], name, marker="o", markersize=3)
    left.set_ylabel("training loss")
    right.set_ylabel(held_out[1])
    _save(figure, path, title)


def _two_axes() -> tuple["Figure", "Axes", "Axes"]:
    """A picture of two plots over the tokens seen; the left one, of losses, is logarithmic."""
    from matplotlib.figure import Figure  # not pyplot, which belongs to the notebook

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("tokens seen")
        axes.grid(alpha=0.3)
    return figure, left, right


def _draw(axes: "Axes", metrics: list[dict[str, int | float]], key: str, label: str,
          **style: Any) -> None:
    """Draw a figure of the log, if it is in there, over the tokens seen."""
    points = [(m["tokens_seen"], m[key]) for m in metrics if key in m]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1, **style)


def _save(figure: "Figure", path: Path, title: str) -> None:
    for axes in figure.axes:
        if axes.lines:  # a run that was stopped early has logged no update
            axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def held_out_line(figures: Mapping[str, Any]) -> str:
    """Held-out figures in words, for the terminal while training and for the model card."""
    line = (f"held-out top-1 {_with_ends(figures, 'top1')}, perplexity "
            f"{figures['perplexity']:.3f}")
    if "kl" in figures:
        line += (f"; teacher {figures['teacher_top1']:.2%}, retention {retention(figures)}; KL "
                 f"{figures['kl']:.4f} nats")
    return line


def _with_ends(figures: Mapping[str, Any], name: str) -> str:
    """A share in per cent, with its interval if there is one."""
    pair = figures.get(f"{name}_interval")
    return f"{figures[name]:.2%}" + (f" (95 % interval {between(pair)})" if pair else "")


def retention(figures: Mapping[str, Any]) -> str:
    """How much of the teacher's top-1 is kept, or why that says nothing."""
    if "retention" in figures:
        return _with_ends(figures, "retention")
    return ("not defined, since the teacher is no better than always the commonest token "
            f"({figures['most_frequent']:.2%})")


@contextlib.contextmanager
def called(how: str) -> Iterator[None]:
    """Within this context, in this thread, `how` is what the reports say they were made by."""
    token = _CALL.set(how)
    try:
        yield
    finally:
        _CALL.reset(token)


def call() -> str:
    """How the job that runs was called: a command line, or a call from Python."""
    return _CALL.get() or "called from Python"


def versions() -> str:
    """Where a number comes from: date, device and versions, in one line."""
    import flax
    import optax

    device = jax.devices()[0]
    return (f"{datetime.date.today()}, {jax.device_count()} x {device.device_kind} "
            f"({platform.machine()}, {os.cpu_count()} cores), Python "
            f"{platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}, "
            f"optax {optax.__version__}")


def describe_data(manifest: dict[str, Any]) -> str:
    """A line for each part of a prepared corpus, and one for where its documents come from."""
    length = manifest["request"]["sequence_length"]
    lines = [f"{word}: {count:,} documents" for word, count in manifest["documents"]]
    lines += [f"{word}: {count:,} records without the field of the text skipped"
              for word, count in manifest.get("skipped", ()) if count]
    if count := manifest.get("overlap"):
        lines.append(f"warning: {count:,} documents of --corpus are in --valid too, " + (
            "too many to leave out: held-out figures are of texts that were learnt"
            if manifest["overlap_trained_on"] else "and are left out of training"))
    for name, part in (("train", "train"), ("held out", "valid")):
        m = manifest[part]
        lines.append(
            f"{name}: {m['documents']:,} documents, {m['characters']:,} characters → "
            f"{m['pieces']:,} pieces, {m['tokens']:,} tokens ({m['unknown']:,} unknown) → "
            f"{m['rows']:,} rows, {m['tokens'] / (m['rows'] * length):.1%} full")
        share = m["unknown"] / max(m["tokens"] - 2 * m["pieces"], 1)
        if share > UNKNOWN:
            lines.append(f"warning: {share:.1%} of its tokens are unknown to the tokenizer, e.g. "
                         f"of {m.get('sample', '')!r}")
    return "\n".join(lines)


@contextlib.contextmanager
def counting(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar without a known end; yields progress(documents, tokens), both so far."""
    with bar(desc=label, unit=" tokens", unit_scale=True, delay=1, leave=False) as counter:

        def progress(documents: int, tokens: int) -> None:
            counter.set_postfix_str(f"{documents:,} documents", refresh=False)
            counter.update(tokens - counter.n)

        yield progress
