"""Write a model in further formats, each checked before it is kept:

    python experiments/ship.py --model DIR --output shipped

The same as `distilbert-jax ship`, from a clone.
"""

from launch import run

if __name__ == "__main__":
    run("ship")
