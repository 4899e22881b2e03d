"""Times of requests → tables in Markdown, and the machine that they were measured on."""

import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from distilbert_jax.benchmark.serving import Contender, Times
from distilbert_jax.evaluation.report import table

# What a CPU can do that decides about the speed of 8 and 16 bits, in Linux's words.
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
LIBRARIES = ("jax", "torch", "transformers", "onnxruntime", "ai-edge-litert", "numpy")


def of_requests(contenders: Sequence[Contender], found: Sequence[Sequence[Times]], names: Sequence[
        str]) -> str:
    """A line for each contender: of each request median and 95th percentile, CPU time, ratio.

    Args:
        contenders: the first is what the others are compared with.
        found: times of each, round by round.
        names: of the requests.
    """
    columns = ["model", "runtime", "MB"]
    for name in names:
        columns += [f"{name}: ms (p95)", "CPU ms", "ratio"]
    rows = []
    for contender, times in zip(contenders, found, strict=True):
        row = _who(contender)
        for name in names:
            wall, busy = (1e3 * np.array([t[name][i] for t in times]) for i in (0, 1))
            row += [f"{np.median(wall):,.1f} ({np.percentile(wall, 95):,.1f})",
                    f"{np.median(busy):,.1f}", f"{_ratio(found[0], times, name):.2f}"]
        rows.append(tuple(row))
    return table(rows, tuple(columns))


def of_texts(
    contenders: Sequence[Contender], found: Sequence[Sequence[Times]], name: str, count: int
) -> str:
    """A line for each contender: seconds for all texts, one by one, and CPU seconds.

    Args:
        contenders, found: as for of_requests; all rounds together are one pass.
        name: of the texts, among the requests.
        count: how many there are.
    """
    rows = []
    for contender, times in zip(contenders, found, strict=True):
        wall, busy = (sum(t[name][i] for t in times) for i in (0, 1))
        rows.append((*_who(contender), f"{wall:,.1f}", f"{busy:,.1f}", f"{1e3 * wall / count:,.1f}",
                     f"{_ratio(found[0], times, name):.2f}"))
    return table(rows, ("model", "runtime", "MB", "all texts s", "CPU s", "ms each", "ratio"))


def _who(contender: Contender) -> list[str]:
    return [contender.folder.resolve().name, contender.text, f"{contender.bytes / 1e6:,.1f}"]


def _ratio(first: Sequence[Times], times: Sequence[Times], name: str) -> float:
    """How many times as fast as the first, by the median over rounds."""
    return statistics.median(a[name][0] / b[name][0] for a, b in zip(first, times, strict=True))


def caption(load: Sequence[float]) -> str:
    """The CPU and which instructions it has, how busy it was, and versions, in one line.

    Args:
        load: averages before and after.
    """
    known = _cpu()
    flags = ", ".join(f"{name} {'yes' if name in known['flags'].split() else 'no'}"
                      for name in FLAGS)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES
                         if _installed(name))
    return (f"CPU: {known['model name']}, {len(os.sched_getaffinity(0))} CPUs, {flags}. Load "
            f"average (1 minute) {load[0]:.2f} before, {load[1]:.2f} after. Python "
            f"{platform.python_version()}, {versions}.")


def _cpu() -> dict[str, str]:
    """Name and flags of this machine's processor."""
    known = {"model name": platform.processor() or platform.machine(), "flags": ""}
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in known:
            known[name.strip()] = value.strip()
    return known


def _installed(library: str) -> bool:
    try:
        return bool(metadata.version(library))
    except metadata.PackageNotFoundError:
        return False
