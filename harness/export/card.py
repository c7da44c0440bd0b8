"""The model card of an export, README.md, written from the run: what it was trained on, how, what
it scores beside its floors, the proof, and what is not known.

Only figures, names of sets and of models on the hub, and settings go into it: no path, host, user
or URI of the run's home.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from harness import __version__
from harness.checkpoint import Checkpoint
from harness.config.encoder import PACKAGES
from harness.config.schema import Config
from harness.evaluate import FOLDER
from harness.evaluate.report import SCORES, floors, read_scores
from harness.evaluate.told import verdict_lines
from harness.export.effect import Effect
from harness.export.licences import DATA, MODELS, UNKNOWN, licence
from harness.export.proof import Proof
from harness.hub.modeling import LM, VISION
from harness.machine.hardware import hardware
from harness.model.vlm import VLMConfig
from harness.redact import masked_document
from harness.report.pictures import markdown_table
from harness.tracking.journal import every_row
from shards.files import ShardError
from shards.manifest import Manifest

PICTURE = "answers.png"
IN_THE_FOLDER = "in this folder"
# Sections of a config that say how the model came about; of data the limits, and not the places.
SECTIONS = ("seed", "data", "model", "prompts", "generate", "train", "known_mistakes")

USE = """```python
import harness.hub  # registers the classes; or give trust_remote_code=True below
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{place}")
processor = AutoProcessor.from_pretrained("{place}")
inputs = processor(images="photo.jpg", text="What color is it?")  # text=None: a caption
print(processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])
```
"""


@dataclass(frozen=True)
class Story:
    """All that the card is written from."""

    found: Checkpoint
    config: Config  # of the run, its sets where they lie now
    proof: Proof
    effect: Effect | None = None  # of merging, where it was merged
    repository: str | None = None
    has_picture: bool = False

    @property
    def merged(self) -> bool:
        return self.effect is not None

    @property
    def name(self) -> str:
        return self.repository or self.config.name


def card(story: Story, own: VLMConfig) -> str:
    """Returns the text of README.md; `own` is the config in the export."""
    sections = {
        "Scores and verdict": _scores(story),
        "Use": USE.format(place=story.repository or "FOLDER"),
        "What is needed": _needed(own),
        "Parts": _parts(story, own),
        "Data": _data(story),
        "Training": _training(story, own),
        "Proof of this export": _proof(story.proof),
        "Limits": "\n".join(f"- {line}" for line in _limits(story)),
    }
    body = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections.items())
    head = yaml.safe_dump(_front(story, own), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n# {story.name}\n\n{_what(story)}\n\n{body}\n"


def _front(story: Story, own: VLMConfig) -> dict[str, Any]:
    """Returns what the hub reads."""
    tags = ["vl-harness", "vision-language", "visual-question-answering", "image-captioning"]
    bases = [id_ for _, id_, *_ in _named_parts(own) if "/" in id_]
    front = {
        "license": "unknown",  # its author's to choose; what is known of its parts stands below
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": [*tags, "merged"] if story.merged else tags,
        "base_model": bases,
        "datasets": sorted({manifest.dataset for _, manifest in _sets(story.config)}),
    }
    return {key: value for key, value in front.items() if value}


def _what(story: Story) -> str:
    bridge = story.config.model.bridge
    kinds = {"qformer": f"a Q-Former of {bridge.query_tokens} queries", "linear": "a linear map"}
    words = kinds.get(bridge.kind, "mean pooling")
    if bridge.question_aware:
        words += " that reads the question"
    lm = story.config.model.lm
    tuned = {"qlora": "in 4 bits with LoRA", "lora": "with LoRA", "full": "trained whole"}
    how = tuned.get(lm.tuning, "frozen")
    if story.merged:
        how = "with LoRA folded in"
    return (
        f"A small vision-language model: a frozen image encoder ({story.config.model.vision.kind}),"
        f" {words}, and a language model ({lm.kind}, {how}). Trained with harness {__version__}, "
        "which judges whether the answers come from the image."
    )


def _scores(story: Story) -> str:
    """Returns the scores of this checkpoint beside their floors, and the verdict with its
    reason.
    """
    lines = [f"![pictures, answers and truths]({PICTURE})\n"] if story.has_picture else []
    if story.effect:
        lines.append("Measured on this merged model alone:\n")
        lines += [f"- {line}" for line in story.effect.of_the_export()]
        lines.append("\nThe run's scores are those of its unmerged model, and are not shown.")
        return "\n".join(lines)
    file = story.found.home / FOLDER / SCORES
    report = read_scores(file) if file.is_file() else {}
    if report.get("step") != story.found.step:
        lines.append(
            f"Not evaluated at step {story.found.step}: no score and no verdict are known."
        )
        return "\n".join(lines)
    for task, figures in report["tasks"].items():
        lines.append(markdown_table(floors(figures), [task, "value"]))
        lines += ["```", *verdict_lines(task, figures), "```", ""]
        if figures.get("reason"):
            lines.append(f"{figures['reason']}.\n")
    confidence = story.config.evaluation.confidence
    lines.append(f"In brackets: {confidence:.0%} intervals, over {report['images']:,} pictures.")
    return "\n".join(lines)


def _needed(own: VLMConfig) -> str:
    vision = own.model["vision"]
    package = PACKAGES.get(vision["kind"])
    more = f", and `{package}`" if package else ""
    if package and not vision.get("weights"):
        more += " with the encoder's weights"
    return (
        f"The Python package of harness ({__version__} or later; its distribution is called "
        f"vl-harness){more}. With `trust_remote_code=True` transformers runs `vl_harness.py`, "
        "which imports that package and holds nothing else."
    )


def _named_parts(own: VLMConfig) -> Iterator[tuple[str, str, str, str]]:
    """Yields what each frozen part is, by what name, revision and hash it is known."""
    encoder = own.encoder
    lm = own.model["lm"]
    for what, id_, local, revision, digest in (
        ("image encoder", encoder["id"], VISION, encoder.get("revision"), encoder["hash"]),
        ("language model", lm["id"], LM, lm.get("revision"), own.lm_hash),
    ):
        name = IN_THE_FOLDER if id_ == local else id_
        yield what, name, revision or "", digest


def _parts(story: Story, own: VLMConfig) -> str:
    rows = []
    for what, name, revision, digest in _named_parts(own):
        known = UNKNOWN if name == IN_THE_FOLDER else licence(name, MODELS)
        rows.append([what, name, revision or "-", f"`{digest[:16]}`", known])
    table = markdown_table(rows, ["part", "from", "revision", "sha256", "licence"])
    once = story.config.model.lm.id
    if story.merged and not Path(once).is_dir():
        table += f"\nThe language model is {once} with this run's LoRA folded in."
    return table


def _sets(config: Config) -> Iterator[tuple[str, Manifest]]:
    """Yields the use and the index of each set of the run that can still be read."""
    for use in ("train", "dev", "test"):
        for dataset in getattr(config.data, use):
            try:
                yield use, Manifest.read_index(dataset.path)
            except (ShardError, OSError):  # counted in `_data`
                continue


def _data(story: Story) -> str:
    rows = [
        [
            use,
            f"{manifest.dataset}/{manifest.split}",
            f"{manifest.samples:,}",
            f"{manifest.texts:,}",
            f"`{manifest.digest[:16]}`",
            licence(manifest.dataset, DATA),
        ]
        for use, manifest in _sets(story.config)
    ]
    data = story.config.data
    lost = len(data.train) + len(data.dev) + len(data.test) - len(rows)
    lines = []
    if rows:
        heads = ["used for", "set", "pictures", "texts", "digest (sha256)", "licence"]
        lines.append(markdown_table(rows, heads))
    if lost:
        lines.append(f"{lost} sets of the run could not be read when this was written.\n")
    digests = [f"`{one['digest'][:16]}`" for one in story.found.state.get("data", [])]
    if digests:
        lines.append(f"Digests of what it was trained on, as the run noted: {', '.join(digests)}.")
    return "\n".join(lines)


def _training(story: Story, own: VLMConfig) -> str:
    state = story.found.state
    hardware = state.get("hardware", "not noted")
    count = state.get("world_size", 1)
    lines = [
        f"- checkpoint: step {story.found.step}",
        f"- hardware: {hardware}, {count} process{'es' if count > 1 else ''}",
        f"- time: {_time(story.found.home, story.found.step)}",
    ]
    document = without_places(story.config, own)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(lines) + f"\n\n```yaml\n{text}```"


def _time(home: Path, step: int) -> str:
    """Returns the time between the first and the last line of the run's journal up to a step."""
    times = [row["time"] for row in every_row(home) if row["step"] <= step]
    if len(times) < 2:
        return "not noted"
    minutes = (times[-1] - times[0]) / 60_000
    return f"{minutes:,.1f} minutes from the first to the last logged figure, pauses included"


