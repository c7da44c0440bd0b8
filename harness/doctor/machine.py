"""What `harness doctor` looks at without a config: Python, torch, GPUs, 4-bit layers, processes,
memory, disk.

Nothing in -> Findings. Everything is tried rather than asked for where that takes seconds: a 4-bit
layer learns, two processes add up their numbers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil

from harness.doctor.findings import Finding
from harness.machine.devices import cards, main_memory

GB = 1e9
PYTHON = (3, 11)
LOCK_SECONDS = 120.0  # younger than this a build may still be about to start its compiler
LONGEST_BUILD_SECONDS = (
    3600.0  # DeepSpeed's slowest took two minutes; a lock as old as this is nobody's
)
TALK_SECONDS = 60.0  # for two processes to start, to find each other and to add two numbers
LOW_MEMORY, LOW_DISK = 4 * GB, 2 * GB
SHARED_MEMORY, SHARED_MEMORY_NCCL = (
    32e6,
    1 * GB,
)  # what NCCL's ranks exchange goes through /dev/shm; Docker gives 64 MB


@dataclass(frozen=True)
class Gpu:
    """What torch says of one GPU."""

    name: str
    capability: tuple[int, int]
    bytes: int

    @property
    def bf16(self) -> bool:
        from harness.machine.precision import BF16_FROM

        return self.capability >= BF16_FROM


def gpus_here() -> list[Gpu]:
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Gpu(one.name, (one.major, one.minor), one.total_memory) for one in found]


def python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < PYTHON:
        return Finding("Python", "error", found, "install Python 3.11 or newer")
    return Finding("Python", "OK", found)


def torch_build(listed_gpus: int, driver: str | None) -> Finding:
    """`listed_gpus`: how many nvidia-smi sees; a torch that sees none of them would train on the
    CPU in silence.
    """
    import torch

    found = f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'built without CUDA'}"
    found += f", driver {driver}" if driver else ", no NVIDIA driver"
    if not listed_gpus or torch.cuda.is_available():
        return Finding("torch", "OK", found)
    found += f": {listed_gpus} GPUs are here and torch uses none of them"
    if torch.version.cuda is None:
        return Finding(
            "torch",
            "error",
            found,
            "install torch from the CUDA index, see pytorch.org/get-started",
        )
    return Finding(
        "torch",
        "error",
        found,
        f"update the driver, or install a torch built for a CUDA before {driver}",
    )


def driver() -> str | None:
    """The NVIDIA driver's version."""
    return next((card.driver for card in cards({})), None)  # hidden GPUs have one too


def graphics(gpus: Sequence[Gpu], kernels: Sequence[str] | None = None) -> Iterator[Finding]:
    """`kernels`: what torch was compiled for, as in ["sm_75", "sm_80", "compute_90"]; none: asked
    of torch.
    """
    import torch

    kernels = torch.cuda.get_arch_list() if kernels is None else kernels
    if not gpus:
        yield Finding("GPU", "OK", "none: training runs on the CPU, in fp32")
    for index, gpu in enumerate(gpus):
        major, minor = gpu.capability
        found = f"{gpu.name}, compute capability {major}.{minor}, {gpu.bytes / 2**30:.1f} GiB"
        found += (
            ", bf16"
            if gpu.bf16
            else ", no native bf16: fp16 with a loss scaler (train.precision=auto)"
        )
        if kernels and not any(_runs_on(kernel, gpu.capability) for kernel in kernels):
            fix = f"install a torch that still has sm_{major}{minor}: an older one, or one built for an older CUDA"
            yield Finding(
                f"GPU {index}",
                "error",
                f"{found}; torch has no kernels for it ({', '.join(kernels)})",
                fix,
            )
        else:
            yield Finding(f"GPU {index}", "OK", found)


def _runs_on(kernel: str, capability: tuple[int, int]) -> bool:
    """Compiled code (sm_) runs on later GPUs of its major version, PTX (compute_) on all later
    ones.
    """
    kind, _, number = kernel.partition("_")
    digits = "".join(filter(str.isdigit, number))  # sm_90a
    built = (int(digits[:-1]), int(digits[-1]))
    return capability >= built and (kind == "compute" or capability[0] == built[0])


