"""Can this config learn a few images by heart? A minute now, before three hours.

`harness doctor CONFIG --overfit 8`: Config -> Findings, a line for each trained part (its gradient,
how far its weights moved), and the verdict. The run's own model, engine, collator and step; one
text an image, nothing random: no dropout, no label smoothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from harness.config.schema import Config, DecodingConfig
from harness.data.collate import most_common
from harness.doctor.findings import Finding, error, ok, warning
from harness.errors import ConfigError
from harness.evaluate.image_use.evidence import LOSS_NEGLIGIBLE
from harness.evaluate.image_use.exchange import donors
from harness.evaluate.image_use.gate import exchanged
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from harness.report.terminal import Terminal
from harness.tracking.journal import JournalTracker
from harness.train.engine import Engine
from harness.train.prepare import build_model, calibrate, encoder_of, in_one_lane, make_loader
from harness.train.state import Run, TrainState
from harness.train.step import StepTaker
from shards.read import Sample

STEPS = 600
SECONDS = 60.0  # whichever comes first
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
        """True also where the gradient is nan."""
        return not (self.gradient and self.gradient >= EPSILON * self.parameters**0.5)


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
    """Trains on the first `images` of data.train until they are known by heart, at most so long.

    Raises ConfigError where nothing is trainable or nothing is there to learn.
    """
    if config.train.objective:
        raise ConfigError(
            "--overfit asks for answers, and a first stage (train.objective) gives none: its "
            "recalls on data.dev tell whether it learns"
        )
    run = _run_without_chance(config, images)
    taker = StepTaker(run, stop_asked=lambda: 0, save_due=lambda: False)
    samples = _samples(run, images)
    whole = taker.collate(samples)
    if whole is None:
        raise ConfigError(
            f"the first {images} records of data.train hold no picture with something to learn"
        )
    whole = whole.to(run.engine.device)
    named = run.engine.named
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    first_loss = _loss(run.model, whole)
    end = time.monotonic() + seconds
    # Else there is nothing that a step could do.
    reached = run.model.train()(whole).sum.requires_grad
    first = FirstGradients(named)
    while reached and run.state.step < steps and time.monotonic() < end:
        step = taker.take(run.state.stream, taker.share(samples))
        if step.gradient_norm is not None:
            first.keep(run.engine.loss_scale)
        progress(run.state.step, steps)
        is_time_to_look = run.state.step % EVERY == 0 and step.loss < LEARNT
        if is_time_to_look and exact_answers(run.model, whole) == whole.images:
            break
    return Result(
        images=whole.images,
        steps=run.state.step,
        first_loss=first_loss,
        last_loss=_loss(run.model, whole),
        shuffled_loss=_loss(run.model, whole, shuffled=True) if whole.images > 1 else None,
        exact=exact_answers(run.model, whole),
        signals=tuple(signals_of(named, first.norms, before)),
    )


class FirstGradients:
    """The gradient norm of each parameter in the first step that was taken; {} before it.

    Tensor hooks, since an engine has no gradients left when its step is over.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self.norms: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._see, name))
            for name, parameter in named.items()
        ]

    def _see(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._seen[name] = parameter.grad.float().norm().item()

    def keep(self, scale: float) -> None:
        """Called after a step that was taken under this loss scale; the first call counts."""
        if self._hooks:
            self.norms = {name: norm / scale for name, norm in self._seen.items()}
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _run_without_chance(config: Config, images: int) -> Run:
    """Returns a run of one global batch, and nothing that keeps a text from being learnt."""
    config = in_one_lane(config)
    rate = max(config.train.learning_rate, LOWEST_RATE)
    bridge_rate = config.train.bridge_learning_rate
    if bridge_rate is not None:
        bridge_rate *= rate / config.train.learning_rate
    bridge = config.model.bridge.model_copy(update={"dropout": 0.0})
    lora = config.model.lm.lora.model_copy(update={"dropout": 0.0})
    lm = config.model.lm.model_copy(update={"lora": lora, "dropout": 0.0})
    train = {
        "global_batch": images,
        "label_smoothing": 0.0,
        "weight_decay": 0.0,
        "learning_rate": rate,
        "bridge_learning_rate": bridge_rate,
        "schedule": "constant",
        "warmup": 0.0,
    }
    data = {"last_batch": "short", "texts_per_image": None}
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update={"bridge": bridge, "lm": lm}),
            "train": config.train.model_copy(update=train),
        }
    )
    engine = Engine(config.train)
    loader = make_loader(config, None)
    encoder = encoder_of(loader, config)
    model = build_model(config, encoder, precision=engine.precision, device=engine.device)
    if not config.model.init_from:
        calibrate(model, config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing is trainable: the bridge and the language model are both frozen")
    state = TrainState(loader.at(0, 0))
    wrapped = engine.prepare(model)
    return Run(config, engine, model, wrapped, loader, state, Terminal(False), JournalTracker())


def _samples(run: Run, images: int) -> list[Sample]:
    """Returns the first images with a text each, encoded: the frozen encoder runs once."""
    with closing(run.loader.iterate()) as steps:
        samples = one_text_each(next(steps)[1])
    if run.model.vision is None or not samples:
        return samples
    pixels_IHW3 = torch.from_numpy(np.stack([sample.payload for sample in samples]))
    with torch.no_grad(), run.engine.precision.autocast("vision"):
        patches_IPD = run.model.vision(pixels_IHW3.to(run.engine.device))
    payloads = patches_IPD.to(torch.float16).cpu().numpy()
    return [
        replace(sample, payload=payload, extension="safetensors")
        for sample, payload in zip(samples, payloads, strict=True)
    ]


def one_text_each(samples: Sequence[Sample]) -> list[Sample]:
    """Returns each readable image with one text and one target; records without an image are none.

    The text is of the question that most images share, and the target another than those before
    where it can be: then only the image tells which.
    """
    readable = [sample for sample in samples if sample.payload is not None]
    shared = Counter(
        ask
        for sample in readable
        for ask in {(text.task, text.prompt) for text in sample.known.texts}
    )
    used: set[tuple[str, str | None, str]] = set()
    chosen = []
    for sample in readable:
        choices = [
            (text, target)
            for text in sample.known.texts
            for target in (text.targets if text.task == "caption" else [most_common(text.targets)])
        ]
        best = max(
            choices,
            key=lambda choice: (
                shared[choice[0].task, choice[0].prompt],
                (choice[0].task, choice[0].prompt, choice[1]) not in used,
            ),
        )
        text = replace(best[0], targets=(best[1],))
        used.add((text.task, text.prompt, best[1]))
        chosen.append(replace(sample, record=replace(sample.known, texts=(text,))))
    return chosen


@torch.no_grad()
def _loss(model: VisionLanguageModel, batch: Batch, shuffled: bool = False) -> float:
    tokens = model.eval().bridge_tokens(batch)
    if shuffled:
        donor_I = donors(batch.images, 0).to(batch.image_of_C.device)
        tokens = exchanged(model, batch, tokens, donor_I[batch.image_of_C])
    return float(model.loss(batch, tokens).sum / batch.weight)


def exact_answers(model: VisionLanguageModel, batch: Batch) -> int:
    """Counts the greedy answers that are the target, token for token. Leaves training mode on."""
    ends = (model.tokenizer.eos_token_id, model.tokenizer.pad_token_id)
    targets = [[token for token in row if token not in ends] for row in batch.labels_TL.tolist()]
    said = model.eval().generate(batch, DecodingConfig(max_new_tokens=batch.labels_TL.shape[1]))
    model.train()
    return sum(answer == target for answer, target in zip(said.token_ids, targets, strict=True))


def part_of(parameter: str) -> str:
    """Returns the trained part that a parameter belongs to, in the words of the findings."""
    if parameter.startswith("bridge."):
        return "projection" if parameter.startswith("bridge.projection.") else "bridge"
    return "LoRA" if ".lora_" in parameter else "language model"


def signals_of(
    named: Mapping[str, nn.Parameter],
    gradients: Mapping[str, float],
    before: Mapping[str, torch.Tensor],
) -> Iterator[Signal]:
    """Yields a Signal for each part.

    `gradients`: norms in the first step, {} where no step was taken; `before`: the weights then.
    """
    for part in dict.fromkeys(map(part_of, named)):
        names = [name for name in named if part_of(name) == part]
        norms = [gradients[name] for name in names if name in gradients]
        weights = _norm(before[name] for name in names)
        change = _norm(named[name].detach() - before[name] for name in names)
        count = sum(named[name].numel() for name in names)
        gradient = sum(norm**2 for norm in norms) ** 0.5 if norms else None
        yield Signal(part, count, gradient, weights, change / max(weights, 1e-12))


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return sum(tensor.float().pow(2).sum().item() for tensor in tensors) ** 0.5


def findings(result: Result) -> Iterator[Finding]:
    """Yields a line for each part, and the verdict: an error unless all were learnt by heart."""
    for signal in result.signals:
        gradient = "no gradient at all"
        if signal.gradient is not None:
            gradient = f"gradient {signal.gradient:.2g} at the first step"
        found = f"{gradient}, weights {signal.weights:.3g}, moved by {signal.moved:.2%}"
        if signal.silent:
            yield error(
                f"overfit: {signal.name}",
                f"gets no signal: {found}",
                f"something cuts the {signal.name} off from the loss: a detach, a no_grad, a "
                "weight of 0",
            )
        else:
            yield ok(f"overfit: {signal.name}", found)
    yield _verdict(result)


def _verdict(result: Result) -> Finding:
    name = f"overfit {result.images}"
    silent = [signal.name for signal in result.signals if signal.silent]
    found = (
        f"{result.exact} of {result.images} answered word for word after {result.steps} steps, "
        f"loss {result.first_loss:.3g} -> {result.last_loss:.3g} nats a token"
    )
    alike = False
    if result.shuffled_loss is not None:
        found += f", {result.shuffled_loss:.3g} with the images exchanged"
        alike = result.shuffled_loss - result.last_loss < LOSS_NEGLIGIBLE
    if result.exact == result.images and not alike:
        return ok(name, f"learnt by heart: {found}")
    if result.exact == result.images:
        why = "learnt by heart without the images: the words alone tell the texts apart"
        return warning(name, f"{why}; {found}", "more images, or texts that share a question")
    why = "not learnt by heart"
    if silent:
        fix = f"first find what cuts off the {' and the '.join(silent)}"
    elif alike:
        why += ", and the images make no difference"
        fix = (
            "look at the image tokens' scale, the encoder's layer, and whether the images are the "
            "right ones"
        )
    else:
        fix = (
            "if the loss is still falling, fewer images or a faster machine; else more query "
            "tokens or a larger LoRA"
        )
    return error(name, f"{why}: {found}", fix)