def without_places(config: Config, own: VLMConfig) -> dict[str, Any]:
    """Returns the settings of a run, without the places of its home: paths and URIs are left out,
    parts that lie in the export are named so.
    """
    document = config.model_dump(mode="json")
    document["model"] = own.model
    return _told({key: document[key] for key in SECTIONS})


def _told(value: Any) -> Any:
    """Returns a document without lists of sets, and without what is a path or a URI."""
    if isinstance(value, Mapping):
        kept = {key: _told(part) for key, part in value.items() if not _is_place(key, part)}
        return {key: part for key, part in kept.items() if part not in (None, {}, [])}
    return masked_document(value)


def _is_place(key: str, value: Any) -> bool:
    if key in ("train", "dev", "test") and isinstance(value, list):
        return True
    names = ("path", "dir", "copy_to", "uri", "init_from")
    if key.endswith(names):
        return True
    return isinstance(value, str) and ("://" in value or value.startswith(("/", "~", "./", "../")))


def _proof(proof: Proof) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    told = [*proof.lines(), f"loaded in a process of its own by {versions}, on {hardware()}"]
    return "\n".join(f"- {line}" for line in told)


def _limits(story: Story) -> Iterator[str]:
    yield "It answers one question about one picture; it was not trained to converse."
    yield (
        "What it was not shown in training it does not know; a verdict holds for the sets above "
        "and for no others."
    )
    if story.config.model.lm.tuning == "qlora" and not story.merged:
        yield (
            "Its base was in 4 bits (NF4) in training and is loaded so; the adapter on a base in "
            "full precision gives other answers than those scored."
        )
    if story.merged and story.config.model.lm.tuning == "qlora":
        yield "Its LoRA was trained on a base in 4 bits and is folded into the full-precision one."
    yield "The licence of this model is for its author to say; those of parts and data bind it too."
