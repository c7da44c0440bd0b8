"""The whole experiment as frozen, validated dataclasses: load a YAML file, override by `key=value`, dump it again.

Every key a config may have is a field below, with its unit and its default. Nothing else is accepted: a wrong key is
answered with the closest right one. Imports no torch, so that `harness --help` and every check before a launch is fast.
"""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from harness.errors import ConfigError


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


S = TypeVar("S", bound="Section")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=(), allow_inf_nan=False)


class DataSet(Section):
    """One set of shards. `weight` is its share of a mixture; without weights every record comes once an epoch."""

    path: str
    weight: Above0 | None = None


class Data(Section):
    train: tuple[DataSet, ...] = ()
    dev: tuple[DataSet, ...] = ()  # scored during training; everything is chosen on it
    test: tuple[DataSet, ...] = ()  # scored by `harness evaluate`, at the end
    texts_per_image: Positive | None = None  # texts drawn of each image per epoch; none: all of them
    answer: Literal["most_common", "drawn"] = "most_common"  # vqa training target; drawn: by annotator frequency
    max_prompt_tokens: Positive = 64
    max_target_tokens: Positive = 48
    loss_on_padding: bool = False  # targets padded to max_target_tokens and trained on: docs/why-is-my-caption-empty.md
    train_images: Positive | None = None  # the first so many of epoch 0, in every epoch; none: all of them
    window_shards: Positive = 8  # samples are shuffled inside a window of this many shards
    last_batch: Literal["short", "fill", "drop"] = "short"
    workers: NonNegative = 0  # reading processes per rank
    prefetch: Positive = 2  # batches read ahead per worker
    cache_dir: str | None = None  # remote shards only
    cache_gb: Above0 = 20.0
    max_image_pixels: Positive = 50_000_000  # larger images are refused as damaged or hostile


class Vision(Section):
    kind: Literal["clip", "efficientnet_lite0"] = "clip"
    id: str = "openai/clip-vit-base-patch32"  # hub id or local folder (unused by efficientnet_lite0)
    revision: str | None = None
    layer: int = -2  # which hidden state of CLIP; -1 is the last
    image_size: Positive = 224  # pixels, both sides


class Bridge(Section):
    kind: Literal["qformer", "mean_pool", "linear"] = "qformer"
    query_tokens: Positive = 32
    layers: Positive = 2
    width: Positive = 768
    heads: Positive = 12
    cross_attention_frequency: Positive = 1  # every how many layers the queries look at the image
    dropout: Fraction = 0.0
    # false: frozen whole at its random start, the control experiment; projection: all of it but the projection
    trainable: bool | Literal["projection"] = True
    question_aware: bool = False  # the queries read the prompt too (InstructBLIP)
    init_from: str | None = None  # hub id or folder of BERT, or of a BLIP-2, whose weights the Q-Former starts from

    @model_validator(mode="after")
    def _fits_together(self) -> Bridge:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.kind != "qformer" and (self.question_aware or self.init_from):
            raise ValueError(f"question_aware and init_from are keys of kind qformer, this is {self.kind}")
        return self


class Lora(Section):
    r: Positive = 16
    alpha: Above0 = 32.0
    dropout: Fraction = 0.0
    targets: Literal["all_linear"] | tuple[str, ...] = "all_linear"


class LanguageModel(Section):
    kind: Literal["t5", "gpt2"] = "t5"
    id: str = "google/flan-t5-base"  # hub id or local folder
    revision: str | None = None
    tuning: Literal["qlora", "lora", "frozen", "full"] = "qlora"
    lora: Lora = Lora()
    dropout: Fraction = 0.0  # in the base itself, for one that is trained whole on few texts
    cross_attention: bool = False  # gpt2: new layers look at the image tokens, which else stand before the prompt
    bos: Literal["always", "generation_only"] = "always"  # gpt2: generation_only is a known mistake, as loss_on_padding

    @model_validator(mode="after")
    def _only_gpt2_has_it(self) -> LanguageModel:
        if self.kind != "gpt2" and (self.cross_attention or self.bos != "always"):
            raise ValueError(f"cross_attention and bos are keys of kind gpt2, this is {self.kind}")
        return self


