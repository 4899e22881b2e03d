"""Parameters → onnx/model.onnx, a float32 graph of standard operators that we write node by node.

No exporter and no PyTorch is needed. Batch and length are free, and names are those that Optimum,
transformers.js, text-embeddings-inference and fastembed look for. `onnx_int8.py` writes the same
graph with other products and tables.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from distilbert_jax.errors import UserError
from distilbert_jax.export.exportable import Exportable
from distilbert_jax.models.encoder import EncoderConfig

OPSET, IR_VERSION = 20, 9
LARGEST = 2**31 - 2**20  # bytes of a protocol buffer, less room for the nodes
# Activation → operator and its attributes; silu is written as x · Sigmoid(x).
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {}), "gelu_new": ("Gelu", {"approximate": "tanh"}), "relu": ("Relu", {}),
    "silu": ("Sigmoid", {}), "tanh": ("Tanh", {})}

Params = dict[str, Any]


def write(model: Exportable, folder: Path) -> Path:
    """Write a float32 graph.

    Args:
        model: what is shipped.
        folder: of the Hugging Face model; the file goes to its onnx/model.onnx.

    Returns:
        The file's path.

    Raises:
        UserError: the file would be larger than a protocol buffer may be.
    """
    return save(Graph(), model, folder / "onnx" / "model.onnx")


class Graph:
    """An ONNX graph under construction: nodes, and arrays by name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output, whose name is returned."""
        return self.add_several(operator, inputs, 1, name, **attributes)[0]

    def add_several(
        self, operator: str, inputs: tuple[str, ...], outputs: int, name: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Append a node with several outputs, whose names are returned."""
        from onnx import helper

        name = name or f"{operator}_{len(self.nodes)}"
        names = [name if not i else f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, name=name, **attributes))
        return names

    def array(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        """Store an array under a name, which is returned."""
        self.arrays[name] = np.asarray(values, dtype)
        return name

    def whole_numbers(self, *values: int) -> str:
        """A constant [n] int64, stored once."""
        return self.array(f"int_{'_'.join(map(str, values))}", values, np.int64)

    def table(self, name: str, rows: np.ndarray, multiplied: bool = False) -> str:
        """Store vectors [R, D] for `taken` and, if they are `multiplied`, for `times_table`."""
        return self.array(name, rows)

    def taken(self, table: str, operator: str, *inputs: str) -> str:
        """Vectors of a table: "Gather" takes those of ids, "Slice" those from one to another."""
        return self.add(operator, table, *inputs)

    def linear(self, x: str, layer: Params, name: str) -> str:
        """x @ kernel + bias; a format may compute it in other numbers."""
        return self.dense(x, layer, name)

    def dense(self, x: str, layer: Params, name: str) -> str:
        """x @ kernel + bias in float32."""
        product = self.add("MatMul", x, self.array(f"{name}/kernel", layer["kernel"]))
        return self.add("Add", product, self.array(f"{name}/bias", layer["bias"]))

    def times_table(self, x: str, table: str) -> str:
        """x @ table.T, with the table that the words were looked up in: [..., D] → [..., V]."""
        return self.add("MatMul", x, self.add("Transpose", table, perm=[1, 0]))

    def norm(self, x: str, layer: Params, name: str, epsilon: float) -> str:
        """LayerNorm over the last axis."""
        return self.add("LayerNormalization", x, self.array(f"{name}/scale", layer["scale"]),
                        self.array(f"{name}/bias", layer["bias"]), axis=-1, epsilon=epsilon)

    def activated(self, x: str, name: str) -> str:
        """An activation of ACTIVATIONS."""
        operator, attributes = ACTIVATIONS[name]
        y = self.add(operator, x, **attributes)
        return self.add("Mul", x, y) if name == "silu" else y


def save(graph: Graph, model: Exportable, path: Path) -> Path:
    """Write the whole model into an empty graph, check it and save it.

    Raises:
        UserError: as for write.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    config = model.config
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if model.typed else [])]
    hidden = _embedded(graph, model)
    bias = _mask_bias(graph)
    for number in range(config.num_hidden_layers):
        hidden = _layer(graph, hidden, bias, model.params["layers"][number], config,
                        f"layers/{number}")
    # Written last, because a graph's output has the name of the node that gives it.
    graph.add("Identity", _answers(graph, hidden, model), name=model.output_name)
    if (size := sum(array.nbytes for array in graph.arrays.values())) > LARGEST:
        raise UserError(f"{path.name} would have {size / 1e9:.1f} GB, and an ONNX file holds 2 GB: "
                        "ship int8, which takes a quarter (--formats int8)")
    shape = {"mlm": ["batch", "sequence", config.vocab_size],
             "tag": ["batch", "sequence", config.num_labels],
             "states": ["batch", "sequence", config.hidden_size]}.get(
                 model.output, ["batch", config.num_labels])
    whole = helper.make_model(helper.make_graph(
        graph.nodes, "distilbert_jax",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
         for name in names],
        [helper.make_tensor_value_info(model.output_name, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(array, order="C"), name)
         for name, array in graph.arrays.items()]),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
        producer_name="distilbert_jax")
    onnx.checker.check_model(whole, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(whole, path)
    return path


def _embedded(graph: Graph, model: Exportable) -> str:
    """Words, positions and types, summed and normalised: [B, T, D]."""
    tables, config = model.params["embeddings"], model.config
    words = graph.table("embeddings/word", tables["word"]["embedding"], model.output == "mlm")
    positions = tables["position"]["embedding"]
    if config.type_vocab_size and not model.typed:  # its one vector is added everywhere
        positions = positions + tables["token_type"]["embedding"]
    x = graph.add("Add", graph.taken(words, "Gather", "input_ids"),
                  _positions(graph, graph.table("embeddings/position", positions), config))
    if model.typed:
        types = graph.array("embeddings/token_type", tables["token_type"]["embedding"])
        x = graph.add("Add", x, graph.add("Gather", types, "token_type_ids"))
    return graph.norm(x, tables["norm"], "embeddings/norm", config.layer_norm_eps)


def _positions(graph: Graph, table: str, config: EncoderConfig) -> str:
    """Vectors of the positions. A row that is too long fails: the sum above, or the Gather.

    Where positions begin behind the pad token's row (RoBERTa), ids are counted as transformers
    does, so that padding stands at that row: of pad token 1 the ids 0 5 2 1 1 have 2 3 4 1 1.
    """
    if config.offset_positions:
        pad = graph.array("pad_token_id", config.pad_token_id, np.int64)
        real = graph.add("Cast", graph.add("Not", graph.add("Equal", "input_ids", pad)), to=7)
        count = graph.add("CumSum", real, graph.array("axis_1", 1, np.int64))
        at = graph.add("Add", graph.add("Mul", count, real), pad)
        return graph.taken(table, "Gather", at)
    length = graph.add("Shape", "input_ids", start=1, end=2)
    return graph.taken(table, "Slice", graph.whole_numbers(0), length)


def _mask_bias(graph: Graph) -> str:
    """[B, 1, 1, S] added to scores: 0 on tokens, the least float32 on padding.

    It is finite, so that a row of nothing but padding has no NaN.
    """
    seen = graph.add("Cast", graph.add("Unsqueeze", "attention_mask", graph.whole_numbers(1, 2)),
                     to=9)
    return graph.add("Where", seen, graph.array("zero", 0),
                     graph.array("least", np.finfo(np.float32).min), name="mask_bias")


def _layer(graph: Graph, x: str, bias: str, layer: Params, config: EncoderConfig, name: str) -> str:
    """One post-LN layer: [B, T, D] → [B, T, D]."""
    attended = _attention(graph, x, bias, layer["attention"], config, f"{name}/attention")
    x = graph.norm(graph.add("Add", x, attended), layer["attention_norm"],
                   f"{name}/attention_norm", config.layer_norm_eps)
    up = graph.activated(graph.linear(x, layer["ffn"]["up"], f"{name}/ffn/up"), config.hidden_act)
    down = graph.linear(up, layer["ffn"]["down"], f"{name}/ffn/down")
    return graph.norm(graph.add("Add", x, down), layer["output_norm"], f"{name}/output_norm",
                      config.layer_norm_eps)


def _attention(
    graph: Graph, x: str, bias: str, layer: Params, config: EncoderConfig, name: str
) -> str:
    """Self-attention; 1/√H is part of the query's kernel and bias."""
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    query = {key: value / math.sqrt(size) for key, value in layer["query"].items()}
    by_head = graph.whole_numbers(0, 0, heads, size)

    def split(part: Params, which: str, *axes: int) -> str:
        flat = graph.linear(x, part, f"{name}/{which}")
        return graph.add("Transpose", graph.add("Reshape", flat, by_head), perm=axes)

    scores = graph.add("MatMul", split(query, "query", 0, 2, 1, 3),
                       split(layer["key"], "key", 0, 2, 3, 1))
    shares = graph.add("Softmax", graph.add("Add", scores, bias), axis=-1)
    context = graph.add("MatMul", shares, split(layer["value"], "value", 0, 2, 1, 3))
    context = graph.add("Transpose", context, perm=[0, 2, 1, 3])
    flat = graph.add("Reshape", context, graph.whole_numbers(0, 0, config.hidden_size))
    return graph.linear(flat, layer["output"], f"{name}/output")


def _answers(graph: Graph, hidden: str, model: Exportable) -> str:
    """What the model's output is made of its last states, see Exportable."""
    config, params = model.config, model.params
    if model.output == "states":
        return hidden
    if model.output == "mlm":
        head = params["mlm_head"]
        x = graph.activated(graph.linear(hidden, head["transform"], "mlm_head/transform"),
                            config.head_act or config.hidden_act)
        x = graph.norm(x, head["norm"], "mlm_head/norm", config.layer_norm_eps)
        return graph.add("Add", graph.times_table(x, "embeddings/word"),
                         graph.array("mlm_head/bias", head["bias"]))
    head = params["task_head"]
    if "dense" in head:
        first = graph.add("Gather", hidden, graph.array("first", 0, np.int64), axis=1)
        hidden = graph.activated(graph.linear(first, head["dense"], "task_head/dense"),
                                 config.pooler_act)
    return graph.dense(hidden, head["output"], "task_head/output")
