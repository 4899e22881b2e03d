"""Judge a model, trained here or elsewhere:

    python experiments/evaluate.py --model DIR --dev labelled.csv

The same as `distilbert-jax evaluate`, from a clone.
"""

from launch import run

if __name__ == "__main__":
    run("evaluate")
