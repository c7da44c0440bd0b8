"""What `harness doctor` looks at without a config: Python, torch, GPUs, processes, memory, disk.

Nothing in -> Findings. Everything is tried rather than asked for where that takes seconds: a 4-bit
layer learns, two processes add up their numbers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from harness.doctor.findings import Finding, error, ok, warning
from harness.errors import install_command
from harness.machine.devices import cards, cores, main_memory
from harness.machine.precision import BF16_FROM
from harness.model.language.quantise import keep_autograd

GB = 1e9
FAILED_RANK = (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException)
PYTHON = (3, 11)
MEETING_SECONDS = 60.0  # for two processes to start, to find each other and to add two numbers
LOW_MEMORY = 4 * GB
LOW_DISK = 2 * GB
SHARED_MEMORY = 32e6
SHARED_MEMORY_NCCL = 1 * GB  # NCCL's ranks exchange through /dev/shm; Docker gives 64 MB


@dataclass(frozen=True)
class Gpu:
    """What torch says of one GPU."""

    name: str
    capability: tuple[int, int]
    bytes: int

    @property
    def bf16(self) -> bool:
        return self.capability >= BF16_FROM


def gpus_here() -> list[Gpu]:
    """Returns the GPUs that torch sees."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Gpu(gpu.name, (gpu.major, gpu.minor), gpu.total_memory) for gpu in found]


def python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < PYTHON:
        return error("Python", found, "install Python 3.11 or newer")
    return ok("Python", found)


def torch_build(listed_gpus: int, driver: str | None) -> Finding:
    """Tells whether torch uses the `listed_gpus` of nvidia-smi, or would train on the CPU."""
    cuda = torch.version.cuda
    found = f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'built without CUDA'}"
    found += f", driver {driver}" if driver else ", no NVIDIA driver"
    if not listed_gpus or torch.cuda.is_available():
        return ok("torch", found)
    fix = "install torch from the CUDA index, see pytorch.org/get-started"
    if cuda:
        fix = f"update the driver, or install a torch built for a CUDA before {driver}"
    return error("torch", f"{found}: {listed_gpus} GPUs are here and torch uses none of them", fix)


def driver() -> str | None:
    """Returns the NVIDIA driver's version."""
    return next((card.driver for card in cards({})), None)  # hidden GPUs have one too


def graphics(gpus: Sequence[Gpu], kernels: Sequence[str] | None = None) -> Iterator[Finding]:
    """Yields a line for each GPU.

    `kernels`: what torch was compiled for, as in ["sm_75", "compute_90"]; None: torch is asked.
    """
    if kernels is None:
        kernels = torch.cuda.get_arch_list()
    if not gpus:
        yield ok("GPU", "none: training runs on the CPU, in fp32")
    for index, gpu in enumerate(gpus):
        major, minor = gpu.capability
        found = f"{gpu.name}, compute capability {major}.{minor}, {gpu.bytes / 2**30:.1f} GiB"
        if gpu.bf16:
            found += ", bf16"
        else:
            found += ", no native bf16: fp16 with a loss scaler (train.precision=auto)"
        if not kernels or any(_runs_on(kernel, gpu.capability) for kernel in kernels):
            yield ok(f"GPU {index}", found)
        else:
            yield error(
                f"GPU {index}",
                f"{found}; torch has no kernels for it ({', '.join(kernels)})",
                f"install a torch that still has sm_{major}{minor}: an older one, or one built "
                "for an older CUDA",
            )


def _runs_on(kernel: str, capability: tuple[int, int]) -> bool:
    """Tells it of compiled code (sm_: its major version) or of PTX (compute_: all later GPUs)."""
    digits = "".join(filter(str.isdigit, kernel))  # sm_90a
    built = (int(digits[:-1]), int(digits[-1]))
    return capability >= built and (kernel.startswith("compute") or capability[0] == built[0])


