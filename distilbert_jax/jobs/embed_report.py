"""What sentence encoders are worth beside their teacher: figures, a table, a report and the card.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from distilbert_jax.benchmark import static_vectors
from distilbert_jax.benchmark.latency import file_latencies, latencies
from distilbert_jax.data import sources
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.evaluation import intervals, report
from distilbert_jax.evaluation.metrics import score
from distilbert_jax.evaluation.page import FILES as REPORTS
from distilbert_jax.evaluation.page import write_report
from distilbert_jax.evaluation.similarity import (
    cosines,
    judged,
    retrieval,
    retrieved,
    spearman,
)
from distilbert_jax.export import predict
from distilbert_jax.export.card import Result, card
from distilbert_jax.export.onnx_runtime import OnnxModel
from distilbert_jax.jobs.provenance import provenance
from distilbert_jax.jobs.sentence_data import Encode, Pairs, Titles
from distilbert_jax.jobs.sentence_model import Named, on_devices
from distilbert_jax.machine import seal
from distilbert_jax.machine.progress import say
from distilbert_jax.models.encoder import graphdef
from distilbert_jax.task_config import EvaluateConfig
from distilbert_jax.training.metrics_log import read_metrics

FILES = ("metrics.json", "losses.png", *REPORTS)
NAMES = {"teacher": "teacher", "untrained": "student, untrained", "student": "student, trained",
         "static": "static vectors (model2vec)", "int8": "student, trained, int8 in ONNX Runtime"}
SHOWN = 500  # held-out sentences that are judged while training
LENGTHS, ROWS = (16, 128), 32  # tokens and sentences of the batches that are timed


def line(sentences: int, figures: dict[str, float]) -> str:
    """Figures in words, for the terminal while training, of so many sentences or the first."""
    return f"held out ({min(SHOWN, sentences):,} of {sentences:,} sentences) " + ", ".join(
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())


def correlation(pairs: Pairs, vectors: np.ndarray) -> float | None:
    """Spearman's correlation of the cosines of pairs with their scores; None if not defined."""
    return score(("spearman",), pairs.scores, pairs.cosines(vectors))


def encoders(config: EmbedConfig | EvaluateConfig, mesh: Mesh, models: Mapping[str, Named]
             ) -> dict[str, Encode]:
    """For each model, a function from texts, and names of a prompt, to vectors."""
    def of(named: Named) -> Encode:
        embedder = on_devices(config, mesh, named)
        return lambda texts, *prompts: embedder(
            named.examples(texts, config.max_length, *prompts), "judge")

    return {name: of(named) for name, named in models.items()}


def remembered(encode: Encode) -> Encode:
    """An encoder that keeps its answers: texts asked for before are not computed again."""
    @functools.cache
    def once(texts: tuple[str, ...], prompts: tuple[str, ...]) -> np.ndarray:
        return encode(list(texts), *prompts)

    return lambda texts, *prompts: once(tuple(texts), prompts)


def judge(
    models: dict[str, Named], encode: dict[str, Encode], held: list[str],
    pairs: list[Pairs], titles: Titles | None,
) -> dict[str, Any]:
    """All figures of the models, of which `teacher` is what the others are compared with.

    Args:
        models: role → model: teacher, untrained, student.
        encode: of each.
        held: held-out sentences, for the cosine to the teacher.
        pairs: that people have scored; titles: of texts; None without.
    """
    say("judging ...")
    static, missing = static_vectors.distil(models["teacher"].facts.model.folder)
    found: dict[str, Any] = {
        "size": {name: {"layers": model.shape.num_hidden_layers,
                        "parameters": report.count_parameters(model.params)}
                 for name, model in models.items()}}
    found["sentences_per_second"] = speeds(models)
    if static:
        encode = encode | {"static": static.encode}
        found["size"]["static"] = {"layers": 0, "parameters": static.parameters}
        found["sentences_per_second"]["static"] = static.speeds(LENGTHS)
    else:
        found["static"] = missing
    return found | _quality(encode, held, pairs, titles)


def _quality(
    encode: dict[str, Encode], held: list[str], pairs: list[Pairs], titles: Titles | None
) -> dict[str, Any]:
    """The figures of what encoders answer, of which `teacher` is one."""
    found: dict[str, Any] = {"pairs": {}, "to_teacher": to_teacher(encode, held)}
    for part in pairs:
        near = {name: part.cosines(own(part.texts)) for name, own in encode.items()}
        found["pairs"][part.name] = spearman(part.scores, near) | {"count": len(part.scores)}
    if titles:
        found["retrieval"] = search(encode, titles)
    return found


