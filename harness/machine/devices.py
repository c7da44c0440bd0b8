"""Devices to plan for, by name, and the one that is here: memory, arithmetic, and how much of it is
likely to be used.

Name -> Device. Imports no torch: the GPU that is here is asked through nvidia-smi, so that no CUDA
context is made.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.errors import ConfigError

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")  # of a container; version 2, or 1
# of a device's memory: the rest is lost to the allocator's fragments (an assumption)
FREE_SHARE = 0.95
CPU_TERAFLOPS_PER_CORE = 0.05  # fp32 products with AVX2 at about 2.5 GHz, not measured


@dataclass(frozen=True)
class Device:
    """`memory`: bytes as CUDA reports them, below the brochure's. Speeds: dense products, 10^12
    operations a second.
    """

    name: str
    memory: int
    capability: tuple[int, int] | None  # None: a CPU
    float16: float  # with sums in fp32
    float32: float  # without TF32, which torch leaves off
    utilisation: float  # share of these speeds that a run is assumed to reach
    aliases: tuple[str, ...] = ()  # as nvidia-smi names it, in lower case
    # bytes of the machine around a GPU; None: not known, as for a GPU by its name
    main_memory: int | None = None

    @property
    def is_gpu(self) -> bool:
        return self.capability is not None

    @property
    def usable(self) -> int:
        return int(self.memory * FREE_SHARE)

    def teraflops(self, dtype: str) -> float:
        """Returns the speed for a dtype; bfloat16's is float16's, since the policy takes bf16 only
        where it is native.
        """
        return self.float32 if dtype == "float32" else self.float16


def _gpu(
    name: str,
    gib: float,
    capability: tuple[int, int],
    float16: float,
    float32: float,
    *aliases: str,
) -> Device:
    # A T4 slows down when it is hot; the fastest GPUs wait for small products: assumptions, not
    # measurements.
    utilisation = 0.2 if name in ("t4", "h100", "h100-pcie", "h200") else 0.3
    return Device(name, int(gib * GIB), capability, float16, float32, utilisation, aliases)


# After a name, of a GPU with other speeds.
OTHER_KIND = r" (?:ti|super|d|laptop)\b"
# Speeds: NVIDIA's data sheets.
DEVICES = {
    device.name: device
    for device in (
        _gpu("t4", 14.7, (7, 5), 65, 8.1, "tesla t4"),
        _gpu("l4", 22.0, (8, 9), 121, 30, "nvidia l4"),
        _gpu("v100", 15.8, (7, 0), 125, 15.7, "v100"),
        _gpu("rtx3090", 23.6, (8, 6), 71, 35.6, "rtx 3090"),
        _gpu("rtx4090", 23.6, (8, 9), 165, 82.6, "rtx 4090"),
        _gpu("rtx5090", 31.4, (12, 0), 209, 104.8, "rtx 5090"),
        _gpu("rtx-a6000", 47.5, (8, 6), 155, 38.7, "rtx a6000"),
        _gpu("l40s", 44.4, (8, 9), 362, 91.6, "nvidia l40s"),
        _gpu("a10", 22.0, (8, 6), 125, 31.2, "nvidia a10"),
        _gpu("a10g", 22.0, (8, 6), 70, 35, "nvidia a10g"),
        _gpu("a100-40", 39.4, (8, 0), 312, 19.5, "a100"),
        _gpu("a100-80", 79.2, (8, 0), 312, 19.5, "a100"),
        _gpu("h100", 79.1, (9, 0), 989, 67, "h100"),
        _gpu("h100-pcie", 79.1, (9, 0), 756, 51, "h100 pcie"),
        _gpu("h200", 139.8, (9, 0), 989, 67, "h200"),
    )
}


def kinds_named(name: str) -> list[Device]:
    """Returns what the table has under a name that nvidia-smi tells, as "NVIDIA H100 PCIe": those
    of the longest alias in it, which several sizes of memory may share.
    """
    fitting = [
        (len(alias), known)
        for known in DEVICES.values()
        for alias in known.aliases
        if re.search(rf"\b{re.escape(alias)}\b(?!{OTHER_KIND})", name.lower())
    ]
    longest = max((length for length, _ in fitting), default=0)
    return [known for length, known in fitting if length == longest]


def peak_teraflops(name: str, precision: str) -> float | None:
    """Returns the peak of dense products, 10^12 operations a second, of the GPU with that name in
    the precision of a policy (bf16, fp16 or fp32); None where it is not in the table.
    """
    kinds = kinds_named(name)
    dtype = "float32" if precision == "fp32" else "float16"
    return kinds[0].teraflops(dtype) if kinds else None


def device(name: str) -> Device:
    """Returns a device of the table, "cpu" (this machine's) or "here". Raises ConfigError with the
    closest name.
    """
    if name == "here":
        return here()
    if name == "cpu":
        return cpu()
    if name in DEVICES:
        return DEVICES[name]
    near = difflib.get_close_matches(name.lower(), DEVICES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(DEVICES)} or cpu"
    raise ConfigError(f"--device {name}: no such device; {hint}")


def cores() -> int:
    """Returns how many cores this process may use; all of them on macOS, which cannot tell."""
    tell = getattr(os, "sched_getaffinity", None)
    return len(tell(0)) if tell else os.cpu_count() or 1


def cpu() -> Device:
    speed = CPU_TERAFLOPS_PER_CORE * cores()
    return Device("cpu", main_memory(), None, speed, speed, 0.5)


def main_memory(free: bool = False) -> int:
    """Returns the bytes of this machine's memory, or of the container's limit where that is lower;
    `free`: only those available.
    """
    memory = psutil.virtual_memory()
    sizes = [memory.available if free else memory.total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = CGROUP / name
        limit = file.read_text().strip() if file.is_file() else ""
        if limit.isdecimal():  # "max" where there is none
            sizes.append(int(limit))
    return min(sizes)


@dataclass(frozen=True)
class Card:
    """What nvidia-smi says of one GPU; `memory`: bytes."""

    index: str
    uuid: str
    name: str
    memory: int
    capability: tuple[int, int]
    driver: str


def cards(environment: Mapping[str, str] = os.environ) -> list[Card]:
    """Returns the GPUs that a process started from here would see, in its order; as
    CUDA_VISIBLE_DEVICES says where it is set.

    As in CUDA, the first entry that names no GPU ends the list. Its numbers are nvidia-smi's:
    CUDA's own where all GPUs are of one kind, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,compute_cap,driver_version"]
    if not shutil.which(query[0]):
        return []
    query.append("--format=csv,noheader,nounits")
    table = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout
    rows = [[field.strip() for field in line.split(",")] for line in table.splitlines()]
    found = [_card(*row) for row in rows if len(row) == 6]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    chosen = []
    for entry in (part.strip() for part in visible.split(",")):
        # Of a slice (MIG) nvidia-smi tells no more than of its GPU, and not which one that is.
        fits = [
            card for card in found if entry == card.index or (entry and card.uuid.startswith(entry))
        ]
        fits = fits or (found if entry.startswith("MIG-") else [])
        if not fits:
            break
        chosen.append(fits[0])
    return chosen


def _card(index: str, uuid: str, name: str, mebibytes: str, capability: str, driver: str) -> Card:
    # A GPU without memory of its own ([N/A]) uses the machine's.
    memory = int(mebibytes) * 2**20 if mebibytes.isdecimal() else main_memory()
    version = [int(number) for number in capability.split(".")]
    return Card(index, uuid, name, memory, (version[0], version[1]), driver)


def here() -> Device:
    """Returns the first GPU that a run would use, with its own memory and the speeds of its kind;
    or the CPU.
    """
    if not (found := cards()):
        return cpu()
    card = found[0]
    kinds = kinds_named(card.name)
    like = min(kinds or DEVICES.values(), key=lambda known: abs(known.memory - card.memory))
    return Device(
        card.name if kinds else f"{card.name} (speeds of a {like.name})",
        int(card.memory * 0.98),  # CUDA sees 1 to 3% less than nvidia-smi tells
        card.capability,
        like.float16,
        like.float32,
        like.utilisation,
        main_memory=main_memory(),
    )
