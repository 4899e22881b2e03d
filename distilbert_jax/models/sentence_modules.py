"""What the files of a sentence-transformers folder say beside its encoder; nothing here needs JAX.

What is not known is refused, never guessed.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distilbert_jax.errors import UserError, choose, first_line

KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")  # modules, in this order
# What is computed for each: `vectors.py` for training, `export/predict.py` without JAX.
POOLINGS = ("cls", "mean", "max", "mean_sqrt_len_tokens")
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU")  # of a Dense
# Keys of 1_Pooling/config.json before sentence-transformers 6, which has "pooling_mode".
OLD = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
       "pooling_mode_mean_tokens": "mean",
       "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
       "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"}


@dataclasses.dataclass(frozen=True)
class Dense:
    """A linear layer after the pooling, and its activation."""

    inputs: int
    outputs: int
    bias: bool = True
    activation: str = "Identity"  # one of ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Sentence:
    """How states become a vector: pooled, through linear layers, and to length 1."""

    pooling: str  # one of POOLINGS
    normalize: bool
    dense: tuple[Dense, ...] = ()

    @property
    def of_first(self) -> bool:
        """Whether only the state of each text's first token is read."""
        return self.pooling == "cls"

    def width(self, hidden_size: int) -> int:
        """Dimensions of the vector."""
        return self.dense[-1].outputs if self.dense else hidden_size


@dataclasses.dataclass(frozen=True)
class Modules:
    """What comes before and after the encoder."""

    sentence: Sentence
    dense: list[dict[str, np.ndarray]]  # kernel [inputs, outputs] and bias [outputs] of each Dense
    max_length: int | None  # tokens of the longest text
    prompts: Mapping[str, str]  # name → what is put before a text
    default_prompt: str | None

    def prompt(self, *names: str) -> str:
        """The first prompt of these names that there is, be it empty, or else ""; without names
        the default one. So does sentence-transformers 6."""
        found = [self.prompts[name] for name in names or (self.default_prompt,)
                 if name in self.prompts]
        return found[0] if found else ""


def read_modules(folder: Path, name: str, pooling: str = "", normalize: bool = True) -> Modules:
    """What modules.json and its folders say; without them, what the user says.

    Args:
        folder: of the encoder.
        name: of the folder, as the user gave it.
        pooling: one of POOLINGS, for an encoder without modules.json; normalize: whether its
            vectors have length 1.

    Raises:
        UserError: no modules.json and no pooling, or both; a module, a pooling or an activation
            that is not known; a file that is missing or damaged.
    """
    path = folder / "modules.json"
    if pooling and path.exists():
        raise UserError(f"{name} has a modules.json, which says how its vectors are made: leave "
                        "out --pooling")
    if not path.exists():
        if not pooling:
            raise UserError(f"{name} has no modules.json, which would say how its states become a "
                            "vector: give --pooling mean, cls, max or mean_sqrt_len_tokens")
        return Modules(Sentence(choose(pooling, POOLINGS, "--pooling"), normalize), [], None, {},
                       None)
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
    longest = said.get("max_seq_length")
    if longest is None:  # sentence-transformers 6 leaves it to the tokenizer
        longest = _json(folder / "tokenizer_config.json").get("model_max_length")
    if not (longest is None or isinstance(longest, int) and longest >= 3):
        raise UserError(f"{name}: the longest text is of {longest!r} tokens (max_seq_length in "
                        "sentence_bert_config.json), which is no whole number from 3")
    dense = [_dense(folder / place) for kind, place in modules if kind == "Dense"]
    return Modules(
        Sentence(_pooling(folder / modules[1][1]), kinds[-1] == "Normalize",
                 tuple(shape for shape, _ in dense)),
        [params for _, params in dense], longest, *_prompts(folder))


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


def _prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    """The prompts by name, and the name of the default one."""
    path = folder / "config_sentence_transformers.json"
    said = _json(path)
    prompts, default = said.get("prompts") or {}, said.get("default_prompt_name")
    if not isinstance(prompts, dict) or default is not None and default not in prompts:
        raise UserError(f"{path}: default_prompt_name {default!r} is none of the prompts "
                        f"{prompts!r:.80}")
    return {name: str(text or "") for name, text in prompts.items()}, default


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
    from safetensors.numpy import load_file

    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
        kernel = np.ascontiguousarray(tensors["linear.weight"].T, np.float32)
    except Exception as error:  # the library has its own
        raise UserError(f"{path} is missing, damaged or holds no linear.weight: "
                        f"{first_line(error)}") from error
    activation = str(raw.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    choose(activation, ACTIVATIONS, f"activation in {folder / 'config.json'}:")
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
