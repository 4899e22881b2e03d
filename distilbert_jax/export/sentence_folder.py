"""A sentence encoder → the folder that sentence-transformers loads, Dense and prompts included."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distilbert_jax.export.huggingface import export, save_tensors
from distilbert_jax.machine import store
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.family import Family
from distilbert_jax.models.sentence_modules import Sentence

# Names that every version of the library knows.
KINDS = "sentence_transformers.models."
ACTIVATIONS = {"Identity": "torch.nn.modules.linear.Identity",
               "Tanh": "torch.nn.modules.activation.Tanh",
               "ReLU": "torch.nn.modules.activation.ReLU",
               "GELU": "torch.nn.modules.activation.GELU"}
# What versions before 6 read; they know these poolings by switches.
SWITCHES = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens",
            "mean_sqrt_len_tokens": "mean_sqrt_len_tokens"}


def export_sentence(
    folder: Path, params: dict[str, Any], config: EncoderConfig, family: Family, tokenizer: Any,
    card: str, max_length: int, prompts: Mapping[str, str], default_prompt: str | None,
) -> None:
    """Write a sentence encoder as a folder, whole or not at all; an older one is replaced.

    Args:
        folder, params, config, tokenizer, card: as for huggingface.export; the config has a
            `sentence`.
        family: of the encoder.
        max_length: tokens of the longest text.
        prompts: name → what is put before a text; default_prompt: the name of the one that is
            taken unless another is asked for.
    """
    encoder = {name: part for name, part in params.items() if name != "sentence_head"}
    with store.whole_folder(folder) as new:
        export(new, encoder, config, family.bare, tokenizer, card)
        _write(new / "modules.json", [
            {"idx": i, "name": str(i), "path": path, "type": KINDS + kind}
            for i, (path, kind) in enumerate(_write_modules(new, params, config))])
        _write(new / "sentence_bert_config.json",
               {"max_seq_length": max_length, "do_lower_case": False})
        _write(new / "config_sentence_transformers.json", {
            "prompts": dict(prompts), "default_prompt_name": default_prompt,
            "similarity_fn_name": "cosine"})


def _write_modules(
    folder: Path, params: dict[str, Any], config: EncoderConfig
) -> list[tuple[str, str]]:
    """Write what comes after the encoder; (folder, kind) of each module, the encoder's too."""
    modules, sentence = [("", "Transformer"), ("1_Pooling", "Pooling")], config.sentence
    _write(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": config.hidden_size, **{
            f"pooling_mode_{switch}": name == sentence.pooling
            for name, switch in SWITCHES.items()}})
    for number in range(len(sentence.dense)):
        modules.append((f"{len(modules)}_Dense", "Dense"))
        _write_dense(folder / modules[-1][0], params["sentence_head"]["dense"][number], sentence,
                     number)
    if sentence.normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
        (folder / modules[-1][0]).mkdir()
    return modules


def _write_dense(folder: Path, params: dict[str, Any], sentence: Sentence, number: int) -> None:
    dense = sentence.dense[number]
    _write(folder / "config.json", {
        "in_features": dense.inputs, "out_features": dense.outputs, "bias": dense.bias,
        "activation_function": ACTIVATIONS[dense.activation]})
    tensors = {"linear.weight": np.ascontiguousarray(np.asarray(params["kernel"], np.float32).T)}
    if dense.bias:
        tensors["linear.bias"] = np.asarray(params["bias"], np.float32)
    save_tensors(tensors, folder / "model.safetensors")


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
