"""A line of a compiled program → what it costs as a kernel: products, memory traffic, its group.

A kernel reads its operands from memory and writes its results there, once each; what is fused
stays on the chip. Of an array that it only cuts a part out of, or puts one into, that part counts.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping

from distilbert_jax.benchmark.hlo_text import Computation, Line

# What is nobody's kernel: names for arrays, calls, and the first half of what runs beside others.
SILENT = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
          "after-all", "call", "async-start", "async-update", "async-done", "copy-start",
          "slice-start", "partition-id", "replica-id")
CUTS = ("slice", "dynamic-slice", "gather")  # of their first operand
PUTS = {"dynamic-update-slice": 1, "scatter": 2}  # into their first operand, in place → which one
FETCHED = ("copy-done", "slice-done")
# Scopes of jax.named_scope → what their kernels are called.
GROUPS = {"head": "vocabulary head", "attention": "attention", "optimizer": "optimizer"}
PRODUCTS, OTHERS = "products of the layers", "everything else"

Shapes = tuple[tuple[int, ...], ...]
KernelFlops = Mapping[Shapes, int]  # shapes of the results of a Pallas kernel → its operations


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a chip."""

    group: str
    count: int  # how often it runs in an update
    flops: int  # of the matrix products, of one run
    bytes: int  # read and written in memory, of one run

    def seconds(self, flops: float, traffic: float) -> float:
        """All its runs at the peaks of a chip, of which the lower one binds."""
        return self.count * max(self.flops / flops, self.bytes / traffic)


def kernel(line: Line, around: Computation, found: dict[str, Computation], count: int,
           known: KernelFlops, loop: Line | None = None) -> Kernel:
    """What a line costs that is a kernel of its own.

    Args:
        line: not of the opcodes in SILENT, and no exchange between chips.
        around: the computation that it is in.
        found: all computations.
        count: how often it runs.
        known: operations of the kernels whose inside the text does not show.
        loop: that it is in, if any.
    """
    operations = product_flops(line, around, found, known)
    fused = found[line.called[0]].values() if line.opcode == "fusion" else ()
    named = group([line, *fused, *([loop] if loop else [])], operations)
    return Kernel(named, count, operations, traffic(line, around, found))


def traffic(line: Line, around: Computation, found: dict[str, Computation]) -> int:
    """Bytes that a kernel reads and writes in memory."""
    if line.opcode in FETCHED:  # who reads it has fetched it, or it is written where it lies
        return sum(array.bytes for array in line.arrays if not array.fast)
    readers, inside, root = [line], around, line
    if line.opcode == "fusion":
        inside = found[line.called[0]]
        readers = inside.values()
        root = next(one for one in readers if one.root)
        parameters = {int(one.rest.partition(")")[0]): one.name for one in readers
                      if one.opcode == "parameter"}
        pairs = [(operand, parameters[n]) for n, operand in enumerate(line.operands)]
    else:
        pairs = [(operand, operand) for operand in dict.fromkeys(line.operands)]
    read = sum(min(_lies_in_memory(around.get(operand), around), _read(name, readers, inside))
               for operand, name in pairs)
    return read + _written(line, root, inside)


def _lies_in_memory(line: Line | None, around: Computation) -> int:
    """Bytes of an operand; what was fetched into fast memory before was fetched for its reader."""
    if line is None:
        return 0
    fetched = _renamed(line, around).opcode in FETCHED
    return sum(array.bytes for array in line.arrays if not array.fast or fetched)


def _renamed(line: Line, around: Computation) -> Line:
    """The line whose result this one is, by another name or in another shape."""
    while line.opcode == "bitcast" and line.operands[0] in around:
        line = around[line.operands[0]]
    return line


