"""The commands of `distilbert-jax`, which the files of experiments/ run from a clone too."""
