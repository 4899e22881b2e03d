"""A mesh, and how every array is laid out on it: "8x1" → Mesh, the table of specs → NamedSharding.

Names and shapes come in, meshes and shardings go out; SHARDING_ROWS is the only place where an axis
of the mesh is given to a parameter.
"""

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils, topologies
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from distilbert_jax.config import TrainConfig
from distilbert_jax.errors import UserError
from distilbert_jax.machine.trees import path_name

# Rows of (end of the parameter's path, its PartitionSpec). Columns of the first product and rows
# of the second are divided over the model axis, so that a block needs one sum at its end.
SHARDING_ROWS: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embeddings/word/embedding", PartitionSpec("model", None)),
    (r"attention/(query|key|value)/kernel", PartitionSpec(None, "model")),
    (r"attention/(query|key|value)/bias", PartitionSpec("model")),
    (r"attention/output/kernel", PartitionSpec("model", None)),
    (r"ffn/up/kernel", PartitionSpec(None, "model")),
    (r"ffn/up/bias", PartitionSpec("model")),
    (r"ffn/down/kernel", PartitionSpec("model", None)),
    (r"projections/.*/kernel", PartitionSpec(None, "model")),
    (r"mlm_head/bias", PartitionSpec("model")),
)

WEEK = 7 * 24 * 60 * 60 * 1000  # ms
_turns = itertools.count()  # the same in every process


def make_mesh(shape: str, topology: Any = None) -> Mesh:
    """A mesh with axes data and model.

    Args:
        shape: "DATAxMODEL", e.g. "8x1"; "" puts all devices on data.
        topology: of devices that are not here, to compile for; default: those that are here.

    Raises:
        UserError: not of that form, or not the number of devices that there are.
    """
    here = len(topology.devices) if topology else jax.device_count()
    shape = shape or f"{here}x1"
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", shape)
    if not match:
        raise UserError(f"--mesh {shape} must look like 8x1: devices on data x devices on model")
    data, model = int(match[1]), int(match[2])
    if data * model != here:
        way_out = "" if topology else (
            f" (simulate them with JAX_NUM_CPU_DEVICES={data * model})")
        raise UserError(f"--mesh {shape} needs {data * model} devices, found {here}{way_out}")
    make = functools.partial(topologies.make_mesh, topology) if topology else jax.make_mesh
    mesh = make((data, model), ("data", "model"))
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * 2)


def rows_each(config: TrainConfig, mesh: Mesh) -> int:
    """Rows of a micro-batch on each device of the data axis.

    Raises:
        UserError: they are not the same number on all.
    """
    micro, data = config.batch_size // config.accumulate, mesh.shape["data"]
    if micro % data:
        raise UserError(f"--batch-size {config.batch_size} in {config.accumulate} micro-batches is "
                        f"{micro} rows, which {data} devices of --mesh do not divide")
    return micro // data


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The first axis, rows of a batch, divided over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def on_mesh(step: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Put `mesh` into the context of `step`, for the kernels in it that divide their own work."""
    if mesh is None:
        return step

    @functools.wraps(step)
    def placed(*args: Any) -> Any:
        with use_abstract_mesh(mesh.abstract_mesh):
            return step(*args)

    return placed


def sum_over_rows(
    function: Callable[[Any, Any], Any], mesh: Mesh | None
) -> Callable[[Any, Any], Any]:
    """Make `function`, which sums over rows, sum over the rows of all devices, once.

    Left to the compiler, gradients would be summed over devices in every micro-batch. Here each
    device keeps the sums of its own rows until the end; the model axis is left to the compiler.

    Args:
        function: (what all rows share, rows) → sums over rows.
        mesh: whose data axis the rows are divided over; None for one device.
    """
    if mesh is None or mesh.shape["data"] == 1:
        return function

    def own_rows(whole: Any, rows: Any) -> Any:
        return jax.lax.psum(function(whole, rows), "data")

    return jax.shard_map(
        own_rows, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec(),
        mesh=mesh.abstract_mesh, axis_names={"data"}, check_vma=False)


def head_specs(
    mesh: AbstractMesh, rows: int, words: int
) -> tuple[PartitionSpec, PartitionSpec]:
    """Which axes of the mesh divide the rows, and which the words, of the vocabulary projection.

    Words are divided over the model axis, as in SHARDING_ROWS; where it does not divide them, it
    divides the rows instead, if it can. Axes that a shard_map has taken already are left out.
    """
    free = [axis for axis in mesh.axis_names
            if axis not in mesh.manual_axes and mesh.shape[axis] > 1]
    of_words = "model" if "model" in free and words % mesh.shape["model"] == 0 else None
    of_rows = tuple(axis for axis in free if axis != of_words)
    while rows % math.prod(mesh.shape[axis] for axis in of_rows):
        of_rows = of_rows[:-1]
    return PartitionSpec(of_rows or None), PartitionSpec(of_words)


def local_rows(mesh: Mesh, count: int) -> np.ndarray:
    """The rows, of `count` in a batch, that devices of this process hold: [rows], ascending."""
    mine = np.zeros(count, bool)
    for (rows,) in by_rows(mesh).addressable_devices_indices_map((count,)).values():
        mine[rows] = True
    return np.flatnonzero(mine)


def place_rows(local: dict[str, np.ndarray], mesh: Mesh, count: int) -> dict[str, jax.Array]:
    """A batch of `count` rows on the mesh, of which each process gives those of `local_rows`."""
    return {name: jax.make_array_from_process_local_data(
        by_rows(mesh), x, (count, *x.shape[1:])) for name, x in local.items()}


def one_each(mesh: Mesh) -> NamedSharding:
    """An array with one element, or one row, on each device."""
    return NamedSharding(mesh, PartitionSpec(("data", "model")))


def place(tree: Any, layout: Any) -> Any:
    """Put a tree that every process holds on the mesh: jax.device_put, which keys need help with.

    Args:
        tree: of arrays and keys.
        layout: a NamedSharding for each leaf.
    """
    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or not jax.dtypes.issubdtype(
                leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(leaf, sharding)
        return jax.jit(lambda key: key, out_shardings=sharding)(leaf)

    return jax.tree.map(put, tree, layout)


def to_host(tree: Any) -> Any:
    """NumPy arrays of the whole tree, in every process, which all must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Run the block in the first process, then in all others at once.

    The others wait for as long as it takes, and not on their devices, whose collectives give up
    after half a minute on CPU. If the first process fails, they go on and fail in the same way.
    """
    wait = functools.partial(ocp.multihost.get_barrier_sync_fn(),
                             key=f"first_process_first {next(_turns)}", timeout_ms=WEEK)
    if jax.process_index():
        wait()
    try:
        yield
    finally:
        if not jax.process_index():
            wait()


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf, by the end of its path, so that moments follow parameters.

    A leaf without a row in SHARDING_ROWS, or whose axis the mesh does not divide (30,522 words
    over 4), is replicated.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for pattern, spec in SHARDING_ROWS:
            if re.search(pattern + "$", path_name(path)) and len(leaf.shape) == len(spec):
                divides = all(axis is None or size % mesh.shape[axis] == 0
                              for size, axis in zip(leaf.shape, spec, strict=True))
                return NamedSharding(mesh, spec) if divides else replicated(mesh)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)
