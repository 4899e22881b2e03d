"""A Hugging Face folder → tensors, shape and family; or one line that says what is wrong with it.

Nothing is guessed, and no code from a file is run.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from distilbert_jax.errors import UserError, choose, first_line
from distilbert_jax.machine import store
from distilbert_jax.models.convert import from_hf
from distilbert_jax.models.encoder import ACTIVATIONS, EncoderConfig
from distilbert_jax.models.families import FAMILIES
from distilbert_jax.models.family import Family
from distilbert_jax.models.kind import architecture, labels_of, read_config, task_of

# Names of activations that compute what another one computes, as transformers has them.
SYNONYMS = {"gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new",
            "swish": "silu"}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model read from a Hugging Face folder."""

    folder: Path
    family: Family
    config: EncoderConfig
    params: dict[str, Any]  # nested dict of float32 NumPy arrays
    labels: tuple[str, ...] = ()  # of the task's head, in the order of its logits


def load(name: str) -> Pretrained:
    """Read a folder, or a hub repository where there is a network.

    Accepts `gamma`/`beta`, a missing `bert.` prefix, position_ids, a pooler, a next-sentence head,
    a decoder that repeats the word embedding, and half precision. Never runs code from a file.

    Raises:
        UserError: absent, truncated or of another family, or tensors that do not fit: the first
            unknown, missing, duplicated, untied, misshapen or not finite ones are in the message.
    """
    folder = _resolve(name)
    family, config = _read_shape(folder)
    tensors = _read_tensors(folder)
    _refuse_untied(folder, family, tensors)
    try:
        return Pretrained(folder, family, *from_hf(tensors, family, config))
    except (UserError, TypeError, ValueError) as error:
        raise _named(folder, error) from error


def load_task(name: str) -> Pretrained:
    """Read a model that was trained for a task, with its head; its family is that of the head.

    Raises:
        UserError: as for load, or there is no such head: its class in config.json is another, its
            tensors are not there, or it gives each text several labels or numbers.
    """
    folder = _resolve(name)
    family, config = _read_shape(folder)
    raw = read_config(folder)
    if raw.get("problem_type") == "multi_label_classification":
        raise UserError(f"{folder} gives each text several labels: one is supported")
    if not (task := task_of(raw)):
        raise UserError(f"{folder} is {architecture(raw) or 'a bare encoder'}, not trained for a "
                        "task: fine-tune it first: distilbert-jax finetune --model "
                        f"{name} ...")
    labels = labels_of(raw)
    if raw.get("problem_type") == "regression" and len(labels) > 1:
        raise UserError(f"{folder} gives each text {len(labels)} numbers: one is supported")
    config = dataclasses.replace(config, task=task, num_labels=len(labels))
    try:
        family = family.for_task(task)
        config, params = from_hf(_read_tensors(folder), family, config)
    except (UserError, TypeError, ValueError) as error:
        raise _named(folder, error) from error
    return Pretrained(folder, family, config, params, () if task == "regress" else labels)


def load_any(name: str) -> Pretrained:
    """Read a model with its task's head if it was trained for one, and as `load` does if not.

    Raises:
        UserError: as for load and load_task.
    """
    return load_task(name) if task_of(read_config(_resolve(name))) else load(name)


def _refuse_untied(folder: Path, family: Family, tensors: dict[str, np.ndarray]) -> None:
    untied = read_config(folder).get("tie_word_embeddings", True) is False
    if untied and not any(name in tensors for name in family.tied):
        raise UserError(f"{folder}: tie_word_embeddings is false and the file has no decoder "
                        f"({next(iter(family.tied))}): only a tied decoder is supported")


def load_shape(name: str) -> tuple[Family, EncoderConfig]:
    """Family and shape of a model, for which its config.json is enough.

    Raises:
        UserError: as for load.
    """
    return _read_shape(_resolve(name))


