"""Distil encoders in JAX: a teacher goes in, a student of half the layers comes out."""

from distilbert_jax.api import Result, distil, embed, finetune, ship
from distilbert_jax.errors import Interrupted, UserError

__version__ = "0.1.0"
__all__ = ["Interrupted", "Result", "UserError", "distil", "embed", "finetune", "ship"]
