"""Write a model in the formats that servers, browsers and phones take, each checked before it is
kept:

    python experiments/ship.py --model DIR
    python experiments/ship.py --model DIR --formats onnx int8 --evaluate dev.tsv --output shipped
"""

from launch import launch

from distilbert_jax.cli import parse
from distilbert_jax.jobs.ship import ship
from distilbert_jax.ship_config import ShipConfig


def main(argv: list[str]) -> None:
    ship(parse(ShipConfig, __doc__, argv, {}))


if __name__ == "__main__":
    launch(main)