def four_bit() -> Finding:
    """A 4-bit layer's gradient before and after an evaluation, against the product with its
    dequantised weights.
    """
    # isort: skip  it quietens bitsandbytes' import
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from harness.model.language.quantise import keep_autograd

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
    keep_autograd(layer)
    expected_D = dequantize_4bit(layer.weight.data, layer.weight.quant_state).sum(dim=0)
    inputs_ND = torch.ones(2, 64, device=device)

    def learns() -> bool:
        given_ND = inputs_ND.clone().requires_grad_()
        out = layer.train()(given_ND).sum()
        if out.requires_grad:
            out.backward()
        return given_ND.grad is not None and torch.allclose(
            given_ND.grad[0], expected_D, rtol=1e-2, atol=1e-3
        )

    before = learns()
    with torch.no_grad():
        layer.eval()(inputs_ND)
    after = learns()
    found = f"{importlib.metadata.version('bitsandbytes')} on {device.type}, NF4"
    if before and after:
        return Finding(
            "bitsandbytes", "OK", f"{found}: the gradient is right before and after an evaluation"
        )
    when = "after an evaluation" if before else "at once"
    fix = "pip install -U bitsandbytes; until then model.lm.tuning=lora trains without 4 bits"
    return Finding(
        "bitsandbytes", "error", f"{found}: a 4-bit layer gives no right gradient {when}", fix
    )


def deepspeed() -> Finding:
    """Whether it is there. Importing it takes seconds: only `harness doctor CONFIG --launch zero2`
    does.
    """
    if importlib.util.find_spec("deepspeed") is None:
        fix = "only the zero2, zero2_offload and zero3_offload launches need it: pip install 'vl-harness[deepspeed]'"
        return Finding("DeepSpeed", "OK", "not installed", fix)
    return Finding("DeepSpeed", "OK", importlib.metadata.version("deepspeed"))


def compiler() -> Finding:
    """For information: DeepSpeed's ops could be built with it, and no launch of ours builds any."""
    found = [
        f"{name} {'found' if shutil.which(name) else 'absent'}" for name in ("c++", "ninja", "nvcc")
    ]
    return Finding(
        "DeepSpeed ops",
        "OK",
        f"none has to be built: harness uses torch's own ({', '.join(found)})",
    )


