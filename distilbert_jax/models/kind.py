"""A folder's config.json → the task that its model was trained for, and the labels it knows.

Neither JAX nor transformers is needed, so that a server can read a folder without them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilbert_jax.errors import UserError, first_line


def read_config(folder: Path) -> dict[str, Any]:
    """The object in a folder's config.json.

    Raises:
        UserError: it is missing, holds something else, or names its labels in another form than
            transformers.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give a Hugging Face folder") from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object")
    names, count = raw.get("id2label") or {}, raw.get("num_labels", 2)
    if not isinstance(count, int):
        raise UserError(f"{path}: num_labels {count!r} is no whole number")
    if not isinstance(names, dict) or not all(number.isdecimal() for number in names):
        raise UserError(f"{path}: id2label must be an object of numbers and names, as "
                        f"{{\"0\": \"no\", \"1\": \"yes\"}}; found {str(names)[:60]}")
    return raw


def task_of(raw: Mapping[str, Any]) -> str:
    """The task that the class named in a config.json is for: classify, regress, tag; "" for none.
    """
    found = architecture(raw)
    if found.endswith("ForTokenClassification"):
        return "tag"
    if found.endswith("ForSequenceClassification"):
        return "regress" if len(labels_of(raw)) == 1 else "classify"
    return ""


def architecture(raw: Mapping[str, Any]) -> str:
    """The class of transformers that a config.json names first; "" where it names none."""
    return next(iter(raw.get("architectures") or [""]))


def labels_of(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the labels in the order of the logits; LABEL_0, … where there are only numbers."""
    names = raw.get("id2label")
    if not names:
        return tuple(f"LABEL_{i}" for i in range(raw.get("num_labels", 2)))
    return tuple(str(names[key]) for key in sorted(names, key=int))
