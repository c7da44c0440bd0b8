"""Every key a config may have: a field below, with its default, its unit and what it means.

The comment beside or above a field is what `harness config` and docs/configuration.md show for it.
Nothing else is accepted. How a file is read: load.py; what a wrong key is told: mistakes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from harness.config.known_mistakes import KnownMistakesConfig, at_their_new_place


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads yes and on as true, and pydantic would take that for 1
        raise ValueError(f"found {str(value).lower()}, expected a number")
    return value


Positive = Annotated[int, BeforeValidator(_number), Field(gt=0)]
NonNegative = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Number = Annotated[float, BeforeValidator(_number)]
Above0 = Annotated[Number, Field(gt=0)]
From0 = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
Below1 = Annotated[Number, Field(ge=0.0, lt=1.0)]
Lite = Literal["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]
Objective = Literal["itc", "lm"]
Between0And1 = Annotated[Number, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A part of a config: frozen, and no key beside its fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False
    )


class DataSetConfig(Section):
    """One set of shards."""

    path: str  # a folder of shards, or its fsspec URL
    # Its share of a mixture; without weights every record comes once an epoch.
    weight: Above0 | None = None
    # Of data.train alone: what a token of its targets counts in the loss. In a mixture captions,
    # which are long and several an image, outweigh short answers; 0.1 for them lets these count.
    loss_weight: Above0 = 1.0


class DataConfig(Section):
    """What is read, and how it is drawn."""

    # A folder of splits, as `harness shards build` makes it, in place of train, dev and test: those
    # of them that are there are read. As `data.folder=DIR` it takes the place of a config's own.
    folder: str | None = None
    # Sets to learn from; of each, weight: its share of a mixture's images; loss_weight: what a
    # token of its targets counts in the loss against another set's, 1 where it is not given.
    train: tuple[DataSetConfig, ...] = ()
    dev: tuple[DataSetConfig, ...] = ()  # scored during training; everything is chosen on it
    test: tuple[DataSetConfig, ...] = ()  # scored by `harness evaluate`, at the end
    texts_per_image: Positive | None = None  # drawn of each image per epoch; null: all of them
    # The answer that is learnt; drawn: by annotator frequency.
    answer: Literal["most_common", "drawn"] = "most_common"
    max_prompt_tokens: Positive = 64  # a longer prompt is cut, and counted
    max_target_tokens: Positive = 48  # a longer target is cut, and counted
    # The first so many images of epoch 0, in every epoch; null: all of them.
    train_images: Positive | None = None
    window_shards: Positive = 8  # samples are shuffled inside a window of this many shards
    # So many streams of shards make the order, whatever the number of processes: every global batch
    # takes as many images of each, and a process reads its own lanes' shards alone where the number
    # of processes divides this one. They divide train.global_batch and share window_shards.
    lanes: Positive = 1
    # An epoch's last global batch: short as it is, filled up with its first images, or dropped.
    last_batch: Literal["short", "fill", "drop"] = "short"
    workers: NonNegative = 0  # reading processes per rank
    prefetch: Positive = 2  # batches read ahead per worker
    cache_dir: str | None = None  # a local folder for remote shards, which need one
    cache_gb: Above0 = 20.0  # 10^9 bytes that it may hold; at least two windows
    # How pictures to learn from are resized: exact, to the pixels of the encoder's own processor,
    # as those of scores and features always are; fast: nearly the same (0.004 of 255 off on
    # average) for half the work; reduced: as fast, of JPEGs decoded at 1/2, 1/4 or 1/8 where the
    # short side allows it, which changes them more.
    resize: Literal["exact", "fast", "reduced"] = "exact"
    max_image_pixels: Positive = 50_000_000  # larger images are refused as damaged or hostile
    # Times in a row that a file is asked for before the run saves and stops; 7: 30 s of pauses.
    read_attempts: Positive = 7
    read_timeout: Above0 = 60.0  # seconds that one answer of a remote file may take
    # Share of a set's images of an epoch that may be unreadable (at least 20 of them, at most half)
    # before the run saves and stops; 1: go on whatever is lost.
    max_unreadable: Fraction = 0.001


class VisionConfig(Section):
    """The frozen image encoder."""

    # clip; auto: SigLIP, SigLIP 2, DINOv2, ViT and others of transformers, with the pixels that the
    # model's own image processor makes; efficientnet_lite0 to 2 come as packages.
    kind: Literal["clip", "auto"] | Lite = "clip"
    id: str = "openai/clip-vit-base-patch32"  # hub id or local folder; clip and auto alone
    revision: str | None = None  # of the hub's repository
    layer: int = -2  # which hidden state; -1 is the last, before a norm; clip and auto alone
    # Pixels, both sides. Another size than clip's or auto's own, if it is given, is reached by
    # interpolating the position embeddings.
    image_size: Positive = 224
    # EfficientNet alone. last: its last grid, of 1/32 of the picture; both: beside each cell of
    # that, channel by channel, the four cells of the grid of 1/16: as many tokens, a third wider.
    stages: Literal["last", "both"] = "last"
    # EfficientNet alone: a folder whose model.safetensors takes the place of the package's weights
    # (benchmarks/encoder_of_words.py makes one).
    weights: str | None = None
    flips: bool = False  # the tokens of the mirrored picture follow: twice as many

    @model_validator(mode="after")
    def _only_efficientnet_has_it(self) -> VisionConfig:
        for key, chosen in (("stages", self.stages != "last"), ("weights", self.weights)):
            if chosen and not self.kind.startswith("efficientnet"):
                raise ValueError(f"{key} is a key of the kinds efficientnet, this is {self.kind}")
        return self


class BridgeConfig(Section):
    """What turns patch tokens into image tokens for the language model."""

    kind: Literal["qformer", "mean_pool", "linear"] = "qformer"  # the others are for comparison
    query_tokens: Positive = 32  # image tokens that the language model reads
    layers: Positive = 2  # of the Q-Former
    width: Positive = 768  # of its tokens; divisible by heads
    heads: Positive = 12  # of its attention
    cross_attention_frequency: Positive = 1  # every how many layers the queries look at the image
    dropout: Fraction = 0.0  # in the Q-Former
    # false: frozen whole at its random start, the control; projection: all but the projection.
    trainable: bool | Literal["projection"] = True
    question_aware: bool = False  # the queries read the prompt too (InstructBLIP)
    # Hub id or folder of BERT, or of a BLIP-2, whose weights the Q-Former starts from.
    init_from: str | None = None

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
    """The low-rank adapters; tuning qlora and lora alone."""

    r: Positive = 16  # rank
    alpha: Above0 = 32.0  # the product is scaled by alpha / r
    dropout: Fraction = 0.0  # before the adapters
    targets: Literal["all_linear"] | tuple[str, ...] = "all_linear"  # names of layers


class LanguageModelConfig(Section):
    """The language model."""

    # Encoder-decoder; or any decoder alone, as OPT, Llama, Qwen, Gemma (gpt2: GPT-2 alone).
    kind: Literal["t5", "decoder", "gpt2"] = "t5"
    id: str = "google/flan-t5-base"  # hub id or local folder
    revision: str | None = None  # of the hub's repository
    gguf_file: str | None = None  # decoder: the name of a GGUF file there, in place of safetensors
    # qlora: frozen in 4 bits (NF4) with LoRA; lora: frozen with LoRA; full: trained whole.
    tuning: Literal["qlora", "lora", "frozen", "full"] = "qlora"
    lora: LoraConfig = LoraConfig()
    dropout: Fraction = 0.0  # in the base itself, for one that is trained whole on few texts
    # GPT-2: new layers look at the image tokens, which else stand before the prompt.
    cross_attention: bool = False

    @property
    def has_encoder(self) -> bool:
        return self.kind == "t5"

    @model_validator(mode="after")
    def _only_decoders_have_it(self) -> LanguageModelConfig:
        for key in ("cross_attention", "gguf_file"):
            if self.has_encoder and getattr(self, key):
                raise ValueError(f"{key} is a key of kind decoder, this is {self.kind}")
        return self


class ModelConfig(Section):
    """The three parts."""

    vision: VisionConfig = VisionConfig()
    bridge: BridgeConfig = BridgeConfig()
    lm: LanguageModelConfig = LanguageModelConfig()
    # An earlier run, a checkpoint or its model/, whose trained weights are the start.
    init_from: str | None = None


class PromptsConfig(Section):
    """Names of templates in data/prompts.py, or templates; none: no prompt (a question stays)."""

    caption: str = "describe"  # before a caption
    vqa: str = "question"  # around a question
    # auto: as the user's turn of the language model's chat template, where it has one.
    chat: Literal["auto", "none"] = "auto"


class DecodingConfig(Section):
    """How an answer is written."""

    max_new_tokens: Positive = 40  # where it is cut
    min_new_tokens: NonNegative = 0  # no end before
    beams: Positive = 1  # 1: greedy
    length_penalty: Number = 1.0  # beams: above 0 favours longer ones


class GenerateConfig(Section):
    """How answers are written, by task."""

    caption: DecodingConfig = DecodingConfig(max_new_tokens=40)
    vqa: DecodingConfig = DecodingConfig(max_new_tokens=10)


class EarlyStopConfig(Section):
    """When a run has stopped getting better."""

    metric: str | None = None  # a figure of the dev sets, as dev/CIDEr; null: it never stops early
    patience: Positive = 3  # evaluations without a better one


class TrainConfig(Section):
    """The training loop."""

    epochs: Positive = 5  # passes over data.train
    max_steps: Positive | None = None  # stop earlier; the schedule still ends at `epochs`
    global_batch: Positive = 32  # images a step, over all ranks and micro-batches
    micro_batch: Positive = 32  # images at a time on one rank
    # BLIP-2's first stage: the Q-Former alone learns from captions, without a language model, by
    # itc (contrast) and, where it stands beside it, lm (captioning); null: through the language
    # model, as all answers need it.
    objective: tuple[Objective, ...] | None = None
    learning_rate: Above0 = 1e-4  # its peak
    bridge_learning_rate: Above0 | None = None  # null: as learning_rate, which LoRA wants higher
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    warmup: Fraction = 0.03  # share of all steps
    final_learning_rate: Fraction = 0.0  # share of the peak where the cosine ends
    weight_decay: From0 = 0.05  # AdamW's; not of biases, norms, query tokens, per-token means
    betas: tuple[Below1, Below1] = (0.9, 0.98)  # AdamW's
    clip_norm: Above0 | None = 1.0  # of the gradient; null: not clipped
    label_smoothing: Fraction = 0.0  # share of the target's weight spread over all words
    eos_loss_weight: From0 = 1.0  # of the end of an answer against a word
    # auto: bf16 where the GPU has it, fp16 by parts on a T4, fp32 on a CPU.
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # The same bits for the same seed on a GPU too, at a price; a CPU gives them without.
    deterministic: bool = False
    # Encoder and bridge compiled by torch for training: the first steps take minutes, the others
    # less; losses differ in the last digits. Not with ZeRO-3.
    compile: bool = False
    activation_checkpointing: bool = False  # less memory: activations are computed twice
    evaluate_every: Positive | None = None  # steps; null: at the end of each epoch
    save_every: Positive | None = None  # steps; null: at the end of each epoch
    keep_checkpoints: Positive = 2  # the newest so many, and the best one
    log_every: Positive = 10  # steps
    max_skipped_in_a_row: Positive = 10  # steps that are not finite before the run stops
    # Steps between looks of the gate at few images; null: at evaluations alone.
    image_use_every: Positive | None = 200
    stop_if_image_ignored: bool = False  # end the run at such a verdict after the first epoch
    # Of several processes: seconds of silence of one, while the others wait for it, until it is
    # told with what it did last; a stopped process is silent, a busy one is not.
    rank_warning_seconds: Above0 = 60
    rank_timeout_seconds: Above0 = 300  # the same until the run is ended
    # A checkpoint also after so many minutes, written while training goes on; less often where
    # that would cost more than 3.5% of the time; null: by steps and epochs alone.
    save_minutes: Above0 | None = 10.0
    # A figure of the dev sets, as dev/CIDEr, by which the best checkpoint is kept too.
    keep_best: str | None = None
    early_stop: EarlyStopConfig = EarlyStopConfig()
    # A folder elsewhere, as s3://BUCKET/RUN, to which every checkpoint is copied.
    copy_to: str | None = None
    copy_wait: From0 = 60.0  # seconds that the end of a run waits for the last copy
    # What --resume does over shards that are others now; changed: goes on at the next epoch.
    resume_data: Literal["same", "changed"] = "same"


class EvaluationConfig(Section):
    """Scores and the proof that images are used."""

    batch_images: Positive = 64  # images at a time
    # Images of each dev set that are scored during training; null: all.
    dev_images: Positive | None = 400
    # Texts of each set and task, at most 4 an image (of captions a quarter as many), on which
    # images are exchanged and left out.
    counterfactual_texts: Positive = 1200
    # Images of each set whose caption is looked for among those of the 99 most alike ones.
    recall_images: Positive = 300
    # Images of each set and task whose tiles are shuffled and patches left out, beside the verdict;
    # 0: none.
    space_images: NonNegative = 100
    # The same as counterfactual_texts during training, where it must cost little.
    dev_counterfactual_texts: NonNegative = 400
    # Images of each dev set for train.image_use_every: one text of each task and image.
    small_gate_images: Positive = 32
    show_images: Positive = 8  # the same images after each epoch, with what the model says
    # Images of report.html for each task on which it is shown where the model looked; 0: none.
    look_images: NonNegative = 6
    confidence: Between0And1 = 0.95  # of the intervals
    bootstrap: Positive = 1000  # resamples over images


class TrackingConfig(Section):
    """Where figures go beside metrics.jsonl in the output folder."""

    kind: Literal["mlflow", "none"] = "mlflow"  # none needs no mlflow
    uri: str | None = None  # null: MLFLOW_TRACKING_URI, else SQLite in the output folder
    experiment: str | None = None  # MLflow's; null: MLFLOW_EXPERIMENT_NAME, else harness
    run_name: str | None = None  # null: MLFLOW_RUN_NAME, else the config's name
    parent_run_id: str | None = None  # the MLflow run whose child this is; `harness ablate` sets it
    # At the end of training the model is exported to OUT/export and registered in MLflow, under the
    # config's name, as one that answers a picture and a prompt.
    log_model: bool = False
    # Seconds that the end of a run waits in all for the store; `harness sync RUN` sends the rest.
    last_wait: From0 = 30.0


class Config(Section):
    """A whole experiment."""

    name: str  # of the experiment
    out: str | None = None  # the output folder; null: runs/NAME
    seed: NonNegative = 0  # of everything that is drawn
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    generate: GenerateConfig = GenerateConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    known_mistakes: KnownMistakesConfig = KnownMistakesConfig()

    @model_validator(mode="before")
    @classmethod
    def _older_keys(cls, document: Any) -> Any:
        return at_their_new_place(document) if isinstance(document, Mapping) else document

    @model_validator(mode="after")
    def _batch_takes_of_each_lane(self) -> Config:
        if self.train.global_batch % self.data.lanes:
            batch = f"train.global_batch {self.train.global_batch}"
            raise ValueError(
                f"data.lanes is {self.data.lanes} and {batch}: a batch takes as many images of "
                "each lane, so the lanes must divide it"
            )
        return self

    @model_validator(mode="after")
    def _only_decoders_make_it(self) -> Config:
        if self.model.lm.has_encoder and self.known_mistakes.bos != "always":
            raise ValueError("known_mistakes.bos is a mistake of kind decoder, model.lm.kind is t5")
        return self

    @model_validator(mode="after")
    def _first_stage_is_a_qformers(self) -> Config:
        if self.train.objective is None:
            return self
        bridge = self.model.bridge
        wrong = {
            "train.objective": self.train.objective not in (("itc",), ("itc", "lm")),
            "model.bridge.kind": bridge.kind != "qformer",
            "model.bridge.question_aware": bridge.question_aware,
            "model.bridge.trainable": bridge.trainable is not True,
            "train.compile": self.train.compile,
            "train.activation_checkpointing": self.train.activation_checkpointing,
            "train.stop_if_image_ignored": self.train.stop_if_image_ignored,
            "tracking.log_model": self.tracking.log_model,
        }
        if keys := [key for key, is_wrong in wrong.items() if is_wrong]:
            raise ValueError(
                f"train.objective is that of a first stage, which does not go with this "
                f"{', '.join(keys)}: it trains a whole Q-Former that reads no question, by [itc] "
                "or [itc, lm], and gives no answers"
            )
        return self

    @property
    def out_dir(self) -> Path:
        return Path(self.out or f"runs/{self.name}")
