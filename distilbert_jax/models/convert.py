"""Tensors as a Hugging Face file names them ↔ parameters, through the family's table both ways.

Tensors come in, a nested dict of arrays goes out, or one line that lists everything that does not
fit. Nothing is left random.
"""

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from distilbert_jax.errors import UserError
from distilbert_jax.machine.progress import say
from distilbert_jax.machine.trees import path_name
from distilbert_jax.models.encoder import EncoderConfig, abstract_params
from distilbert_jax.models.family import Family

# Names of the attributes in which DataParallel and DistributedDataParallel, torch.compile,
# DeepSpeed, FSDP and activation checkpointing keep a model, and which end up in its tensors' names.
WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module",
            "_checkpoint_wrapped_module")
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

Leaf = tuple[tuple[Any, ...], Any]  # its path and its array, or its shape


def from_hf(
    tensors: dict[str, np.ndarray], family: Family, config: EncoderConfig
) -> tuple[EncoderConfig, dict[str, Any]]:
    """Turn Hugging Face tensors into parameters.

    Args:
        tensors: name → array, as in the file.
        family: a row of FAMILIES.
        config: the shape; `pooler` and `mlm_head` are set here, by what the tensors hold.

    Returns:
        The completed config, and the nested dict with kernels as [in, out], float32 (float64
        stays float64).

    Raises:
        UserError: with the list of all mismatches.
    """
    tensors, problems = _canonical(_unwrapped(tensors, family), family)
    modules = {_module(name) for name in tensors}
    present = {ours.split("/")[0] for theirs, ours in family.tensors.items()
               if theirs in modules and isinstance(ours, str)}
    config = dataclasses.replace(
        config, pooler="pooler" in present, mlm_head="mlm_head" in present)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract_params(config))
    table = _by_tensor(leaves, family)
    _check_tied(tensors, family, table, problems)
    unknown = [name for name in tensors if name not in table]
    other_heads = [name for name in unknown if not name.startswith(family.prefix)]
    problems += [f"unknown {name} {list(tensors[name].shape)}" for name in unknown
                 if name not in other_heads]
    found: dict[str, np.ndarray] = {}  # by path
    for name, parts in table.items():
        expected = list(_joined([np.broadcast_to(np.float32(0), leaf.shape) for _, leaf in parts],
                                parts[0][0], family).shape)
        if name not in tensors:
            problems.append(f"missing {name} {expected}")
            continue
        array = tensors[name]
        if list(array.shape) != expected:
            problems.append(f"{name} is {list(array.shape)}, config.json says {expected}")
            continue
        if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
            problems.append(f"{name} is {array.dtype}, of a quantised model: undo that first")
            continue
        array = array if array.dtype == np.float64 else array.astype(np.float32)
        if not np.isfinite(array).all():
            problems.append(f"{name} holds NaN or infinity")
        found |= _divided(array, parts, family)
    if problems:
        problems += [f"unknown {name} {list(tensors[name].shape)}" for name in other_heads]
        raise UserError(f"{len(problems)} tensors do not fit: {shortened(problems, '; ')}")
    if other_heads:
        say(f"left out, heads of other tasks: {shortened(other_heads, ', ')}")
    return config, jax.tree_util.tree_unflatten(
        treedef, [found[path_name(path)] for path, _ in leaves])


def shortened(parts: list[str], between: str, most: int = 8) -> str:
    """The first parts of a list, and how many more there are."""
    more = [f"and {len(parts) - most} more"] if len(parts) > most else []
    return between.join(parts[:most] + more)


def to_hf(params: dict[str, Any], family: Family) -> dict[str, np.ndarray]:
    """Turn parameters into Hugging Face tensors, contiguous; tied tensors appear once."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {name: np.ascontiguousarray(_joined(
        [np.asarray(leaf) for _, leaf in parts], parts[0][0], family))
        for name, parts in _by_tensor(leaves, family).items()}


def _by_tensor(leaves: list[Leaf], family: Family) -> dict[str, list[Leaf]]:
    """Each tensor of the file → the leaves that it holds, as they lie side by side in it."""
    names = {}  # our module → its module in the file, and which part of it
    for theirs, ours in family.tensors.items():
        for part, module in enumerate([ours] if isinstance(ours, str) else ours):
            names[module] = theirs, part
    table: dict[str, dict[int, Leaf]] = {}
    for path, leaf in leaves:
        *module, kind = path_name(path).split("/")
        layer = module[1] if module[0] == "layers" else ""
        theirs, part = names["/".join(["layers", "{i}", *module[2:]] if layer else module)]
        name = f"{theirs.replace('{i}', layer)}.{LEAF_NAMES[kind]}"
        table.setdefault(name, {})[part] = path, leaf
    return {name: [parts[part] for part in sorted(parts)] for name, parts in table.items()}


def _joined(arrays: list[np.ndarray], path: tuple[Any, ...], family: Family) -> np.ndarray:
    """Leaves of one kind as one tensor of the file."""
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
    return whole.T if _turns(path, family) else whole


def _divided(array: np.ndarray, parts: list[Leaf], family: Family) -> dict[str, np.ndarray]:
    """A tensor of the file as our leaves, by path: the inverse of `_joined`."""
    whole = array.T if _turns(parts[0][0], family) else array
    if len(parts) == 1:
        return {path_name(parts[0][0]): whole}
    ends = np.cumsum([leaf.shape[-1] for _, leaf in parts])[:-1]
    return {path_name(path): piece for (path, _), piece in zip(
        parts, np.split(whole, ends, axis=-1), strict=True)}


def _turns(path: tuple[Any, ...], family: Family) -> bool:
    """Whether the file has a kernel [in, out] as torch's [out, in]."""
    return path_name(path).endswith("kernel") and not family.as_stored


def _module(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _unwrapped(tensors: dict[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    """Names without what trainers' wrappers put before or into them, e.g. `module._orig_mod.`.

    Only where the family's own names begin so, they stay.
    """
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    wrapper = re.compile(rf"(^|\.)({'|'.join(WRAPPERS)})(?=\.)")
    return {wrapper.sub("", name).lstrip("."): array for name, array in tensors.items()}


def _canonical(
    tensors: dict[str, np.ndarray], family: Family
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Names as transformers writes them today, without the ignored ones; duplicates are listed."""
    def known(name: str) -> bool:
        return (re.sub(r"\.\d+\.", ".{i}.", _module(name)) in family.tensors
                or name in family.ignored)

    out: dict[str, np.ndarray] = {}
    duplicates = []
    for name, array in tensors.items():
        full = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        if known(family.prefix + full):
            full = family.prefix + full
        if full in out:
            duplicates.append(f"duplicated {full} (as {name})")
        if full not in family.ignored:
            out[full] = array
    return out, duplicates


def _check_tied(
    tensors: dict[str, np.ndarray], family: Family, table: dict[str, list[Leaf]],
    problems: list[str],
) -> None:
    """Take the tied tensors out, each equal to what it repeats; a lone one stands for it."""
    for name, original in family.tied.items():
        if name not in tensors or original not in table:
            continue
        tied = tensors.pop(name)
        if not np.array_equal(tied, tensors.setdefault(original, tied)):
            problems.append(f"untied {name} differs from {original}")
