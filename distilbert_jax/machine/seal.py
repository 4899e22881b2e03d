"""Sealed folders: their last file holds size and SHA-256 of every other, so damage is found.

A folder without its seal was not completed, and a single changed bit is found. On a disk a folder
is renamed before it is deleted, under gs:// its seal is deleted first, so that what a removal
leaves behind when it is cut short is not taken for a sealed folder.
"""

import hashlib
import json
import shutil
from typing import Any

import jax
import numpy as np

from distilbert_jax.machine import store
from distilbert_jax.machine.store import AnyPath
from distilbert_jax.machine.trees import path_name

SEAL = "sha256.json"


def seal(folder: AnyPath) -> None:
    """Bring all files of a folder to the disk, and write their sizes and SHA-256 beside them."""
    names = _files(folder)
    for name in names:
        store.sync(folder / name)
    write_json(folder / SEAL, {name: _digest(folder / name) for name in names})


def find_fault(folder: AnyPath) -> str:
    """Compare every file of a folder with its seal.

    Returns:
        What is wrong, in a few words; "" if nothing is.

    Raises:
        OSError: the network failed under gs://, which says nothing about the folder.
    """
    try:
        sealed = json.loads((folder / SEAL).read_bytes())
        sealed = {name: (size, sha256) for name, (size, sha256) in sealed.items()}
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if store.is_remote(folder) and isinstance(error, OSError):
            raise
        return f"{SEAL} is damaged"
    found = set(_files(folder))
    for name in sorted(found | sealed.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in sealed:
            return f"{name} does not belong to it"
        try:
            size, sha256 = _digest(folder / name)
        except OSError as error:
            if store.is_remote(folder):
                raise
            return f"{name} cannot be read ({error.strerror})"
        if size != sealed[name][0]:
            return f"{name} has {size} bytes, not {sealed[name][0]}"
        if sha256 != sealed[name][1]:
            return f"{name} is damaged (its SHA-256 differs)"
    return ""


def read_json(folder: AnyPath, name: str) -> dict[str, Any]:
    """Read one JSON file of a sealed folder, and compare that file alone with the seal.

    Returns:
        Its content; {} if it is missing or differs from what was sealed.
    """
    try:
        text = (folder / name).read_bytes()
        _, sha256 = json.loads((folder / SEAL).read_bytes())[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if store.is_remote(folder) and type(error) is OSError:  # of the network
            raise
        return {}
    return json.loads(text) if hashlib.sha256(text).hexdigest() == sha256 else {}


def write_json(path: AnyPath, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; without a newline, so that its last byte counts."""
    with store.whole_file(path) as new:
        new.write_text(json.dumps(content, indent=1))


def remove(folder: AnyPath) -> None:
    """Delete a sealed folder; cut short, it leaves `folder`.old or, under gs://, no seal."""
    if not store.is_remote(folder):
        folder = folder.rename(folder.with_name(folder.name + ".old"))
    delete(folder)


def delete(folder: AnyPath) -> None:
    """Delete a folder that is not sealed, or no longer has its name."""
    if store.is_remote(folder):
        store.remove(folder, SEAL)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def fingerprint(tree: Any) -> str:
    """SHA-256 of the paths, types, shapes and values of a pytree of host arrays."""
    sha256 = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.ascontiguousarray(leaf)
        sha256.update(f"{path_name(path)} {leaf.dtype} {leaf.shape}\n".encode())
        sha256.update(leaf.reshape(-1).view(np.uint8))
    return sha256.hexdigest()


def _files(folder: AnyPath) -> list[str]:
    """All files of a folder but its seal."""
    return [name for name in store.files(folder) if name != SEAL]


def _digest(path: AnyPath) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256
