"""Defaults that belong together: a file for each, whose docstring says for what it is.

A recipe has DISTIL, settings of a distillation; where it has PRETRAIN too, its teacher is trained
first, and where it has ABLATION, the rows of `distilbert-jax ablate`.
"""

import importlib
import pkgutil
from types import ModuleType


def recipes() -> dict[str, ModuleType]:
    """The files of this folder by name."""
    return {found.name: importlib.import_module(f"{__name__}.{found.name}")
            for found in pkgutil.iter_modules(__path__)}
