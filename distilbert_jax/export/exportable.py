"""A model in the form that every format is written from, and our own answers beside a format's.

A folder comes in as arrays and what they are for; each format is called as a `Run`, and so is our
model, which the gate compares it with.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from distilbert_jax.models import hub
from distilbert_jax.models.encoder import EncoderConfig, graphdef
from distilbert_jax.models.family import Family

# A model in some runtime: ids, mask (1 on tokens, 0 on padding) and token types, each [B, T] int64,
# → its answers, see Exportable. A row longer than the model's positions raises.
Run = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
SHORTEST = 32  # tokens; our own model is compiled for this length and its doubles


@dataclasses.dataclass(frozen=True)
class Exportable:
    """A model, and which of its answers are shipped.

    `output` is "mlm" (logits over the vocabulary, [B, T, V]), "tag" (logits of tags, [B, T, C]),
    "classify" or "regress" (logits of the row, [B, C]) or "states" (last hidden states,
    [B, T, D]). What stands at padding means nothing.
    """

    config: EncoderConfig
    params: dict[str, Any]  # nested dict of float32 NumPy arrays, kernels [in, out]
    family: Family
    output: str

    @classmethod
    def of(cls, found: hub.Pretrained) -> "Exportable":
        """What is shipped of a folder: a task's logits, the vocabulary's, or hidden states.

        A folder with modules.json is a sentence encoder, whose states are wanted.
        """
        output = found.config.task or ("mlm" if found.config.mlm_head else "states")
        if (found.folder / "modules.json").exists():
            output = "states"
        return cls(found.config, found.params, found.family, output)

    @property
    def output_name(self) -> str:
        """The output's name, as Optimum, transformers.js and text-embeddings-inference have it."""
        return "last_hidden_state" if self.output == "states" else "logits"

    @property
    def typed(self) -> bool:
        """Whether token types are an input; where there is one type, its vector is always added."""
        return self.config.type_vocab_size > 1


def answer(
    graph: nnx.GraphDef, config: EncoderConfig, output: str, params: dict[str, Any],
    ids: Int[Array, "B T"], mask: Int[Array, "B T"], types: Int[Array, "B T"],
) -> Float[Array, "..."]:
    """Compute what an Exportable answers; traced by JAX, here and where a format is made by it.

    Args:
        graph: of the config, from models.encoder.graphdef.
        config, output: of the Exportable.
        params: its parameters.
        ids, mask, types: [B, T], see Run; the tokens of a row come before its padding.

    Returns:
        [B, T, V], [B, T, C], [B, C] or [B, T, D], see Exportable; at least float32.
    """
    model = nnx.merge(graph, params)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = model(ids, mask, positions, types).last
    if output == "states":
        return hidden
    if output == "mlm":
        return model.mlm_logits(hidden)
    if output == "tag":
        return model.task_logits(hidden)
    return model.task_logits(hidden[:, :1])[:, 0]


def reference(model: Exportable, rows: int = 1) -> Run:
    """Our own model, jitted, in float32; shapes are rounded up, so that few are compiled.

    Args:
        model: what is shipped.
        rows: of the smallest batch that is compiled.
    """
    graph = graphdef(model.config, jnp.float32)
    params = jax.device_put(model.params, jax.local_devices()[0])
    call = jax.jit(functools.partial(answer, graph, model.config, model.output))

    def run(ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        count, length = ids.shape
        wide = min(padded(length), model.config.positions)
        if length > wide:
            raise ValueError(f"{length} tokens, the model has {wide} positions")
        room = ((0, padded(count, rows) - count), (0, wide - length))
        found = np.asarray(call(params, *(
            jnp.asarray(np.pad(x, room), jnp.int32) for x in (ids, mask, types))))[:count]
        return found[:, :length] if found.ndim == 3 else found

    return run


def padded(count: int, least: int = SHORTEST) -> int:
    """The least power of two times `least` that is not below `count`."""
    return least * 2 ** max(0, (-(-count // least) - 1).bit_length())
