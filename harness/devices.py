"""Devices to plan for, by name, and the one that is here: memory, arithmetic, and how much of it is likely to be used.

Name -> Device. Imports no torch: the GPU that is here is asked through nvidia-smi, so that no CUDA context is made.
"""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from harness.config import ConfigError

GIB = 2**30
FREE_SHARE = 0.95  # of a device's memory: the rest is lost to the allocator's fragments (an assumption)
CPU_TERAFLOPS_PER_CORE = 0.05  # fp32 products with AVX2 at about 2.5 GHz, not measured


@dataclass(frozen=True)
class Device:
    """`memory`: bytes as CUDA reports them, below the brochure's. Speeds: dense products, 10^12 operations a second."""

    name: str
    memory: int
    capability: tuple[int, int] | None  # None: a CPU
    float16: float  # with sums in fp32
    float32: float  # without TF32, which torch leaves off
    utilisation: float  # share of these speeds that a run is assumed to reach
    aliases: tuple[str, ...] = ()  # as nvidia-smi names it, in lower case

    @property
    def is_gpu(self) -> bool:
        return self.capability is not None

    @property
    def usable(self) -> int:
        return int(self.memory * FREE_SHARE)

    def teraflops(self, dtype: str) -> float:
        """Of bfloat16 as of float16: the policy takes bf16 only where it is native."""
        return self.float32 if dtype == "float32" else self.float16


def _gpu(name: str, gib: float, capability: tuple[int, int], float16: float, float32: float, *aliases: str) -> Device:
    # A T4 slows down when it is hot; the fastest GPUs wait for small products: assumptions, not measurements.
    utilisation = 0.2 if name in ("t4", "h100", "h200") else 0.3
    return Device(name, int(gib * GIB), capability, float16, float32, utilisation, aliases)


# Speeds: NVIDIA's data sheets.
DEVICES = {
    device.name: device
    for device in (
        _gpu("t4", 14.7, (7, 5), 65, 8.1, "tesla t4"),
        _gpu("l4", 22.0, (8, 9), 121, 30, "nvidia l4"),
        _gpu("v100", 15.8, (7, 0), 125, 15.7, "v100"),
        _gpu("rtx3090", 23.6, (8, 6), 71, 35.6, "rtx 3090"),
        _gpu("rtx4090", 23.6, (8, 9), 165, 82.6, "rtx 4090"),
        _gpu("a10", 22.0, (8, 6), 125, 31.2, "nvidia a10"),
        _gpu("a100-40", 39.4, (8, 0), 312, 19.5, "a100"),
        _gpu("a100-80", 79.2, (8, 0), 312, 19.5, "a100"),
        _gpu("h100", 79.1, (9, 0), 989, 67, "h100"),
        _gpu("h200", 139.8, (9, 0), 989, 67, "h200"),
    )
}


def device(name: str) -> Device:
    """A device of the table, "cpu" (this machine's) or "here". Raises ConfigError with the closest name."""
    if name == "here":
        return here()
    if name == "cpu":
        return cpu()
    if name in DEVICES:
        return DEVICES[name]
    near = difflib.get_close_matches(name.lower(), DEVICES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(DEVICES)} or cpu"
    raise ConfigError(f"--device {name}: no such device; {hint}")


def cpu() -> Device:
    speed = CPU_TERAFLOPS_PER_CORE * len(os.sched_getaffinity(0))
    return Device("cpu", psutil.virtual_memory().total, None, speed, speed, 0.5)


def here() -> Device:
    """The first GPU of this machine, with its own memory and the speeds of its kind; or the CPU."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which(query[0]) else ""
    if not found.strip() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return cpu()
    name, mebibytes, capability = (field.strip() for field in found.splitlines()[0].split(","))
    major, _, minor = capability.partition(".")
    kinds = [known for known in DEVICES.values() if any(alias in name.lower() for alias in known.aliases)]
    like = min(kinds or DEVICES.values(), key=lambda known: abs(known.memory - int(mebibytes) * 2**20))
    # CUDA sees 1 to 3% less than nvidia-smi tells.
    memory, known_as = int(int(mebibytes) * 2**20 * 0.98), name if kinds else f"{name} (speeds of a {like.name})"
    return Device(known_as, memory, (int(major), int(minor)), like.float16, like.float32, like.utilisation)
