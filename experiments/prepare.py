"""Prepare a corpus once, for any number of runs:

    python experiments/prepare.py --tokenizer TEACHER --corpus FILES --output prepared

The same as `distilbert-jax prepare`, from a clone.
"""

from launch import run

if __name__ == "__main__":
    run("prepare")
