"""Distil a sentence encoder into a smaller one in the space of its own vectors:

    python experiments/embed.py --teacher DIR --corpus FILES --student-layers 3

The same as `distilbert-jax embed`, from a clone.
"""

from launch import run

if __name__ == "__main__":
    run("embed")
