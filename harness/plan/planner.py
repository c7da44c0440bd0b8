"""Memory, time and disk of a run before anything is loaded: does it fit, how long will it take,
what would make it fit.

Config, device, launch -> Plan. What a micro-batch holds is taken from the real model on fake
tensors (skeleton.py); the optimizer, ZeRO and the rest are sums here. Nothing is measured: every
figure is modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from harness.config.schema import Config
from harness.machine.devices import FREE_SHARE, GIB, Device
from harness.machine.launch_file import NO_ZERO_FOR_A_FIRST_STAGE, Launch
from harness.plan.report import Plan, gb, tightest

if TYPE_CHECKING:
    from harness.plan.skeleton import Pass, Skeleton
    from harness.plan.workload import Sizes, Workload

CUDA_CONTEXT = int(0.55 * GIB)  # and the workspace of cuBLAS, about
# Python, torch and its libraries: with CUDA's (True), without
PROCESS = {True: int(2.5 * GIB), False: int(0.9 * GIB)}
# of the tensors that a step holds at most, on a CPU: measured, see docs/scaling.md
MALLOC_KEEPS = 0.9
WORKER = int(0.4 * GIB)  # a reading process
# An evaluation answers with the image, twice without it and once more for the floor, about.
EVALUATION_FORWARDS = 4
NEAR = 32  # the first step away from an estimated micro-batch is this part of it
DOUBT = 0.01  # of a limit: so near to it a micro-batch is run, and not reckoned from others
EXACT_BELOW = 64  # images: a larger micro-batch is found to one part in as many


def checkpoint_bytes(config: Config, trained: int) -> int:
    """Returns the bytes of all checkpoints that lie in the run's folder at once; `trained`: bytes
    of the trained weights.
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
        """Returns another planner; what was built is used again where the model stays the same."""
        planner = replace(self, passes={}, **changes)
        if same_model:
            planner.skeleton = self.skeleton
        return planner

    @cached_property
    def skeleton(self) -> Skeleton:
        from harness.plan.skeleton import Skeleton

        return Skeleton.planned_for(self.device, self.config, self.encoder)

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
        """Images of a micro-batch."""
        return min(self.config.train.micro_batch, self.share)

    @property
    def stage(self) -> int:
        return self.launch.zero_stage or 0

    @cached_property
    def zero(self) -> dict[str, Any]:
        """What the launch file says of ZeRO."""
        return self.launch.deepspeed.zero if self.launch.deepspeed else {}

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

    @property
    def _split(self) -> dict[int, int]:
        """ZeRO's stage that divides -> the bytes that one process has of what it divides: optimizer
        states, gradients, weights.
        """
        trained = self.skeleton.trained_bytes
        share = -(-trained // self.processes)
        return {stage: share if self.stage >= stage else trained for stage in (1, 2, 3)}

    def _resident(self) -> dict[str, int]:
        """Returns the bytes by part that are there from one step to the next."""
        parts = (
            {"CUDA context": CUDA_CONTEXT} if self.device.is_gpu else {"process": PROCESS[False]}
        )
        if self.stage == 3:
            on_device = 0 if self.launch.offload_parameters else 1
            many = self.processes
            parts |= {name: on_device * -(-size // many) for name, size in self.weights.items()}
        else:
            parts |= self.weights
        # With ZeRO the optimizer works on a flat copy of its share of the weights.
        copies = 3 if self.stage else 2
        states = 0 if self.launch.offload_optimizer else self._split[1] * copies
        return parts | {"optimizer states": states}

    def peak(self, images: int) -> tuple[dict[str, int], str]:
        """Returns the bytes by part when they are most, and when that is."""
        split = self._split
        parts = self._resident()
        bucket = int(self.zero.get("reduce_bucket_size", 5e8)) * 4 if self.stage else 0
        gathered = 0
        if self.stage == 3:
            whole = sum(self.weights.values())
            gathered = min(whole, int(self.zero.get("stage3_max_live_parameters", 1e9)) * 4)
        else:
            bucket *= 1 + bool(self.zero.get("overlap_comm", False))
        gradients = 0 if self.launch.offload_optimizer and self.stage >= 2 else split[2]
        micro = dict(self.run(images).peak)
        if self.stage >= 2:
            micro["gradients"] = gradients
        batch = {"images": "images in flight", "features": "features in flight"}
        micro[batch["features" if self.encoder else "images"]] = micro.pop("batch", 0)
        micro["optimizer and gather temporaries"] = bucket + gathered
        if not self.device.is_gpu:
            parts["kept by malloc"] = int(MALLOC_KEEPS * sum(micro.values()))
        # AdamW's fused kernel on a GPU keeps nothing aside; on the CPU one tensor's root.
        root = 0 if self.device.is_gpu else self.skeleton.largest_trained_bytes
        flat = split[1] if self.stage else 0  # gradients in the dtype and layout of the flat copy
        step = {"gradients": gradients, "optimizer and gather temporaries": root + flat}
        if self.launch.offload_optimizer:
            step = {"gradients": gradients}
        at_step = sum(step.values()) > sum(micro.values())
        return parts | (
            step if at_step else micro
        ), "optimizer step" if at_step else "forward and backward"

    def beside(self, held: dict[str, int]) -> dict[str, int]:
        """Returns what a model without gradients holds, beside what is there all the time: for it a
        partitioned model is gathered on each device, whole (`Engine.gathered_weights`).
        """
        parts = self._resident()
        if self.stage == 3:
            share = sum(parts[name] for name in self.weights)
            parts |= self.weights | {"own share of the weights": share}
        if not self.device.is_gpu:
            held = held | {"kept by malloc": int(MALLOC_KEEPS * sum(held.values()))}
        return parts | held

    @cached_property
    def evaluation(self) -> dict[str, int]:
        """The bytes by part when an evaluation holds most; {} where there is none."""
        return self.evaluation_of(self.config.evaluation.batch_images)

    def evaluation_of(self, batch_images: int) -> dict[str, int]:
        """Returns the same of so many images at a time."""
        from harness.plan.answering import evaluation_held

        held = evaluation_held(self.skeleton, self.work, self.config, batch_images)
        return self.beside(held) if held else {}

    @cached_property
    def calibration(self) -> dict[str, int]:
        """The bytes by part when the bridge's start values hold most: there is no optimizer yet."""
        from harness.plan.answering import calibration_held

        held = calibration_held(self.skeleton, self.work, self.config)
        return self.beside(held) | {"optimizer states": 0}

    def bytes(self, images: int) -> int:
        return sum(self.peak(images)[0].values())

    def host(self, images: int, peak: int) -> int:
        """Returns the main memory that one machine needs: its processes, their readers and batches,
        and what is offloaded.
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

    def limits(self, images: int, at_least: int = 0) -> dict[str, tuple[int, int]]:
        """Returns, by kind of memory, (bytes needed, bytes usable); all processes share a CPU's.
        `at_least`: bytes that a process needs whatever the size of a micro-batch.
        """
        peak = max(self.bytes(images), at_least)
        host = self.host(images, peak)
        if not self.device.is_gpu:
            return {"main memory": (host, self.device.usable)}
        limits = {"GPU memory": (peak, self.device.usable)}
        if self.device.main_memory is not None:
            limits["main memory"] = (host, int(self.device.main_memory * FREE_SHARE))
        return limits

    def short_of(self, images: int) -> str | None:
        """Returns the kind of memory that is missing most, or None where the run fits."""
        worst = tightest(self.limits(images))
        return worst.what if worst.needed > worst.limit else None

    def fits(self, images: int) -> bool:
        """Returns whether the steps do: an evaluation does not depend on the micro-batch."""
        return self.short_of(images) is None

    def fits_whole(self, images: int) -> bool:
        """Returns whether the run does, its evaluations and the bridge's start values included."""
        worst = tightest(self.limits(images, self.without_gradients))
        return worst.needed <= worst.limit

    @property
    def without_gradients(self) -> int:
        """Bytes of an evaluation, or of the bridge's start values where these need more."""
        return max(sum(self.evaluation.values()), sum(self.calibration.values()))

    @property
    def refused(self) -> str | None:
        """Why `harness train` would not start it on any number of bytes."""
        if self.config.train.objective and self.launch.zero_stage is not None:
            return NO_ZERO_FOR_A_FIRST_STAGE
        if self.stage == 3 and self.config.train.compile:
            return "train.compile and ZeRO-3: set train.compile=false, or take ZeRO-2"
        if self.launch.zero_stage is None or self.skeleton.precision.name != "fp16":
            return None
        return "DeepSpeed and fp16: take --launch multi_gpu (DDP), or a device with bf16"

    def largest(self) -> int:
        """Returns the largest micro-batch that fits, 0 where none does: steps that double around an
        estimate until it is enclosed, then halving.
        """
        fits = self.fits(self.images)
        low = self.images if fits else 0
        high = None if fits else self.images
        images = self._estimate()
        step = max(1, images // NEAR)
        while high is None or high - low > 1 + low // EXACT_BELOW:
            images = max(images, low + 1)
            if high is not None:
                images = min(images, high - 1)
            reckoned = self._on_the_line(images)
            if self.fits(images) if reckoned is None else reckoned:
                low = images
                images += step
                if high is not None:
                    images = min(images, (low + high) // 2)
            else:
                high = images
                images = max(images - step, (low + high) // 2)
            step *= 2
        return low

    def _on_the_line(self, images: int) -> bool | None:
        """Returns whether a micro-batch fits, by the line through the two nearest that were run;
        None where it is further from them than they are from each other, or within `DOUBT` of the
        limit.
        """
        known = sorted(self.passes, key=lambda run: abs(run - images))[:2]
        if images in known or len(known) < 2 or abs(known[0] - images) > abs(known[1] - known[0]):
            return None
        near, far = (self.limits(run) for run in known)
        steps = (images - known[0]) / (known[0] - known[1])
        shares = [
            (needed + (needed - far[kind][0]) * steps) / limit
            for kind, (needed, limit) in near.items()
        ]
        return None if abs(max(shares) - 1) < DOUBT else max(shares) < 1

    def _estimate(self) -> int:
        """Returns where memory would be full if a micro-batch's bytes grew as its images do."""
        worst = tightest(self.limits(self.images))
        each = max(self.run(self.images).bytes / self.images, 1.0)
        return int(self.images + (worst.limit - worst.needed) / each)

    def plan(self, brief: bool) -> Plan:
        """Returns the plan; `brief` leaves out the other way of checkpointing, and the largest
        micro-batch where this one fits.
        """
        train = self.config.train
        images = self.images
        peak = self.peak(images)
        parts = peak[0]
        limits = self.limits(images, self.without_gradients)
        fits = self.fits_whole(images)
        refused = self.refused
        skeleton = self.skeleton
        passed = self.run(images)
        flops = {name: count * train.global_batch / images for name, count in passed.flops.items()}
        return Plan(
            device=self.device.name,
            processes=self.processes,
            launch=self.launch.name or ("multi_gpu" if self.processes > 1 else ""),
            precision=f"{skeleton.precision.name} ({skeleton.precision.reason})",
            fits=fits and not refused,
            refused=refused,
            limits=limits,
            usable_bytes=self.device.usable,
            peak_bytes=sum(parts.values()),
            host_bytes=self.host(images, max(sum(parts.values()), self.without_gradients)),
            parts=parts,
            peak_is_in=peak[1],
            evaluation_bytes=sum(self.evaluation.values()),
            evaluation_parts=self.evaluation,
            calibration_bytes=sum(self.calibration.values()),
            parameters=skeleton.parameters,
            trained_parameters=skeleton.trained_parameters,
            micro_batch=images,
            largest_micro_batch=None if brief and fits else self.largest(),
            activation_bytes=self._activations(passed, brief),
            logits_bytes=passed.logits,
            step_flops=int(sum(flops.values())),
            utilisation=self.device.utilisation,
            disk_bytes=checkpoint_bytes(self.config, skeleton.trained_bytes),
            notes=self.notes(passed),
            **self._time(flops),
        )

    def _activations(self, passed: Pass, brief: bool) -> dict[str, int]:
        """Returns the bytes saved for the backward pass, as configured and the other way."""
        ours = self.config.train.activation_checkpointing
        saved = {"checkpointed" if ours else "kept": passed.saved}
        if not brief:
            other = self.skeleton.run(
                self.sizes,
                self.images,
                checkpointing=not ours,
                gradients_held=False,
                backward=False,
            )
            saved["kept" if ours else "checkpointed"] = other.saved
        return saved

    def _time(self, flops: Mapping[str, float]) -> dict[str, Any]:
        """Returns the fields of a plan that tell its time, from the operations of a step by dtype;
        all but the step's are None where the shards are not there.
        """
        train = self.config.train
        speed = self.device.utilisation * 1e12 * self.processes
        seconds = sum(
            count / (self.device.teraflops(name) * speed) for name, count in flops.items()
        )
        steps = evaluations = epoch_seconds = hours = None
        if self.work.images is not None:
            in_epoch = self.work.images // train.global_batch
            if self.work.images % train.global_batch and self.config.data.last_batch != "drop":
                in_epoch += 1
            steps = min(in_epoch * train.epochs, train.max_steps or in_epoch * train.epochs)
            evaluations = -(-steps // in_epoch)
            if train.evaluate_every:
                evaluations += steps // train.evaluate_every
            # a forward pass of an image, on one process
            alone = seconds * self.processes / train.global_batch / 3
            evaluation = alone * EVALUATION_FORWARDS * (self.config.evaluation.dev_images or 5000)
            all_seconds = steps * seconds + evaluations * evaluation
            epoch_seconds = all_seconds * in_epoch / steps
            hours = all_seconds / 3600
        return {
            "seconds_per_step": seconds,
            "steps": steps,
            "evaluations": evaluations,
            "seconds_per_epoch": epoch_seconds,
            "hours": hours,
        }

    def notes(self, passed: Pass) -> list[str]:
        sizes = self.work.sizes
        weights = self.weights
        skeleton = self.skeleton
        notes = [
            f"an image: {sizes.contexts:.1f} contexts of {sizes.prompt_tokens} prompt tokens, "
            f"{sizes.targets:.1f} targets of {sizes.target_tokens} tokens, {sizes.kept:.0%} of "
            f"them not padding ({self.work.source})",
            *skeleton.notes,
        ]
        if self.config.train.objective:
            notes.append(
                "a first stage: the similarities of the whole global batch and its patch tokens "
                "are not counted, nor the first of its two passes"
            )
        if "LM 4-bit" in weights:
            packed = weights["LM 4-bit"] + weights["quantisation constants"]
            state = 4 * skeleton.trained_bridge_bytes
            saved = 8 * weights["LM 4-bit"] - packed
            verdict = "more" if state + passed.logits > saved else "less"
            notes.append(
                f"4 bits save {gb(saved)} of this language model's weights against fp32; the "
                f"bridge's training state ({gb(state)}) and the logits ({gb(passed.logits)}) cost "
                f"{verdict}, activations {gb(passed.saved)}"
            )
        if self.stage:
            notes.append("DeepSpeed's own buffers are taken from its settings, not from a run")
        return notes
