"""Put finished runs into one table and one plot:

    python experiments/compare.py DIR DIR

The same as `distilbert-jax compare`, from a clone.
"""

from launch import run

if __name__ == "__main__":
    run("compare")