def with_int8(
    found: dict[str, Any], folder: Path, max_length: int, student: Named, teacher: Encode,
    held: list[str], pairs: list[Pairs], titles: Titles | None,
) -> dict[str, Any]:
    """The figures of `judge`, and beside them those of the int8 file in the student's folder.

    Args:
        found: by judge.
        folder: of the student, shipped.
        max_length: tokens of the longest text.
        student: in float32.
        teacher: its vectors.
        held, pairs, titles: as for judge.
    """
    say("judging its int8 ...")
    model, path = predict.load(folder, "int8"), folder / predict.FILES["int8"]
    run = OnnxModel(path, os.cpu_count() or 1)
    longest, words = student.shape.positions, student.shape.vocab_size
    encode = {"teacher": teacher, "int8": lambda texts, *prompts: model.embed(
        texts, *prompts, max_length=max_length)}
    more = _quality(encode, held, pairs, titles) | {
        "size": {"int8": {"layers": found["size"]["student"]["layers"],
                          "parameters": found["size"]["student"]["parameters"],
                          "bytes": path.stat().st_size}},
        "sentences_per_second": {"int8": [
            1e3 * ROWS / file_latencies({"": run}, min(length, longest), words, ROWS)[""][0]
            for length in LENGTHS]}}
    return _joined(found, more)


