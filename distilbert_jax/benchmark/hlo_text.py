"""The text of a compiled program → its computations, line by line, and how often each of them runs.

A program is a number of computations; one of them is its entry, and lines of it call others. What
a line is called with, the text gives by name alone: its shape stands where it is made.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}
ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](?:\{{[^}}]*?(S\(\d+\))?\}})?")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(?.*?\)?) ([a-z][\w-]*)\((.*)$")
# Custom calls of the TPU's compiler that move nothing → the opcode that they amount to.
NAMES_ALONE = {"ConcatBitcast": "bitcast", "AllocateBuffer": "after-all"}
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class InMemory:
    """One array of a result."""

    bytes: int
    shape: tuple[int, ...]
    fast: bool  # it lies in a chip's fast memory


@dataclasses.dataclass(frozen=True)
class Line:
    """One instruction."""

    root: bool  # its result is that of its computation
    name: str
    result: str
    opcode: str
    rest: str  # operands and attributes

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of the lines whose results it is given."""
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    @functools.cached_property
    def arrays(self) -> list[InMemory]:
        """What it results in."""
        found = []
        for kind, sizes, fast in ARRAY.findall(self.result):
            shape = tuple(int(size) for size in sizes.split(",") if size)
            found.append(InMemory(BYTES[kind] * math.prod(shape), shape, bool(fast)))
        return found

    @functools.cached_property
    def called(self) -> list[str]:
        """The names of the computations that it runs."""
        branches = re.search(r"branch_computations=\{(.*?)\}", self.rest)
        return CALLED.findall(self.rest) + (
            [name.strip(" %") for name in branches[1].split(",")] if branches else [])

    @functools.cached_property
    def path(self) -> str:
        """Where jax made it, by functions, transformations and jax.named_scope; "" if unknown."""
        found = re.search(r'op_name="(.*?)"', self.rest)
        return found[1] if found else ""

    def numbers(self, attribute: str) -> list[int]:
        """The numbers of an attribute such as lhs_contracting_dims={1,2}."""
        found = re.search(rf'{attribute}"?\s*[=:]\s*[{{\[]([\d",\s]*)', self.rest)
        return [int(number) for number in re.findall(r"\d+", found[1])] if found else []


Computation = dict[str, Line]  # by name of the line, in their order


def computations(text: str) -> tuple[dict[str, Computation], str]:
    """Name → computation, and the name of the one where the program begins."""
    found: dict[str, Computation] = {}
    lines, entry = {}, ""
    for text_line in text.splitlines():
        if text_line.endswith("{") and not text_line.startswith((" ", "HloModule")):
            head = text_line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
            lines = found.setdefault(head, {})
            entry = head if text_line.startswith("ENTRY") else entry
        elif match := INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", text_line)):
            root, name, result, opcode, rest = match.groups()
            target = re.search(r'custom_call_target="(\w+)"', rest)
            opcode = NAMES_ALONE.get(target[1], opcode) if target else opcode
            lines[name] = Line(bool(root), name, result, opcode, rest)
    return found, entry


def times(found: dict[str, Computation], entry: str) -> collections.Counter[str]:
    """How often each computation runs in one run of the program."""
    callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for name, line in _lines(found):
        if line.opcode in ("async-update", "async-done"):
            continue
        turns = _turns(found, line) if line.opcode == "while" else 1
        for other in line.called:
            callers[other].append((name, turns))
    runs = collections.Counter({entry: 1})

    def count(name: str) -> int:
        if name not in runs:
            runs[name] = sum(count(caller) * turns for caller, turns in callers[name])
        return runs[name]

    for name in found:
        count(name)
    return runs


def parts(found: dict[str, Computation]) -> set[str]:
    """The computations that are part of a line elsewhere: what it fuses, or how it adds up."""
    return {called for _, line in _lines(found) for called in line.called
            if line.opcode not in ("while", "conditional", "call", "async-start")}


def loops(found: dict[str, Computation]) -> dict[str, Line]:
    """The body of each loop → the line that is the loop."""
    return {called: line for _, line in _lines(found) if line.opcode == "while"
            for called in line.called}


def _lines(found: dict[str, Computation]) -> Iterator[tuple[str, Line]]:
    for name, computation in found.items():
        for line in computation.values():
            yield name, line


def _turns(found: dict[str, Computation], line: Line) -> int:
    """How often a loop turns that counts up from 0; 1 where that cannot be read."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest):
        return int(known[1])
    condition = found[re.search(r"condition=%?([\w.-]+)", line.rest)[1]].values()
    constants = {one.name: int(one.rest.split(")")[0]) for one in condition
                 if one.opcode == "constant" and one.rest.split(")")[0].isdecimal()}
    limits = [constants[name] for one in condition if one.opcode == "compare"
              for name in one.operands if name in constants]
    return limits[0] if len(limits) == 1 else 1
