"""Memory and time of an evaluation that several processes share, before anything is loaded.

Planner, number of texts -> EvaluationPlan. Operations are counted on fake tensors (skeleton.py):
encoder and bridge once an image, the language model twice a text (its loss and its answer) and once
more for every word of each beam. Nothing is measured: every figure is modelled.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness.config.schema import Config
from harness.machine import devices
from harness.machine.launch_file import Launch
from harness.plan.answering import Evaluated
from harness.plan.planner import Planner
from harness.plan.report import gb, hours
from harness.plan.workload import TEXTS_UNKNOWN, Sizes, workload

# Seconds that the host needs for one word through one layer of the decoder, however few numbers are
# multiplied: some 40 kernels are launched (an assumption, not a measurement).
LAYER_STEP = {True: 0.5e-3, False: 0.0}
GATE_PASSES = 3  # over the gate's texts: other pictures twice, and none, blank or noise about once


@dataclass(frozen=True)
class EvaluationPlan:
    """What an evaluation would need; bytes are of one process, all but `seconds` of statistics,
    which rank 0 makes alone and which are not modelled.
    """

    device: str
    processes: int
    images: int
    texts: int
    batches: int  # of evaluation.batch_images; the most that one process answers is `rounds`
    rounds: int
    seconds: float
    host_bound: float  # share of the time in which the device waits for the host
    parts: dict[str, int]
    usable_bytes: int
    source: str  # of the texts' lengths
    status: str = "modelled"

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes, "fits": self.fits}

    def table(self) -> str:
        """Returns it for people, in Markdown."""
        rows = [f"| {name} | {gb(size)} |" for name, size in self.parts.items() if size]
        verdict = "fits" if self.fits else "does not fit"
        return "\n".join(
            [
                f"{self.device}, {self.processes} process{'es' * (self.processes > 1)}: an "
                f"evaluation of {self.texts:,} texts of {self.images:,} images; all figures are "
                f"{self.status}, none was measured",
                "",
                "| part | GB |",
                "|---|---|",
                *rows,
                f"| **peak** of a process, of {gb(self.usable_bytes)}: **{verdict}** | "
                f"**{gb(self.peak_bytes)}** |",
                "",
                f"- time: {hours(self.seconds / 3600)}; {self.batches:,} batches, at most "
                f"{self.rounds:,} for each process; {self.host_bound:.0%} of it the device waits "
                "for the host; scores and statistics, which the first process makes, not counted",
                f"- lengths: {self.source}",
            ]
        )


def plan_evaluation(
    config: Config,
    texts: int,
    device: str = "here",
    processes: int | None = None,
    launch: Launch | None = None,
) -> EvaluationPlan:
    """Returns the plan for a device by name. Raises ConfigError as `plan` does."""
    launch = launch or Launch()
    found = devices.device("cpu" if device == "here" and launch.cpu else device)
    work = workload(config)
    planner = Planner(config, found, launch, processes or launch.processes or 1, work, work.encoder)
    an_image = TEXTS_UNKNOWN if work.images is None else max(1.0, work.sizes.contexts)
    images = max(1, round(texts / an_image))
    sizes = replace(work.sizes, contexts=texts / images, kept=1.0, lengths=())
    batch = min(images, config.evaluation.batch_images)
    seconds = _seconds(planner, sizes, batch)
    compute, host = seconds
    batches = -(-images // batch)
    world = planner.processes
    gate = min(texts, config.evaluation.counterfactual_texts) / (batch * sizes.contexts)
    rounds = -(-batches // world)
    held = Evaluated(planner.skeleton, sizes, batch, config.generate.vqa)
    passes = rounds + -(-GATE_PASSES * gate // world)
    return EvaluationPlan(
        device=found.name,
        processes=world,
        images=images,
        texts=texts,
        batches=batches,
        rounds=rounds,
        seconds=passes * (compute + host),
        host_bound=host / (compute + host),
        parts=planner.beside(held.bytes()) | {"optimizer states": 0},
        usable_bytes=found.usable if found.is_gpu else found.usable // world,
        source=work.source,
    )


def _seconds(planner: Planner, sizes: Sizes, images: int) -> tuple[float, float]:
    """Returns the seconds of a batch's operations, and those in which the device waits for the
    host.
    """
    skeleton = planner.skeleton
    long = replace(sizes, target_tokens=2 * sizes.target_tokens)
    seen = Counter(skeleton.forward(sizes, images, of_images_alone=True).flops)
    lost = Counter(skeleton.forward(sizes, images).flops)
    more = Counter(skeleton.forward(long, images).flops)
    more.subtract(lost)  # of the decoder, for as many more words
    told = images * sizes.targets * sizes.target_tokens
    decoding = planner.config.generate.vqa
    said = images * sizes.contexts * (1 + decoding.beams * decoding.max_new_tokens)
    speed = planner.device.utilisation * 1e12
    seconds = 0.0
    for dtype, count in lost.items():
        read = count - seen[dtype] - more[dtype]  # the language model's reading of each text
        spoken = more[dtype] * said / told
        seconds += (count + read + spoken) / (planner.device.teraflops(dtype) * speed)
    steps = decoding.max_new_tokens * skeleton.decoder_layers
    return seconds, steps * LAYER_STEP[planner.device.is_gpu]
