"""A teacher's vectors of all sentences, computed once and kept in parts, sealed in the end.

Stopped, the same command goes on after the last whole part. What is kept is used only for the same
teacher, tokenizer, sentences and settings.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distilbert_jax.jobs.kept_parts import KeptParts

PART = 8192  # sentences in a file


def vectors_once(
    folder: Path, request: dict[str, Any], count: int, width: int,
    compute: Callable[[range], np.ndarray],
) -> np.ndarray:
    """The vectors in a folder, of which those that are not there yet are computed.

    Args:
        folder: theirs.
        request: what they depend on, `dtype` being how they are kept.
        count: sentences.
        width: dimensions of a vector.
        compute: numbers of sentences → their vectors [n, D]; called by all processes.

    Returns:
        [count, D] of the dtype that they are kept in.

    Raises:
        UserError: the folder holds something else, vectors of something else, or is damaged.
    """
    parts = KeptParts(folder, request, count, PART, "vectors", "--vectors")
    parts.complete(lambda numbers: compute(numbers).astype(request["dtype"]), "teacher",
                   " sentences")
    found = [np.load(path) for path in parts.files]
    for number, (path, part) in enumerate(zip(parts.files, found, strict=True)):
        needed = len(parts.numbers(number)), width
        if part.shape != needed:
            raise parts.damaged(f"{path.name} holds {part.shape}, needed are {needed}")
    return np.concatenate(found)