def _read_shape(folder: Path) -> tuple[Family, EncoderConfig]:
    raw = read_config(folder)
    if "model_type" not in raw:
        raise UserError(f"{folder}/config.json has no model_type: write which it is, e.g. "
                        f"\"model_type\": \"bert\" (known: {', '.join(sorted(FAMILIES))})")
    kind = str(raw["model_type"])
    if kind not in FAMILIES:
        raise UserError(f"{folder}: model_type {kind!r} is not supported (known: "
                        f"{', '.join(sorted(FAMILIES))})")
    family = FAMILIES[kind]
    if raw.get("position_embedding_type", "absolute") != "absolute" or raw.get("is_decoder", False):
        raise UserError(f"{folder}: only encoders with absolute positions are supported")
    try:
        config = family.from_hf(raw)
        config = dataclasses.replace(
            config, hidden_act=SYNONYMS.get(config.hidden_act, config.hidden_act))
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                     "intermediate_size", "max_position_embeddings"):
            if not isinstance(size := getattr(config, name), int) or not 1 <= size < 2**31:
                raise UserError(f"config.json: {name} {size!r} is not a positive whole number")
        for name in ("layer_norm_eps", "initializer_range"):
            if not isinstance(size := getattr(config, name), (int, float)) or size <= 0:
                raise UserError(f"config.json: {name} {size!r} is not a positive number")
        for name, most in (("type_vocab_size", 2**31), ("pad_token_id", config.vocab_size)):
            if not isinstance(size := getattr(config, name), int) or not 0 <= size < most:
                raise UserError(f"config.json: {name} {size!r} is not a whole number from 0 below "
                                f"{most}")
        if not isinstance(raw.get("tie_word_embeddings", True), bool):
            raise UserError("config.json: tie_word_embeddings must be true or false")
        choose(config.hidden_act, ACTIVATIONS, f"activation in {folder}/config.json")
        if config.hidden_size % config.num_attention_heads:
            raise UserError(f"config.json: {config.num_attention_heads} attention heads do not "
                            f"divide hidden size {config.hidden_size}")
    except (UserError, TypeError, ValueError) as error:
        raise _named(folder, error) from error
    return family, config


def _named(folder: Path, error: Exception) -> UserError:
    """The error with its folder in front."""
    text = str(error)
    return UserError(text if text.startswith(str(folder)) else f"{folder}: {text}")


def is_name(name: str) -> bool:
    """Whether a model of this name is looked for on the hub: NAME or OWNER/NAME, no folder here."""
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)) and not os.path.exists(name)


def _resolve(name: str) -> Path:
    if not name.isprintable():
        raise UserError(f"model folder {name!r} holds characters that cannot be printed")
    folder = Path(os.path.expanduser(store.fetch(name)))
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise UserError(f"{name} is a file; give the folder that holds config.json and the weights")
    if not is_name(name):
        raise UserError(f"model folder {name} does not exist")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.safetensors", "README.md"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # the hub client has a dozen kinds; each means "not to be had"
        raise UserError(
            f"no folder {name}, and the hub did not give it: {first_line(error)}") from error
    return folder


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder: safetensors before torch files, one file or several."""
    readers = {"model.safetensors": load_file, "pytorch_model.bin": _read_torch}
    for stem, read in readers.items():
        if (folder / stem).exists():
            return _checked(read, folder / stem)
        index = folder / f"{stem}.index.json"
        if index.exists():
            names = _checked(_read_index, index)
            tensors: dict[str, np.ndarray] = {}
            for part in sorted(set(names.values())):
                more = _checked(read, folder / part)
                if twice := sorted(tensors.keys() & more.keys()):
                    raise UserError(f"{folder / part} repeats {', '.join(twice)} of another part")
                tensors |= more
            if missing := sorted(set(names) - set(tensors)):
                raise UserError(f"{index} names tensors that no part holds: {', '.join(missing)}")
            return tensors
    others = [name for name in ("flax_model.msgpack", "tf_model.h5") if (folder / name).exists()]
    if others:
        raise UserError(f"{folder} holds only {others[0]}: convert it, in an environment of "
                        "transformers 4 with that library, by AutoModelForMaskedLM.from_pretrained("
                        f"FOLDER, from_{'flax' if 'flax' in others[0] else 'tf'}=True)"
                        ".save_pretrained(FOLDER)")
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _read_index(path: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    names = dict(json.loads(path.read_text())["weight_map"])
    if not all(isinstance(part, str) for part in names.values()):
        raise ValueError("weight_map names parts that are no text")
    return names


def _checked(read: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    try:
        return read(path)
    except UserError:
        raise
    except Exception as error:  # each library has its own; the file is what the user can mend
        raise UserError(f"{path} is damaged or incomplete: {first_line(error)}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} needs PyTorch to be read: pip install torch, or convert the "
                        "folder to safetensors") from error
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in tensors.items()):
        raise ValueError("it is no dict of tensors by name; save model.state_dict()")
    tensors = {name: t.detach() for name, t in tensors.items()}
    return {name: (t.float() if t.is_floating_point() and t.itemsize < 4 else t).numpy()
            for name, t in tensors.items()}