def _joined(found: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both, dict by dict; what both have is taken from the first."""
    return found | {name: _joined(found[name], value) if isinstance(found.get(name), dict)
                    else found.get(name, value) for name, value in more.items()}


def to_teacher(encode: dict[str, Encode], held: list[str]) -> dict[str, Any]:
    """Mean and worst cosine of each model in the teacher's space to the teacher's vectors."""
    theirs = encode["teacher"](held)
    near = {name: cosines(own(held), theirs) for name, own in encode.items()
            if name not in ("teacher", "static")}
    drawn = intervals.drawn_means(near)
    return {name: {"mean": float(x.mean()), "interval": intervals.interval(drawn[name]),
                   "worst": float(x.min()), "count": len(x)} for name, x in near.items()}


def search(encode: dict[str, Encode], titles: Titles) -> dict[str, Any]:
    """Titles look for their texts: both by one model, and titles against the teacher's texts.

    Returns:
        symmetric and asymmetric → figure → role → value, interval, retention.
    """
    queries, texts = {}, {}
    for name, own in encode.items():
        queries[name] = own(titles.titles, "query")
        texts[name] = own(titles.texts, "document", "passage", "corpus")
    teacher = retrieved(queries["teacher"], texts["teacher"])
    found: dict[str, Any] = {}
    for kind in ("symmetric", "asymmetric"):
        each = {name: retrieval(retrieved(
            own, texts[name if kind == "symmetric" else "teacher"]), teacher)
            for name, own in queries.items() if kind == "symmetric" or name != "static"}
        found[kind] = {figure: _judged_means({name: own[figure] for name, own in each.items()})
                       for figure in each["teacher"]}
    return found | {"count": len(titles.titles)}


def _judged_means(values: dict[str, np.ndarray]) -> dict[str, Any]:
    return judged({name: float(x.mean()) for name, x in values.items()},
                  intervals.drawn_means(values))


def speeds(models: Mapping[str, Named]) -> dict[str, list[float]]:
    """Sentences per second of each model at each of LENGTHS, in batches of ROWS, in float32."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for length in LENGTHS:
        length = min(length, *(model.shape.positions for model in models.values()))
        times = latencies({name: (graphdef(model.shape, "float32"), model.params)
                           for name, model in models.items()}, length, ROWS)
        for name, milliseconds in times.items():
            found[name].append(1e3 * ROWS / milliseconds)
    return found


def _table(found: dict[str, Any]) -> str:
    """A row for each model, a column for each figure."""
    kinds = found.get("retrieval", {})
    columns = ["model", "layers", "parameters", "size [MB]",
               *(f"Spearman {name}" for name in found["pairs"]), "cosine to teacher (worst)",
               *(f"recall@10, {kind}" for kind in ("symmetric", "asymmetric") if kinds),
               *(f"sentences/s of {length}" for length in LENGTHS)]
    rows = []
    for name in ("teacher", "untrained", "static", "student", "int8"):
        if name == "static" and name not in found["size"]:
            rows.append((f"{NAMES[name]}: {found['static']}", *[""] * (len(columns) - 1)))
        if name not in found["size"]:
            continue
        size, near = found["size"][name], found["to_teacher"].get(name)
        rows.append((
            NAMES[name], str(size["layers"]), f"{size['parameters']:,}",
            f"{size.get('bytes', 4 * size['parameters']) / 1e6:.1f}",
            *(_cell(part[name]) for part in found["pairs"].values()),
            f"{near['mean']:.4f} ({near['worst']:.4f})" if near else "",
            *(_cell(kinds[kind]["recall@10"].get(name))
              for kind in ("symmetric", "asymmetric") if kinds),
            *(f"{speed:,.0f}" for speed in found["sentences_per_second"][name])))
    return report.table(rows, tuple(columns))


def _cell(found: dict[str, Any] | None) -> str:
    """A figure in per cent, its interval, and what share of the teacher's it is."""
    if not found or found["value"] is None:
        return "not in its space" if found is None else "not defined"
    text = f"{100 * found['value']:.2f}"
    if pair := found["interval"]:
        text += f" ({100 * pair[0]:.2f} to {100 * pair[1]:.2f})"
    if pair := found.get("retention_interval"):
        text += f"; {found['retention']:.2%} kept ({pair[0]:.2%} to {pair[1]:.2%})"
    return text


def _search_table(found: dict[str, Any]) -> str:
    """All figures of the search."""
    rows = [(NAMES[name], f"{figure}, {kind}", _cell(value))
            for kind in ("symmetric", "asymmetric") for figure, own in found[kind].items()
            for name, value in own.items()]
    return (
        f"\n\n## Search: {found['count']:,} titles look for their texts\n\nSymmetric: one model "
        "for titles and texts. Asymmetric: titles by the model, texts by the teacher. \"Of the "
        "teacher's\": against the ten that the teacher finds; the other figures: the title's own "
        "text.\n\n" + report.table(rows, ("model", "figure", "value")))


def model_card(config: EmbedConfig, found: dict[str, Any], origin: str) -> str:
    """The model card of the student."""
    teacher = Path(config.teacher).name
    lines = [f"- Spearman of cosines, {name}: {_cell(part['student'])}"
             for name, part in found["pairs"].items()]
    near = found["to_teacher"]["student"]
    text = (
        f"Distilled by distilbert_jax from `{teacher}`: its vectors can be compared with the "
        f"teacher's. {origin}\n\n- parameters: {found['size']['student']['parameters']:,}\n"
        f"- cosine to the teacher's vectors, {near['count']:,} held-out sentences: mean "
        f"{near['mean']:.4f}, worst {near['worst']:.4f}\n" + "".join(f"{x}\n" for x in lines)
        + f"- corpus: {', '.join(map(sources.published, config.corpus))}\n- {report.versions()}")
    results = [Result("spearmanr", "Spearman of cosines", name, part["student"]["value"],
                      part["student"]["interval"])
               for name, part in found["pairs"].items() if part["student"]["value"] is not None]
    layers = found["size"]["student"]["layers"]
    return card("sentence-similarity", f"{layers}-layer student in the space of {teacher}",
                text, folder="student", origin=config.teacher, results=results,
                corpus=config.corpus)


def write(config: EmbedConfig, found: dict[str, Any], origin: str, updates: int) -> None:
    """Write metrics.json and the report of a student after so many updates, and print the table."""
    output, table = Path(config.output), _table(found)
    seal.write_json(output / "metrics.json", found | {"versions": report.versions()})
    where = (f"{origin} Spearman's correlation of cosines with people's scores, and recall@10, in "
             "per cent, with 95 % intervals by bootstrap over pairs or titles; in brackets after "
             "\"kept\", that of the share of the teacher's figure. Texts are cut at "
             f"{config.max_length} tokens. Speed: batches of {ROWS} in float32, without the "
             "tokenizer (static vectors: with theirs).")
    more = _search_table(found["retrieval"]) if "retrieval" in found else ""
    report.plot_runs({"student": read_metrics(output, updates)},
                     ("cosine", "cosine to the teacher's vectors, held out"),
                     output / "losses.png", f"{Path(config.teacher).name} → student")
    write_report(
        output, f"# A smaller encoder in the space of {Path(config.teacher).name}\n\n{table}\n\n"
        f"{where}\n\n![losses](losses.png){more}\n\n{provenance(config)}")
    print(f"\n{table}\n\n{where}\n\nmodel: {output / 'student'}\nreport: {output / 'report.html'}")
