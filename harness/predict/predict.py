"""`harness predict`: a trained model's answers to pictures that nobody labelled, in a file.

A run or a saved model, pictures and a prompt -> a line of JSON for each answer, or the result file
that EvalAI takes. Threads read and decode ahead; the model answers in batches.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import fact
from harness.config.load import changed_by
from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.features import check_encoder
from harness.data.images import ImageDecoder, cache_of
from harness.errors import ConfigError
from harness.evaluate.predict import answers, by_stratum, set_name
from harness.loading import Opened, opened
from harness.model.vlm import WEIGHTS
from harness.predict.lines import Lines, write_results
from harness.predict.pictures import Picture, Pictures, kind_at, pictures_at
from shards.files import UnreachableError
from shards.read import Sample

AHEAD = 2  # batches that are read and decoded ahead
CHANGEABLE = ("generate.", "data.")
Progress = Callable[[int, int | None], None]  # (pictures done, pictures in all)
Read = tuple[str, Sample | str]  # a picture's name, and what it is or why it cannot be read


@dataclass(frozen=True)
class Predicted:
    """What a call has done."""

    lines: Lines
    damaged: int  # pictures that cannot be read, each named in the file
    passed_over: Sequence[str]  # files that are no pictures by their names
    results: int | None  # entries of the result file, if that was asked for


def predict(
    source: Path | str,
    images: str,
    out: Path,
    *,
    prompt: str | None = None,
    batch_images: int | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
    **parts: Any,
) -> Predicted:
    """Asks the model of `source` about all pictures of `images`, and goes on where OUT stopped.

    `prompt`: one question for all; None: the texts of a set of shards, or a description. OUT is
    FILE.jsonl, or FILE.json for the official result file, beside whose lines it is made.
    `overrides`: `key=value` of the model's generate and data; `parts`: what `opened` takes to find
    the model. Raises ConfigError, ShardError.
    """
    as_results = _checked_out(out)
    found = opened(source, with_vision=kind_at(images) == "images", **parts)
    config = _config(found, overrides)
    pictures = pictures_at(images, prompt, cache_of(config))
    if as_results and not pictures.has_texts:
        raise ConfigError(
            f"--out {out}: a result file has the ids of a set's own texts, and this is "
            f"{'asked --prompt' if prompt else 'a folder without them'}: give FILE.jsonl"
        )
    if pictures.manifest and pictures.manifest.kind == "features":
        check_encoder(pictures.manifest, found.model.config.encoder)
    lines = Lines.open(
        out.with_suffix(".jsonl"),
        {
            "model": _identity(found, config),
            "set": set_name(pictures.manifest) if pictures.manifest else None,
            "asked": prompt,
        },
    )
    size = batch_images or config.evaluation.batch_images
    _ask_all(found, config, pictures, lines, size, progress)
    damaged = lines.written["error"]
    if damaged and not lines.before + lines.written["answer"]:
        raise ConfigError(f"--images {images}: no picture can be read; {lines.path} says why")
    results = write_results(lines, out) if as_results else None
    return Predicted(lines, damaged, pictures.passed_over, results)


def _checked_out(out: Path) -> bool:
    """Returns whether the official result file is asked for. Raises ConfigError."""
    if out.suffix not in (".json", ".jsonl") or out.is_dir():
        raise ConfigError(
            f"--out {out}: expected FILE.jsonl for a line for each answer, or FILE.json for the "
            "file that EvalAI takes"
        )
    return out.suffix == ".json"


def _config(found: Opened, overrides: Sequence[str]) -> Config:
    for given in overrides:
        if not given.startswith(CHANGEABLE):
            raise ConfigError(
                f"{given}: a model answers as it was trained, only {', '.join(CHANGEABLE)}... can "
                "be given"
            )
    return changed_by(found.config.model_dump(mode="json"), overrides, found.folder)


def _identity(found: Opened, config: Config) -> str:
    """Returns a hash of all by which the answers come about, beside the pictures."""
    settings = [config.generate.model_dump(), config.prompts.model_dump()]
    weights = fact(found.folder / WEIGHTS)["sha256"]
    parts = [weights, found.model.config.lm_hash, settings, config.data.max_prompt_tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@torch.no_grad()
def _ask_all(
    found: Opened,
    config: Config,
    pictures: Pictures,
    lines: Lines,
    size: int,
    progress: Progress,
) -> None:
    decode = ImageDecoder.of(config.model.vision, config.data.max_image_pixels)
    collate = Collator.of(config, found.model.tokenizer, training=False)
    done = 0
    for read in _batches(pictures, decode, lines, size):
        samples = {
            name: lines.unanswered(sample, name)
            for name, sample in read
            if isinstance(sample, Sample)
        }
        said = _answered(found, config, collate, samples)
        failed = [{"image": name, "error": why} for name, why in read if isinstance(why, str)]
        if said or failed:
            lines.add(said + failed)
        done += len(read)
        progress(len(lines.done) + done, pictures.count)


def _batches(
    pictures: Pictures, decode: Callable[[Sample], Any], lines: Lines, size: int
) -> Iterator[list[Read]]:
    """Yields what is to be asked, so many pictures at a time, and those that cannot be read."""
    waiting: deque[tuple[str, Future[Sample]]] = deque()
    rest = (picture for picture in pictures.each if picture.name not in lines.done)

    def decoded(picture: Picture) -> Sample:
        sample = picture.read()
        if sample.known.has_picture:
            sample.payload = decode(sample)
        return sample

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        while True:
            while len(waiting) < AHEAD * size and (picture := next(rest, None)):
                waiting.append((picture.name, pool.submit(decoded, picture)))
            if not waiting:
                return
            next_ones = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            yield [(name, _sample_or_reason(future)) for name, future in next_ones]


def _sample_or_reason(future: Future[Sample]) -> Sample | str:
    try:
        return future.result()
    except UnreachableError:
        raise
    except (OSError, ValueError) as error:  # damaged: ImageError, ShardError, RecordError
        return " ".join(str(error).split())


def _answered(
    found: Opened, config: Config, collate: Collator, samples: dict[str, Sample]
) -> list[dict[str, Any]]:
    """Returns a line for each text of these samples, by picture."""
    name_of = {sample.known.key: name for name, sample in samples.items() if sample.known.texts}
    asked = [samples[name] for name in name_of.values()]
    if not asked:
        return []
    model: Any = found.model
    batch = collate.asked(asked).to(model.device)
    tokens = model.bridge_tokens(batch)
    lines: dict[int, dict[str, Any]] = {}
    for stratum, part, rows in by_stratum(batch):
        part_tokens = tokens.with_rows(tokens.token_row_of_C[rows.to(batch.image_of_C.device)])
        decoding = getattr(config.generate, stratum.task)
        told = answers(model, part, decoding, part_tokens)
        for row, said in zip(rows.tolist(), told, strict=True):
            lines[row] = {
                "image": name_of[said.key],
                "image_id": said.image_id if said.dataset else None,
                "text_id": said.text_id or None,
                "task": said.task,
                "question": said.question,
                "prompt": said.prompt,
                "answer": said.answer,
                "ended": said.ended,
            }
    return [lines[row] for row in sorted(lines)]
