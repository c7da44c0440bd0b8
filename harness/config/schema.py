"""The whole experiment as frozen, validated dataclasses: load a YAML file, override by `key=value`,
dump it again.

Every key a config may have is a field below, with its unit and its default. Nothing else is
accepted: a wrong key is answered with the closest right one. Imports no torch, so that `harness
--help` and every check before a launch is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads yes and on as true, and pydantic would take that for 1
        raise ValueError(f"found {str(value).lower()}, expected a number")
    return value


Positive = Annotated[int, BeforeValidator(_number), Field(gt=0)]
NonNegative = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Number = Annotated[float, BeforeValidator(_number)]
Above0 = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
Below1 = Annotated[Number, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False
    )


class DataSetConfig(Section):
    """One set of shards. `weight` is its share of a mixture; without weights every record comes
    once an epoch.
    """

    path: str
    weight: Above0 | None = None


class DataConfig(Section):
    train: tuple[DataSetConfig, ...] = ()
    dev: tuple[DataSetConfig, ...] = ()  # scored during training; everything is chosen on it
    test: tuple[DataSetConfig, ...] = ()  # scored by `harness evaluate`, at the end
    texts_per_image: Positive | None = (
        None  # texts drawn of each image per epoch; none: all of them
    )
    answer: Literal["most_common", "drawn"] = (
        "most_common"  # vqa training target; drawn: by annotator frequency
    )
    max_prompt_tokens: Positive = 64
    max_target_tokens: Positive = 48
    loss_on_padding: bool = (
        False  # targets padded to max_target_tokens and trained on: docs/why-is-my-caption-empty.md
    )
    train_images: Positive | None = (
        None  # the first so many of epoch 0, in every epoch; none: all of them
    )
    window_shards: Positive = 8  # samples are shuffled inside a window of this many shards
    last_batch: Literal["short", "fill", "drop"] = "short"
    workers: NonNegative = 0  # reading processes per rank
    prefetch: Positive = 2  # batches read ahead per worker
    cache_dir: str | None = None  # remote shards only
    cache_gb: Above0 = 20.0
    max_image_pixels: Positive = 50_000_000  # larger images are refused as damaged or hostile


class VisionConfig(Section):
    kind: Literal["clip", "efficientnet_lite0"] = "clip"
    id: str = (
        "openai/clip-vit-base-patch32"  # hub id or local folder (unused by efficientnet_lite0)
    )
    revision: str | None = None
    layer: int = -2  # which hidden state of CLIP; -1 is the last
    image_size: Positive = 224  # pixels, both sides


class BridgeConfig(Section):
    kind: Literal["qformer", "mean_pool", "linear"] = "qformer"
    query_tokens: Positive = 32
    layers: Positive = 2
    width: Positive = 768
    heads: Positive = 12
    cross_attention_frequency: Positive = 1  # every how many layers the queries look at the image
    dropout: Fraction = 0.0
    # false: frozen whole at its random start, the control experiment; projection: all of it but the
    # projection
    trainable: bool | Literal["projection"] = True
    question_aware: bool = False  # the queries read the prompt too (InstructBLIP)
    init_from: str | None = (
        None  # hub id or folder of BERT, or of a BLIP-2, whose weights the Q-Former starts from
    )

    @model_validator(mode="after")
    def _fits_together(self) -> BridgeConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.kind != "qformer" and (self.question_aware or self.init_from):
            raise ValueError(
                f"question_aware and init_from are keys of kind qformer, this is {self.kind}"
            )
        return self


class LoraConfig(Section):
    r: Positive = 16
    alpha: Above0 = 32.0
    dropout: Fraction = 0.0
    targets: Literal["all_linear"] | tuple[str, ...] = "all_linear"


class LanguageModelConfig(Section):
    kind: Literal["t5", "gpt2"] = "t5"
    id: str = "google/flan-t5-base"  # hub id or local folder
    revision: str | None = None
    tuning: Literal["qlora", "lora", "frozen", "full"] = "qlora"
    lora: LoraConfig = LoraConfig()
    dropout: Fraction = 0.0  # in the base itself, for one that is trained whole on few texts
    cross_attention: bool = (
        False  # gpt2: new layers look at the image tokens, which else stand before the prompt
    )
    bos: Literal["always", "generation_only"] = (
        "always"  # gpt2: generation_only is a known mistake, as loss_on_padding
    )

    @model_validator(mode="after")
    def _only_gpt2_has_it(self) -> LanguageModelConfig:
        if self.kind != "gpt2" and (self.cross_attention or self.bos != "always"):
            raise ValueError(f"cross_attention and bos are keys of kind gpt2, this is {self.kind}")
        return self


class ModelConfig(Section):
    vision: VisionConfig = VisionConfig()
    bridge: BridgeConfig = BridgeConfig()
    lm: LanguageModelConfig = LanguageModelConfig()
    init_from: str | None = (
        None  # an earlier run, a checkpoint or its model/: whose trained weights are the start
    )


class PromptsConfig(Section):
    """Names of templates in prompts.py, or a template of one's own; "none" leaves the prompt out (a
    question stays).
    """

    caption: str = "describe"
    vqa: str = "question"


class DecodingConfig(Section):
    max_new_tokens: Positive = 40
    min_new_tokens: NonNegative = 0
    beams: Positive = 1
    length_penalty: Number = 1.0


class GenerateConfig(Section):
    caption: DecodingConfig = DecodingConfig(max_new_tokens=40)
    vqa: DecodingConfig = DecodingConfig(max_new_tokens=10)


class TrainConfig(Section):
    epochs: Positive = 5
    max_steps: Positive | None = None  # stop earlier; the schedule still ends at `epochs`
    global_batch: Positive = 32  # images a step, over all ranks and micro-batches
    micro_batch: Positive = 32  # images at a time on one rank
    learning_rate: Above0 = 1e-4  # its peak
    bridge_learning_rate: Above0 | None = None  # none: as learning_rate, which LoRA wants higher
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Fraction = 0.03  # share of all steps
    final_learning_rate: Fraction = 0.0  # share of the peak where the cosine ends
    weight_decay: Annotated[Number, Field(ge=0)] = 0.05
    betas: tuple[Below1, Below1] = (0.9, 0.98)
    clip_norm: Above0 | None = 1.0
    label_smoothing: Fraction = 0.0
    eos_loss_weight: Annotated[Number, Field(ge=0)] = 1.0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    activation_checkpointing: bool = False
    evaluate_every: Positive | None = None  # steps; none: at the end of each epoch
    save_every: Positive | None = None  # steps; none: at the end of each epoch
    keep_checkpoints: Positive = 2
    log_every: Positive = 10  # steps
    max_skipped_in_a_row: Positive = 10  # non-finite steps before the run stops
    image_use_every: Positive | None = (
        200  # steps between looks of the gate at few images; none: at evaluations alone
    )
    stop_if_image_ignored: bool = False


class EvaluationConfig(Section):
    batch_images: Positive = 64
    dev_images: Positive | None = 400  # images scored during training; none: all
    counterfactual_texts: Positive = (
        2000  # of each task, on which the images are shuffled, blanked and left out
    )
    dev_counterfactual_texts: NonNegative = (
        400  # the same during training, where it must cost little
    )
    small_gate_images: Positive = (
        32  # of the dev sets, for train.image_use_every: one text of each task and image
    )
    show_images: Positive = 8  # the same images after each epoch, with what the model says
    confidence: Annotated[Number, Field(gt=0, lt=1)] = 0.95
    bootstrap: Positive = 1000  # resamples over images


class TrackingConfig(Section):
    kind: Literal["mlflow", "none"] = "mlflow"
    uri: str | None = None  # none: MLFLOW_TRACKING_URI, else sqlite in the output folder
    experiment: str = "harness"
    run_name: str | None = None  # none: the config's name
    parent_run_id: str | None = (
        None  # the MLflow run whose child this one is, as `harness ablate` says
    )


class Config(Section):
    name: str
    out: str | None = None  # none: runs/<name>
    seed: NonNegative = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    generate: GenerateConfig = GenerateConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def out_dir(self) -> Path:
        return Path(self.out or f"runs/{self.name}")
