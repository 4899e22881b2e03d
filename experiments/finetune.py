"""Train a model for a task, alone or from a teacher:

    python experiments/finetune.py --model DIR --task mrpc --data ../shared/data/glue/MRPC
    python experiments/finetune.py --model DIR --train a.csv --distil --student-layers 3
"""

from launch import launch

from distilbert_jax.cli import parse
from distilbert_jax.jobs.finetune import finetune
from distilbert_jax.task_config import FinetuneConfig


def main(argv: list[str]) -> None:
    finetune(parse(FinetuneConfig, __doc__, argv, {}))


if __name__ == "__main__":
    launch(main)
