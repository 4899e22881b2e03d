"""Train a model for a task, alone or from a teacher:

    python experiments/finetune.py --model DIR --train a.csv --distil --student-layers 3

The same as `distilbert-jax finetune`, from a clone.
"""

from launch import run

if __name__ == "__main__":
    run("finetune")
