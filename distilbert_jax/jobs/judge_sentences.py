"""Judge any sentence encoder: on scored pairs, by its distance to a teacher, and in a search."""

from pathlib import Path
from typing import Any

from distilbert_jax.data.labelled import Columns
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation.similarity import spearman
from distilbert_jax.jobs.embed_report import encoders, search, to_teacher
from distilbert_jax.jobs.sentence_data import read_all_pairs, read_titles
from distilbert_jax.jobs.sentence_model import Named
from distilbert_jax.machine.sharding import make_mesh
from distilbert_jax.models.sentence_modules import POOLINGS
from distilbert_jax.task_config import EvaluateConfig


def judge_sentences(config: EvaluateConfig) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Judge `config.model`, as `distilbert-jax evaluate --task sts` does.

    Returns:
        Its figures by name, with the ends of their 95 % intervals; and all of them, the teacher's
        too, as metrics.json holds them.

    Raises:
        UserError: anything in the settings or files that the user can mend.
    """
    names = config.dev or ((str(Path(config.data, "dev.tsv")),) if config.data else ())
    if not (names or config.retrieval):
        raise UserError("--dev is missing: give files of score, sentence1, sentence2, or "
                        "--retrieval")
    folders = [folder for folder in (config.model, config.teacher) if folder]
    if config.pooling and all(Path(folder, "modules.json").exists() for folder in folders):
        raise UserError(f"{' and '.join(folders)}: modules.json says how vectors are made: leave "
                        "out --pooling")
    columns = Columns(tuple(config.text), config.label)
    pairs, titles = read_all_pairs(names, columns), read_titles(config.retrieval)
    models = {name: _read(folder, config.pooling) for name, folder in (
        ("teacher", config.teacher), ("model", config.model)) if folder}
    if config.teacher and models["teacher"].width != models["model"].width:
        raise UserError(f"the vectors of --model {config.model} have {models['model'].width} "
                        f"dimensions, those of --teacher {models['teacher'].width}: they lie in "
                        "different spaces; leave out --teacher")
    encode = encoders(config, make_mesh(config.mesh), models)
    figures: dict[str, float | None] = {}
    content: dict[str, Any] = {"pairs": {}}
    for part in pairs:
        near = {name: part.cosines(own(part.texts)) for name, own in encode.items()}
        content["pairs"][part.name] = found = spearman(part.scores, near)
        figures |= _named(f"spearman, {part.name}", found["model"])
        if config.teacher:
            content[f"to_teacher, {part.name}"] = of_it = to_teacher(encode, part.texts)["model"]
            figures |= {f"cosine to the teacher, {part.name}": of_it["mean"],
                        f"worst cosine to the teacher, {part.name}": of_it["worst"]}
    if titles:
        content["retrieval"] = search(
            encode if config.teacher else {"teacher": encode["model"]}, titles)
        role = "model" if config.teacher else "teacher"
        for kind in ("symmetric", "asymmetric") if config.teacher else ("symmetric",):
            for figure, each in content["retrieval"][kind].items():
                if config.teacher or "teacher" not in figure:
                    figures |= _named(f"{figure}, {kind}", each[role])
    return figures, content


def _read(name: str, pooling: str) -> Named:
    """A model; --pooling is for those of the two that have no modules.json."""
    if pooling not in ("", *POOLINGS):
        return Named.read(name, pooling)  # which says that it is unknown
    return Named.read(name, "" if Path(name, "modules.json").exists() else pooling)


def _named(name: str, found: dict[str, Any]) -> dict[str, float | None]:
    """A figure, the ends of its interval, and the share of the teacher's figure."""
    low, high = found["interval"] or (None, None)
    kept = {f"{name}, share of the teacher's": found["retention"]} if "retention" in found else {}
    return {name: found["value"], f"{name}, 95 % from": low, f"{name}, to": high} | kept
