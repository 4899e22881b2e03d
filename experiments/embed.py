"""Distil a sentence encoder into a smaller one in the space of its own vectors:

    python experiments/embed.py --teacher DIR --corpus FILES --student-layers 3
    python experiments/embed.py --teacher ../shared/data/minilm-l6 --pooling mean --corpus FILES
"""

from launch import launch

from distilbert_jax.cli import parse
from distilbert_jax.embed_config import EmbedConfig
from distilbert_jax.jobs.embed import embed


def main(argv: list[str]) -> None:
    embed(parse(EmbedConfig, __doc__, argv, {}))


if __name__ == "__main__":
    launch(main)