def build_locks(now: float | None = None) -> Iterator[Finding]:
    """A killed build of a torch extension leaves a lock for which every later start waits for ever,
    in silence.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    locks = sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])
    if not locks:
        yield Finding("build locks", "OK", f"none under {root}")
    for lock in locks:
        age = (time.time() if now is None else now) - lock.stat().st_mtime
        builder = _works_in(lock.parent)
        if age < LONGEST_BUILD_SECONDS and (builder or age < LOCK_SECONDS):
            who = builder or "perhaps a process that has not started its compiler yet"
            fix = f"wait for it; or remove {lock} if that build was killed"
            yield Finding(
                "build locks", "warning", f"{lock}, {age:.0f} s old, is held by {who}", fix
            )
        else:
            lock.unlink()
            yield Finding(
                "build locks",
                "OK",
                f"{lock} was left by a build that was killed; it is removed now",
            )


def _works_in(folder: Path) -> str | None:
    """A process in this folder: torch starts ninja, and that its compilers, inside the folder that
    they fill.
    """
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder.resolve():
                return f"process {process.pid} ({process.name()})"
        except (psutil.Error, OSError):  # another user's, or gone meanwhile
            continue
    return None


def all_reduce(
    gpus: int, seconds: float = TALK_SECONDS, program: str = "all_reduce_rank"
) -> Finding:
    """Processes that add up their ranks, as every training step does: gloo, or NCCL where there are
    GPUs.
    """
    world, backend = (min(gpus, 2), "nccl") if gpus else (2, "gloo")
    name = f"all-reduce ({backend})"
    line = [
        sys.executable,
        "-c",
        f"import sys; from harness.doctor.machine import *; {program}(*sys.argv[1:])",
    ]
    fix = "set NCCL_DEBUG=INFO (NCCL) or GLOO_SOCKET_IFNAME=lo (gloo), and look at firewalls between processes"
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [*line, str(rank), str(world), backend, str(Path(folder, "meet"))],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        end = time.monotonic() + seconds
        try:
            said = [
                process.communicate(timeout=max(0.1, end - time.monotonic()))
                for process in processes
            ]
        except subprocess.TimeoutExpired:
            return Finding(
                name, "error", f"{world} processes did not find each other in {seconds:.0f} s", fix
            )
        finally:
            for process in processes:
                process.kill()
                process.wait()
    expected = str(float(sum(range(1, world + 1))))
    for rank, (out, problem) in enumerate(said):
        if out.strip() != expected:
            last = (
                problem.strip() or f"it said {out.strip()!r}, expected {expected}"
            ).splitlines()[-1]
            return Finding(name, "error", f"rank {rank} of {world}: {last}", fix)
    alone = "" if world > 1 else ": with one GPU there is nobody to talk to"
    return Finding(name, "OK", f"{world} processes added up their numbers{alone}")


def all_reduce_rank(rank: str, world: str, backend: str, meeting_point: str) -> None:
    """What each of those processes runs."""
    import torch
    from torch import distributed

    if backend == "nccl":
        torch.cuda.set_device(int(rank))
    distributed.init_process_group(
        backend,
        init_method=f"file://{meeting_point}",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=TALK_SECONDS),
    )
    total = torch.tensor([float(rank) + 1], device="cuda" if backend == "nccl" else "cpu")
    distributed.all_reduce(total)
    print(total.item(), flush=True)
    os._exit(0)  # ending gloo's group can wait for its own thread for ever


def threads(processes: int = 1) -> Finding:
    """OpenMP's threads of all processes against the cores; threads that spin are 100 times slower
    when too many.
    """
    cores, given = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    found = f"{cores} cores, OMP_NUM_THREADS={given or 'not set'}, OMP_WAIT_POLICY={policy or 'not set'}"
    if given.isdecimal() and int(given) * processes > cores:
        fix = (
            f"export OMP_NUM_THREADS={cores // processes}"
            if processes <= cores
            else f"--processes {cores} or fewer"
        )
        return Finding(
            "threads",
            "warning",
            f"{found}: more threads than cores with {processes} processes",
            fix,
        )
    if policy.upper() != "PASSIVE":
        return Finding(
            "threads",
            "warning",
            f"{found}: threads that wait spin",
            "export OMP_WAIT_POLICY=PASSIVE",
        )
    return Finding("threads", "OK", found)


def shared_memory(gpus: int, workers: int = 0, folder: Path = Path("/dev/shm")) -> Finding:
    """NCCL's ranks of one machine exchange through it. Reading processes hand samples over by
    pipes, and need of it only their semaphores.
    """
    if not folder.is_dir():
        return Finding("/dev/shm", "OK", f"{folder} is not there: this system has no such folder")
    free = shutil.disk_usage(folder).free
    needed = SHARED_MEMORY_NCCL if gpus > 1 else SHARED_MEMORY
    found = f"{free / GB:.2f} GB free, for {gpus} GPUs and {workers} reading processes each"
    if free < needed:
        fix = "start the container with --shm-size=2g or --ipc=host"
        return Finding("/dev/shm", "warning", f"{found}; {needed / GB:.2f} GB are wanted", fix)
    return Finding("/dev/shm", "OK", found)


def disk(folder: Path, needed: float | None = None) -> Finding:
    """Free bytes where `folder` is or will be; `needed`: by the checkpoints that will lie there at
    once, if known.
    """
    there = next(
        parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir()
    )
    free = shutil.disk_usage(there).free
    found = f"{free / GB:.1f} GB free at {folder}"
    if needed is not None:
        found += f", checkpoints take {needed / GB:.2f}"
    if free >= (LOW_DISK if needed is None else needed):
        return Finding("disk", "OK", found)
    fix = "make room, choose another out=, or lower train.keep_checkpoints"
    return Finding("disk", "warning" if needed is None else "error", found, fix)


def host_memory(available: float | None = None) -> Finding:
    """`available` bytes; none: those of the machine, or the container's limit where that is lower."""
    available = main_memory(free=True) if available is None else available
    found = f"{available / GB:.1f} GB available"
    if available < LOW_MEMORY:
        return Finding(
            "memory",
            "warning",
            f"{found}: loading a model may fail",
            "close other programs; data.workers=0",
        )
    return Finding("memory", "OK", found)
