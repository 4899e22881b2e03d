"""A teacher's vectors of all sentences, computed once and kept in parts, sealed in the end.

Stopped, the same command goes on after the last whole part. What is kept is used only for the same
teacher, tokenizer, sentences and settings.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distilbert_jax.errors import UserError
from distilbert_jax.jobs.task_model import read_json
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.progress import bar
from distilbert_jax.machine.sharding import first_process_first

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
    parts = [(folder / f"{i:05d}.npy", range(i * PART, min(count, (i + 1) * PART)))
             for i in range(math.ceil(count / PART))]
    _check(folder, request)
    sealed = (folder / seal.SEAL).exists()
    with bar(total=count, desc="teacher", unit=" sentences", delay=2, leave=False) as progress:
        for path, numbers in parts if not sealed else []:
            if not path.exists():
                _write(path, compute(numbers).astype(request["dtype"]), request)
            progress.update(len(numbers))
    with first_process_first():
        if jax.process_index() == 0 and not sealed:
            seal.seal(folder)
    if fault := seal.find_fault(folder):
        raise _damaged(folder, fault)
    found = [np.load(path) for path, _ in parts]
    for (path, numbers), part in zip(parts, found, strict=True):
        if part.shape != (len(numbers), width):
            raise _damaged(folder, f"{path.name} holds {part.shape}, needed are "
                                   f"{(len(numbers), width)}")
    return np.concatenate(found)


def _check(folder: Path, request: dict[str, Any]) -> None:
    """Raise a UserError if there is something else in the folder."""
    if not folder.exists():
        return
    before = read_json(folder / "request.json")
    if not before:
        raise UserError(f"{folder} was not made by this command, or its request.json is damaged: "
                        "remove it, or name another folder by --vectors")
    if other := [name for name in request if request[name] != before.get(name)]:
        raise UserError(f"{folder} holds vectors for another {', '.join(other)}: remove it, or "
                        "name another folder by --vectors")


def _write(path: Path, vectors: np.ndarray, request: dict[str, Any]) -> None:
    with first_process_first():
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "request.json").write_text(json.dumps(request, indent=1))
            with store.whole_file(path) as new, open(new, "wb") as file:
                np.save(file, vectors)


def _damaged(folder: Path, fault: str) -> UserError:
    return UserError(f"{folder} is damaged ({fault}): remove it, and the teacher is asked again")
