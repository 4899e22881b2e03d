"""Parameters → a Hugging Face folder that transformers loads, tokenizer and model card included."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from distilbert_jax.machine import store
from distilbert_jax.models.convert import to_hf
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.family import Family


def export(
    folder: Path, params: dict[str, Any], config: EncoderConfig, family: Family,
    tokenizer: Any, card: str,
) -> None:
    """Write a model as a Hugging Face folder, whole or not at all; an older one is replaced.

    Args:
        folder: of the model.
        params: nested dict of arrays; stored as float32.
        config: of the model.
        family: module with the names that transformers gives to config and tensors.
        tokenizer: a fast tokenizer, saved beside the model.
        card: text of README.md.
    """
    tensors = {name: array.astype(np.float32) for name, array in to_hf(params, family).items()}
    description = {
        "architectures": [family.architecture], "model_type": family.model_type,
        "dtype": "float32", "tie_word_embeddings": True, **family.to_hf(config)}
    tokenizer.model_max_length = config.positions
    with store.whole_folder(folder) as new:
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        tokenizer.save_pretrained(new)
        (new / "README.md").write_text(card, encoding="utf-8")
