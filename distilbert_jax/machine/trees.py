"""Paths of trees as text."""

from typing import Any


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as text: `layers/3/attention/query/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