class Model(Section):
    vision: Vision = Vision()
    bridge: Bridge = Bridge()
    lm: LanguageModel = LanguageModel()
    init_from: str | None = None  # an earlier run, a checkpoint or its model/: whose trained weights are the start


class Prompts(Section):
    """Names of templates in prompts.py, or a template of one's own; "none" leaves the prompt out (a question stays)."""

    caption: str = "describe"
    vqa: str = "question"


class Decoding(Section):
    max_new_tokens: Positive = 40
    min_new_tokens: NonNegative = 0
    beams: Positive = 1
    length_penalty: Number = 1.0


class Generate(Section):
    caption: Decoding = Decoding(max_new_tokens=40)
    vqa: Decoding = Decoding(max_new_tokens=10)


class Train(Section):
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
    image_use_every: Positive | None = 200  # steps between looks of the gate at few images; none: at evaluations alone
    stop_if_image_ignored: bool = False


class Evaluation(Section):
    batch_images: Positive = 64
    dev_images: Positive | None = 400  # images scored during training; none: all
    counterfactual_texts: Positive = 2000  # of each task, on which the images are shuffled, blanked and left out
    dev_counterfactual_texts: NonNegative = 400  # the same during training, where it must cost little
    small_gate_images: Positive = 32  # of the dev sets, for train.image_use_every: one text of each task and image
    show_images: Positive = 8  # the same images after each epoch, with what the model says
    confidence: Annotated[Number, Field(gt=0, lt=1)] = 0.95
    bootstrap: Positive = 1000  # resamples over images


class Tracking(Section):
    kind: Literal["mlflow", "none"] = "mlflow"
    uri: str | None = None  # none: MLFLOW_TRACKING_URI, else sqlite in the output folder
    experiment: str = "harness"
    run_name: str | None = None  # none: the config's name
    parent_run_id: str | None = None  # the MLflow run whose child this one is, as `harness ablate` says


class Config(Section):
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


