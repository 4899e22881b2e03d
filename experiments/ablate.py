"""Distil several times, each time with something else changed:

    python experiments/ablate.py --recipe table_4 --teacher DIR --corpus FILES --seeds 5

The same as `distilbert-jax ablate`, from a clone.
"""

from launch import run

if __name__ == "__main__":
    run("ablate")
