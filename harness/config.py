"""The whole experiment as frozen, validated dataclasses: load a YAML file, override by `key=value`, dump it again.

Every key a config may have is a field below, with its unit and its default. Nothing else is accepted: a wrong key is
answered with the closest right one. Imports no torch, so that `harness --help` and every check before a launch is fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigError(ValueError):
    """A config that cannot be used: the message names the file, the key, what was found and what would be right."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


class DataSet(_Section):
    """One set of shards. `weight` is its share of a mixture; without weights every record comes once an epoch."""

    path: str
    weight: Annotated[float, Field(gt=0)] | None = None


class Data(_Section):
    train: tuple[DataSet, ...] = ()
    dev: tuple[DataSet, ...] = ()  # scored during training; everything is chosen on it
    test: tuple[DataSet, ...] = ()  # scored by `harness evaluate`, at the end
    texts_per_image: Positive | None = None  # texts drawn of each image per epoch; none: all of them
    answer: Literal["most_common", "drawn"] = "most_common"  # vqa training target; drawn: by annotator frequency
    max_prompt_tokens: Positive = 64
    max_target_tokens: Positive = 48
    window_shards: Positive = 8  # samples are shuffled inside a window of this many shards
    last_batch: Literal["short", "fill", "drop"] = "short"
    workers: NonNegative = 0  # reading processes per rank
    prefetch: Positive = 2  # batches read ahead per worker
    cache_dir: str | None = None  # remote shards only
    cache_gb: Annotated[float, Field(gt=0)] = 20.0
    max_image_pixels: Positive = 50_000_000  # larger images are refused as damaged or hostile


class Vision(_Section):
    kind: Literal["clip", "efficientnet_lite0"] = "clip"
    id: str = "openai/clip-vit-base-patch32"  # hub id or local folder (unused by efficientnet_lite0)
    revision: str | None = None
    layer: int = -2  # which hidden state of CLIP; -1 is the last
    image_size: Positive = 224  # pixels, both sides


class Bridge(_Section):
    kind: Literal["qformer", "mean_pool", "linear"] = "qformer"
    query_tokens: Positive = 32
    layers: Positive = 2
    width: Positive = 768
    heads: Positive = 12
    cross_attention_frequency: Positive = 1  # every how many layers the queries look at the image
    dropout: Fraction = 0.0
    trainable: bool = True  # false: frozen at its random start, the control experiment

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Bridge:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class Lora(_Section):
    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Fraction = 0.0
    targets: Literal["all_linear"] | tuple[str, ...] = "all_linear"


class LanguageModel(_Section):
    kind: Literal["t5"] = "t5"
    id: str = "google/flan-t5-base"  # hub id or local folder
    revision: str | None = None
    tuning: Literal["qlora", "lora", "frozen", "full"] = "qlora"
    lora: Lora = Lora()


class Model(_Section):
    vision: Vision = Vision()
    bridge: Bridge = Bridge()
    lm: LanguageModel = LanguageModel()
    init_from: str | None = None  # folder of an earlier model whose trained weights are the start


class Prompts(_Section):
    """Names of templates in prompts.py, or a template of one's own; "none" leaves the prompt out."""

    caption: str = "describe"
    vqa: str = "question"


class Decoding(_Section):
    max_new_tokens: Positive = 40
    min_new_tokens: NonNegative = 0
    beams: Positive = 1
    length_penalty: float = 1.0


class Generate(_Section):
    caption: Decoding = Decoding(max_new_tokens=40)
    vqa: Decoding = Decoding(max_new_tokens=10)


class Train(_Section):
    epochs: Positive = 5
    max_steps: Positive | None = None  # stop earlier; the schedule still ends at `epochs`
    global_batch: Positive = 32  # images a step, over all ranks and micro-batches
    micro_batch: Positive = 32  # images at a time on one rank
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Fraction = 0.03  # share of all steps
    final_learning_rate: Fraction = 0.0  # share of the peak where the cosine ends
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    label_smoothing: Fraction = 0.0
    eos_loss_weight: Annotated[float, Field(ge=0)] = 1.0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    activation_checkpointing: bool = False
    evaluate_every: Positive | None = None  # steps; none: at the end of each epoch
    save_every: Positive | None = None  # steps; none: at the end of each epoch
    keep_checkpoints: Positive = 2
    log_every: Positive = 10  # steps
    max_skipped_in_a_row: Positive = 10  # non-finite steps before the run stops
    stop_if_image_ignored: bool = False


class Evaluation(_Section):
    batch_images: Positive = 64
    dev_images: Positive | None = 400  # images scored during training; none: all
    counterfactual_texts: Positive = 2000  # texts on which the images are shuffled, blanked and left out
    show_images: Positive = 8  # the same images after each epoch, with what the model says
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    bootstrap: Positive = 1000  # resamples over images


class Tracking(_Section):
    kind: Literal["mlflow", "none"] = "mlflow"
    uri: str | None = None  # none: MLFLOW_TRACKING_URI, else sqlite in the output folder
    experiment: str = "harness"
    run_name: str | None = None  # none: the config's name


class Config(_Section):
    name: str
    out: str | None = None  # none: runs/<name>
    seed: NonNegative = 0
    data: Data = Data()
    model: Model = Model()
    prompts: Prompts = Prompts()
    generate: Generate = Generate()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()

    @property
    def out_dir(self) -> Path:
        return Path(self.out or f"runs/{self.name}")
