"""How fast a corpus is prepared, and how much memory ten times as large a corpus takes.

    python experiments/benchmark_prepare.py --tokenizer DIR --corpus FILES --workers 2
"""

import dataclasses

from launch import launch

from distilbert_jax.benchmark import preparation
from distilbert_jax.config import PrepareConfig, UserError, parse


def main(argv: list[str]) -> None:
    config = parse(PrepareConfig, __doc__, argv, {})
    if not (config.tokenizer and config.corpus):
        raise UserError("--tokenizer or --corpus is missing (see --help)")
    workers = config.workers or 1
    print(preparation.describe(preparation.measure(dataclasses.replace(config, workers=workers))))


if __name__ == "__main__":
    launch(main)
