"""`harness export`: a run's model as a folder that stands alone, proven and then put in place.

    RUN -> OUT: config.json, model.safetensors, adapter/, tokenizer and processor, lm/ and vision/
    where these were local, README.md (the model card), vl_harness.py

Written beside OUT, loaded again in a fresh process and compared with the run; only what answers as
the run is renamed to OUT, and only that is pushed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import checkpoint
from harness.checkpoint import Checkpoint
from harness.checks import data_sets
from harness.config.schema import Config
from harness.errors import ConfigError
from harness.evaluate.measures import is_right
from harness.evaluate.moved import Move
from harness.export.card import PICTURE, Story, card
from harness.export.contexts import PICTURES, dev_contexts
from harness.export.effect import Effect
from harness.export.parts import write_parts
from harness.export.proof import Measured, Proof, UnprovenError, measure, prove
from harness.export.publish import check_repository, push
from harness.hub.remote import NAME
from harness.loading import load_model, where_found
from harness.model.vlm import WEIGHTS, VLMConfig
from harness.redact import say
from harness.report.pictures import Shown, predictions_picture
from shards.write import folder_beside

MERGE_PICTURES = 64  # on which a merged model's answers and score are compared with the run's
CARD = "README.md"
SHOWN = 12  # pictures in the card
TEXTS = (".json", ".md", ".py", ".jinja", ".txt")
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")  # words of a language


@dataclass(frozen=True)
class Exported:
    """What was written and what was proven of it."""

    out: Path
    checkpoint: Checkpoint
    proof: Proof
    effect: Effect | None  # of a merge, on answers and score
    url: str | None  # of the repository that it was pushed to


@dataclass(frozen=True)
class Wanted:
    """What an export is asked for beside its folder."""

    merge: bool = False  # LoRA folded into the base, a 4-bit one's into its full-precision weights
    push_to_hub: str | None = None  # OWNER/NAME
    public: bool = False  # the repository; else private
    with_pictures: bool = False  # of the dev set, with their answers, in the card


def export(
    run: Path | str,
    out: Path | str,
    wanted: Wanted = Wanted(),
    *,
    which: str | None = None,
    tell: Callable[[object], None] = say,
) -> Exported:
    """Writes a run's newest model (`which`: newest, best or a step), or that of a checkpoint, to
    the folder `out`, which is new or an earlier export.

    Raises ConfigError, ShardError, OSError, and UnprovenError where the export does not answer as
    the run: then `out` is as it was, and nothing is pushed.
    """
    out = Path(out)
    found = checkpoint.at(run, which)
    config = Config(**Move.of(found).config(found.state["config"]))
    check_out(out)
    check_merge(config, wanted.merge)
    if wanted.push_to_hub:
        check_repository(wanted.push_to_hub, wanted.public)
    elif wanted.public:
        raise ConfigError("--public says nothing without --push-to-hub OWNER/NAME")
    model = load_model(found, config)
    pictures = MERGE_PICTURES if wanted.merge else PICTURES
    contexts = dev_contexts(where_found(config, model), model.tokenizer, pictures)
    if wanted.with_pictures and not contexts.has_pictures:
        raise ConfigError(f"--with-pictures: there are none to show, only {contexts.source}")
    own = measure(model, config, contexts)
    with folder_beside(out) as beside:
        write_parts(model, config, beside, merge=wanted.merge)
        proof = prove(beside, own, config, merged=wanted.merge)
        effect = Effect.of(own, proof, config) if wanted.merge else None
        for line in (*proof.lines(), *(effect.lines() if effect else ())):
            tell(line)
        if not proof.holds:
            raise UnprovenError(f"the export does not answer as {run}: {out} is not written")
        story = Story(found, config, proof, effect, wanted.push_to_hub, wanted.with_pictures)
        _write_card(beside, story, own)
        check_tells_nothing(beside, config, found.path)
        put_in_place(beside, out)
    url = None
    if wanted.push_to_hub:
        url = push(out, wanted.push_to_hub, wanted.public)
    return Exported(out, found, proof, effect, url)


def check_out(out: Path) -> None:
    """Raises ConfigError for a place where something else lies than an export of ours."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not is_export(out)):
        raise ConfigError(
            f"{out} is there already and is no export of harness: remove it, or choose another "
            "folder"
        )


def is_export(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (f"{NAME}.py", WEIGHTS, CARD))


def check_merge(config: Config, merge: bool) -> None:
    """Raises ConfigError where there is nothing to merge."""
    tuning = config.model.lm.tuning
    if merge and tuning not in ("lora", "qlora"):
        raise ConfigError(
            f"--merge: this run has no LoRA to fold into its base (model.lm.tuning={tuning}); "
            "export it without"
        )


def put_in_place(beside: Path, out: Path) -> None:
    """Renames the finished folder to `out`; an export that lies there is moved aside first, and
    removed when the new one is in its place.
    """
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(beside, out)
    shutil.rmtree(old, ignore_errors=True)


def _write_card(folder: Path, story: Story, own: Measured) -> None:
    if story.has_picture:
        predictions_picture(_shown(own, story.proof), folder / PICTURE)
    config = VLMConfig.from_pretrained(folder, local_files_only=True)
    (folder / CARD).write_text(card(story, config))


def _shown(own: Measured, proof: Proof) -> list[Shown]:
    """Returns the first pictures of the comparison, with what the export says to each."""
    batch = own.contexts.batch
    items = []
    for picture, said in zip(batch.image_of_C.tolist(), proof.answers, strict=True):
        right = is_right(said.task, said.answer, said.references)
        image = own.contexts.pictures[picture]
        items.append(Shown(image, said.question or "", said.references, said.answer, right))
    return items[:SHOWN]


def check_tells_nothing(folder: Path, config: Config, run: Path) -> None:
    """Raises ConfigError where a text in the folder holds a path or a URI of the run's home: it
    would be published.
    """
    uris = [config.tracking.uri, config.train.copy_to, os.environ.get("MLFLOW_TRACKING_URI")]
    vision = config.model.vision
    parts = [config.model.lm.id, vision.id, vision.weights or "", str(run), str(Path.home())]
    parts.append(str(config.out_dir))
    sets = list(data_sets(config).values())
    places = [str(Path(place).absolute()) for place in (*parts, *sets) if "://" not in place]
    told = [place for place in (*places, *uris, *sets) if place and "/" in place and len(place) > 3]
    for file in folder.rglob("*"):
        if file.suffix not in TEXTS or file.name in VOCABULARIES:
            continue
        text = file.read_text(errors="replace")
        if found := [place for place in told if place in text]:
            raise ConfigError(
                f"{file.relative_to(folder)} would tell {found[0]!r}, a place of this machine: "
                "take it out of what the run was given (name, prompts, names of sets)"
            )
