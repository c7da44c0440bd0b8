"""The hardware of this machine in words, for what a run leaves: no name of a host, no user."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path

import torch

from harness.machine.devices import cores

CPUINFO = Path("/proc/cpuinfo")


@cache
def multiplies_bf16() -> bool:
    """Returns whether this CPU has products in bf16, by its flags (of x86 or Arm)."""
    if not CPUINFO.is_file():
        return False
    flags = re.findall(r"^(?:flags|Features)\s*: (.*)$", CPUINFO.read_text(errors="replace"), re.M)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(" ".join(flags).split()))


@cache
def hardware() -> str:
    """Returns "NVIDIA T4", or "2 cores of Intel(R) Xeon(R) CPU @ 2.20GHz"."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if CPUINFO.is_file():
        named = re.search(r"^model name\s*: (.*)$", CPUINFO.read_text(errors="replace"), re.M)
        name = named[1] if named else name
    return f"{cores()} cores of {name}"
