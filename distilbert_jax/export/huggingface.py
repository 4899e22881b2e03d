"""Parameters → a Hugging Face folder that transformers loads, tokenizer and model card included."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from distilbert_jax.errors import UserError
from distilbert_jax.machine import store
from distilbert_jax.models.convert import to_hf
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.family import Family

# What config.json says of a task beside the class of its model.
PROBLEMS = {"classify": {"problem_type": "single_label_classification"},
            "regress": {"problem_type": "regression"}, "tag": {}}
NEW_CLASS = "TokenizersBackend"  # what transformers 5 calls a tokenizer, and 4 does not know


def export(
    folder: Path, params: dict[str, Any], config: EncoderConfig, family: Family,
    tokenizer: Any, card: str, labels: tuple[str, ...] = (),
) -> None:
    """Write a model as a Hugging Face folder, whole or not at all; an older one is replaced.

    Args:
        folder: of the model.
        params: nested dict of arrays; stored as float32.
        config: of the model.
        family: module with the names that transformers gives to config and tensors.
        tokenizer: a fast tokenizer, saved beside the model.
        card: text of README.md.
        labels: names of the classes of a task's head, in the order of its logits.
    """
    tensors = {name: array.astype(np.float32) for name, array in to_hf(params, family).items()}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise UserError(f"{name} of the trained model holds NaN or infinity, and nothing is "
                            "exported: lower --learning-rate, in another --output")
    description = {
        "architectures": [family.architecture], "model_type": family.model_type,
        "dtype": "float32", "tie_word_embeddings": True, **family.to_hf(config)}
    if config.task:
        names = labels or [f"LABEL_{i}" for i in range(config.num_labels)]
        description |= {"id2label": dict(enumerate(names)),
                        "label2id": {name: i for i, name in enumerate(names)}} | PROBLEMS[
                            config.task]
    tokenizer.model_max_length = config.positions
    with store.whole_folder(folder) as new:
        save_tensors(tensors, new / "model.safetensors")
        (new / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        tokenizer.save_pretrained(new)
        generalise(new / "tokenizer_config.json", config)
        (new / "README.md").write_text(card, encoding="utf-8", errors="replace")


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write tensors, for all to read who may read the other files (safetensors 0.8: mode 0600)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def generalise(path: Path, config: EncoderConfig) -> None:
    """Bring a tokenizer_config.json into the form that every version and reader understands.

    What concerns only this machine or transformers 5 goes. Said is which inputs the model takes,
    since transformers 4 hands the model all that its tokenizer gives.

    Args:
        path: of the file.
        config: of the model beside it.
    """
    types = ["token_type_ids"] if config.type_vocab_size > 1 else []
    raw = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only", "name_or_path"):
        raw.pop(name, None)
    if raw.get("tokenizer_class") == NEW_CLASS:  # its name in transformers 4 and 5:
        raw["tokenizer_class"] = "PreTrainedTokenizerFast"
    raw["model_input_names"] = ["input_ids", *types, "attention_mask"]
    path.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
