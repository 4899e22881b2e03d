"""Distil BERT-family encoders in JAX: a teacher goes in, a student of half the layers comes out."""

__version__ = "0.1.0"
