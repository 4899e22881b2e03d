"""A distillation from what was given: recipe, settings, the teacher of a recipe, the student."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilbert_jax.cli import settle
from distilbert_jax.config import DistilConfig, PretrainConfig
from distilbert_jax.jobs.distil import distil
from distilbert_jax.jobs.forecast import compile_only
from distilbert_jax.jobs.pretrain import pretrain, scratch_shape
from distilbert_jax.jobs.setup import check_job
from distilbert_jax.machine import store
from distilbert_jax.models import bert
from distilbert_jax.models.hub import load_shape
from distilbert_jax.recipes import recipes


def settings(given: Mapping[str, Any]) -> DistilConfig:
    """What was given, over the defaults of its recipe.

    Args:
        given: settings of DistilConfig by name; without teacher, corpus and recipe the recipe is
            the quickstart.

    Raises:
        UserError: an unknown recipe or setting, or a value that cannot be.
    """
    known = {name: recipe.DISTIL for name, recipe in recipes().items()}
    config = settle(DistilConfig, given, known)
    if config.teacher or config.corpus or config.recipe:
        return config
    return settle(DistilConfig, {**given, "recipe": "quickstart"}, known)


def run(config: DistilConfig) -> Path:
    """Distil; where the recipe says how its teacher is trained and none is given, that comes first.

    Returns:
        The folder of the exported student.

    Raises:
        UserError, Interrupted: as for jobs.distil.
    """
    if teacher := _teacher(config):
        config = dataclasses.replace(config, teacher=store.join(teacher.output, "model"))
        # Before the minutes that the teacher takes.
        check_job(config, bert.FAMILY, [scratch_shape(teacher)])
        pretrain(teacher)
    return distil(config)


def forecast(config: DistilConfig) -> str:
    """What the update would take on the TPU of --compile-only: see jobs.forecast."""
    if config.teacher:
        families, shapes = zip(*map(load_shape, config.teacher), strict=True)
        return compile_only(config, families[0], shapes)
    teacher = _teacher(config)
    return compile_only(config, bert.FAMILY, [scratch_shape(teacher) if teacher else bert.BASE])


def _teacher(config: DistilConfig) -> PretrainConfig | None:
    """How the recipe has its teacher trained, if none is given."""
    recipe = recipes().get(config.recipe)
    if config.teacher or not hasattr(recipe, "PRETRAIN"):
        return None
    return PretrainConfig(
        **recipe.PRETRAIN, output=store.join(config.output, "teacher"), mesh=config.mesh,
        dtype=config.dtype, seed=config.seed)
