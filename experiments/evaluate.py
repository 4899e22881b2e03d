"""Judge a model that was trained for a task, or a masked language model, here or elsewhere:

    python experiments/evaluate.py --model DIR --task mrpc --data ../shared/data/glue/MRPC
    python experiments/evaluate.py --model DIR --dev labelled.csv --output judged
    python experiments/evaluate.py --model DIR --teacher DIR --corpus text.jsonl
"""

from launch import launch

from distilbert_jax.cli import parse
from distilbert_jax.jobs.evaluate import evaluate
from distilbert_jax.task_config import EvaluateConfig


def main(argv: list[str]) -> None:
    evaluate(parse(EvaluateConfig, __doc__, argv, {}))


if __name__ == "__main__":
    launch(main)