def _read(name: str, readers: Iterable[Line], inside: Computation) -> int | float:
    """Bytes that are read of a parameter: what is cut out of it; infinitely many for all."""
    total = 0
    for line in readers:
        if name not in line.operands:
            continue
        if line.opcode == "bitcast":
            total += _read(line.name, readers, inside)
        elif name in line.operands[1:]:
            return math.inf
        elif line.opcode in CUTS:
            total += _bytes(line)
        elif line.opcode == "scatter":  # adds to what is there
            total += _bytes(inside[line.operands[2]])
        elif line.opcode not in PUTS:
            return math.inf
    return total


def _written(line: Line, root: Line, inside: Computation) -> int:
    """Bytes of the results in memory; of an array that is changed in place, of the part."""
    results = [root]
    if root.opcode == "tuple" and len(root.operands) == len(line.arrays):
        results = [inside[name] for name in root.operands]
    total = 0
    for array, one in zip(line.arrays, itertools.cycle(results)):
        one, size = _renamed(one, inside), array.bytes
        if one.opcode in PUTS and (one is line or _renamed(
                inside[one.operands[0]], inside).opcode == "parameter"):
            size = _bytes(inside[one.operands[PUTS[one.opcode]]])
        total += 0 if array.fast else size
    return total


def _bytes(line: Line) -> int:
    return sum(array.bytes for array in line.arrays)


def product_flops(line: Line, around: Computation, found: dict[str, Computation],
                  known: KernelFlops) -> int:
    """Operations of the matrix products of a line: [m, k] and [k, n] have 2 m k n."""
    if line.opcode == "fusion":
        return sum(product_flops(one, found[name], found, known)
                   for name in line.called for one in found[name].values())
    if line.opcode == "convolution":
        return _convolution_flops(line, around)
    if line.opcode == "custom-call":
        if "__cudnn$fmha" in line.rest:
            return _cudnn_attention_flops(line, around)
        if shapes := known.get(tuple(array.shape for array in line.arrays)):
            return shapes
    contracted = line.numbers("lhs_contracting_dim(?:s|ensions)")
    if line.opcode not in ("dot", "custom-call") or not contracted:
        return 0
    left = around[line.operands[0]].arrays[0].shape
    return 2 * math.prod(line.arrays[0].shape) * math.prod(left[axis] for axis in contracted)


def _cudnn_attention_flops(line: Line, around: Computation) -> int:
    """Of cuDNN's attention: two products with [B, N, T, S] forward, five backward."""
    queries = math.prod(around[line.operands[0]].arrays[0].shape)  # B T N H
    sizes = line.numbers('intermediate_tensor_shape.*?"dimensions')
    return 2 * (5 if "Backward" in line.rest else 2) * queries * sizes[-1]


def _convolution_flops(line: Line, around: Computation) -> int:
    """Of a convolution, as which a TPU's compiler writes products; what is 0 by padding is not.

    One with batches is a convolution over them, of which a window sees one batch at a time.
    """
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest).groups()
    inputs, kernels = (around[name].arrays[0].shape for name in line.operands[:2])
    results = line.arrays[0].shape
    total = (2 * results[result.index("b")] * results[result.index("f")]
             * kernels[right.index("i")])
    window = re.search(r"window=\{(.*?)\}", line.rest)
    settings = dict(re.findall(r"(\w+)=([\dx_-]+)", window[1])) if window else {}
    for axis in range(len(left) - 2):
        def setting(name, default, axis=axis):
            return settings[name].split("x")[axis] if name in settings else default

        stride, dilation, spread = (
            int(setting(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        low = int(setting("pad", "0_0").split("_")[0])
        end = (inputs[left.index(str(axis))] - 1) * spread + 1
        places = (out * stride + at * dilation - low
                  for out in range(results[result.index(str(axis))])
                  for at in range(int(setting("size", "1"))))
        total *= sum(0 <= place < end and place % spread == 0 for place in places)
    return total


def group(lines: Iterable[Line], operations: int) -> str:
    """The scope of a kernel, by the first path among its own line, those in it, and its loop."""
    path = next((line.path for line in lines if line.path), "")
    if scope := re.search(rf"[/(]({'|'.join(GROUPS)})[/)]", path):
        return GROUPS[scope[1]]
    return PRODUCTS if operations else OTHERS
