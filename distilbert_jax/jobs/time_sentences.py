"""Our training of a sentence encoder beside that of sentence-transformers: speed, then quality."""

import dataclasses
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from distilbert_jax.benchmark import sentences
from distilbert_jax.benchmark.settings import SentenceBenchmark
from distilbert_jax.data import sentences as texts
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation.report import table
from distilbert_jax.evaluation.similarity import cosines, spearman
from distilbert_jax.export.sentence_folder import export_sentence
from distilbert_jax.jobs.embed import RATE, WIDTH
from distilbert_jax.jobs.sentence_data import Pairs, read_all_pairs
from distilbert_jax.jobs.sentence_model import Named, cut_to, on_devices
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.sharding import make_mesh
from distilbert_jax.models import student

HELD = 2000  # held-out sentences that are compared with the teacher's


def time_sentences(config: SentenceBenchmark) -> str:
    """Measure, and give the table.

    Raises:
        UserError: anything in the settings or files that the user can mend.
    """
    for library in ("sentence_transformers", "accelerate"):
        if not find_spec(library):
            raise UserError(f"{library} is not installed, which ours is compared with: pip install "
                            "sentence-transformers accelerate")
    teacher = Named.read(config.teacher, config.pooling, config.normalize)
    layers = student.choose_layers(config.student_layers, teacher.shape.num_hidden_layers)
    start = cut_to(teacher, layers)
    start = dataclasses.replace(start, shape=dataclasses.replace(
        start.shape, hidden_dropout=config.dropout, attention_dropout=config.dropout))
    pairs = read_all_pairs(config.sts)
    found = texts.read(config.corpus, config.valid, config.valid_share, config.sentences,
                       config.text_field)
    embedder = on_devices(config, make_mesh(config.mesh), teacher)
    examples = start.examples(found.train, config.max_length)
    config = dataclasses.replace(
        config, learning_rate=config.learning_rate or RATE * WIDTH / start.shape.hidden_size)
    held = found.valid[:HELD]
    asked = list(dict.fromkeys([*held, *(text for part in pairs for text in part.texts)]))
    with tempfile.TemporaryDirectory() as folder:
        prompts = teacher.facts.modules.prompts
        export_sentence(Path(folder, "start"), start.params, start.shape, start.family,
                        start.tokenizer, "", config.max_length, prompts,
                        teacher.facts.modules.default_prompt)
        measured = sentences.measure(sentences.SentenceProblem(
            config, str(Path(folder, "start")), start.family.model_type, start.shape, start.params,
            examples, config.max_length, config.updates, config.rounds,
            embedder(examples, "teacher"), teacher.shape, found.train, asked,
            start.examples(asked, config.max_length), 60 * config.minutes))
    theirs = embedder(teacher.examples(asked, config.max_length), "teacher")
    say(f"{len(found.train):,} sentences of {examples.lengths.mean():.1f} tokens; layers "
        f"{', '.join(map(str, layers))}")
    return _table(measured, theirs, asked, held, pairs)


def _table(
    measured: dict[str, dict[str, Any]], theirs: np.ndarray, asked: list[str], held: list[str],
    pairs: list[Pairs],
) -> str:
    """A line for each side."""
    number = {text: i for i, text in enumerate(asked)}

    def of(vectors: np.ndarray, some: list[str]) -> np.ndarray:
        return vectors[[number[text] for text in some]]

    scored = {part.name: spearman(part.scores, {
        name: part.cosines(of(vectors, part.texts)) for name, vectors in (
            ("teacher", theirs), *((name, side["vectors"]) for name, side in measured.items()))})
        for part in pairs}
    rows, speeds = [], sentences.speeds(measured)
    for name, side in measured.items():
        near = cosines(of(side["vectors"], held), of(theirs, held))
        rows.append((
            name, f"{speeds[name][0]:,.1f}", f"{speeds[name][1]:.2f} times",
            f"{side['updates']:,} in {side['seconds'] / 60:.1f} min", f"{near.mean():.4f}",
            *(_kept(part[name]) for part in scored.values()),
            f"{side['process_bytes'] / 1e6:,.0f}"))
    return table(rows, ("side", "sentences/s", "ours is", "updates", "cosine to teacher",
                        *(f"Spearman {name} (kept)" for name in scored), "process MB"))


def _kept(figure: dict[str, Any]) -> str:
    """A correlation in percent and the share of the teacher's, where there are such."""
    value, kept = figure["value"], figure.get("retention")
    said = "not defined" if value is None else f"{100 * value:.2f}"
    return said if kept is None else f"{said} ({kept:.2%})"
