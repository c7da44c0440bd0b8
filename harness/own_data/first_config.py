"""A first config for one's own data: five answers -> a YAML file with the reason for each size.

Sizes follow from what the shards hold, from the device, and where the models are at hand from what
`harness plan` says of them.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from harness.checks import check_models, without_dev
from harness.config.encoder import PACKAGES
from harness.config.load import parse_yaml, validated
from harness.config.schema import Config
from harness.config.splits import with_splits_named
from harness.errors import ConfigError
from harness.machine.devices import GIB, Device, device
from harness.model.preprocessing import own_preprocessing, read_json
from harness.redact import masked
from shards.files import ShardError, is_remote, write_whole
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Text

TOY = "toy"
CLIP = "openai/clip-vit-base-patch32"
# of the pictures that they were trained on
PACKAGE_SIZES = dict(zip(PACKAGES, (224, 240, 260), strict=True))
LOOKED_AT = 500  # records whose texts are measured
# Characters of a token, at the least: English tokens of T5 and GPT-2 have four and more.
CHARACTERS_OF_A_TOKEN = 3
MOST_TOKENS = 256
TOY_STEPS = 150
FEWEST_STEPS = 500
FEWEST_EPOCHS = 5
MOST_EPOCHS = 30  # few pictures are known by heart by then
EVALUATIONS = 3  # of a run whose epochs are short
# GiB of a GPU's memory -> pictures at a time, where the models are not at hand to be planned with
GUESSED = ((17, 16), (25, 32), (48, 64), (math.inf, 128))
_FAST = "pictures to learn from, to nearly the encoder's own pixels for half the work"
Task = Literal["captions", "questions"]
TASKS: dict[Task, str] = {"captions": "caption", "questions": "vqa"}


@dataclass(frozen=True)
class Answers:
    """What `harness init` asks."""

    task: Task
    data: str  # a folder of splits, or a set
    device: str  # as `harness plan` takes it: here, cpu, t4, ...
    lm: str  # id of the hub, folder, or toy
    out: Path  # the file to write; the run goes to runs/ and its name
    vision: str = CLIP


@dataclass(frozen=True)
class Found:
    """What the shards hold: images by split, tasks, the longest prompt and target in characters."""

    images: dict[str, int]
    tasks: frozenset[str]
    prompt: int
    target: int


@dataclass(frozen=True)
class Sizes:
    """What follows from data, device and models; `why` of the micro-batch."""

    epochs: int
    global_batch: int
    micro_batch: int
    evaluate_every: int | None
    why: str


def task_of(answer: str) -> Task:
    """Returns the task that an answer, or its beginning, names. Raises ConfigError."""
    for task in TASKS:
        if answer and task.startswith(answer.lower()):
            return task
    raise ConfigError(f"found {answer!r}, expected {' or '.join(TASKS)}")


def default_lm(chosen: Device) -> str:
    """Returns the language model to suggest: what trains within hours on such a device."""
    if not chosen.is_gpu:
        return TOY
    return "google/flan-t5-large" if chosen.memory > 20 * GIB else "google/flan-t5-base"


def write_first_config(answers: Answers) -> list[str]:
    """Writes the config, and returns sentences on it: what was found, what is guessed, what to type
    next.

    Raises ConfigError or ShardError for answers that do not fit what is there.
    """
    out = answers.out
    if out.exists():
        raise ConfigError(f"{out} is there already: remove it, or choose another file")
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{out}: expected the name of a YAML file, as in mine.yaml")
    found = look(answers.data)
    if TASKS[answers.task] not in found.tasks:
        other = next(word for word, task in TASKS.items() if task in found.tasks)
        raise ConfigError(f"{masked(answers.data)} holds {other}, and no {answers.task}")
    sizes = _sizes(answers, found)
    config = _config(_text(answers, found, sizes), out)
    said: list[str] = []
    if answers.lm != TOY:
        try:
            check_models(config)
            sizes = _planned(config, sizes, answers.device)
        except ConfigError as error:
            said = [f"the models are not at hand, so sizes are guessed: {error}"]
    write_whole(out, _text(answers, found, sizes).encode())
    counts = ", ".join(f"{count:,} in {part}" for part, count in found.images.items())
    return [f"{out}: for {counts}", *said, *without_dev(config), *_next(answers)]


def look(place: str) -> Found:
    """Returns what the shards of a folder of splits, or of one set, hold. Raises ShardError,
    ConfigError.
    """
    named = _data(place)
    data = Config(name="-", data=with_splits_named({"data": named})["data"]).data
    parts = {"train": data.train, "dev": data.dev, "test": data.test}
    opened = {part: [Manifest.open(one.path) for one in sets] for part, sets in parts.items()}
    train = opened["train"][0]
    train.check_texts()
    reader = Reader(train)
    texts: list[Text] = []
    for index in range(0, train.samples, max(1, train.samples // LOOKED_AT)):
        try:
            texts += reader.read(index).known.texts
        except ShardError:  # the run names what it cannot read
            continue
    return Found(
        {part: sum(one.samples for one in sets) for part, sets in opened.items() if sets},
        frozenset(text.task for text in texts),
        max((len(text.prompt or "") for text in texts), default=0),
        max((len(words) for text in texts for words in text.targets), default=1),
    )


def _data(place: str) -> dict[str, Any]:
    return {"train": [{"path": place}]} if is_remote(place) else {"folder": place}


def _sizes(answers: Answers, found: Found) -> Sizes:
    """Returns sizes without a look at the models."""
    chosen = device(answers.device)
    images = found.images["train"]
    toy = answers.lm == TOY
    batch = 8 if images < 200 else 16 if toy else 32
    micro = 16 if toy else 4
    why = "at a time"
    if chosen.is_gpu:
        micro = next(many for gib, many in GUESSED if chosen.memory < gib * GIB)
        why = "at a time: a guess, which `harness plan` will check"
    steps = math.ceil(images / batch)
    wanted = math.ceil((TOY_STEPS if toy else FEWEST_STEPS) / steps)
    epochs = min(max(FEWEST_EPOCHS, wanted), MOST_EPOCHS)
    every = math.ceil(steps * epochs / EVALUATIONS) if epochs > 3 * EVALUATIONS else None
    return Sizes(epochs, batch, min(micro, batch), every, why)


def _planned(config: Config, sizes: Sizes, name: str) -> Sizes:
    """Returns them with the micro-batch that `harness plan` finds room for. Raises ConfigError."""
    from harness.plan.plan import plan  # brings torch

    made = plan(config, name)
    largest = made.largest_micro_batch
    if made.refused or not largest:
        raise ConfigError(made.refused or "; ".join(made.advice) or "the plan finds no room")
    micro = 2 ** int(math.log2(min(largest, sizes.global_batch)))
    return replace(sizes, micro_batch=micro, why=f"at a time; {largest:,} would fit {made.device}")


def _next(answers: Answers) -> list[str]:
    """Returns the commands to type next."""
    file = answers.out
    lines = [f"harness shards view {masked(answers.data)} --config {file}"]
    lines += [f"harness doctor {file}", f"harness train {file}"]
    if answers.lm == TOY:
        lines.insert(0, _base_lm(answers))
    return ["next:", *(f"  {line}" for line in lines)]


def _base_lm(answers: Answers) -> str:
    train = config_sets(answers.data)
    out = f"runs/{answers.out.stem}_lm"
    return f"harness base-lm {train} --config {answers.out} --steps 60 --out {out}"


def config_sets(place: str) -> str:
    """Returns the set that is learnt from."""
    return with_splits_named({"data": _data(place)})["data"]["train"][0]["path"]


def _config(text: str, out: Path) -> Config:
    return validated(Config, with_splits_named(parse_yaml(text, str(out))), out)


def _tokens(characters: int) -> int:
    """Returns room for the longest text, a multiple of 8."""
    return min(MOST_TOKENS, 8 * math.ceil((characters / CHARACTERS_OF_A_TOKEN + 2) / 8))


def _plain(value: str) -> str:
    """Returns a text as YAML takes it, quoted where it could be read as something else."""
    return value if re.fullmatch(r"[A-Za-z_./][\w./\-]*", value) else json.dumps(value)


def _kind(lm: str) -> str:
    """Returns t5 or decoder: what a folder says of itself, else by the name."""
    file = Path(lm).expanduser() / "config.json"
    kind = lm.rpartition("/")[2].lower()
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = str(found.get("model_type"))
        if kind != "t5" and found.get("is_encoder_decoder"):
            raise ConfigError(
                f"{lm} is a {kind}: a language model here is a T5 or a decoder alone, as GPT-2, "
                "OPT, Llama or Qwen"
            )
    return "t5" if "t5" in kind else "decoder"


def _vision(vision: str) -> str:
    """Returns kind, id and size of an encoder: what its files say of it, else by its name."""
    if vision in PACKAGES:
        return f"kind: {vision}, image_size: {PACKAGE_SIZES[vision]}"
    folder = Path(vision).expanduser()
    named: dict[str, Any] = {"model_type": "clip" if "clip" in vision.lower() else "auto"}
    said: dict[str, Any] = (
        read_json(vision, "config.json", None) if folder.is_dir() else None
    ) or named
    kind = "clip" if str(said["model_type"]).startswith("clip") else "auto"
    in_name = re.search(r"-(\d{3})$", vision)
    size = int(in_name[1]) if in_name else 224
    if kind == "clip":
        size = said.get("vision_config", said).get("image_size", size)
    else:
        with suppress(ConfigError):  # which `check_models` tells
            size = own_preprocessing(vision, None).fit.side
    return f"kind: {kind}, id: {_plain(vision)}, image_size: {size}"


def _text(answers: Answers, found: Found, sizes: Sizes) -> str:
    """Returns the file, each line with its reason."""
    name = answers.out.stem
    captions = answers.task == "captions"
    steps = math.ceil(found.images["train"] / sizes.global_batch) * sizes.epochs
    counts = ", ".join(f"{count:,} in {part}" for part, count in found.images.items())
    place = f"train: [{{path: {_plain(answers.data)}}}]"
    if not is_remote(answers.data):
        place = f"folder: {_plain(answers.data)}"
    prompt = "prompts: {caption: photo}" if captions else "prompts: {vqa: question}"
    said = "caption: {max_new_tokens: %d, beams: 3}" if captions else "vqa: {max_new_tokens: %d}"
    longest = _tokens(found.target)
    lines = [
        f"# Made by `harness init` for {answers.task} on {answers.device}. Every key and its",
        "# meaning: `harness config`, or `harness config train.epochs`. Then:",
        *(f"# {line.strip()}" for line in _next(answers)[1:]),
        f"name: {_plain(name)}  # the run goes to runs/{name}",
        "data:",
        f"  {place}  # pictures: {counts}",
        f"  max_prompt_tokens: {_tokens(found.prompt + 40)}  # a longer prompt is cut, and counted",
        f"  max_target_tokens: {longest}  # the longest here has {found.target} characters",
        *([] if answers.lm == TOY else [f"  resize: fast  # {_FAST}"]),
        *_model(answers),
        f"{prompt}  # or a sentence of your own, with {{question}} for questions",
        "generate:",
        f"  {said % longest}  # where an answer is cut",
        "train:",
        f"  epochs: {sizes.epochs}  # {steps:,} steps",
        f"  global_batch: {sizes.global_batch}  # pictures a step",
        f"  micro_batch: {sizes.micro_batch}  # {sizes.why}",
        f"  learning_rate: {'8.0e-4' if answers.lm == TOY else '1.0e-4'}  # its peak",
        "  warmup: 0.05  # share of the steps in which it rises",
    ]
    if sizes.evaluate_every:
        lines.append(f"  evaluate_every: {sizes.evaluate_every}  # steps; epochs are short here")
        lines.append(f"  save_every: {sizes.evaluate_every}  # steps")
    return "\n".join(lines) + "\n"


def _model(answers: Answers) -> list[str]:
    """Returns the section of the three parts."""
    if answers.lm == TOY:
        return [
            "model:",
            "  # Nothing is downloaded: an encoder from a package, and a small T5 that `harness",
            "  # base-lm` trains on the texts alone. It shows the whole way; it is no good model.",
            "  vision: {kind: efficientnet_lite0, image_size: 128}",
            "  bridge: {query_tokens: 16, layers: 2, width: 128, heads: 4}",
            f"  lm: {{id: {_plain(f'runs/{answers.out.stem}_lm')}, tuning: full, dropout: 0.1}}",
        ]
    lm = f"kind: {_kind(answers.lm)}, id: {_plain(answers.lm)}"
    return [
        "model:",
        f"  vision: {{{_vision(answers.vision)}}}  # frozen",
        "  bridge: {query_tokens: 32, layers: 2, width: 768, heads: 12}  # what is trained",
        f"  lm: {{{lm}, tuning: qlora}}  # frozen in 4 bits, with LoRA",
    ]
