"""Parameters → onnx/model_quantized.onnx: the graph of `onnx.py` with products in 8 bits.

Dynamic quantisation: activations are rounded while the model runs, with one scale for the whole
tensor, hence for a batch; weights are rounded here, with a scale for each column of a kernel and
for each row of a table. One int8 matrix serves as word embedding and, transposed, as decoder.
"""

from pathlib import Path

import numpy as np

from distilbert_jax.export.exportable import Exportable
from distilbert_jax.export.onnx import Graph, Params, save

LARGEST, LARGEST_REDUCED = 127, 63


def write(model: Exportable, folder: Path, reduce_range: bool = False) -> Path:
    """Write an int8 graph.

    Args:
        model: what is shipped.
        folder: of the Hugging Face model; the file goes to its onnx/model_quantized.onnx.
        reduce_range: keep what is multiplied within ±63, for x86 CPUs without VNNI, whose products
            of 8 bits saturate at 16 bits.

    Returns:
        The file's path.
    """
    graph = Int8Graph(LARGEST_REDUCED if reduce_range else LARGEST)
    return save(graph, model, folder / "onnx" / "model_quantized.onnx")


def rounded(weights: np.ndarray, axis: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Round weights to whole numbers within ±largest, one scale for each vector along an axis.

    Args:
        weights: [D, F], or any other shape.
        axis: along which weights share a scale: 0 for the columns of a kernel.
        largest: 127, or less.

    Returns:
        int8 of the shape of weights, and float32 scales with a 1 at `axis`; their product is the
        weights again, within half a scale.
    """
    scale = np.abs(weights).max(axis, keepdims=True) / largest
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.rint(weights / scale).clip(-largest, largest).astype(np.int8), scale


class Int8Graph(Graph):
    """A graph whose linear layers and tables of embeddings are int8."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest
        self.quantised: dict[str, list[str]] = {}  # tensor → its uint8 form, scale and zero point

    def table(self, name: str, rows: np.ndarray, multiplied: bool = False) -> str:
        # What is only looked up takes part in no product that could saturate.
        values, scale = rounded(rows, 1, self.largest if multiplied else LARGEST)
        self.array(f"{name}/scale", scale)  # [R, 1]
        return self.array(name, values, np.int8)

    def taken(self, table: str, operator: str, *inputs: str) -> str:
        values = self.add("Cast", self.add(operator, table, *inputs), to=1)
        return self.add("Mul", values, self.add(operator, f"{table}/scale", *inputs))

    def linear(self, x: str, layer: Params, name: str) -> str:
        values, scale = rounded(layer["kernel"], 0, self.largest)
        product = self._product(x, self.array(f"{name}/kernel", values, np.int8),
                                self.array(f"{name}/scale", scale[0]))
        return self.add("Add", product, self.array(f"{name}/bias", layer["bias"]))

    def times_table(self, x: str, table: str) -> str:
        # A runtime transposes the constant once, when it loads the file.
        scale = self.add("Reshape", f"{table}/scale", self.whole_numbers(-1))
        return self._product(x, self.add("Transpose", table, perm=[1, 0]), scale)

    def _product(self, x: str, kernel: str, scale: str) -> str:
        """x @ (kernel · scale), summed up in int32; x is rounded once for all that take it."""
        if x not in self.quantised:
            self.quantised[x] = self.add_several("DynamicQuantizeLinear", (x,), 3)
        values, x_scale, zero = self.quantised[x]
        sums = self.add("Cast", self.add("MatMulInteger", values, kernel, zero), to=1)
        return self.add("Mul", sums, self.add("Mul", x_scale, scale))
