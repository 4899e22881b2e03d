"""Distil several times, each time with something else changed, and compare:

    python experiments/ablate.py --recipe table_4 --teacher ../shared/data/rxn-bert \\
        --corpus ../shared/data/uspto-reactions/train.txt.gz \\
        --valid ../shared/data/uspto-reactions/valid.txt.gz --seeds 5 --output output/table-4

A recipe with ABLATION names the rows; all else is a setting of run.py.
"""

from launch import launch, recipes

from distilbert_jax.cli import parse
from distilbert_jax.config import AblationConfig
from distilbert_jax.errors import UserError
from distilbert_jax.jobs.ablate import ablate


def main(argv: list[str]) -> None:
    known = {name: recipe for name, recipe in recipes().items() if hasattr(recipe, "ABLATION")}
    config = parse(AblationConfig, __doc__, argv,
                   {name: recipe.DISTIL for name, recipe in known.items()})
    if not config.recipe:
        raise UserError(f"--recipe is missing: one of {', '.join(sorted(known))} has the rows")
    ablate(config, known[config.recipe].ABLATION)


if __name__ == "__main__":
    launch(main)
