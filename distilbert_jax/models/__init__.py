"""Flax modules of the encoders, and one file of names per Hugging Face family."""
