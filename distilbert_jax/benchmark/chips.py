"""Chips that are not here: their peaks, and what a compiler needs to compile for them.

The compiler for TPUs is in jax[tpu], that for NVIDIA's GPUs in jax[cuda12] and jax[cuda13]; none
needs its chip.
"""

import dataclasses
import os
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies

from distilbert_jax.errors import UserError, choose, first_line

GIB = 2**30
SHARE = 0.75  # of a GPU's memory that jax takes, if XLA_PYTHON_CLIENT_MEM_FRACTION says no other
PER_HOST = 8  # GPUs
CUDA = "jax_cuda12_plugin", "jax_cuda13_plugin"  # either compiles for all of them


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU as its driver describes it; the figures are those of XLA's own descriptions
    (openxla/xla, xla/backends/gpu/target_config/specs)."""

    name: str
    capability: int  # the major number; all have 0 after it
    cores: int
    units: int  # of float32 in a core
    clock: float  # [GHz]
    memory: int  # [bytes], as all that follow
    traffic: int  # a second
    cache: int
    shared: int  # in a core
    shared_by_block: int  # at most

    def description(self) -> str:
        """The text that XLA takes for the card itself, with the libraries of jax[cuda12]."""
        extension = "feature_extension: ACCELERATED_FEATURES" if self.capability >= 9 else ""
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {self.capability} {extension} }}
  core_count: {self.cores}
  fpus_per_core: {self.units}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  memory_bandwidth: {self.traffic}
  l2_cache_size: {self.cache}
  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared_by_block}
  shared_memory_per_block: 49152
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{self.name}"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip: of TPUs by Austin et al. 2025, How to Scale Your Model, chapter 2; of
    GPUs by NVIDIA's datasheets (SXM, products without sparsity) and the card's description."""

    memory: float  # that a program gets [bytes]
    flops: float  # of bfloat16 products [1/s]
    traffic: float  # to and from memory [bytes/s]
    exchange: float  # what it sends: a TPU along one axis of the torus, a GPU by NVLink [bytes/s]
    options: dict[str, str] = dataclasses.field(default_factory=dict)  # of a TPU's topology
    card: Card | None = None  # None: a TPU


def _gpu(card: Card, flops: float, exchange: float) -> Chip:
    return Chip(SHARE * card.memory, flops, float(card.traffic), exchange, card=card)


HOPPER = dict(capability=9, cores=132, units=128, clock=1.98, cache=52428800, shared=233472,
              shared_by_block=232448)

CHIPS = {
    "v4": Chip(30.75 * GIB, 2.75e14, 1.2e12, 9e10, {"chip_config_name": "megacore"}),
    "v5e": Chip(15.75 * GIB, 1.97e14, 8.1e11, 9e10),
    "v5p": Chip(95.74 * GIB, 4.59e14, 2.8e12, 1.8e11),
    "v6e": Chip(31.25 * GIB, 9.2e14, 1.6e12, 1.8e11),
    "a100": _gpu(Card("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85100068864, 2039040000000,
                      41943040, 167936, 166912), 3.12e14, 3e11),
    "h100": _gpu(Card("NVIDIA H100 80GB HBM3", memory=84942979072, traffic=3352320000000,
                      **HOPPER), 9.89e14, 4.5e11),
    "h200": _gpu(Card("NVIDIA H200", memory=151397597184, traffic=4800000000000, **HOPPER),
                 9.89e14, 4.5e11),
    "b200": _gpu(Card("NVIDIA B200", 10, 148, 128, 1.965, 191514411008, 7672320000000, 132644864,
                      233472, 232448), 2.25e15, 9e11)}


def topology(name: str) -> tuple[Chip, Any]:
    """Peaks and devices of a topology, e.g. v5e:2x4 or h100:8.

    Raises:
        UserError: not of that form, not known, or the compiler for it is not installed.
    """
    kind, colon, sizes = name.partition(":")
    if not colon:
        raise UserError(f"--compile-only {name} must look like v5e:2x4 or h100:8: a kind of chip, "
                        "and how many TPUs along each axis, or GPUs of a host")
    chip = CHIPS[choose(kind, CHIPS, "chip of --compile-only")]
    if chip.card and sizes not in map(str, range(1, PER_HOST + 1)):
        raise UserError(f"--compile-only {name} must say how many GPUs of one host, 1 to "
                        f"{PER_HOST}: {kind}:1")
    packages, extra = (CUDA, "cuda12") if chip.card else (("libtpu",), "tpu")
    if not any(map(find_spec, packages)):
        raise UserError(f"--compile-only {name} needs the compiler for it: pip install "
                        f'"jax[{extra}]"')
    jax.config.update("jax_platforms", "cpu")
    # What is compiled for absent devices cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return chip, _gpus(chip.card, sizes) if chip.card else _tpus(name, chip)
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error).partition(": ")[2]
        raise UserError(f"--compile-only {name}: {reason}") from error


def _gpus(card: Card, number: str) -> Any:
    return topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{number}", target_config=card.description())


def _tpus(name: str, chip: Chip) -> Any:
    # It would look for the TPU that it runs on, wait for a metadata server, and complain.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                   "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TPU_WORKER_ID": "0",
                   "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **chip.options)
