"""Weights from Hugging Face folders and back, for use from Python.

    found = load("bert-base-uncased")      # .params: nested dict of arrays, .config, .family
    export(folder, found.params, found.config, found.family, tokenizer, card)
"""

from distilbert_jax.export.huggingface import export
from distilbert_jax.models.hub import load, load_task

__all__ = ["export", "load", "load_task"]
