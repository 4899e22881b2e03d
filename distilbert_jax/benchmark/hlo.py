"""A compiled step → what it costs: its kernels, and its exchanges between chips.

XLA's own cost analysis counts a loop's body once, and no kernel of Pallas. Here loops count as
often as they turn.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from distilbert_jax.benchmark import hlo_text, kernel_costs
from distilbert_jax.benchmark.hlo_text import Line
from distilbert_jax.benchmark.kernel_costs import Kernel, KernelFlops

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between chips."""

    kind: str
    devices: int  # that take part in one of them
    count: int  # an update
    bytes: int  # an update, of the results on each chip

    def seconds(self, bandwidth: float) -> float:
        """Around a ring with this many bytes a second through each chip, all directions."""
        around = (self.devices - 1) / max(self.devices, 1)
        whole = self.bytes * (self.devices if self.kind == "reduce-scatter" else 1)
        return whole * {"all-reduce": 2 * around, "collective-permute": 1.0}.get(
            self.kind, around) / bandwidth


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program of one chip."""

    collectives: list[Collective]  # those of one kind and number of devices together
    kernels: list[Kernel]
    shapes: set[tuple[int, ...]]  # of all arrays that are in memory

    @property
    def flops(self) -> int:
        """Operations of the matrix products of an update."""
        return sum(each.count * each.flops for each in self.kernels)

    @property
    def traffic(self) -> int:
        """Bytes to and from memory in an update, as often as a kernel reads or writes them."""
        return sum(each.count * each.bytes for each in self.kernels)

    def seconds(self, flops: float, traffic: float) -> float:
        """All kernels, one after another, each at the peaks of a chip."""
        return sum(each.seconds(flops, traffic) for each in self.kernels)

    def groups(self, flops: float, traffic: float) -> list[tuple[str, int, float]]:
        """(Name, kernels in an update, seconds) of each group, the dearest first."""
        sums: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
        for each in self.kernels:
            sums[each.group][0] += each.count
            sums[each.group][1] += each.seconds(flops, traffic)
        return sorted(((name, *both) for name, both in sums.items()), key=lambda row: -row[2])


def read(text: str, known: KernelFlops | None = None) -> Program:
    """Read what `compiled.as_text()` gives; `known` comes from `kernel_flops`."""
    found, entry = hlo_text.computations(text)
    times, parts, loops = (
        hlo_text.times(found, entry), hlo_text.parts(found), hlo_text.loops(found))
    exchanges: dict[Any, list[Any]] = collections.defaultdict(list)
    kernels, shapes, seen = [], set(), set()
    for name, computation in found.items():
        for line in computation.values():
            kind = line.opcode.removesuffix("-start")
            if kind in KINDS:
                # Of one that runs beside other work, every piece of that work repeats the line.
                chain = re.search(r'chain_id="(\d+)"', line.rest)
                key = chain[1] if chain else (name, line.name)
                if key not in seen:
                    seen.add(key)
                    exchanges[kind, _devices(line.rest)].append((times[name], _moved(line, kind)))
            if name in parts or not times[name] or line.opcode in kernel_costs.SILENT:
                continue
            shapes |= {array.shape for array in line.arrays if not array.fast}
            if kind not in KINDS and line.opcode.removesuffix("-done") not in KINDS:
                kernels.append(kernel_costs.kernel(
                    line, computation, found, times[name], known or {}, loops.get(name)))
    merged = [Collective(
        kind, devices, sum(n for n, _ in each), sum(n * moved for n, moved in each))
        for (kind, devices), each in sorted(exchanges.items())]
    return Program([c for c in merged if c.count], [k for k in kernels if k.bytes or k.flops],
                   shapes)


def _moved(line: Line, kind: str) -> int:
    """Bytes of the results of an exchange; the start of one names its operands beside them."""
    arrays = line.arrays
    if line.opcode != kind and len(arrays) > 1 and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2:]
    return sum(array.bytes for array in arrays)


def _devices(rest: str) -> int:
    """How many devices are in one group of a collective."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(tiled[1])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", rest):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", mesh[2]))
    return 1


def product_flops(jaxpr: Any) -> int:
    """Operations of all matrix products of a traced function, over all devices.

    A product of [m, k] and [k, n] has 2 m k n. Of branches the costliest counts.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
            continue
        inner = [product_flops(sub) for sub in _inner(params)]
        if name == "scan":
            total += params["length"] * sum(inner)
        elif name == "shard_map":
            axes = params["newly_manual_axes"]
            total += math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
        elif name == "pallas_call":
            total += math.prod(params["grid_mapping"].grid) * sum(inner)
        else:
            total += max(inner, default=0) if name == "cond" else sum(inner)
    return total


def kernel_flops(jaxpr: Any) -> KernelFlops:
    """Operations of one call of each Pallas kernel of a traced function, on one device."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            inner = sum(product_flops(sub) for sub in _inner(equation.params))
            shapes = tuple(result.aval.shape for result in equation.outvars)
            found[shapes] = math.prod(equation.params["grid_mapping"].grid) * inner
        else:
            for sub in _inner(equation.params):
                found |= kernel_flops(sub)
    return found


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation runs."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one
