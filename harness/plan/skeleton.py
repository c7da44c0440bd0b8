"""The model without its weights, and one micro-batch through it: real classes, real forward and
backward, fake tensors.

Config -> skeleton -> Pass: what a step holds in memory when it holds most, and its floating-point
operations. Tensors have shapes, dtypes and lifetimes, and no content. Legend: I images, C contexts,
T targets, L tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from harness.config.schema import Config
from harness.errors import ConfigError
from harness.loading import model_class
from harness.machine.devices import Device
from harness.machine.precision import Precision, choose
from harness.model.batch import MADE_FROM, Batch, TargetIndex, TargetRows
from harness.model.language.quantise import quantised_layers
from harness.model.packing import Packed
from harness.model.vlm import VisionLanguageModel
from harness.plan.facts import located
from harness.plan.workload import Sizes

EMBEDDINGS = (
    *("shared.weight", "lm_head.weight", "wte.weight", "wpe.weight"),
    *("embed_tokens.weight", "embed_positions.weight"),
)
ALLOCATED = 512  # bytes: CUDA's caching allocator rounds every tensor up to a multiple of this
aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default
# The most frequent operations, of those that give one tensor and look at shapes and dtypes alone.
DIRECT = {
    aten._to_copy.default,
    aten._unsafe_view.default,
    aten.add_.Tensor,
    aten.cat.default,
    aten.clone.default,
    aten.detach.default,
    aten.expand.default,
    aten.gather.default,
    aten.gelu.default,
    aten.gelu_backward.default,
    aten.index_add.default,
    aten.index_select.default,
    aten.mean.dim,
    aten.mm.default,
    aten.new_empty.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.sum.dim_IntList,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten.where.self,
}
# They give a tensor like the largest that they take, where all are of one dtype.
POINTWISE = {
    aten.add.Tensor,
    aten.div.Scalar,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.pow.Tensor_Scalar,
    aten.rsqrt.default,
}
# The CPU's attention kernels are not in torch's table.
FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)
    ),
}


@dataclass(frozen=True)
class Pass:
    """One micro-batch forward and backward. `peak`: bytes by kind at the moment when they are most
    in all.

    The kinds: "batch" (images or features, and texts), "activations" (saved for the backward pass),
    "logits" (all tensors as wide as the vocabulary), "gradients", "temporaries". `saved`: bytes of
    all saved tensors at the end of the forward pass, of parameters not counted. `logits`: the most
    there are of them. `flops`: by the dtype of what is multiplied, forward and backward.
    """

    peak: Mapping[str, int]
    saved: int
    logits: int
    flops: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.peak.values())


class Skeleton:
    """`model` lives on fake CPU tensors whatever the device planned for: autograd needs no CUDA,
    and shapes are equal.

    `precision` is the policy of the device planned for. Raises ConfigError for models whose
    config.json is nowhere. `notes` tell by whose facts it was built.
    """

    notes: tuple[str, ...] = ()

    @classmethod
    def planned_for(
        cls, device: Device, config: Config, encoder: Mapping[str, Any] | None
    ) -> Skeleton:
        """Returns the skeleton with the policy of a device."""
        kind = torch.device("cuda" if device.is_gpu else "cpu")
        found = located(config, with_vision=not encoder)
        try:
            precision = choose(config.train.precision, kind, device.capability)
            skeleton = cls(found.config, precision, encoder)
        except ConfigError as error:
            raise found.by_id(error) from error
        skeleton.notes = found.notes
        return skeleton

    def __init__(
        self, config: Config, precision: Precision, encoder: Mapping[str, Any] | None = None
    ):
        self.precision, self.on_gpu = precision, precision.device_type == "cuda"
        self.mode = FakeTensorMode()
        with _no_collection(), torch.device("meta"):
            self.model = model_class(config).build(
                config, encoder, precision=replace(precision, device_type="cpu"), device="meta"
            )
        with _no_collection(), self.mode:
            _materialise(self.model)
        if self.on_gpu:
            for module in self.model.modules():
                # CUDA's autocast computes these in fp32, the CPU's does not.
                if isinstance(module, nn.LayerNorm):
                    module.register_forward_pre_hook(
                        lambda _, inputs: tuple(x.float() for x in inputs)
                    )
        self.encoder = self.model.config.encoder
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.trained = list(trained.values())
        self.trained_parameters = sum(p.numel() for p in self.trained)
        self.trained_bytes = sum(map(_bytes, self.trained))
        self.trained_bridge_bytes = sum(
            _bytes(p) for name, p in trained.items() if name.startswith("bridge.")
        )
        self.largest_trained_bytes = max(map(_bytes, self.trained), default=0)

    @property
    def parameters(self) -> dict[str, int]:
        """Returns how many weights each part has; two of a 4-bit layer's share a byte."""
        packed = {id(layer.weight) for layer in quantised_layers(self.model)}
        return {
            name: sum(p.numel() * (1 + (id(p) in packed)) for p in part.parameters())
            for name, part in self.model.parts.items()
        }

    def run(
        self,
        sizes: Sizes,
        images: int,
        *,
        checkpointing: bool,
        gradients_held: bool,
        backward: bool = True,
    ) -> Pass:
        """Runs one micro-batch. `gradients_held`: those of earlier micro-batches, or of DDP's
        buckets, are there already.

        Without `backward`, `saved` alone is whole.
        """
        self._checkpoint(checkpointing)
        with self.mode:
            batch = self._batch(sizes, images)
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter) if gradients_held else None
            meter = self._meter(batch)
            meter.add([p.grad for p in self.trained if p.grad is not None], "gradients")
            hooks = [p.register_post_accumulate_grad_hook(meter.gradient) for p in self.trained]
            with _no_collection(), meter:
                with saved_tensors_hooks(meter.saving, lambda tensor: tensor):
                    loss = self.model(batch).sum
                saved = meter.saved
                if backward and loss.requires_grad:
                    loss.backward()
            for hook in hooks:
                hook.remove()
            for parameter in self.trained:
                parameter.grad = None
        return Pass(meter.peak, saved, meter.logits, dict(meter.flops))

    @torch.no_grad()
    def forward(self, sizes: Sizes, images: int, of_images_alone: bool = False) -> Pass:
        """Runs a batch forward, as an evaluation does; `of_images_alone`: encoder and bridge."""
        self._checkpoint(False)
        with self.mode:
            batch = self._batch(sizes, images)
            meter = self._meter(batch)
            run = self.model.bridge_tokens if of_images_alone else self.model
            with _no_collection(), meter:
                run(batch)
        return Pass(meter.peak, 0, meter.logits, dict(meter.flops))

    @property
    def decoder_layers(self) -> int:
        """Layers that a word of an answer passes."""
        config: Any = self.model.lm.base.config
        return getattr(config, "num_decoder_layers", None) or config.num_hidden_layers

    def calibrated(self, sizes: Sizes, images: int, micro_batch: int) -> Mapping[str, int]:
        """Returns the bytes by kind when the bridge's start values, taken from so many images, hold
        most.
        """
        with self.mode, torch.no_grad():
            batch = self._batch(sizes, images)
            few = self._batch(sizes, min(micro_batch, images))
            with _no_collection(), self._meter(batch) as meter:
                encoded = self.model.patch_tokens(few)  # the others are of the same size
                patches_IPD = torch.cat([encoded] * -(-images // few.images))[:images]
                self.model.bridge.calibrate(*self.model.bridge_inputs(batch, patches_IPD))
        return meter.peak

    def _checkpoint(self, checkpointing: bool) -> None:
        """Switches activation checkpointing on or off; a first stage has none."""
        if self.model.config.objective:
            return
        lm: Any = self.model.lm.base  # the method's name changed in transformers 5
        (
            getattr(lm, "activation_checkpointing_disable", None)
            or lm.gradient_checkpointing_disable
        )()
        self.model.checkpoints_bridge = False
        with suppress(AttributeError):  # where it was never on
            lm.disable_input_require_grads()
        if checkpointing:
            self.model.checkpoint_activations()

    def _batch(self, sizes: Sizes, images: int) -> Batch:
        features = self.model.vision is None
        batch = make_batch(sizes, images, self.encoder, features, self.on_gpu)
        lm = self.model.lm
        begins = lm.begins is not None and lm.bos_in_training
        return replace(batch, packs=True, begins=begins, index=_index(sizes, images, batch))

    def _meter(self, batch: Batch) -> _Meter:
        """Returns a meter that has counted the batch already."""
        meter = _Meter(self.mode, self.model, ALLOCATED if self.on_gpu else 1)
        meter.add(tensors_of(batch), "batch")
        return meter


def weights(model: VisionLanguageModel) -> Counter[str]:
    """Returns the bytes of parameters and buffers by part, of a real model or a skeleton; a tensor
    that is shared counts once.
    """
    parts: Counter[str] = Counter()
    packed = {id(layer.weight): layer for layer in quantised_layers(model)}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts[_part(name, id(tensor) in packed)] += _bytes(tensor)
    if packed:
        parts["quantisation constants"] = sum(map(_constants, packed.values()))
    return parts


def _part(name: str, packed: bool) -> str:
    if packed:
        return "LM 4-bit"
    if name.startswith("vision."):
        return "encoder"
    if name.startswith("bridge."):
        return "projection" if name.startswith("bridge.projection.") else "Q-Former"
    if ".lora_" in name:
        return "LoRA"
    return "embeddings and lm_head" if name.endswith(EMBEDDINGS) else "LM other"


def _constants(layer: Any) -> int:
    """Returns the bytes that NF4 with double quantisation keeps beside a layer's weights: a byte a
    block of 64 weights, a float for 256 of these, an offset, 2 codes.
    """
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        blocks = -(-layer.in_features * layer.out_features // 64)
        return blocks + 4 * (-(-blocks // 256)) + 4 + 4 * 16 + 4 * 256
    tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return sum(map(_bytes, tensors))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Switches off Python's garbage collector, whose moments are chance: equal runs give equal
    bytes, and sooner.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def make_batch(
    sizes: Sizes, images: int, encoder: Mapping[str, Any], features: bool, on_gpu: bool
) -> Batch:
    """Returns a batch of these sizes as the collator lays it out, on the current default device."""
    contexts = max(1, round(images * sizes.contexts))
    targets = max(1, round(images * sizes.targets))
    pixels_IHW3 = torch.zeros(
        images, encoder["image_size"], encoder["image_size"], 3, dtype=torch.uint8
    )
    labels_TL = torch.ones(targets, sizes.target_tokens, dtype=torch.long)
    prompt_ids_CL = torch.ones(contexts, sizes.prompt_tokens, dtype=torch.long)
    return Batch(
        prompt_ids_CL=prompt_ids_CL,
        prompt_mask_CL=torch.ones_like(prompt_ids_CL, dtype=torch.bool),
        image_of_C=torch.arange(contexts) * images // contexts,
        labels_TL=labels_TL,
        weight_TL=torch.ones_like(labels_TL, dtype=torch.float),
        context_of_T=torch.arange(targets) * contexts // targets,
        pixels_IHW3=None if features else pixels_IHW3,
        features_IPD=torch.zeros(images, encoder["tokens"], encoder["width"], dtype=torch.half)
        if features
        else None,
        groups=sizes.groups(targets, on_gpu),
    )


def _index(sizes: Sizes, images: int, batch: Batch) -> TargetIndex:
    """Returns the index of a batch of fake tensors, whose own have no content to make it from."""
    whole = batch.labels_TL.numel()
    positions = sum(len(rows) * longest for rows, longest in batch.groups) or whole
    share = min(1.0, sizes.kept * whole / positions)  # of the positions of a group
    length = batch.labels_TL.shape[1]
    groups = batch.groups if len(batch.groups) > 1 else ()
    made = []
    for count, longest in ((len(batch.labels_TL), length), *((len(g), n) for g, n in groups)):
        kept_K = torch.zeros(max(1, math.ceil(count * longest * share)), dtype=torch.long)
        made.append(TargetRows(torch.zeros(count, dtype=torch.long), longest, kept_K, kept_K + 0))
    told_K = torch.zeros(max(1, math.ceil(whole * sizes.kept)), dtype=torch.long)
    made[0] = made[0]._replace(kept_K=told_K, target_of_K=told_K + 0)
    packed = []
    for by_image in (True, False):
        of_image = sizes.packed(by_image)
        rows = max(1, round(images * of_image.rows))
        row_RW = torch.zeros(rows, of_image.positions, dtype=torch.long)
        packed.append(
            Packed(
                source_RW=row_RW,
                context_RW=row_RW + 0,
                target_RW=row_RW + 0,
                place_RW=row_RW + 0,
                context_R=row_RW[:, 0] + 0,
                row_K=told_K + 0,
                column_K=told_K + 0,
                bare_RW=None,
                longest=1,
            )
        )
    made_from = tuple(getattr(batch, name) for name in MADE_FROM)
    return TargetIndex(made_from, tuple(made), tuple(packed))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]


def _materialise(model: nn.Module) -> None:
    """Puts fake tensors in the place of meta tensors; a 4-bit layer gets packed weights and a
    forward of its own.
    """
    packed = set(map(id, quantised_layers(model)))
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own:
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    if id(module) in packed and name == "weight":
                        new = torch.empty((-(-old.numel() // 2), 1), dtype=torch.uint8)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    made[id(old)] = new
                tensors[name] = made[id(old)]
        if id(module) in packed:
            module.forward = MethodType(_forward_4bit, module)


def _forward_4bit(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Computes as bitsandbytes' Linear4bit does: in the compute dtype, and back."""
    shape = (module.out_features, module.in_features)
    return _Product4bit.apply(x.to(module.compute_dtype), shape).to(x.dtype)


class _Product4bit(torch.autograd.Function):
    """The product of bitsandbytes' MatMul4Bit: the weight is made anew in each direction, and
    nothing is saved.
    """

    @staticmethod
    def forward(ctx, x, shape):
        ctx.shape = shape
        return nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(ctx.shape), None


class _Meter(TorchDispatchMode):
    """Bytes of all storages alive, by kind, and how they stood when they were most; floating-point
    operations by dtype.

    Operations are counted by the table of torch's FlopCounterMode; that mode itself keeps
    recomputed tensors alive. It also answers what a fake tensor cannot: everything that is asked to
    be equal is, every scalar is 0.
    """

    def __init__(self, mode: FakeTensorMode, model: VisionLanguageModel, rounding: int):
        super().__init__()
        self.mode = mode
        self.device = torch.device("cpu")
        lm: Any = model.lm
        self.vocabulary = lm.size if model.config.objective else lm.base.config.vocab_size
        self.rounding = rounding
        self.alive: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.saved = self.logits = self._most = self._total = 0
        held = [*model.parameters(), *model.buffers()]
        self._of_model = {id(t.untyped_storage()) for t in held}
        self._known: dict[int, _Held] = {}  # by the storage's id

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tells torch not to wrap each call in a switch for its compiler, which is not used."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two in three calls
        if func is aten.equal.default:
            return True
        if func is aten._local_scalar_dense.default:
            return 0
        out = self._shaped(func, args, kwargs or {})
        if out is None:
            out = func(*args, **(kwargs or {}))
        if count := FLOPS.get(func.overloadpacket):
            dtype = next(a.dtype for a in tree_leaves(args) if isinstance(a, torch.Tensor))
            self.flops[str(dtype).removeprefix("torch.")] += count(
                *args, **(kwargs or {}), out_val=out
            )
        self.add([t for t in tree_leaves(out) if isinstance(t, torch.Tensor)], "temporaries")
        return out

    def _shaped(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Returns what a frequent operation makes of fake tensors, by its meta kernel; None for any
        other. FakeTensorMode would come to the same, ten times as slowly.
        """
        if func is aten.addmm.default and args[0].dtype == args[1].dtype:
            func, args = aten.mm.default, args[1:3]
        elif func in POINTWISE and (largest := _largest(args)) is not None:
            func, args = aten.clone.default, (largest,)
        elif func not in DIRECT and func not in POINTWISE:
            return None
        if "device" in kwargs:  # there is one alone
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        with in_kernel_invocation_manager(self.mode):
            out = func(*args, **kwargs)
        return out if isinstance(out, FakeTensor) else FakeTensor(self.mode, out, self.device)

    def add(self, tensors: list[torch.Tensor], kind: str) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (key := id(storage)) in self._known or key in self._of_model:
                continue
            size = -(-storage.nbytes() // self.rounding) * self.rounding
            wide = kind == "temporaries" and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
            held = _Held("logits" if wide else kind, size)
            held.ends = weakref.ref(storage, partial(self._gone, key))
            self._known[key] = held
            self.alive[held.kind] += size
            self._total += size
        self.logits = max(self.logits, self.alive["logits"])
        if self._total > self._most:
            self._most = self._total
            self.peak = dict(self.alive)

    def _gone(self, key: int, _: object) -> None:
        held = self._known.pop(key)
        self.alive[held.kind] -= held.bytes
        self._total -= held.bytes

    def _rename(self, held: _Held, kind: str) -> None:
        if held.kind == "temporaries":
            self.alive[held.kind] -= held.bytes
            self.alive[kind] += held.bytes
            held.kind = kind

    def saving(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts tensors that autograd saves: views of one storage once, parameters not at all."""
        held = self._known.get(id(tensor.untyped_storage()))
        if held and not held.saved:
            held.saved = True
            self.saved += held.bytes
            self._rename(held, "activations")
        return tensor

    def gradient(self, parameter: torch.Tensor) -> None:
        """Counts a gradient as it comes to lie in `grad`."""
        assert parameter.grad is not None  # torch calls the hook when it has been accumulated
        if held := self._known.get(id(parameter.grad.untyped_storage())):
            self._rename(held, "gradients")


def _largest(args: tuple) -> torch.Tensor | None:
    """Returns the tensor to whose shape and dtype all others are brought; None where that takes
    more than a look.
    """
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    largest = max(tensors, key=torch.Tensor.numel)
    shape = largest.shape
    is_alike = largest.is_floating_point() and all(
        t.dtype == largest.dtype
        and all(own in (1, whole) for own, whole in zip(t.shape[::-1], shape[::-1], strict=False))
        and t.ndim <= len(shape)
        for t in tensors
    )
    return largest if is_alike else None


@dataclass
class _Held:
    """One storage that is alive."""

    kind: str
    bytes: int
    saved: bool = False
    ends: Any = None  # the weak reference that tells its end
