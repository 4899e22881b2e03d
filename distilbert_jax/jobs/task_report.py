"""What a training for a task leaves: metrics.json, predictions.tsv, a report and its pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbert_jax.benchmark.latency import latencies
from distilbert_jax.evaluation import answers, intervals, report
from distilbert_jax.evaluation.metrics import METRICS, compute
from distilbert_jax.evaluation.page import FILES as REPORTS
from distilbert_jax.evaluation.page import write_report
from distilbert_jax.evaluation.report import between
from distilbert_jax.export.card import Result, card
from distilbert_jax.jobs.provenance import provenance
from distilbert_jax.machine import seal
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.training.metrics_log import read_metrics

if TYPE_CHECKING:
    from distilbert_jax.jobs.task_data import TaskInput
    from distilbert_jax.jobs.task_model import Trained
    from distilbert_jax.task_config import FinetuneConfig

COLUMNS = ("model", "layers", "parameters", "score", "min to max", "95 % interval", "retention",
           "latency [ms]")
SHOWN = 1000  # dev examples that are judged while training
FILES = ("metrics.json", "predictions.tsv", "test_predictions.tsv", "submission.tsv",
         "confusion.png", "calibration.png", "losses.png", *REPORTS)
NAMES = {"teacher": "teacher", "plain": "student, fine-tuned plainly",
         "distilled": "student, distilled", "model": "model"}


def line(examples: int, figures: dict[str, float]) -> str:
    """Figures in words, for the terminal while training, of so many dev examples or a sample."""
    return f"dev ({min(SHOWN, examples):,} of {examples:,} examples) " + ", ".join(
        f"{name} {value:.4f}" for name, value in figures.items())


def seconds(folder: Path) -> float:
    """Seconds of training, over all continuations."""
    lines = read_metrics(folder)
    return float(lines[-1]["seconds"]) if lines else 0.0


def model_card(task: "TaskInput", role: str, config: "FinetuneConfig", standing: str,
               judged: dict[str, Any] | None = None) -> str:
    """The model card; with figures where those of all seeds are known (_judge's, of dev)."""
    kind = "token-classification" if task.kind == "tag" else "text-classification"
    teacher = ", learning from a fine-tuned teacher" if role == "distilled" else ""
    source = Path(config.model or config.teacher).name
    text = (f"Trained by distilbert_jax from `{source}` on {len(task.parts['train']):,} labelled "
            f"examples{teacher}; seed {config.seed}. {standing}".rstrip() + "\n\n"
            + (f"Labels: {', '.join(task.labels)}.\n\n" if task.labels else ""))
    results = []
    if judged:
        first = {name: value for name, value in judged[role]["seeds"][0].items()
                 if name in task.task.metrics and value is not None}
        # The interval is of the mean of the metrics, over all seeds.
        alone = len(task.task.metrics) == len(judged[role]["seeds"]) == 1
        ends = judged[role]["interval"] if alone else None
        results = [Result(METRICS[name].hub or name, METRICS[name].text, f"{task.name}, dev",
                          value, ends) for name, value in first.items()]
        said = f" (95 % interval {between(ends)})" if ends else ""
        text += "".join(f"- {METRICS[name].text} on {len(task.parts['dev']):,} dev examples: "
                        f"{100 * value:.2f}{said}\n" for name, value in first.items())
        if kept := judged[role].get("retention"):
            text += (f"- kept of the teacher's score: {_percent(kept)} % (95 % interval "
                     f"{between(judged[role]['retention_interval'])}; {len(judged[role]['seeds'])}"
                     " seeds)\n")
        text += "\n" if first else ""
    return card(kind, task.name, text + report.versions(), folder="model",
                origin=config.model or config.teacher, results=results,
                corpus=(*config.train, *config.unlabelled))


def given(task: "TaskInput", part: str, found: np.ndarray) -> list[Any]:
    """A model's answers to a part: class numbers, numbers, or tags of words."""
    content = task.parts[part]
    words = [len(texts) for texts in content.raw.texts] if task.kind == "tag" else []
    return answers.answers(task.kind, found, content.examples, words, task.labels)


def figures(task: "TaskInput", part: str, found: np.ndarray) -> dict[str, float | None]:
    """All metrics of a part that has labels; `score` is the mean of the task's own."""
    names = [name for name in task.metrics if name != "f1" or len(task.labels) == 2]
    truth, said = task.parts[part].truth, given(task, part, found)
    own = compute(task.task.metrics, truth, said)
    return compute(names, truth, said) | {"score": own["score"]}


def collapsed(task: "TaskInput", found: np.ndarray) -> bool:
    """Whether a model gives the same answer to everything."""
    return len({str(answer) for answer in given(task, "dev", found)}) == 1


def write(config: "FinetuneConfig", task: "TaskInput", runs: dict[str, list["Trained"]],
          main: str) -> None:
    """Write all that is left beside the models, their card, and print the result."""
    output = Path(config.output)
    judged = {part: _judge(task, part, runs) for part in ("dev", "test")
              if part in task.parts and task.parts[part].truth is not None}
    speed = latencies({role: (graphdef(own[0].model.config, "float32"), own[0].model.params)
                       for role, own in runs.items()},
                      int(min(128, task.parts["dev"].examples.lengths.max())))
    table = _table(task, runs, judged["dev"], speed)
    words = _differences(task, judged["dev"], main)
    content = {"task": task.name, "kind": task.kind, "labels": task.labels,
               "score": list(task.task.metrics), "parts": judged, "latency_ms": speed,
               "size": {role: {"layers": len(own[0].model.params["layers"]),
                               "parameters": report.count_parameters(own[0].model.params)}
                        for role, own in runs.items()},
               "seconds": {role: [run.seconds for run in own] for role, own in runs.items()},
               "versions": report.versions()}
    seal.write_json(output / "metrics.json", content)
    best = runs[main][0]
    for part in best.found:
        name = "predictions.tsv" if part == "dev" else f"{part}_predictions.tsv"
        write_predictions(output / name, task, part, best.found[part])
        if task.parts[part].truth is None and task.kind != "tag":
            _write_submission(output / "submission.tsv", task, part, best.found[part])
    detail = ""
    if task.kind == "classify":
        detail = f"\n\n## Classes\n\n```\n{_classes(task, best.found['dev'])}```\n\n" \
            "![confusion](confusion.png)\n\n![calibration](calibration.png)"
        plot_confusion(task, best.found["dev"], output / "confusion.png")
        plot_calibration(task, {role: own[0].found["dev"] for role, own in runs.items()},
                         output / "calibration.png")
    cut = {part: content.examples.cut for part, content in task.parts.items()}
    where = (f"Score: {' and '.join(METRICS[n].text for n in task.task.metrics)}, on "
             f"{len(task.parts['dev']):,} dev examples; median of the seeds, interval by bootstrap "
             f"over examples and seeds. Cut: {', '.join(f'{n:,} in {p}' for p, n in cut.items())}. "
             f"Latency: batch 1, float32, median of 30.")
    if "teacher" in runs:
        where += f" Temperature {config.temperature}."
    where += "".join(f" Of {NAMES[role]}, seed {config.seed + i}: {run.standing}"
                     for role, own in runs.items() for i, run in enumerate(own) if run.standing)
    own_card = model_card(task, main, config, best.standing, judged["dev"])
    (output / "model" / "README.md").write_text(own_card, encoding="utf-8", errors="replace")
    plot_losses(task, runs, output / "losses.png")
    write_report(
        output, f"# {task.name}\n\n{table}\n\n{words}\n\n{where}\n\n![losses](losses.png){detail}"
        f"\n\n{provenance(config)}")
    print(f"\n{table}\n\n{words}\n{where}\n\nmodel: {output / 'model'}\nreport: "
          f"{output / 'report.html'}\nanswers: {output / 'predictions.tsv'}")


def plot_losses(task: "TaskInput", runs: dict[str, list["Trained"]], path: Path) -> None:
    """Draw how each model was trained; of several seeds, the first."""
    metric = task.task.metrics[0]
    logs = {NAMES[role]: read_metrics(own[0].folder) for role, own in runs.items()}
    report.plot_runs(logs, (metric, f"{METRICS[metric].text}, dev"), path, task.name)


def _judge(task: "TaskInput", part: str, runs: dict[str, list["Trained"]]) -> dict[str, Any]:
    """Figures of every model and seed, intervals, and the drawn scores that differences need."""
    truth = task.parts[part].truth
    said = {role: [given(task, part, run.found[part]) for run in own] for role, own in runs.items()}
    drawn = intervals.drawn(task.task.metrics, truth, said)
    teacher = drawn.get("teacher")
    found: dict[str, Any] = {}
    for role, own in runs.items():
        each = [figures(task, part, run.found[part]) for run in own]
        scores = [one["score"] for one in each if one["score"] is not None]
        found[role] = {
            "seeds": each, "score": float(np.median(scores)) if scores else None,
            "range": [min(scores), max(scores)] if scores else None,
            "interval": intervals.interval(drawn[role]),
            "collapsed": sum(collapsed(task, run.found["dev"]) for run in own)}
        if teacher is not None and role != "teacher":
            whole = found["teacher"]["score"] or 0.0
            if whole > 0 and found[role]["score"] is not None:
                found[role]["retention"] = found[role]["score"] / whole
            with np.errstate(divide="ignore", invalid="ignore"):  # in draws where it scores 0
                found[role]["retention_interval"] = (
                    intervals.interval(drawn[role] / teacher) if whole > 0 else None)
    if "plain" in drawn and "distilled" in drawn:
        gain = drawn["distilled"] - drawn["plain"]
        if pair := intervals.interval(gain):
            found["distilled"] |= {"over_plain": float(np.nanmean(gain)),
                                   "over_plain_interval": pair}
    return found


def _table(task: "TaskInput", runs: dict[str, list["Trained"]], judged: dict[str, Any],
           speed: dict[str, float]) -> str:
    rows = []
    for role, own in runs.items():
        found, params = judged[role], own[0].model.params
        kept = found.get("retention")
        rows.append((
            NAMES[role], str(len(params["layers"])), f"{report.count_parameters(params):,}",
            _percent(found["score"]), between(found["range"]), between(found["interval"]),
            "" if role in ("teacher", "model") else
            f"{_percent(kept)} ({between(found['retention_interval'])})",
            f"{speed[role]:.2f}"))
    return report.table(rows, COLUMNS)


def _percent(value: float | None) -> str:
    return "not defined" if value is None else f"{100 * value:.2f}"


def _differences(task: "TaskInput", judged: dict[str, Any], main: str) -> str:
    """What the intervals say, in words."""
    said = []
    found = judged[main]
    if found["collapsed"]:
        said.append(f"{found['collapsed']} of {len(found['seeds'])} seeds collapsed: the same "
                    "answer to everything.")
    if pair := found.get("over_plain_interval"):
        gain = f"{100 * found['over_plain']:+.2f} points ({between(pair)})"
        said.append(f"Distilled over plain: {gain}; " + (
            "the interval holds 0: no difference is shown." if pair[0] <= 0 <= pair[1] else
            "the interval does not hold 0."))
    if len(found["seeds"]) == 1:
        said.append("One seed: what another would give is not in the intervals (--seeds 5).")
    return " ".join(said)


def write_predictions(path: Path, task: "TaskInput", part: str, found: np.ndarray) -> None:
    """Answers in the order of the input: of tags a word a line, else an example a line."""
    content, said = task.parts[part], given(task, part, found)
    gold = content.raw.labels
    lines = []
    if task.kind == "tag":
        for texts, tags, own in zip(content.raw.texts, gold, said, strict=True):
            lines += ["\t".join((" ".join(word.split()), tag, answer)) for word, tag, answer in zip(
                texts, tags or [""] * len(texts), own, strict=True)] + [""]
    else:
        shares = answers.probabilities(found) if task.kind == "classify" else None
        columns = ["row", "label", "answer"]
        names = [f"p({name})" if name in columns else name for name in task.labels]
        lines.append("\t".join([*columns, *names]))
        for row, (label, answer) in enumerate(zip(gold, said, strict=True)):
            name = task.labels[answer] if task.kind == "classify" else f"{answer:.6f}"
            more = [] if shares is None else [f"{share:.6f}" for share in shares[row]]
            lines.append("\t".join([str(row), "" if label is None else str(label), name, *more]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_submission(path: Path, task: "TaskInput", part: str, found: np.ndarray) -> None:
    """GLUE's file for a test part without labels: as the task's files write the labels."""
    written = [own for own, _ in task.task.labels] or list(task.labels)
    said = given(task, part, found)
    rows = [f"{row}\t{written[answer] if task.kind == 'classify' else f'{answer:.3f}'}"
            for row, answer in enumerate(said)]
    path.write_text("index\tprediction\n" + "\n".join(rows) + "\n", encoding="utf-8")


def _classes(task: "TaskInput", found: np.ndarray) -> str:
    from sklearn.metrics import classification_report

    return classification_report(
        task.parts["dev"].truth, given(task, "dev", found), labels=range(len(task.labels)),
        target_names=task.labels, digits=3, zero_division=0)


def plot_confusion(task: "TaskInput", found: np.ndarray, path: Path) -> None:
    """Draw how often each label gets each answer."""
    import matplotlib
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    few = len(task.labels) <= 40  # of more, the counts could not be read
    size = 2.5 + 0.6 * min(len(task.labels), 40)
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name is a $
        figure = Figure(figsize=(size + 1, size), layout="constrained")
        axes = figure.subplots()
        ConfusionMatrixDisplay.from_predictions(
            task.parts["dev"].truth, given(task, "dev", found), labels=range(len(task.labels)),
            display_labels=task.labels if few else None, include_values=few, ax=axes, cmap="Blues",
            xticks_rotation=45 if few else 90)
        axes.set(xlabel="answer", ylabel="label")
        figure.savefig(path, dpi=120)


def plot_calibration(task: "TaskInput", found: dict[str, np.ndarray], path: Path) -> None:
    """Draw how often answers are right over how sure each model is of them.

    Args:
        found: role → logits of the dev part; the first seed's.
        path: of the picture.
    """
    from matplotlib.figure import Figure
    from sklearn.calibration import calibration_curve

    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for role, logits in found.items():
        sure = np.minimum(answers.probabilities(logits).max(-1), 1)  # rounding
        right = logits.argmax(-1) == np.asarray(task.parts["dev"].truth)
        share, mean = calibration_curve(right, sure, n_bins=10, strategy="quantile")
        axes.plot(mean, share, marker="o", markersize=4, label=(
            f"{NAMES[role]}: sure {sure.mean():.1%}, right {right.mean():.1%}"))
    axes.set(xlabel="probability of the answer, in ten equal parts of the dev examples",
             ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
