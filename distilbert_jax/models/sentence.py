"""What a sentence-transformers folder says beside the encoder: how its states become one vector.

A folder comes in; a model whose config has a `Sentence`, the longest text and the prompts go out,
or one line. What is not known is refused, never guessed.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from distilbert_jax.errors import UserError, choose, first_line
from distilbert_jax.models import hub
from distilbert_jax.models.vectors import DENSE_ACTIVATIONS, POOLINGS, Dense, Sentence

KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")  # modules, in this order
# Keys of 1_Pooling/config.json before sentence-transformers 6, which has "pooling_mode".
OLD = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
       "pooling_mode_mean_tokens": "mean",
       "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
       "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"}


@dataclasses.dataclass(frozen=True)
class SentenceModel:
    """A sentence encoder read from its folder."""

    model: hub.Pretrained  # its config has a `sentence`; neither pooler nor language-model head
    max_length: int  # tokens of the longest text; what is longer is cut
    prompts: Mapping[str, str]  # name → what is put before a text
    default_prompt: str | None

    def prompt(self, *names: str) -> str:
        """The first prompt of these names that there is, or else the default one, or ""."""
        for name in (*names, self.default_prompt):
            if self.prompts.get(name or ""):
                return self.prompts[name]
        return ""


def load(name: str, pooling: str = "", normalize: bool = True) -> SentenceModel:
    """Read a sentence encoder.

    Args:
        name: of a folder with modules.json, or of a hub repository.
        pooling: a key of POOLINGS, for an encoder without modules.json; normalize: whether its
            vectors have length 1.

    Raises:
        UserError: as for hub.load; no modules.json and no pooling, or both; a module, a pooling or
            an activation that is not known; a layer that does not fit.
    """
    model = hub.load(name)
    if model.config.mlm_head and not pooling and not (model.folder / "modules.json").exists():
        raise UserError(f"{name} is a masked language model without modules.json: its states were "
                        "not trained to be a text's vector; to take them so, give --pooling mean")
    parts = _modules(model.folder, name, pooling, normalize)
    config = dataclasses.replace(
        model.config, sentence=parts.sentence, pooler=False, mlm_head=False)
    if (found := parts.sentence.dense[:1]) and found[0].inputs != config.hidden_size:
        raise UserError(f"{name}: Dense takes {found[0].inputs} dimensions, the pooled states have "
                        f"{config.hidden_size}")
    params = {key: model.params[key] for key in ("embeddings", "layers")}
    if parts.dense:
        params["sentence_head"] = {"dense": dict(enumerate(parts.dense))}
    said = _json(model.folder / "config_sentence_transformers.json")
    return SentenceModel(
        dataclasses.replace(model, config=config, params=params),
        min(parts.max_length or config.positions, config.positions),
        {key: str(text) for key, text in (said.get("prompts") or {}).items()},
        said.get("default_prompt_name"))


@dataclasses.dataclass(frozen=True)
class _Parts:
    sentence: Sentence
    dense: list[dict[str, np.ndarray]]
    max_length: int | None


def _modules(folder: Path, name: str, pooling: str, normalize: bool) -> _Parts:
    """What modules.json and its folders say; without them, what the user says."""
    path = folder / "modules.json"
    if pooling and path.exists():
        raise UserError(f"{name} has a modules.json, which says how its vectors are made: leave "
                        "out --pooling")
    if not path.exists():
        if not pooling:
            raise UserError(f"{name} has no modules.json, which would say how its states become a "
                            "vector: give --pooling mean, cls, max or mean_sqrt_len_tokens")
        return _Parts(Sentence(choose(pooling, POOLINGS, "--pooling"), normalize), [], None)
    modules = _listed(path)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or "Normalize" in kinds[:-1]:
        raise UserError(f"{path} lists {', '.join(kinds)}; supported are Transformer, Pooling, "
                        "then any Dense, and last Normalize or not")
    if modules[0][1] not in ("", "."):
        raise UserError(f"{path} keeps the Transformer in {modules[0][1]}: move its files beside "
                        "modules.json, and write \"path\": \"\"")
    said = _json(folder / "sentence_bert_config.json")
    if said.get("do_lower_case"):
        raise UserError(f"{folder / 'sentence_bert_config.json'}: do_lower_case is not supported: "
                        "set it in the tokenizer, and to false here")
    dense = [_dense(folder / place) for kind, place in modules if kind == "Dense"]
    return _Parts(
        Sentence(_pooling(folder / modules[1][1]), kinds[-1] == "Normalize",
                 tuple(shape for shape, _ in dense)),
        [params for _, params in dense], said.get("max_seq_length"))


def _listed(path: Path) -> list[tuple[str, str]]:
    """(Kind, folder) of each module."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(part["type"]).rsplit(".", 1)[-1], str(part["path"])) for part in raw]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    for kind, _ in found:
        choose(kind, KNOWN, f"module in {path}:")
    return found


def _pooling(folder: Path) -> str:
    raw = _json(folder / "config.json", needed=True)
    modes = raw.get("pooling_mode") or [name for key, name in OLD.items() if raw.get(key)] or [
        "mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) > 1:
        raise UserError(f"{folder / 'config.json'} joins {' and '.join(modes)}: one pooling is "
                        "supported")
    if raw.get("include_prompt", True) is False:
        raise UserError(f"{folder / 'config.json'}: include_prompt is false, which is not "
                        "supported")
    return choose(modes[0], POOLINGS, f"pooling in {folder / 'config.json'}:")


def _dense(folder: Path) -> tuple[Dense, dict[str, np.ndarray]]:
    raw = _json(folder / "config.json", needed=True)
    if raw.get("use_residual") or any(raw.get(key, "sentence_embedding") not in (
            None, "sentence_embedding") for key in ("module_input_name", "module_output_name")):
        raise UserError(f"{folder / 'config.json'}: only a Dense from sentence_embedding to "
                        "sentence_embedding without residual is supported")
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
        kernel = np.ascontiguousarray(tensors["linear.weight"].T, np.float32)
    except Exception as error:  # the library has its own
        raise UserError(f"{path} is missing, damaged or holds no linear.weight: "
                        f"{first_line(error)}") from error
    activation = str(raw.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    choose(activation, DENSE_ACTIVATIONS, f"activation in {folder / 'config.json'}:")
    params = {"kernel": kernel}
    if "linear.bias" in tensors:
        params["bias"] = tensors["linear.bias"].astype(np.float32)
    return Dense(*kernel.shape, "bias" in params, activation), params


def _json(path: Path, needed: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none and none is needed."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if needed:
            raise UserError(f"{path} does not exist, and modules.json names it") from error
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object")
    return raw
