"""The table of formats that a model is shipped in: who writes each, who runs it, what it may lose.

A format is one file with `write` and `load`, and a row here.
"""

import dataclasses
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from distilbert_jax.errors import UserError, choose
from distilbert_jax.export import litert, onnx, onnx_int8, onnx_runtime, stablehlo
from distilbert_jax.export.exportable import Run
from distilbert_jax.export.gate import FLOAT32, INT8, Limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A row of FORMATS.

    `write` is called as write(model, folder, **options) and returns folder/path, a file or a folder
    of files; `load` opens that in the format's own runtime.
    """

    text: str  # for messages and reports
    path: str  # where it lies in the Hugging Face folder
    extra: str  # of setup.cfg that brings the libraries
    needs: tuple[str, ...]  # modules of these libraries
    write: Callable[..., Path]
    load: Callable[[Path], Run]
    limits: dict[str, Limit]  # of the gate: figure → the worst that is shipped
    options: tuple[str, ...] = ()  # settings of a shipment that `write` takes
    default: bool = True  # whether it is written unless others are named


_ONNX = dict(extra="serve", needs=("onnx", "onnxruntime"), load=onnx_runtime.OnnxModel)
FORMATS = {
    "onnx": Format(
        text="ONNX, float32", path="onnx/model.onnx", write=onnx.write, limits=FLOAT32, **_ONNX),
    "int8": Format(
        text="ONNX, int8", path="onnx/model_quantized.onnx", write=onnx_int8.write, limits=INT8,
        options=("reduce_range",), **_ONNX),
    "litert": Format(
        text="LiteRT, int8", path="litert/model.tflite", extra="phone",
        needs=("litert_converter", "ai_edge_quantizer", "ai_edge_litert"), write=litert.write,
        load=litert.LiteRtModel, limits=INT8 | {
            # Each length has its own positions and operations: 9 % of 12 layers of 256.
            "size": Limit("the size, over float32's,", most=0.35)}, default=False),
    "stablehlo": Format(
        text="StableHLO, float32", path="stablehlo/model.jax_export", extra="serve",
        needs=("flatbuffers",), write=stablehlo.write, load=stablehlo.load, limits=FLOAT32,
        default=False),
}
DEFAULT = tuple(name for name, row in FORMATS.items() if row.default)


def check_formats(names: Iterable[str]) -> None:
    """Raise a UserError unless these are formats whose libraries are installed."""
    for name in names:
        row = FORMATS[choose(name, FORMATS, "format")]
        if missing := [module for module in row.needs if not _installed(module)]:
            raise UserError(f"format {name} needs {', '.join(missing)}: pip install "
                            f"\"distilbert_jax[{row.extra}]\"")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # it is kept from being imported
        return False