def four_bit() -> Finding:
    """Compares a 4-bit layer's gradient, before and after an evaluation, with the true one."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
    keep_autograd(layer)
    weight: Any = layer.weight  # bitsandbytes' own kind of parameter
    expected_D = dequantize_4bit(weight.data, weight.quant_state).sum(dim=0)
    inputs_ND = torch.ones(2, 64, device=device)

    def learns() -> bool:
        given_ND = inputs_ND.clone().requires_grad_()
        out = layer.train()(given_ND).sum()
        if not out.requires_grad:
            return False
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
        return ok("bitsandbytes", f"{found}: the gradient is right before and after an evaluation")
    when = "after an evaluation" if before else "at once"
    return error(
        "bitsandbytes",
        f"{found}: a 4-bit layer gives no right gradient {when}",
        "pip install -U bitsandbytes; until then model.lm.tuning=lora trains without 4 bits",
    )


def deepspeed() -> Finding:
    """Tells whether it is there; importing takes seconds: `doctor CONFIG --launch zero2` does."""
    if importlib.util.find_spec("deepspeed") is None:
        needed = "only the zero2, zero2_offload and zero3_offload launches need it"
        return ok("DeepSpeed", "not installed", f"{needed}: {install_command('deepspeed')}")
    return ok("DeepSpeed", importlib.metadata.version("deepspeed"))


def all_reduce(
    gpus: int, seconds: float = MEETING_SECONDS, rank_program: Callable[..., None] | None = None
) -> Finding:
    """Lets processes add up their ranks as every step does: by gloo, by NCCL where there are GPUs.

    `accelerate test`'s scripts do not: on CPU processes of our launch files they run as one.
    """
    world = min(gpus, 2) if gpus else 2
    backend = "nccl" if gpus else "gloo"
    name = f"all-reduce ({backend})"
    fix = (
        "set NCCL_DEBUG=INFO (NCCL) or GLOO_SOCKET_IFNAME=lo (gloo), and look at firewalls between "
        "processes"
    )
    with tempfile.TemporaryDirectory() as folder:
        given = (world, backend, f"{folder}/meet")
        ranks = multiprocessing.start_processes(
            rank_program or add_up_ranks, given, nprocs=world, join=False, start_method="spawn"
        )
        end = time.monotonic() + seconds
        try:
            while not ranks.join(timeout=0.2):
                if time.monotonic() > end:
                    found = f"{world} processes did not find each other in {seconds:.0f} s"
                    return error(name, found, fix)
        except FAILED_RANK as problem:
            last = str(problem).strip().splitlines()[-1]
            return error(name, f"rank {problem.error_index} of {world}: {last}", fix)
        finally:
            for process in ranks.processes:
                process.kill()
    alone = "" if world > 1 else ": with one GPU there is nobody to talk to"
    return ok(name, f"{world} processes added up their numbers{alone}")


def add_up_ranks(rank: int, world: int, backend: str, meeting_point: str) -> None:
    """Runs in each of these processes. Raises ValueError for a wrong sum."""
    device = "cpu"
    if backend == "nccl":
        device = "cuda"
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend,
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=MEETING_SECONDS),
    )
    total = torch.tensor([rank + 1.0], device=device)
    distributed.all_reduce(total)
    expected = world * (world + 1) / 2
    if total.item() != expected:
        raise ValueError(f"the sum is {total.item()}, expected {expected}")
    os._exit(0)  # ending gloo's group can wait for its own thread for ever


def threads(processes: int = 1) -> Finding:
    """Compares OpenMP's threads of all processes with the cores.

    Threads that spin while they wait are 100 times slower when there are too many of them.
    """
    here = cores()
    given = os.environ.get("OMP_NUM_THREADS", "")
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    found = (
        f"{here} cores, OMP_NUM_THREADS={given or 'not set'}, OMP_WAIT_POLICY={policy or 'not set'}"
    )
    if given.isdecimal() and int(given) * processes > here:
        fix = f"--processes {here} or fewer"
        if processes <= here:
            fix = f"export OMP_NUM_THREADS={here // processes}"
        found += f": more threads than cores with {processes} processes"
        return warning("threads", found, fix)
    if policy.upper() != "PASSIVE":
        return warning(
            "threads", f"{found}: threads that wait spin", "export OMP_WAIT_POLICY=PASSIVE"
        )
    return ok("threads", found)


def shared_memory(gpus: int, workers: int = 0, folder: Path = Path("/dev/shm")) -> Finding:
    """Looks whether NCCL's ranks have room to exchange.

    Reading processes hand samples over by pipes, and need of it only their semaphores.
    """
    if not folder.is_dir():
        return ok("/dev/shm", f"{folder} is not there: this system has no such folder")
    free = shutil.disk_usage(folder).free
    needed = SHARED_MEMORY_NCCL if gpus > 1 else SHARED_MEMORY
    found = f"{free / GB:.2f} GB free, for {gpus} GPUs and {workers} reading processes each"
    if free < needed:
        fix = "start the container with --shm-size=2g or --ipc=host"
        return warning("/dev/shm", f"{found}; {needed / GB:.2f} GB are wanted", fix)
    return ok("/dev/shm", found)


def disk(folder: Path, needed: float | None = None) -> Finding:
    """Looks at the free bytes where `folder` is or will be.

    `needed`: by the checkpoints that will lie there at once; None: not known.
    """
    above = (folder.absolute(), *folder.absolute().parents)
    free = shutil.disk_usage(next(parent for parent in above if parent.is_dir())).free
    found = f"{free / GB:.1f} GB free at {folder}"
    if needed is not None:
        found += f", checkpoints take {needed / GB:.2f}"
    if free >= (LOW_DISK if needed is None else needed):
        return ok("disk", found)
    fix = "make room, choose another out=, or lower train.keep_checkpoints"
    return warning("disk", found, fix) if needed is None else error("disk", found, fix)


def host_memory(available: float | None = None) -> Finding:
    """Looks at `available` bytes; None: the machine's, or its container's where that is lower."""
    if available is None:
        available = main_memory(free=True)
    found = f"{available / GB:.1f} GB available"
    if available < LOW_MEMORY:
        fix = "close other programs; data.workers=0"
        return warning("memory", f"{found}: loading a model may fail", fix)
    return ok("memory", found)
