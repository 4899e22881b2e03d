"""Parameters → stablehlo/model.jax_export: one file that JAX runs on CPU, GPU and TPU.

The weights are in it, rows and tokens are free. It is opened without this package:

    from jax import export
    call = export.deserialize(bytearray(open("model.jax_export", "rb").read())).call
    logits = call(input_ids, attention_mask)  # int32 [B, T]; token_type_ids where there are types
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from distilbert_jax.export.exportable import Exportable, Run, answer, padded
from distilbert_jax.kernels.products import any_platform
from distilbert_jax.models.encoder import graphdef

PLATFORMS = ("cpu", "tpu", "cuda")


def write(model: Exportable, folder: Path) -> Path:
    """Write one file for all platforms.

    Args:
        model: what is shipped.
        folder: of the Hugging Face model; the file goes to its stablehlo/model.jax_export.

    Returns:
        The file's path.
    """
    shape = export.symbolic_shape(
        "batch, length", constraints=[f"length <= {model.config.positions}"])
    path = folder / "stablehlo" / "model.jax_export"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(exported(model, shape, PLATFORMS).serialize())
    return path


def exported(
    model: Exportable, shape: tuple[Any, ...],
    platforms: tuple[str, ...], graph: nnx.GraphDef | None = None,
) -> export.Exported:
    """A model as a StableHLO program, weights inside.

    Args:
        model: what is shipped.
        shape: [B, T] of ids, mask and, where there are several, token types; int32.
        platforms: that it will run on.
        graph: of the model, if not the usual one; its parameters are `model.params`.

    Returns:
        The program: input_ids, attention_mask[, token_type_ids] → answers, see Exportable.
    """
    graph = graph or graphdef(model.config, jnp.float32)
    params = jax.tree.map(jnp.asarray, model.params)

    def call(ids: jax.Array, mask: jax.Array, types: jax.Array | None = None) -> jax.Array:
        types = jnp.zeros_like(ids) if types is None else types
        return answer(graph, model.config, model.output, params, ids, mask, types)

    given = [jax.ShapeDtypeStruct(shape, jnp.int32)] * (3 if model.typed else 2)
    with any_platform(), _no_source_files():
        return export.export(jax.jit(call), platforms=platforms)(*given)


@contextlib.contextmanager
def _no_source_files() -> Iterator[None]:
    """A context in which a program does not say in which files of this machine it was written."""
    name = "jax_hlo_source_file_canonicalization_regex"  # what it matches is cut out of a path
    before = getattr(jax.config, name)
    jax.config.update(name, ".*")
    try:
        yield
    finally:
        jax.config.update(name, before)


def load(path: Path) -> Run:
    """Open a file on the first device; shapes are rounded up, so that few are compiled."""
    program = export.deserialize(bytearray(path.read_bytes()))
    call = jax.jit(program.call)

    def padded_to(wide: int, batch: tuple[np.ndarray, ...]) -> np.ndarray:
        rows, length = batch[0].shape
        room = ((0, padded(rows, 1) - rows), (0, wide - length))
        found = np.asarray(call(*(np.pad(x, room).astype(np.int32) for x in batch)))[:rows]
        return found[:, :length] if found.ndim == 3 else found

    def run(ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        batch, length = (ids, mask, types)[:len(program.in_avals)], ids.shape[1]
        with contextlib.suppress(ValueError):  # fewer positions: Error refining shapes (jax 0.10.2)
            return padded_to(padded(length), batch)
        try:
            return padded_to(length, batch)
        except ValueError as error:
            raise ValueError(f"rows of {length} tokens are longer than the model's positions"
                             ) from error

    return run
