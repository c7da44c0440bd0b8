"""Can this config learn a few images by heart? A minute now, before three hours: `harness doctor
CONFIG --overfit 8`.

Config -> Findings: a line for each trained part (its gradient, how far its weights moved), and the
verdict. The run's own model, engine and collator; one text an image, nothing random: no dropout, no
label smoothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import nn

from harness.config.schema import Config, DecodingConfig
from harness.data.collate import Collator, most_common
from harness.doctor.findings import Finding
from harness.errors import ConfigError
from harness.evaluate.image_use import LOSS_NEGLIGIBLE, donors, exchanged
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from harness.train.engine import Engine
from harness.train.prepare import build_model, calibrate, encoder_of, make_loader, micro_batches
from shards.read import Sample

STEPS, SECONDS = 600, 60.0  # whichever comes first
EVERY = 10  # steps between two looks at the answers
LEARNT = 0.1  # nats a token below which a loss is small
LOWEST_RATE = 1e-3  # peak learning rates are meant for thousands of steps: a few hundred want more
EPSILON = 1e-8  # AdamW's: a gradient whose root mean square is below it moves nothing


@dataclass(frozen=True)
class Signal:
    """What reached one trained part."""

    name: str
    parameters: int
    gradient: float | None  # its norm at the first step that was taken; None: no gradient at all
    weights: float  # their norm before
    moved: float  # norm of the change, as a share of it

    @property
    def silent(self) -> bool:
        return not (
            self.gradient and self.gradient >= EPSILON * self.parameters**0.5
        )  # nan is no signal either


@dataclass(frozen=True)
class Result:
    """Losses in nats a token."""

    images: int
    steps: int
    first_loss: float
    last_loss: float
    shuffled_loss: float | None  # under the images of others; None with a single one
    exact: int  # answers that are the targets, word for word
    signals: tuple[Signal, ...]


def overfit(
    config: Config,
    images: int,
    *,
    steps: int = STEPS,
    seconds: float = SECONDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Trains on the first `images` of data.train until they are known by heart, at most so long."""
    config = _without_chance(config, images)
    engine, loader = Engine(config.train), make_loader(config, None)
    encoder = encoder_of(loader, config)
    model = build_model(config, encoder, precision=engine.precision, device=engine.device)
    if not config.model.init_from:
        calibrate(model, config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing is trainable: the bridge and the language model are both frozen")
    engine.prepare(model)
    with closing(loader.iterate()) as first:
        samples = one_text_each(next(first)[1])
    collate = Collator(
        model.tokenizer, config.data, config.prompts, config.seed, config.train.eos_loss_weight
    )
    if (whole := collate(samples)) is None:
        raise ConfigError(f"the first {images} images of data.train carry nothing to learn")
    batches = [
        _encoded(batch, model, engine)
        for batch in micro_batches(samples, collate, config.train.micro_batch)
    ]
    whole = _encoded(whole, model, engine)
    weight, before = (
        float(whole.weight),
        {name: p.detach().clone() for name, p in engine.named.items()},
    )
    rate, start = max(config.train.learning_rate, LOWEST_RATE), time.monotonic()
    first_loss, done, gradients = _loss(model, whole), 0, dict[str, float | None]()
    reached = model.train()(
        batches[0]
    ).sum.requires_grad  # else there is nothing that a step could do
    while reached and done < steps and time.monotonic() - start < seconds:
        total = 0.0
        for position, batch in enumerate(batches):
            with engine.micro_step(last=position == len(batches) - 1):
                loss = model(batch).sum / weight
                engine.backward(loss)
            total += loss.item()
        seen = {name: _norm(p.grad, engine.scaler.get_scale()) for name, p in engine.named.items()}
        taken = engine.step(rate) is not None
        gradients = gradients or (seen if taken else {})
        done += 1
        progress(done, steps)
        if done % EVERY == 0 and total < LEARNT and exact_answers(model, whole) == whole.images:
            break
    return Result(
        images=whole.images,
        steps=done,
        first_loss=first_loss,
        last_loss=_loss(model, whole),
        shuffled_loss=_loss(model, whole, shuffled=True) if whole.images > 1 else None,
        exact=exact_answers(model, whole),
        signals=tuple(signals_of(engine.named, gradients, before)),
    )


def _without_chance(config: Config, images: int) -> Config:
    """One global batch of these images, and nothing that keeps a text from being learnt by heart."""
    model = config.model
    bridge = model.bridge.model_copy(update={"dropout": 0.0})
    lora = model.lm.lora.model_copy(update={"dropout": 0.0})
    lm = model.lm.model_copy(update={"lora": lora, "dropout": 0.0})
    train = {"global_batch": images, "label_smoothing": 0.0, "weight_decay": 0.0}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"last_batch": "short", "texts_per_image": None}),
            "model": model.model_copy(update={"bridge": bridge, "lm": lm}),
            "train": config.train.model_copy(update=train),
        }
    )


