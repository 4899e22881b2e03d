"""Distil a BERT teacher into a DistilBERT student: python experiments/run.py --mesh 8x1

Without teacher, corpus and recipe the quickstart runs: it trains a small teacher on the
documentation of Python itself, distils it, and reports, in minutes and without a network.
"""

import dataclasses

from launch import launch, recipes

from distilbert_jax.cli import parse
from distilbert_jax.config import DistilConfig, PretrainConfig
from distilbert_jax.jobs.distil import distil
from distilbert_jax.jobs.forecast import compile_only
from distilbert_jax.jobs.pretrain import pretrain, scratch_shape
from distilbert_jax.jobs.setup import check_job
from distilbert_jax.machine import store
from distilbert_jax.models import bert
from distilbert_jax.models.hub import load_shape


def main(argv: list[str]) -> None:
    known = recipes()
    defaults = {name: recipe.DISTIL for name, recipe in known.items()}
    config = parse(DistilConfig, __doc__, argv, defaults)
    if not (config.teacher or config.corpus or config.recipe):
        config = parse(DistilConfig, __doc__, [*argv, "--recipe", "quickstart"], defaults)
    recipe = known.get(config.recipe)
    teacher = None
    if not config.teacher and hasattr(recipe, "PRETRAIN"):
        teacher = PretrainConfig(
            **recipe.PRETRAIN, output=store.join(config.output, "teacher"),
            mesh=config.mesh, dtype=config.dtype, seed=config.seed)
    if config.compile_only:
        family, shape = load_shape(config.teacher) if config.teacher else (
            bert.FAMILY, scratch_shape(teacher) if teacher else bert.BASE)
        print(compile_only(config, family, shape))
        return
    if teacher:
        config = dataclasses.replace(config, teacher=store.join(teacher.output, "model"))
        # Before the minutes that the teacher takes.
        check_job(config, bert.FAMILY, scratch_shape(teacher))
        pretrain(teacher)
    distil(config)


if __name__ == "__main__":
    launch(main)
