"""What a user is told of a run that failed for want of memory, or of another rank: one sentence.

Error -> sentence, or None for a bug, which deserves its traceback.
"""

from __future__ import annotations

import os
import traceback

import torch
from torch import distributed

from harness.config.schema import Config
from harness.errors import GuardError
from harness.train.engine import wanted_world_size

GPU_MEMORY = ("out of memory", "ALLOC_FAILED")  # CUDA's, HIP's, cuBLAS's and cuDNN's words
MAIN_MEMORY = "can't allocate memory"  # of torch's allocator
# gloo raises RuntimeErrors that name its own file
CONNECTION = ("gloo/transport", "Connection closed by peer", "NCCL error")


def explain_failure(error: BaseException, config: Config | None, rank: str) -> str | None:
    """Returns the sentence for memory that is out or a rank that is gone. None: it is neither.

    Rank 0 alone asks the plan how large a micro-batch may be, which takes seconds.
    """
    if isinstance(error, GuardError):  # a sentence of ours, whatever words are in it
        return None
    text = " ".join(str(error).split())
    is_error_of_torch = isinstance(error, RuntimeError)
    on_gpu = isinstance(error, torch.OutOfMemoryError) or (
        is_error_of_torch and any(words in text for words in GPU_MEMORY)
    )
    if on_gpu or isinstance(error, MemoryError) or (is_error_of_torch and MAIN_MEMORY in text):
        memory = "GPU memory" if on_gpu else "main memory"
        return f"{memory} is out ({text[:120]}): {_advice(error, config, rank)}"
    is_lost = isinstance(error, distributed.DistError) or any(word in text for word in CONNECTION)
    if is_error_of_torch and is_lost:
        return (
            f"the connection to another rank broke, as when that has ended ({text[:160]}): go on "
            "with --resume auto"
        )
    return None


def _advice(error: BaseException, config: Config | None, rank: str) -> str:
    if config is None:
        return "a smaller model, or a larger machine"
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(os.path.join("harness", "evaluate") in name for name in frames):
        size = config.evaluation.batch_images
        return f"in the evaluation; lower evaluation.batch_images, which is {size}"
    now = f"train.micro_batch is {config.train.micro_batch}"
    plan = "`harness plan CONFIG` tells what fits and what else would help"
    if rank != "0":
        return f"{now}; {plan}"
    if smaller := _smaller(config):
        return f"{now}; by the plan {smaller} fits, with the same global_batch and result; {plan}"
    return f"{now}, and by the plan no smaller one fits; {plan}"


def _smaller(config: Config) -> int:
    """Returns the largest half, quarter ... of the micro-batch that fits by the plan; 0: none."""
    from harness.plan.plan import smaller_micro_batch

    return smaller_micro_batch(config, wanted_world_size())
