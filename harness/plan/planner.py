"""Memory, time and disk of a run before anything is loaded: does it fit, how long will it take,
what would make it fit.

Config, device, launch -> Plan. What a micro-batch holds is taken from the real model on fake
tensors (skeleton.py); the optimizer, ZeRO and the rest are sums here. Nothing is measured: every
figure is modelled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import yaml

from harness.config.schema import Config
from harness.machine.devices import FREE_SHARE, GIB, Device
from harness.machine.launcher import Launch, deepspeed_file
from harness.plan.report import Plan, gb, tightest

if TYPE_CHECKING:
    from harness.plan.skeleton import Pass, Skeleton
    from harness.plan.workload import Sizes, Workload

CUDA_CONTEXT = int(0.55 * GIB)  # and the workspace of cuBLAS, about
PROCESS = {
    True: int(2.5 * GIB),
    False: int(0.9 * GIB),
}  # Python, torch and its libraries; with CUDA's, without
MALLOC_KEEPS = (
    0.9  # of the tensors that a step holds at most, on a CPU: measured, see docs/scaling.md
)
WORKER = int(0.4 * GIB)  # a reading process
EVALUATION_FORWARDS = (
    4  # an evaluation answers with the image, twice without it and once more for the floor, about
)
TRIES = 5  # runs to find the largest micro-batch; the answer is always one that was run


def checkpoint_bytes(config: Config, trained: int) -> int:
    """Of all checkpoints that lie in the run's folder at once; `trained`: bytes of the trained
    weights.
    """
    # The weights and two moments of each; a new one is whole before an old one goes.
    return 3 * trained * (config.train.keep_checkpoints + 1)


@dataclass
class Planner:
    """One config on one device; changes of it are planners of their own. `encoder`: of features, in
    place of images.
    """

    config: Config
    device: Device
    launch: Launch
    processes: int
    work: Workload
    encoder: Mapping[str, Any] | None
    passes: dict[int, Pass] = field(default_factory=dict)

    def changed(self, same_model: bool = True, **changes: Any) -> Planner:
        """Another one; what was built already is used again where the model stays the same."""
        planner = replace(self, passes={}, **changes)
        if same_model:
            planner.skeleton = self.skeleton
        return planner

    @cached_property
    def skeleton(self) -> Skeleton:
        import torch

        from harness.machine.precision import choose
        from harness.plan.skeleton import Skeleton

        kind = torch.device("cuda" if self.device.is_gpu else "cpu")
        return Skeleton(
            self.config,
            choose(self.config.train.precision, kind, self.device.capability),
            self.encoder,
        )

    @cached_property
    def weights(self) -> dict[str, int]:
        from harness.plan.skeleton import weights

        return dict(weights(self.skeleton.model))

    @property
    def sizes(self) -> Sizes:
        """A partitioned model decodes all targets of a micro-batch at once."""
        return replace(self.work.sizes, lengths=()) if self.stage == 3 else self.work.sizes

    @property
    def images(self) -> int:
        """Of a micro-batch."""
        return min(self.config.train.micro_batch, self.share)

    @property
    def stage(self) -> int:
        return self.launch.zero_stage or 0

    @cached_property
    def zero(self) -> dict[str, Any]:
        """What the launch file's DeepSpeed JSON says of ZeRO."""
        if self.launch.zero_stage is None:
            return {}
        plugin = yaml.safe_load(self.launch.file.read_text()).get("deepspeed_config") or {}
        named = plugin.get("deepspeed_config_file")
        return (
            json.loads(deepspeed_file(named).read_text()).get("zero_optimization") or {}
            if named
            else {}
        )

    @property
    def share(self) -> int:
        """Images of a global batch that one process gets."""
        return -(-self.config.train.global_batch // self.processes)

    def run(self, images: int) -> Pass:
        if images not in self.passes:
            checkpointing = self.config.train.activation_checkpointing
            held = self.share > images or (self.processes > 1 and self.stage < 2)
            self.passes[images] = self.skeleton.run(
                self.sizes, images, checkpointing=checkpointing, gradients_held=held
            )
        return self.passes[images]

    def peak(self, images: int) -> tuple[dict[str, int], str]:
        """Bytes by part when they are most, and when that is."""
        world, trained = self.processes, self.skeleton.trained_bytes
        split = {
            stage: -(-trained // world) if self.stage >= stage else trained for stage in (1, 2, 3)
        }
        parts = (
            {"CUDA context": CUDA_CONTEXT} if self.device.is_gpu else {"process": PROCESS[False]}
        )
        bucket = int(self.zero.get("reduce_bucket_size", 5e8)) * 4 if self.stage else 0
        gathered = 0
        if self.stage == 3:
            whole = sum(self.weights.values())
            gathered = min(whole, int(self.zero.get("stage3_max_live_parameters", 1e9)) * 4)
            on_device = 0 if self.launch.offload_parameters else 1
            parts |= {name: on_device * -(-size // world) for name, size in self.weights.items()}
        else:
            parts |= self.weights
            bucket *= 1 + bool(self.zero.get("overlap_comm", False))
        # With ZeRO the optimizer works on a flat copy of its share of the weights.
        states = 0 if self.launch.offload_optimizer else split[1] * (3 if self.stage else 2)
        gradients = 0 if self.launch.offload_optimizer and self.stage >= 2 else split[2]
        parts["optimizer states"] = states
        micro = dict(self.run(images).peak)
        if self.stage >= 2:
            micro["gradients"] = gradients
        batch = {"images": "images in flight", "features": "features in flight"}
        micro[batch["features" if self.encoder else "images"]] = micro.pop("batch", 0)
        micro["optimizer and gather temporaries"] = bucket + gathered
        if not self.device.is_gpu:
            parts["kept by malloc"] = int(MALLOC_KEEPS * sum(micro.values()))
        # AdamW on a GPU takes the root of all second moments at once; on the CPU one tensor at a
        # time.
        root = split[1] if self.device.is_gpu else self.skeleton.largest_trained_bytes
        flat = split[1] if self.stage else 0  # gradients in the dtype and layout of the flat copy
        step = {"gradients": gradients, "optimizer and gather temporaries": root + flat}
        if self.launch.offload_optimizer:
            step = {"gradients": gradients}
        at_step = sum(step.values()) > sum(micro.values())
        return parts | (
            step if at_step else micro
        ), "optimizer step" if at_step else "forward and backward"

    def bytes(self, images: int) -> int:
        return sum(self.peak(images)[0].values())

    def host(self, images: int, peak: int) -> int:
        """Main memory of one machine: its processes, their readers and batches, and what is
        offloaded.
        """
        each = PROCESS[True] if self.device.is_gpu else peak
        workers = self.config.data.workers
        batch = self.run(images).peak.get("batch", 0) * -(-self.share // images)
        each += workers * (WORKER + self.config.data.prefetch * batch) + batch
        trained, world = self.skeleton.trained_bytes, self.processes
        if self.device.is_gpu and self.launch.offload_optimizer:
            each += 4 * -(-trained // world)  # weights, both moments, gradients
        if self.device.is_gpu and self.launch.offload_parameters:
            each += -(-sum(self.weights.values()) // world)
        if self.device.is_gpu:
            each += sum(self.weights.values())  # models are loaded in main memory, then moved
        return each * -(-world // self.launch.machines)

    def limits(self, images: int) -> dict[str, tuple[int, int]]:
        """Kind of memory -> (bytes needed, bytes usable); a CPU's is shared by all processes."""
        peak = self.bytes(images)
        host = self.host(images, peak)
        if not self.device.is_gpu:
            return {"main memory": (host, self.device.usable)}
        limits = {"GPU memory": (peak, self.device.usable)}
        if self.device.main_memory is not None:
            limits["main memory"] = (host, int(self.device.main_memory * FREE_SHARE))
        return limits

    def short_of(self, images: int) -> str | None:
        """The kind of memory that is missing most, or None where the run fits."""
        what, needed, limit = tightest(self.limits(images))
        return what if needed > limit else None

    def fits(self, images: int) -> bool:
        return self.short_of(images) is None

    @property
    def refused(self) -> str | None:
        """Why `harness train` would not start it on any number of bytes."""
        if self.launch.zero_stage is None or self.skeleton.precision.name != "fp16":
            return None
        return "DeepSpeed and fp16: take --launch multi_gpu (DDP), or a device with bf16"

    def largest(self) -> int:
        """The largest micro-batch that fits, 0 where none does: halving the interval, guided by the
        last two peaks.
        """
        low, high, images = 0, None, self.images
        for _ in range(TRIES):
            if self.fits(images):
                low = images
            else:
                high = images
            if high is not None and high - low <= 1:
                break
            images = self._next(low, high)
            if images <= low:
                break
        return low

    def _next(self, low: int, high: int | None) -> int:
        """Where the line through two peaks meets the memory, a little below; between `low` and
        `high`.
        """
        known = sorted(self.passes)
        first, last = (known[0], known[-1]) if len(known) > 1 else (0, known[0])
        if high is not None and len(known) > 1:  # the two that enclose it
            first, last = max(k for k in (0, *known) if k <= low), high
        what, need, usable = tightest(self.limits(last))
        before = self.limits(first)[what][0] if first else need - self.run(last).bytes
        slope = max((need - before) / (last - first), 1.0)
        guess = int(last + (usable - need) / slope)
        if high is None and first:
            return guess
        return max(low + 1, guess) if high is None else min(max(low + 1, guess), high - 1)

    def plan(self, brief: bool) -> Plan:
        train, device = self.config.train, self.device
        images = self.images
        parts, when = self.peak(images)
        peak, fits, skeleton, work = (
            sum(parts.values()),
            self.fits(images),
            self.skeleton,
            self.work,
        )
        refused = self.refused
        passed = self.run(images)
        flops = {name: count * train.global_batch / images for name, count in passed.flops.items()}
        speed = device.utilisation * 1e12 * self.processes
        seconds = sum(count / (device.teraflops(name) * speed) for name, count in flops.items())
        steps = evaluations = in_epoch = epoch_seconds = all_hours = None
        if work.images is not None:
            whole, rest = divmod(work.images, train.global_batch)
            in_epoch = whole + bool(rest and self.config.data.last_batch != "drop")
            steps = min(in_epoch * train.epochs, train.max_steps or in_epoch * train.epochs)
            evaluations = -(-steps // in_epoch) + (
                steps // train.evaluate_every if train.evaluate_every else 0
            )
            alone = (
                seconds * self.processes / train.global_batch / 3
            )  # a forward pass of an image, on one process
            evaluation = alone * EVALUATION_FORWARDS * (self.config.evaluation.dev_images or 5000)
            all_seconds = steps * seconds + evaluations * evaluation
            epoch_seconds, all_hours = all_seconds * in_epoch / steps, all_seconds / 3600
        ours = train.activation_checkpointing
        activations = {"checkpointed" if ours else "kept": passed.saved}
        if not brief:
            other = skeleton.run(
                self.sizes, images, checkpointing=not ours, gradients_held=False, backward=False
            )
            activations["kept" if ours else "checkpointed"] = other.saved
        launch = self.launch.name or ("multi_gpu" if self.processes > 1 else "")
        largest = None if brief and fits else self.largest()
        return Plan(
            device=device.name,
            processes=self.processes,
            launch=launch,
            precision=f"{skeleton.precision.name} ({skeleton.precision.reason})",
            fits=fits and not refused,
            refused=refused,
            limits=self.limits(images),
            usable_bytes=device.usable,
            peak_bytes=peak,
            host_bytes=self.host(images, peak),
            parts=parts,
            peak_is_in=when,
            parameters=skeleton.parameters,
            trained_parameters=skeleton.trained_parameters,
            micro_batch=images,
            largest_micro_batch=largest,
            activation_bytes=activations,
            logits_bytes=passed.logits,
            step_flops=int(sum(flops.values())),
            utilisation=device.utilisation,
            seconds_per_step=seconds,
            steps=steps,
            evaluations=evaluations,
            seconds_per_epoch=epoch_seconds,
            hours=all_hours,
            disk_bytes=checkpoint_bytes(self.config, skeleton.trained_bytes),
            notes=self.notes(passed),
        )

    def notes(self, passed: Pass) -> list[str]:
        sizes, weights, skeleton = self.work.sizes, self.weights, self.skeleton
        notes = [
            f"an image: {sizes.contexts:.1f} contexts of {sizes.prompt_tokens} prompt tokens, {sizes.targets:.1f} "
            f"targets of {sizes.target_tokens} tokens, {sizes.kept:.0%} of them not padding ({self.work.source})"
        ]
        if "LM 4-bit" in weights:
            packed = weights["LM 4-bit"] + weights["quantisation constants"]
            state = 4 * skeleton.trained_bridge_bytes
            saved = 8 * weights["LM 4-bit"] - packed
            verdict = "more" if state + passed.logits > saved else "less"
            notes.append(
                f"4 bits save {gb(saved)} of this language model's weights against fp32; the bridge's training state "
                f"({gb(state)}) and the logits ({gb(passed.logits)}) cost {verdict}, activations {gb(passed.saved)}"
            )
        if self.stage:
            notes.append("DeepSpeed's own buffers are taken from its settings, not from a run")
        return notes
