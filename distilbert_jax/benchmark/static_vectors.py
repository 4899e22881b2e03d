"""Static vectors of the same teacher, by model2vec: the cheap student that a real one must beat."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from distilbert_jax.errors import first_line

DIMENSIONS, FREQUENCY = 256, 1e-4  # pca_dims and sif_coefficient of model2vec's recipe
TEXTS = 512  # that are timed


@dataclasses.dataclass(frozen=True)
class Static:
    """Vectors of words, whose mean is the vector of a text; no space of the teacher's."""

    model: Any

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return int(self.model.embedding.size)

    def encode(self, texts: list[str], *prompts: str) -> np.ndarray:
        """The vectors of texts, [n, 256]."""
        return np.asarray(self.model.encode(list(texts)))

    def speeds(self, lengths: tuple[int, ...]) -> list[float]:
        """Texts per second at these lengths in words, its own tokenizer included."""
        found = []
        for length in lengths:
            texts = [" ".join(["word"] * length)] * TEXTS
            self.encode(texts)
            began = time.perf_counter()
            self.encode(texts)
            found.append(TEXTS / (time.perf_counter() - began))
        return found


def distil(folder: Path) -> tuple[Static | None, str]:
    """Make them from the teacher's folder; without the library, None and why."""
    try:
        from model2vec.distill import distill
    except ImportError as error:
        return None, f"model2vec is not installed ({first_line(error)})"
    try:
        return Static(distill(model_name=str(folder), device="cpu", pca_dims=DIMENSIONS,
                              sif_coefficient=FREQUENCY)), ""
    except Exception as error:  # the library raises what its own libraries raise
        return None, f"model2vec failed: {first_line(error)}"
