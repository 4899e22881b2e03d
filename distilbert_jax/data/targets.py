"""Labels as they are written → what is to be done, and the numbers or class names to learn."""

import math
import re
from collections.abc import Sequence
from typing import Any

from distilbert_jax.data.labelled import Labelled
from distilbert_jax.errors import UserError


def kind_of(examples: Labelled, wish: str = "") -> str:
    """What is to be done: tag words, give a number, or choose a class.

    Args:
        examples: with labels.
        wish: of the user; "" goes by the labels: numbers with decimals are regressed.
    """
    if examples.tagged:
        if wish not in ("", "tag"):
            raise UserError(f"{examples.where[0]} holds tagged words, where texts are needed to "
                            f"{wish}")
        return "tag"
    if wish == "tag":
        raise UserError(f"{examples.where[0]} holds no tagged words, as are needed to tag")
    decimals = [isinstance(label, float) or "." in str(label) for label in examples.labels]
    if wish:
        return wish
    if all(re.fullmatch(r"-?\d+,\d+", str(label)) for label in examples.labels):
        raise UserError(f"{examples.where[0]}: label {examples.labels[0]!r} looks like a number "
                        "with a decimal comma: write a point, or give --kind classify")
    numbers = all(_is_number(label) for label in examples.labels)
    return "regress" if numbers and any(decimals) else "classify"


def _is_number(label: Any) -> bool:
    try:
        float(label)
    except (TypeError, ValueError, OverflowError):  # the last of a whole number of 400 digits
        return False
    return True


def numbers(examples: Labelled) -> list[float]:
    """The labels of a regression.

    Raises:
        UserError: one is no finite number.
    """
    for label, place in zip(examples.labels, examples.where, strict=True):
        if not _is_number(label) or not math.isfinite(float(label)):
            raise UserError(f"{place}: label {label!r} is not a finite number, as is needed to "
                            "regress")
    return [float(label) for label in examples.labels]


def class_name(label: Any) -> str:
    """A label as a name: what is written, and of a number without decimals its digits."""
    return str(int(label)) if isinstance(label, (bool, float)) and label == int(label) else str(
        label)


def classes(examples: Labelled, known: Sequence[str] = ()) -> list[int] | list[list[int]]:
    """The labels as numbers in the order of `known`, which are matched by name, in any case.

    Raises:
        UserError: a label that is not among them.
    """
    order = {name.lower(): number for number, name in enumerate(known)}

    def number(label: Any, place: str) -> int:
        name = class_name(label).lower()
        if name not in order:
            raise UserError(f"{place}: label {label!r} is not among the labels {some(known)}")
        return order[name]

    if examples.tagged:
        return [[number(tag, place) for tag in tags]
                for tags, place in zip(examples.labels, examples.where, strict=True)]
    return [number(label, place)
            for label, place in zip(examples.labels, examples.where, strict=True)]


def some(names: Sequence[str]) -> str:
    """Names for a message, not all of very many."""
    more = f", ... ({len(names)} in all)" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def class_names(examples: Labelled, least: int = 2) -> tuple[str, ...]:
    """The names of the classes that occur, sorted; O before the other tags.

    Raises:
        UserError: there are fewer than `least`, two that differ in case alone, or one that a table
            cannot hold.
    """
    found = {class_name(label) for labels in examples.labels
             for label in (labels if examples.tagged else [labels])}
    if odd := [name for name in found if min(name, default=" ") < " "]:
        raise UserError(f"{examples.where[0]} ...: label {odd[0]!r} holds a tab or another control "
                        "character")
    by_case: dict[str, str] = {}
    for name in sorted(found):
        if (other := by_case.setdefault(name.lower(), name)) != name:
            raise UserError(f"{examples.where[0]} ...: labels {other!r} and {name!r} differ in "
                            "case alone: write them in one way")
    if len(found) < least:
        raise UserError(f"{examples.where[0]} ...: all labels are {found.pop()!r}: there is "
                        "nothing to learn")
    key = (lambda name: (0, int(name), "")) if all(
        name.isascii() and name.isdigit() for name in found) else (
        lambda name: (name != "O", 0, name))
    return tuple(sorted(found, key=key))
