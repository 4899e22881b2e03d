"""Distil a masked language model:

    python experiments/run.py --mesh 8x1

The same as `distilbert-jax distil`, from a clone.
"""

from launch import run

if __name__ == "__main__":
    run("distil")
