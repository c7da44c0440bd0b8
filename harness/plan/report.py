"""A plan as it is shown: what a run would need, as numbers, as a table for people and as a few
lines for its start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Plan:
    """What a run would need; bytes are of one process, but for `host_bytes` (all of one machine's)
    and `disk_bytes`.

    `parts` are the bytes at the peak and add up to `peak_bytes`. `seconds_per_epoch` is None where
    the shards are not there; evaluations are in it. `limits`: kind of memory -> (bytes needed,
    usable), all of which must hold. `refused`: why the run would not start, however much memory
    there is. `activation_bytes`: saved for the backward pass of a micro-batch, with and without
    activation checkpointing.
    """

    device: str
    processes: int
    launch: str
    precision: str
    fits: bool
    refused: str | None
    limits: dict[str, tuple[int, int]]
    usable_bytes: int
    peak_bytes: int
    host_bytes: int
    parts: dict[str, int]
    peak_is_in: str
    parameters: dict[str, int]
    trained_parameters: int
    micro_batch: int
    largest_micro_batch: int | None
    activation_bytes: dict[str, int]
    logits_bytes: int
    step_flops: int
    utilisation: float
    seconds_per_step: float
    steps: int | None
    evaluations: int | None
    seconds_per_epoch: float | None
    hours: float | None
    disk_bytes: int
    evaluation_bytes: int  # 0 where nothing is evaluated
    evaluation_parts: dict[str, int]
    calibration_bytes: int  # when the bridge's start values are taken
    advice: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    status: str = "modelled"

    @property
    def tightest(self) -> Tightest:
        return tightest(self.limits)

    @property
    def verdict(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        return "fits" if self.fits else "does not fit"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> list[str]:
        """Returns a few lines for the start of a run."""
        what, needed, limit = self.tightest
        many = (
            f", {self.processes} processes together"
            if what == "main memory" and self.processes > 1
            else ""
        )
        known = f" of {gb(self.limits['main memory'][1])}" if "main memory" in self.limits else ""
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:4]
        lines = [
            f"plan (modelled): {gb(needed)} of {gb(limit)} of {what} on {self.device}{many}: "
            f"{self.verdict}",
            "  most: " + ", ".join(f"{name} {gb(size)}" for name, size in largest),
            f"  needs {gb(self.host_bytes)}{known} of main memory, {gb(self.disk_bytes)} on disk "
            "for checkpoints",
        ]
        if self.hours is not None:
            lines.append(
                f"  {self.steps:,} steps, about {hours(self.hours)} at {self.utilisation:.0%} of "
                "the device's speed"
            )
        return lines + [f"  {sentence}" for sentence in (*self.warnings, *self.advice)]

    def _evaluated(self) -> str:
        names = ("KV cache", "logits", "kept by malloc")
        parts = {name: self.evaluation_parts.get(name, 0) for name in names}
        if not self.evaluation_bytes:
            return "- nothing is evaluated"
        most = ", ".join(f"{name} {gb(size)}" for name, size in parts.items() if size)
        return f"- an evaluation between steps: {gb(self.evaluation_bytes)} ({most})"

    def table(self) -> str:
        """Returns the whole plan for people, in Markdown."""
        rows = [f"| {name} | {gb(size)} |" for name, size in self.parts.items() if size]
        saved = {"kept": "", "checkpointed": " with activation checkpointing"}
        activations = [
            f"{gb(size)}{saved[name]}" for name, size in sorted(self.activation_bytes.items())[::-1]
        ]
        time = "the shards are not there: build them to see hours"
        if self.hours is not None and self.seconds_per_epoch is not None:
            time = (
                f"{self.steps:,} steps of {self.seconds_per_step:.2f} s, {self.evaluations} "
                f"evaluations: {hours(self.seconds_per_epoch / 3600)} an epoch, "
                f"{hours(self.hours)} in all"
            )
        parameters = [f"{name} {count / 1e6:.1f} M" for name, count in self.parameters.items()]
        largest = {0: "none fits", None: "not looked for"}.get(
            self.largest_micro_batch, self.largest_micro_batch
        )
        launched = f" by {self.launch}" if self.launch else ""
        lines = [
            f"{self.device}, {self.processes} process{'es' * (self.processes > 1)}{launched}, "
            f"{self.precision}; all figures are {self.status}, none was measured",
            "",
            f"| part (at the peak: {self.peak_is_in}) | GB |",
            "|---|---|",
            *rows,
            f"| **peak** of a process | **{gb(self.peak_bytes)}** |",
            *(
                f"| {what}, of {gb(limit)} | {gb(needed)} |"
                for what, (needed, limit) in self.limits.items()
            ),
            f"| **{self.tightest[0]}** decides | **{self.verdict}** |",
            "",
            f"- parameters: {', '.join(parameters)}; "
            f"{self.trained_parameters / 1e6:.1f} M of them are trained",
            f"- activations of a micro-batch of {self.micro_batch}: {', '.join(activations)}; "
            f"logits {gb(self.logits_bytes)}",
            f"- largest micro-batch: {largest}",
            self._evaluated(),
            f"- the bridge's start values, from the first images: {gb(self.calibration_bytes)}",
            f"- needs {gb(self.host_bytes)} of main memory, all processes of a machine together; "
            f"checkpoints on disk: {gb(self.disk_bytes)}",
            f"- time: {time}; {self.step_flops / 1e12:.3g} TFLOP a step, {self.utilisation:.0%} of "
            "the device's speed assumed",
        ]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(
            lines + [f"- **{sentence}**" for sentence in (*self.warnings, *self.advice)]
        )


class Tightest(NamedTuple):
    """The kind of memory of which the largest share is needed."""

    what: str
    needed: int  # bytes
    limit: int


def tightest(limits: Mapping[str, tuple[int, int]]) -> Tightest:
    """Returns it of (bytes needed, bytes usable) by kind."""
    what = max(limits, key=lambda kind: limits[kind][0] / limits[kind][1])
    return Tightest(what, *limits[what])


def hours(count: float) -> str:
    return f"{count:.1f} h" if count >= 1 else f"{count * 60:.0f} min"


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