def one_text_each(samples: Sequence[Sample]) -> list[Sample]:
    """Each image with one text and one target: of the question that most of them share, and if it
    can be another target than the images before, so that only the image tells which. Unreadable
    images are left out.
    """
    readable = [sample for sample in samples if sample.payload is not None]
    shared = Counter(
        ask
        for sample in readable
        for ask in {(text.task, text.prompt) for text in sample.record.texts}
    )
    used: set[tuple[str, str | None, str]] = set()
    chosen = []
    for sample in readable:
        choices = [
            (text, target)
            for text in sample.record.texts
            for target in (text.targets if text.task == "caption" else (most_common(text.targets),))
        ]
        text, target = max(
            choices,
            key=lambda c: (
                shared[c[0].task, c[0].prompt],
                (c[0].task, c[0].prompt, c[1]) not in used,
            ),
        )
        used.add((text.task, text.prompt, target))
        record = replace(sample.record, texts=(replace(text, targets=(target,)),))
        chosen.append(replace(sample, record=record))
    return chosen


def _encoded(batch: Batch, model: VisionLanguageModel, engine: Engine) -> Batch:
    """The batch with its patch tokens in place of its pixels: the encoder is frozen, it need not
    run at every step.
    """
    batch = batch.to(engine.device)
    with torch.no_grad():
        return replace(batch, features_IPD=model.eval().patch_tokens(batch), pixels_IHW3=None)


def _norm(gradient: torch.Tensor | None, scale: float) -> float | None:
    return None if gradient is None else gradient.float().norm().item() / scale


@torch.no_grad()
def _loss(model: VisionLanguageModel, batch: Batch, shuffled: bool = False) -> float:
    tokens = model.eval().bridge_tokens(batch)
    if shuffled:
        donor_I = donors(batch.images, 0).to(batch.image_of_C.device)
        tokens = exchanged(model, batch, tokens, donor_I[batch.image_of_C])
    return float(model.loss(batch, tokens).sum / batch.weight)


def exact_answers(model: VisionLanguageModel, batch: Batch) -> int:
    """How many greedy answers are the target, token for token. Leaves the model in training mode."""
    ends = (model.tokenizer.eos_token_id, model.tokenizer.pad_token_id)
    targets = [[token for token in row if token not in ends] for row in batch.labels_TL.tolist()]
    said = model.eval().generate(batch, DecodingConfig(max_new_tokens=batch.labels_TL.shape[1]))
    model.train()
    return sum(answer == target for answer, target in zip(said.token_ids, targets, strict=True))


def part_of(parameter: str) -> str:
    if parameter.startswith("bridge."):
        return "projection" if parameter.startswith("bridge.projection.") else "bridge"
    return "LoRA" if ".lora_" in parameter else "language model"


def signals_of(
    named: Mapping[str, nn.Parameter],
    gradients: Mapping[str, float | None],
    before: Mapping[str, torch.Tensor],
) -> Iterator[Signal]:
    """By part, from the first step's gradient norms (empty: no step was taken) and the weights
    before all steps.
    """
    for part in dict.fromkeys(map(part_of, named)):
        names = [name for name in named if part_of(name) == part]
        norms = [gradients[name] for name in names if gradients.get(name) is not None]
        weights = _together(before[name] for name in names)
        change = _together(named[name].detach() - before[name] for name in names)
        count = sum(named[name].numel() for name in names)
        gradient = sum(norm**2 for norm in norms) ** 0.5 if norms else None
        yield Signal(part, count, gradient, weights, change / max(weights, 1e-12))


def _together(tensors: Iterator[torch.Tensor]) -> float:
    return sum(tensor.float().pow(2).sum().item() for tensor in tensors) ** 0.5


def findings(result: Result) -> Iterator[Finding]:
    """A line for each part, and the verdict: an error unless all images were learnt by heart."""
    for signal in result.signals:
        how = (
            "no gradient at all"
            if signal.gradient is None
            else f"gradient {signal.gradient:.2g} at the first step"
        )
        found = f"{how}, weights {signal.weights:.3g}, moved by {signal.moved:.2%}"
        if signal.silent:
            fix = f"something cuts the {signal.name} off from the loss: a detach, a no_grad, a weight of 0"
            yield Finding(f"overfit: {signal.name}", "error", f"gets no signal: {found}", fix)
        else:
            yield Finding(f"overfit: {signal.name}", "OK", found)
    name, silent = (
        f"overfit {result.images}",
        [signal.name for signal in result.signals if signal.silent],
    )
    found = (
        f"{result.exact} of {result.images} answered word for word after {result.steps} steps, "
        f"loss {result.first_loss:.3g} -> {result.last_loss:.3g} nats a token"
    )
    alike = (
        result.shuffled_loss is not None
        and result.shuffled_loss - result.last_loss < LOSS_NEGLIGIBLE
    )
    if result.shuffled_loss is not None:
        found += f", {result.shuffled_loss:.3g} with the images exchanged"
    if result.exact == result.images and not alike:
        yield Finding(name, "OK", f"learnt by heart: {found}")
    elif result.exact == result.images:
        why = "learnt by heart without the images: the words alone tell the texts apart"
        yield Finding(
            name, "warning", f"{why}; {found}", "more images, or texts that share a question"
        )
    elif silent:
        fix = f"first find what cuts off the {' and the '.join(silent)}"
        yield Finding(name, "error", f"not learnt by heart: {found}", fix)
    elif alike:
        fix = "look at the image tokens' scale, the encoder's layer, and whether the images are the right ones"
        yield Finding(
            name, "error", f"not learnt by heart, and the images make no difference: {found}", fix
        )
    else:
        fix = "if the loss is still falling, fewer images or a faster machine; else more query tokens or a larger LoRA"
        yield Finding(name, "error", f"not learnt by heart: {found}", fix)