def shipped(kind: Literal["configs", "launch"]) -> Path:
    """The folder of the experiments or launchers that come with harness, in a wheel or in a source checkout."""
    here = Path(__file__).resolve().parent
    inside = here / kind  # where the wheel puts it
    return inside if inside.is_dir() else here.parent / kind


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, changed by overrides such as `train.epochs=2`.

    `path` may also be the bare name of a shipped experiment (`demo`, or `configs/demo.yaml` where that is not a file).
    Raises ConfigError naming the file, the dotted key, the value found and what is expected.
    """
    file = find(path)
    return validated(Config, apply_overrides(read_yaml(file), overrides), file, overrides)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError naming the file."""
    try:
        document = yaml.load(file.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        why = " ".join(str(error).replace(' in "<unicode string>",', ",").split())
        raise ConfigError(f"{file}: is not YAML: {why}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{file}: found {_short(document)}, expected a mapping of keys such as name, data, model")
    return document


def validated(kind: type[S], document: Mapping[str, Any], file: Path, overrides: Sequence[str] = ()) -> S:
    """The document as a section of that kind. Raises ConfigError naming the file, or the override that was wrong."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        message, key = _explain(error, kind)
        given = next((o for o in overrides if key == (name := o.partition("=")[0]) or key.startswith(name + ".")), None)
        where = f"override {given!r}" if given else str(file)
        raise ConfigError(f"{where}: {message}") from error


def parse_override(override: str) -> tuple[list[str], Any]:
    """`train.epochs=2` -> (["train", "epochs"], 2); the value is read as YAML. Raises ConfigError."""
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: expected key=value, for instance train.epochs=2")
    try:
        return parts, yaml.load(value, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error


def apply_overrides(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the document with each `key=value` put in place; `data.train.0.path=DIR` reaches into a list."""
    changed = copy.deepcopy(dict(document))
    for override in overrides:
        parts, value = parse_override(override)
        at: Any = changed
        for depth, part in enumerate(parts):
            where, last = ".".join(parts[:depth]), depth == len(parts) - 1
            if isinstance(at, list):
                if not part.isdecimal() or int(part) >= len(at):
                    expected = f"a list of {len(at)}, found {part!r}, expected a position in it"
                    raise ConfigError(f"override {override!r}: {where} is {expected}")
                part = int(part)
            elif not isinstance(at, dict):
                raise ConfigError(f"override {override!r}: {where} is {_short(at)}, it holds no keys")
            elif at.get(part) is None and not last:
                at[part] = {}
            if last:
                at[part] = value
            at = at[part]
    return changed


def dump(config: Config) -> str:
    """The whole config, defaults included, as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, in the order of the fields; every key can be used as an override."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for position, inner in enumerate(value):
                yield from walk(f"{prefix}.{position}", inner)
        else:
            yield prefix, value

    return dict(walk("", config.model_dump(mode="json")))


class _StrictLoader(yaml.SafeLoader):
    """yaml.safe_load, but a key written twice in one section is an error: YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def find(path: str | Path, folder: str = "configs") -> Path:
    """A YAML file by its path, or a shipped one of `folder` by its bare name. Raises ConfigError."""
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder, expected a YAML file")
    ours = {f.stem: f for f in sorted((shipped("configs") / folder.partition("/")[2]).glob("*.yaml"))}
    if str(file.parent) in (".", folder) and file.suffix in ("", ".yaml") and file.stem in ours:
        return ours[file.stem]
    near = difflib.get_close_matches(file.stem, ours, n=1)
    hint = f"did you mean {folder}/{near[0]}.yaml?" if near else f"the shipped ones are {', '.join(ours)}"
    raise ConfigError(f"{file}: no such config file; {hint}")


def _explain(error: ValidationError, root: type[Section]) -> tuple[str, str]:
    """The first problem in one sentence, and its dotted key. A wrong key goes first: it is often why another lacks."""
    errors = error.errors()
    unknown = [problem for problem in errors if problem["type"] in ("extra_forbidden", "invalid_key")]
    first = (unknown or errors)[0]
    path = _field_path(first["loc"])
    key = ".".join(map(str, path))
    if unknown:
        return f"no key {key}; {_closest(path, root)}", key
    if first["type"] == "missing" and isinstance(path[-1], str):
        return f"{key} is missing: the config needs it", key
    if first["type"] == "value_error":
        return f"{key or 'the config'}: {first['ctx']['error']}", key
    here = [problem for problem in errors if _field_path(problem["loc"]) == path]
    expected = " or ".join(dict.fromkeys(_expected(problem, root) for problem in here))
    return f"{key}: found {_short(first['input'])}, expected {expected}", key


def _expected(problem: Mapping[str, Any], root: type[Section]) -> str:
    if problem["type"] == "model_type":
        return f"a section with keys such as {', '.join(list(_section_at(problem['loc'], root).model_fields)[:3])}"
    if problem["type"] == "missing":  # of a list with a fixed length
        return "one value more"
    text = problem["msg"].removeprefix("Input should be ").partition(", unable to")[0]
    return text.replace("a valid integer", "an integer").replace("valid tuple", "list").replace("valid ", "")


def _section_at(location: Sequence[str | int], root: type[Section]) -> type[Section]:
    """The deepest section on the way to a location: its keys are the valid ones there."""

    def inner(annotation: Any) -> type[Section] | None:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation
        return next(filter(None, map(inner, get_args(annotation))), None)

    section = root
    for part in location:
        if part in section.model_fields:
            section = inner(section.model_fields[part].annotation) or section
    return section


def _field_path(location: Sequence[str | int]) -> list[str | int]:
    """A location up to where pydantic names the member of a union, such as `literal['all_linear']`."""
    return list(itertools.takewhile(lambda part: "[" not in str(part), location))


def _closest(location: Sequence[str | int], root: type[Section]) -> str:
    section, *above, wrong = _section_at(location[:-1], root), *location
    here = {key: ".".join(map(str, [*above, key])) for key in section.model_fields}
    everywhere = {key.rpartition(".")[2]: key for key in flatten(Config(name="-"))}
    for known in (here, everywhere) if root is Config else (here,):
        if near := difflib.get_close_matches(str(wrong), known, n=1):
            return f"did you mean {known[near[0]]}?"
    return f"the keys there are {', '.join(here)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
