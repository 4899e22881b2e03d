"""Parameters → litert/model.tflite: int8 for phones, by StableHLO; no PyTorch, no TensorFlow.

LiteRT's shapes are fixed, so the file has a signature for each of a few lengths, tokens_32 and so
on, of one row each. They share the weights, and a row takes the shortest that holds it.
"""

import contextlib
import dataclasses
import io
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from distilbert_jax.export.exportable import Exportable
from distilbert_jax.export.onnx_int8 import LARGEST, rounded
from distilbert_jax.export.stablehlo import exported
from distilbert_jax.models.encoder import Embed, Encoder, EncoderConfig

LENGTHS = (32, 128, 512)  # tokens of a row; the last is cut to the model's positions
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def write(model: Exportable, folder: Path, lengths: tuple[int, ...] = LENGTHS) -> Path:
    """Write an int8 file; linear layers are computed in 8 bits, all else in float32.

    Activations are rounded while the model runs, with a scale for each row; weights here, with a
    scale for each output of a layer and each row of the word embedding.

    Args:
        model: what is shipped.
        folder: of the Hugging Face model; the file goes to its litert/model.tflite.
        lengths: tokens [1] that there is a signature for; those beyond the model's positions are
            cut to them.

    Returns:
        The file's path.
    """
    from ai_edge_quantizer import quantizer, recipe

    plain = converted(_with_rounded_words(model), lengths, _graph(model.config))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        made = quantizer.Quantizer(plain, recipe.dynamic_wi8_afp32()).quantize()
    path = folder / "litert" / "model.tflite"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.quantized_model)
    return path


def converted(
    model: Exportable, lengths: tuple[int, ...] = LENGTHS, graph: nnx.GraphDef | None = None
) -> bytes:
    """A file in float32.

    Args:
        model, lengths: as for `write`.
        graph: of the model, if not the usual one.

    Returns:
        What the file holds.
    """
    # litert-converter 0.5 documents no calls of Python; these are what litert-torch 0.10 uses.
    from litert_converter.mlir import ir, passmanager
    from litert_converter.mlir._mlir_libs import converter_api_ext as converter
    from litert_converter.mlir.dialects import stablehlo

    context = ir.Context()
    converter.prepare_mlir_context(context)
    stablehlo.register_dialect(context)
    settings = converter.ConvertToTFLConfig()
    settings.unsafe_fuse_dynamic_shaped_broadcast = True
    settings.canonicalizing_inf_as_min_max_float = False
    parts = []
    with context:
        for length in sorted({min(length, model.config.positions) for length in lengths}):
            program = exported(model, (1, length), ("cpu",), graph)
            parts.append(stablehlo.deserialize_portable_artifact(
                context, program.mlir_module_serialized))
            converter.set_signature(
                parts[-1].operation, signature_name=f"tokens_{length}",
                input_names=INPUTS[:len(program.in_avals)], output_names=[model.output_name])
        whole = converter.merge_modules(parts)
        converter.run_convert_to_tfl_passes(whole, passmanager.PassManager(), settings)
        return converter.export_flatbuffer_to_bytes(whole.operation)


class RoundedEmbed(nnx.Module):
    """An embedding table in int8, ids [...] → vectors [..., D].

    The quantiser leaves a table that is looked up by GATHER_ND in float32 without a word
    (ai-edge-quantizer 0.10.0), which is a third of a DistilBERT.
    """

    def __init__(self, words: Embed):
        """Take the place of an embedding; its table stays for the decoder."""
        self.embedding = words.embedding
        self.rows = nnx.Param(jnp.zeros(words.embedding.shape, jnp.int8))
        self.scales = nnx.Param(jnp.zeros((words.embedding.shape[0], 1), jnp.float32))

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        rows, scales = (jnp.take(jnp.asarray(x[...]), ids, axis=0, mode="clip")
                        for x in (self.rows, self.scales))
        return rows.astype(jnp.float32) * scales


def _graph(config: EncoderConfig) -> nnx.GraphDef:
    """The structure of a model whose word embedding is rounded."""
    def build() -> Encoder:
        model = Encoder(config, rngs=nnx.Rngs(0))
        model.embeddings.word = RoundedEmbed(model.embeddings.word)
        return model

    return nnx.split(nnx.eval_shape(build))[0]


def _with_rounded_words(model: Exportable) -> Exportable:
    """The model with the parameters of `_graph`."""
    embeddings = model.params["embeddings"]
    table = embeddings["word"]["embedding"]
    rows, scales = rounded(table, 1, LARGEST)
    word = {"embedding": table, "rows": rows, "scales": scales}
    return dataclasses.replace(
        model, params=model.params | {"embeddings": embeddings | {"word": word}})


class LiteRtModel:
    """A file in LiteRT on the CPU, called as a `Run`, row by row."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        """Open a file.

        Args:
            path: of a .tflite file from this module.
            threads: of a product.
        """
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path), num_threads=threads)
        self._runners = {int(name.removeprefix("tokens_")): interpreter.get_signature_runner(name)
                         for name in interpreter.get_signature_list()}

    def __call__(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray:
        """Answer rows of [B, T] int64 each; one longer than the longest signature raises."""
        length = ids.shape[1]
        wide = min((n for n in self._runners if n >= length), default=0)
        if not wide:
            raise ValueError(f"{length} tokens, the file takes {max(self._runners)}")
        runner, room = self._runners[wide], ((0, 0), (0, wide - length))
        padded = [np.pad(x, room).astype(np.int32) for x in (ids, mask, types)]
        known = runner.get_input_details()
        rows = []
        for row in range(len(ids)):
            given = {name: x[row:row + 1] for name, x in zip(INPUTS, padded, strict=True)}
            answers = runner(**{name: given[name] for name in known})
            rows.append(next(iter(answers.values())))
        found = np.concatenate(rows)
        return found[:, :length] if found.ndim == 3 else found
