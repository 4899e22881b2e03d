"""Train a BERT with the masked-language-model loss: from scratch, or --model to adapt one.

    python experiments/pretrain.py --corpus texts/*.txt --output teacher
"""

from launch import launch

from distilbert_jax.cli import parse
from distilbert_jax.config import PretrainConfig
from distilbert_jax.jobs.pretrain import pretrain


def main(argv: list[str]) -> None:
    pretrain(parse(PretrainConfig, __doc__, argv, {}))


if __name__ == "__main__":
    launch(main)
