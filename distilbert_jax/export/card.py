"""What is known of a model → its card, README.md, with the front matter that the hub reads."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

PIPELINE = 'from transformers import pipeline\n\nanswer = pipeline("{kind}", model="{folder}")'
# What a model is for, in the hub's words → how it is loaded, and which method of `predict` answers.
USAGE = {
    "fill-mask": (PIPELINE, 'fill_mask(["A sentence with a {mask}."])'),
    "text-classification": (PIPELINE, 'classify(["A text."])'),
    "token-classification": (PIPELINE, 'tag([["some", "words"]])'),
    "sentence-similarity": (
        "from sentence_transformers import SentenceTransformer\n\n"
        'vectors = SentenceTransformer("{folder}").encode(["A sentence."])',
        'embed(["A sentence."])')}


@dataclasses.dataclass(frozen=True)
class Result:
    """A figure of the model, on a scale from 0 to 1."""

    metric: str  # the hub's name of it: accuracy, f1, spearmanr, ...
    name: str
    dataset: str
    value: float
    interval: Sequence[float] | None = None  # of 95 %

    @property
    def text(self) -> str:
        """Its name with the interval, for which the hub has no place of its own."""
        if not self.interval:
            return self.name
        return f"{self.name} (95 % interval {self.interval[0]:.4f} to {self.interval[1]:.4f})"


def card(
    kind: str, title: str, text: str, *, folder: str, origin: str, results: Sequence[Result] = (),
    mask: str = "[MASK]",
) -> str:
    """The card: front matter, text, and how the model is used.

    Args:
        kind: row of USAGE.
        title: of the page.
        text: Markdown.
        folder: the name of the model's own folder.
        origin: the model that it was made from: a folder, whose own card says its licence and
            language if there is one, or a hub name; never a path in the result.
        results: figures of the model.
        mask: its mask token.
    """
    library = "sentence-transformers" if kind == "sentence-similarity" else "transformers"
    data = ModelCardData(
        model_name=folder, library_name=library, pipeline_tag=kind, tags=["distilbert_jax"],
        eval_results=[EvalResult(
            task_type=kind, dataset_type=result.dataset, dataset_name=result.dataset,
            metric_type=result.metric, metric_name=result.text,
            metric_value=round(result.value, 4)) for result in results] or None,
        **_inherited(origin))
    load, answer = (words.format(kind=kind, folder=folder, mask=mask) for words in USAGE[kind])
    return (f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n\n```python\n{load}\n```\n\n"
            "Without PyTorch, by distilbert_jax; after its ship.py also by ONNX Runtime alone "
            '(`runtime="onnx"` or `"int8"`):\n\n```python\nfrom distilbert_jax.predict import load'
            f'\n\nload("{folder}").{answer}\n```\n')


def held_out_results(figures: Mapping[str, Any]) -> list[Result]:
    """The figure of a masked language model, from held_out's."""
    return [Result("accuracy", "top-1 of hidden tokens", "held-out texts", figures["top1"],
                   figures["top1_interval"])]


def _inherited(origin: str) -> dict[str, Any]:
    """Licence and language of the model that another is made from, and its name on the hub."""
    try:
        data = ModelCard.load(Path(origin, "README.md"), ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):  # none there, or one that cannot be read
        named = re.fullmatch(r"[\w.-]+/[\w.-]+", origin) and not Path(origin).exists()
        return {"base_model": origin} if named else {}
    return {"license": data.license, "language": data.language}
