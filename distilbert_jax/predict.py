"""Answers from a folder, for use from Python.

    model = load("DIR", runtime="onnx")    # or "jax", or "int8"
    model.fill_mask(["the [MASK] barks"])  # .classify, .tag, .embed, as the model was trained
"""

from distilbert_jax.export.predict import Predictor, load

__all__ = ["Predictor", "load"]
