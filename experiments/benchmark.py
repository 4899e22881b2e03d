"""Measure, side by side in one run:

    python experiments/benchmark.py train

The same as `distilbert-jax benchmark`, from a clone.
"""

from launch import run

if __name__ == "__main__":
    run("benchmark")
