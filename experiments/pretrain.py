"""Train a BERT with the masked-language-model loss:

    python experiments/pretrain.py --corpus FILES --output teacher

The same as `distilbert-jax pretrain`, from a clone.
"""

from launch import run

if __name__ == "__main__":
    run("pretrain")
