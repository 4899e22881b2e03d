"""Packed rows, a masked language model → how far its predictions move without some of its layers.

Nothing is trained: the layers that are left follow each other, between the model's own embeddings
and head. It is how a student's start is chosen; held_out.py judges what comes out of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from distilbert_jax.config import EVALUATION_MASKING
from distilbert_jax.data.pack import PackedRows
from distilbert_jax.evaluation.held_out import SEED, some_rows
from distilbert_jax.machine.sharding import on_mesh
from distilbert_jax.models.encoder import EncoderConfig, graphdef
from distilbert_jax.training import losses
from distilbert_jax.training.labels import Vocabulary, mask_tokens, row_keys
from distilbert_jax.training.objective import at_masked

TOKENS = 2**12  # of whole rows, on which predictions are compared: some 600 of them are hidden


class Shortened:
    """KL of the predictions of some layers from those of all, on masked tokens of packed rows.

    Tokens are hidden as in held_out.py: every chosen one behind [MASK]. States after each layer of
    the last call are kept, so that a call that begins with the same layers goes on from there.
    """

    def __init__(
        self, config: EncoderConfig, dtypes: tuple[Any, Any], params: dict[str, Any],
        vocabulary: Vocabulary, packed: PackedRows, mesh: Mesh,
    ):
        """Run the whole model.

        Args:
            config: of the whole model.
            dtypes: of products and of parameters.
            params: on the mesh, as a step takes a teacher's.
            vocabulary: of the tokenizer.
            packed: rows to compare on: some, always the same, are taken.
            mesh: where all is laid.
        """
        one = graphdef(dataclasses.replace(config, num_hidden_layers=1), *dtypes)
        self._params, self._steps = params, _Steps.of(one, mesh)
        key = jax.random.key(SEED)
        count = max(1, TOKENS // packed.rows.shape[1])
        self._batches = [self._steps.masked(batch, vocabulary, key)
                         for batch, _ in some_rows(packed, mesh, count)]
        self._chain: list[int] = []
        self._states = [[self._steps.embed(self._with(), batch) for batch in self._batches]]
        whole = self._after(list(range(config.num_hidden_layers)))
        self._whole = [self._steps.gather(x, batch)
                       for x, batch in zip(whole, self._batches, strict=True)]
        self.masked = int(sum(float(batch["label_weights"].sum()) for batch in self._batches))

    def __call__(self, layers: list[int]) -> float:
        """KL(all layers ‖ these) at temperature 1, in nats per masked token."""
        total = sum(float(self._steps.divergence(self._with(), x, whole, batch))
                    for x, whole, batch in zip(self._after(layers), self._whole, self._batches,
                                               strict=True))
        return total / max(self.masked, 1)

    def _with(self, number: int = 0) -> dict[str, Any]:
        """The parameters of a model that has one layer."""
        return self._params | {"layers": {0: self._params["layers"][number]}}

    def _after(self, layers: list[int]) -> list[jax.Array]:
        """The states [B, T, D] of each batch after these layers."""
        pairs = enumerate(zip(self._chain, layers, strict=False))
        shared = next((i for i, (before, now) in pairs if before != now),
                      min(len(self._chain), len(layers)))
        self._chain, self._states = self._chain[:shared], self._states[:shared + 1]
        for number in layers[shared:]:
            self._states.append([self._steps.layer(self._with(number), x, batch) for x, batch in
                                 zip(self._states[-1], self._batches, strict=True)])
            self._chain.append(number)
        return self._states[-1]


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The parts of a model with one layer, jitted: each is compiled once, for all layers."""

    masked: Callable[..., dict[str, jax.Array]]  # (batch, vocabulary, key) → labelled batch
    embed: Callable[..., jax.Array]  # (parameters, batch) → states
    layer: Callable[..., jax.Array]  # (parameters, states, batch) → states
    gather: Callable[..., jax.Array]  # (states, batch) → those at masked positions
    divergence: Callable[..., jax.Array]  # (parameters, states, those of gather, batch) → sum

    @classmethod
    def of(cls, one: nnx.GraphDef, mesh: Mesh) -> "_Steps":
        """The parts of the model with this structure."""
        def masked(batch, vocabulary, key):
            return mask_tokens(row_keys(key, batch), batch, vocabulary, EVALUATION_MASKING)

        def embed(params, batch):
            model = nnx.merge(one, params)
            return model.embeddings(batch["input_ids"], batch["position_ids"], None, None)

        def layer(params, states, batch):
            return nnx.merge(one, params).layers[0](states, batch["segment_ids"], None)

        def divergence(params, states, whole, batch):
            logits = map(nnx.merge(one, params).mlm_logits, (at_masked(states, batch), whole))
            return losses.ce_sum(*logits, batch["label_weights"], temperature=1.0)

        return cls(*(jax.jit(on_mesh(step, mesh))
                     for step in (masked, embed, layer, at_masked, divergence)))
