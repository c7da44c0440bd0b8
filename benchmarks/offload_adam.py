"""The optimizer's step on the CPU, as ZeRO offload takes it: torch's AdamW (plain, fused) against
DeepSpeedCPUAdam.

    python benchmarks/offload_adam.py --million 50

Prints one table. DeepSpeedCPUAdam is compiled first (a minute, once, g++ and ninja needed);
`harness` itself uses the fused AdamW of torch, which needs no compiler. The three take turns, so
that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import torch

from harness.report.pictures import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--million", type=int, default=50, help="parameters")
    parser.add_argument("--steps", type=int, default=7)
    given = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    kinds = {
        "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "torch AdamW, fused (used)": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        "DeepSpeedCPUAdam": lambda p: DeepSpeedCPUAdam(
            p, lr=1e-3, weight_decay=0.01, adamw_mode=True
        ),
    }
    torch.manual_seed(0)
    start, gradient = torch.randn(given.million * 10**6), torch.randn(given.million * 10**6)
    weights = {name: torch.nn.Parameter(start.clone()) for name in kinds}
    optimizers = {name: make([weights[name]]) for name, make in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(given.steps):
        for name, optimizer in optimizers.items():
            weights[name].grad = gradient.clone()
            began = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - began)
    medians = {
        name: statistics.median(times[1:]) for name, times in seconds.items()
    }  # the first makes the moments
    reference = weights["torch AdamW"].detach()
    rows = [
        (
            name,
            f"{median * 1e3:.0f}",
            f"{medians['torch AdamW'] / median:.2f}",
            f"{(weights[name].detach() - reference).abs().max():.1e}",
        )
        for name, median in medians.items()
    ]
    headers = (
        "optimizer",
        f"ms a step of {given.million} M parameters",
        "times as fast",
        "largest difference",
    )
    print(markdown_table(rows, headers))
    print(
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
