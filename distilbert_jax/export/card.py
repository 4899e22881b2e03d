"""What is known of a model → its card, README.md, with the front matter that the hub reads."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache

from distilbert_jax.data import sources
from distilbert_jax.models import hub

PIPELINE = 'from transformers import pipeline\n\nanswer = pipeline("{kind}", model="{folder}")'
# What a model is for, in the hub's words → how it is loaded, which method of `predict` answers, and
# by ONNX Runtime alone: what is encoded, and what is read from the first output.
USAGE = {
    "fill-mask": (
        PIPELINE, 'fill_mask(["A sentence with a {mask}."])', '"A sentence with a {mask}."',
        'print(tokenizer.decode([answer[0, text.tokens.index("{mask}")].argmax()]))'),
    "text-classification": (
        PIPELINE, 'classify(["A text."])', '"A text."',
        "print(answer[0])  # a logit for each of id2label in config.json"),
    "token-classification": (
        PIPELINE, 'tag([["some", "words"]])', '["some", "words"], is_pretokenized=True',
        "print(text.tokens, answer[0].argmax(-1))  # numbers of id2label in config.json"),
    "sentence-similarity": (
        "from sentence_transformers import SentenceTransformer\n\n"
        'vectors = SentenceTransformer("{folder}").encode(["A sentence."])',
        'embed(["A sentence."])', '"A sentence."',
        "print(answer[0])  # of each token, to be pooled as 1_Pooling/config.json says")}
ONNX = """import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("{folder}/tokenizer.json")
text = tokenizer.encode({text})
known = {{"input_ids": text.ids, "attention_mask": text.attention_mask,
         "token_type_ids": text.type_ids}}
model = onnxruntime.InferenceSession("{folder}/onnx/model.onnx")
answer, = model.run(None, {{one.name: np.array([known[one.name]]) for one in model.get_inputs()}})
{read}"""


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
    mask: str = "[MASK]", corpus: Sequence[str] = (),
) -> str:
    """The card: front matter, text, and how the model is used.

    Args:
        kind: row of USAGE.
        title: of the page.
        text: Markdown.
        folder: the name of the model's own folder.
        origin: the model that it was made from: a folder, or a hub name; never a path in the
            result. Its own card says licence and language, if there is one.
        results: figures of the model.
        mask: its mask token.
        corpus: the words of --corpus or --train, of which the front matter has the hub's datasets.
    """
    library = "sentence-transformers" if kind == "sentence-similarity" else "transformers"
    data = ModelCardData(
        model_name=folder, library_name=library, pipeline_tag=kind, tags=["distilbert_jax"],
        eval_results=[EvalResult(
            task_type=kind, dataset_type=result.dataset, dataset_name=result.dataset,
            metric_type=result.metric, metric_name=result.text,
            metric_value=round(result.value, 4)) for result in results] or None,
        datasets=list(dict.fromkeys(filter(None, map(sources.hub_dataset, corpus)))) or None,
        **_inherited(origin))
    load, answer, given, read = (
        words.format(kind=kind, folder=folder, mask=mask) for words in USAGE[kind])
    runtime = ONNX.format(folder=folder, text=given, read=read)
    return (f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n\n```python\n{load}\n```\n\n"
            "Without PyTorch, by distilbert_jax; after `distilbert-jax ship` also without JAX "
            '(`runtime="onnx"` or `"int8"`):\n\n```python\nfrom distilbert_jax.predict import load'
            f'\n\nload("{folder}").{answer}\n```\n\nAfter `distilbert-jax ship` by ONNX Runtime '
            f"and tokenizers alone:\n\n```python\n{runtime}\n```\n")


def held_out_results(figures: Mapping[str, Any]) -> list[Result]:
    """The figure of a masked language model, from held_out's."""
    return [Result("accuracy", "top-1 of hidden tokens", "held-out texts", figures["top1"],
                   figures["top1_interval"])]


def _inherited(origin: str) -> dict[str, Any]:
    """Licence and language of the model that another is made from, and its name on the hub.

    The network is not asked: of a model on the hub the card is read if it is in the cache.
    """
    if not origin:
        return {}
    named = hub.is_name(origin)
    found = {"base_model": origin} if named else {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # no card, or a damaged one
        path = try_to_load_from_cache(origin, "README.md") if named else Path(
            origin, "README.md").expanduser()
        if isinstance(path, (str, Path)):  # else the cache has none
            data = metadata_load(path) or {}
            found |= {name: data.get(name) for name in ("license", "language")}
    return found
