"""The jobs for use from Python, with the settings of the command line as keywords.

    import distilbert_jax as dj

    result = dj.distil(teacher="DIR", corpus="text.jsonl", student_layers=6, output="small")
    result.report["models"]["student"]["top1"]
    result.predictor().fill_mask(["the [MASK] barks"])

Nothing here starts JAX before a job is called.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distilbert_jax.export.predict import Predictor


@dataclasses.dataclass(frozen=True)
class Result:
    """What a job has left.

    Attributes:
        path: the folder of --output.
        student: the folder of the model, for transformers and distilbert_jax.predict.
        report: the figures, as report.json or metrics.json has them; {} in all processes of
            several but the first.
    """

    path: Path
    student: Path
    report: dict[str, Any] = dataclasses.field(repr=False)

    def _repr_html_(self) -> str | None:
        """The table and the curves of the report, as a notebook shows a result."""
        from distilbert_jax.evaluation.page import summary

        return summary(self.path)

    def predictor(self, runtime: str = "jax") -> "Predictor":
        """Open the model to answer texts, without PyTorch.

        Args:
            runtime: "jax", or "onnx" or "int8" of what was shipped.

        Returns:
            A model with fill_mask, classify, tag or embed, by what it was trained for.

        Raises:
            UserError: the files of this runtime are missing or cannot be read.
        """
        from distilbert_jax.predict import load

        return load(self.student, runtime)


def distil(**settings: Any) -> Result:
    """Distil a masked language model into one with fewer layers: `distilbert-jax distil`.

    Args:
        teacher: Hugging Face folder or hub name, or a list of them, with `teacher_weights`.
        corpus: text files, a folder or a dataset, or a list of them.
        student_layers: how many of the teacher's layers to keep, or a list of which.
        output: folder; stopped, the same call goes on from its last checkpoint.
        settings: all flags of `distilbert-jax distil --help`, with underscores; a weight of a loss
            as alpha_NAME. Without teacher, corpus and recipe the quickstart runs.

    Returns:
        The student, and `report` with `models` (of teacher, "teacher 2" …, student, student at
        start: layers, parameters, top1 and retention as shares, perplexity, kl [nats], latency
        [ms]), `updates`, `tokens`, `seconds`.

    Raises:
        UserError: an unknown setting, or whatever can be mended in settings and files.
        Interrupted: stopped by Ctrl-C or SIGTERM, state saved; in another thread than the main one
            signals are not seen.
    """
    return _run("distil", settings, _distil, "report.json")


def finetune(**settings: Any) -> Result:
    """Train a model for a task, alone or from a teacher: `distilbert-jax finetune`.

    Args:
        model: Hugging Face folder to start from.
        train, dev: labelled files; or task and data, a task that is known and its folder.
        distil: True to fine-tune `model` first and then distil it into `student_layers`.
        output: folder; stopped, the same call goes on.
        settings: all flags of `distilbert-jax finetune --help`, with underscores.

    Returns:
        The model (distilled, where there is a teacher), and `report` with `parts` (dev, test →
        figures and intervals of each model), `labels`, `latency_ms`, `seconds`.

    Raises:
        UserError, Interrupted: as for distil.
    """
    return _run("finetune", settings, _finetune, "metrics.json")


def embed(**settings: Any) -> Result:
    """Distil a sentence encoder in the space of its own vectors: `distilbert-jax embed`.

    Args:
        teacher: sentence-transformers folder.
        corpus: texts whose sentences are learnt from.
        student_layers: how many of the teacher's layers to keep, or a list of which.
        output: folder; stopped, the same call goes on.
        settings: all flags of `distilbert-jax embed --help`, with underscores.

    Returns:
        The student, and `report` with `to_teacher` (cosines on held-out sentences), `pairs`
        (Spearman's correlation on each file of `sts`), `size`.

    Raises:
        UserError, Interrupted: as for distil.
    """
    return _run("embed", settings, _embed, "metrics.json")


def ship(**settings: Any) -> Result:
    """Write a model as ONNX and more, each file checked before it is kept: `distilbert-jax ship`.

    Args:
        model: Hugging Face folder.
        evaluate: texts or labelled files on which each file is compared with the model.
        output: folder for a copy of the model; without it the files are written into `model`.
        settings: all flags of `distilbert-jax ship --help`, with underscores.

    Returns:
        The folder, as `path` and `student`, and `report` with `formats` (bytes, seconds, figures).

    Raises:
        UserError: an unknown setting, whatever can be mended in settings and files, or a format
            that did not pass; the others are there.
    """
    return _run("ship", settings, _ship, "report.json")


def _run(name: str, settings: Mapping[str, Any], job: Callable[[Mapping[str, Any]], Path],
         report: str) -> Result:
    """Run a job with this call as its provenance, and collect what it left."""
    from distilbert_jax.evaluation.report import called

    written = ", ".join(f"{key}={str(value) if isinstance(value, Path) else value!r}"
                        for key, value in settings.items())
    with called(f"distilbert_jax.{name}({written})"):
        student = job(settings)
    path = student if name == "ship" else student.parent
    try:
        found = json.loads((path / report).read_text(encoding="utf-8"))
    except FileNotFoundError:  # the first process alone writes it
        found = {}
    return Result(path, student, found)


def _distil(settings: Mapping[str, Any]) -> Path:
    from distilbert_jax.commands import distil
    from distilbert_jax.errors import UserError

    config = distil.settings(settings)
    if config.compile_only:
        raise UserError("compile_only leaves no student: run distilbert-jax distil --compile-only")
    return distil.run(config)


def _finetune(settings: Mapping[str, Any]) -> Path:
    from distilbert_jax.cli import settle
    from distilbert_jax.jobs.finetune import finetune
    from distilbert_jax.task_config import FinetuneConfig

    return finetune(settle(FinetuneConfig, settings))


def _embed(settings: Mapping[str, Any]) -> Path:
    from distilbert_jax.cli import settle
    from distilbert_jax.embed_config import EmbedConfig
    from distilbert_jax.jobs.embed import embed

    return embed(settle(EmbedConfig, settings))


def _ship(settings: Mapping[str, Any]) -> Path:
    from distilbert_jax.cli import settle
    from distilbert_jax.jobs.ship import ship
    from distilbert_jax.ship_config import ShipConfig

    return ship(settle(ShipConfig, settings))
