"""Distil a BERT teacher into a DistilBERT student: python experiments/run.py --mesh 8x1

Without teacher, corpus and recipe the quickstart runs: it trains a small teacher on the
documentation of Python itself, distils it, and reports, in minutes and without a network.
"""

import dataclasses

from launch import launch, recipes

from distilbert_jax import store
from distilbert_jax.config import DistilConfig, PretrainConfig, parse
from distilbert_jax.distil import check, distil, pretrain, scratch_shape


def main(argv: list[str]) -> None:
    known = recipes()
    defaults = {name: recipe.DISTIL for name, recipe in known.items()}
    config = parse(DistilConfig, __doc__, argv, defaults)
    if not (config.teacher or config.corpus or config.recipe):
        config = parse(DistilConfig, __doc__, [*argv, "--recipe", "quickstart"], defaults)
    recipe = known.get(config.recipe)
    if not config.teacher and hasattr(recipe, "PRETRAIN"):
        teacher = PretrainConfig(
            **recipe.PRETRAIN, output=store.join(config.output, "teacher"),
            mesh=config.mesh, dtype=config.dtype, seed=config.seed)
        config = dataclasses.replace(config, teacher=store.join(teacher.output, "model"))
        check(config, scratch_shape(teacher))  # before the minutes that the teacher takes
        pretrain(teacher)
    distil(config)


if __name__ == "__main__":
    launch(main)
