"""The gate: a shipped file's answers beside our own model's, and how far apart they may be.

Shapes that break graphs and rows of real text go through the file's own runtime. Out come figures,
of which a format's limits name the worst that is still shipped.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from distilbert_jax.data.examples import Examples
from distilbert_jax.export.exportable import Exportable, Run, padded, reference

BATCH_TOKENS = 2048  # of a batch of real text, padding included
SEED = 20191001  # of the made-up rows


@dataclasses.dataclass(frozen=True)
class Limit:
    """The worst value of a figure that a format is shipped with."""

    figure: str
    text: str  # of the figure
    most: float | None = None
    least: float | None = None

    def refuses(self, figures: dict[str, float]) -> str:
        """In a few words what is beyond the limit; "" if nothing is, or the figure is not there."""
        if self.figure not in figures:
            return ""
        value = figures[self.figure]
        if self.most is not None and not value <= self.most:
            return f"{self.text} {value:.4g}, at most {self.most:g} is allowed"
        if self.least is not None and not value >= self.least:
            return f"{self.text} {value:.4g}, at least {self.least:g} is allowed"
        return ""


def _limits(**values: float) -> tuple[Limit, ...]:
    return tuple(Limit(name, *TEXTS[name][:1], **{TEXTS[name][1]: value})
                 for name, value in values.items())


# Figure → what it is, and on which side of a limit it has to stay. Two of few answers may always
# differ: `same` and the losses are of the answers beyond these two.
TEXTS = {
    "difference": ("largest difference of an answer", "most"),
    "padding": ("largest difference made by what stands at padding", "most"),
    "same": ("share of equal answers", "least"),
    "top1_lost": ("top-1 lost, as a share,", "most"),
    "perplexity_ratio": ("perplexity, as a multiple,", "most"),
    "score_lost": ("score lost, of 1,", "most"),
    "correlation": ("correlation with our answers", "least"),
    "cosine_mean": ("mean cosine of pooled states", "least"),
    "cosine_worst": ("worst cosine of pooled states", "least"),
    "size": ("size, as a multiple of float32,", "most"),
}
FLOAT32 = _limits(
    difference=1e-4, padding=1e-5, same=0.999, top1_lost=5e-4, perplexity_ratio=1.001,
    score_lost=5e-4, correlation=0.9999, cosine_mean=0.9999, cosine_worst=0.9999)
# Measured with one scale for each column on two real models: 0.9988 the same, cosine 0.994 and
# 0.979; with one for each kernel 0.964 and 0.856, which top-1 and correlations hardly show.
INT8 = _limits(
    same=0.995, top1_lost=3e-3, perplexity_ratio=1.01, score_lost=3e-3, correlation=0.99,
    cosine_mean=0.99, cosine_worst=0.97, size=0.27)
