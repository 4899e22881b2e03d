"""A step → what it costs: products by its jaxpr, memory traffic and collectives by its HLO.

XLA's own cost analysis counts a loop's body once, and no kernel of Pallas. Here loops count as
often as they turn.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}
ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](?:\{{[^}}]*?(S\(\d+\))?\}})?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(?.*?\)?) ([a-z][\w-]*)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
# What writes no array of its own.
SILENT = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
          "after-all", "call", "async-start", "copy-start", "slice-start")


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
    traffic: int  # bytes to and from memory in an update, every result written and read once
    shapes: set[tuple[int, ...]]  # of all arrays that are in memory


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    result: str
    opcode: str
    rest: str  # operands and attributes


def read(text: str) -> Program:
    """Read what `compiled.as_text()` gives."""
    computations, entry = _computations(text)
    times = _times(computations, entry)
    found: dict[Any, list[Any]] = collections.defaultdict(list)
    traffic, shapes, seen = 0, set(), set()
    fused = {name for lines in computations.values() for line in lines if line.opcode == "fusion"
             for name in CALLED.findall(line.rest)}
    for name, lines in computations.items():
        for line in lines:
            kind = line.opcode.removesuffix("-start")
            # Of one that runs beside other work, every piece of that work repeats the line.
            chain = re.search(r'chain_id="(\d+)"', line.rest)
            key = chain[1] if chain else (name, line.name)
            if kind in KINDS and key not in seen:
                seen.add(key)
                arrays = list(_arrays(line.result))
                if line.opcode != kind and len(arrays) > 1:  # operands and results
                    arrays = arrays[len(arrays) // 2:] if kind != "all-reduce" else arrays
                found[kind, _devices(line.rest)].append((times[name], arrays))
            if name not in fused and line.opcode not in SILENT and times[name]:
                in_memory = [(size, shape) for size, shape, fast in _arrays(line.result)
                             if not fast]
                traffic += 2 * times[name] * sum(size for size, _ in in_memory)
                shapes |= {shape for _, shape in in_memory}
    merged = [Collective(
        kind, devices, sum(n for n, _ in each),
        sum(n * size for n, arrays in each for size, _, _ in arrays))
        for (kind, devices), each in sorted(found.items())]
    return Program([c for c in merged if c.count], traffic, shapes)


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """Name → lines, and the name of the one where the program begins."""
    computations: dict[str, list[_Line]] = {}
    lines, entry = [], ""
    for text_line in text.splitlines():
        if text_line.endswith("{") and not text_line.startswith((" ", "HloModule")):
            head = text_line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
            lines = computations.setdefault(head, [])
            entry = head if text_line.startswith("ENTRY") else entry
        elif match := INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", text_line)):
            lines.append(_Line(*match.groups()))
    return computations, entry


def _times(computations: dict[str, list[_Line]], entry: str) -> collections.Counter[str]:
    """How often each computation runs in one run of the program."""
    callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            if line.opcode in ("async-update", "async-done"):
                continue
            turns = _turns(computations, line) if line.opcode == "while" else 1
            branches = re.search(r"branch_computations=\{(.*?)\}", line.rest)
            called = CALLED.findall(line.rest) + (
                [n.strip(" %") for n in branches[1].split(",")] if branches else [])
            for other in called:
                callers[other].append((name, turns))
    times = collections.Counter({entry: 1})

    def count(name: str) -> int:
        if name not in times:
            times[name] = sum(count(caller) * turns for caller, turns in callers[name])
        return times[name]

    for name in computations:
        count(name)
    return times


def _turns(computations: dict[str, list[_Line]], line: _Line) -> int:
    """How often a loop turns that counts up from 0; 1 where that cannot be read."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest):
        return int(known[1])
    condition = computations[re.search(r"condition=%?([\w.-]+)", line.rest)[1]]
    constants = {one.name: int(one.rest.split(")")[0]) for one in condition
                 if one.opcode == "constant" and one.rest.split(")")[0].isdecimal()}
    limits = [constants[name] for one in condition if one.opcode == "compare"
              for name in re.findall(r"%?([\w.-]+)", one.rest.split(")")[0]) if name in constants]
    return limits[0] if len(limits) == 1 else 1


def _arrays(result: str) -> Iterator[tuple[int, tuple[int, ...], bool]]:
    """Bytes, shape, and whether it lies in a chip's fast memory, of each array of a result."""
    for kind, sizes, fast in ARRAY.findall(result):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        yield BYTES[kind] * math.prod(shape), shape, bool(fast)


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


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation runs."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one
