"""The file of answers: a line of JSON for each, appended as they come, gone on with after a stop.

    {"image": "a/b.jpg", "image_id": null, "text_id": null, "task": "vqa",
     "question": "What is it?", "prompt": "Question: What is it? Answer:", "answer": "a dog",
     "ended": true, "model": "1f0c...", "set": null, "asked": "What is it?"}
    {"image": "c.jpg", "error": "12 bytes cannot be decoded ...", "model": "1f0c...", "set": null,
     "asked": "What is it?"}

Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.evaluate.measures import TASKS
from shards.files import write_whole
from shards.read import Sample

# What all lines of a file have in common, and how that is told.
COMMON = {
    "model": "another model, or the same with other settings",
    "set": "another set of pictures",
    "asked": "another --prompt",
}
KEYS = ("image", *COMMON)


@dataclass
class Lines:
    """An open file of answers."""

    path: Path
    common: Mapping[str, Any]  # of COMMON
    done: set[str] = field(default_factory=set)  # pictures that were asked before
    # A kill may have come between two answers to one picture: which it has of the last one.
    last: tuple[str, set[str | None]] = ("", set())
    before: int = 0  # answers that were there
    written: Counter[str] = field(default_factory=Counter)  # "answer" and "error", now

    @classmethod
    def open(cls, path: Path, common: Mapping[str, Any]) -> Lines:
        """Reads what is there. A last line that was cut off and pictures that could not be read
        are taken out: they are asked again. Raises ConfigError for another file.
        """
        lines = cls(path, common)
        if path.exists():
            lines._go_on()
        return lines

    def _go_on(self) -> None:
        kept = []
        whole = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(whole, 1):
            if number == len(whole) and not line.endswith(b"\n"):
                break
            found = self._checked(number, line)
            if "answer" in found:
                kept.append(line)
                self._note(found["image"], found["text_id"])
        self.before = len(kept)
        if len(kept) < len(whole):
            write_whole(self.path, b"".join(kept))

    def _note(self, image: str, text_id: str | None) -> None:
        if image != self.last[0]:
            self.done.add(self.last[0])
            self.last = (image, set())
        self.last[1].add(text_id)

    def unanswered(self, sample: Sample, image: str) -> Sample:
        """Returns a sample with those of its texts alone that are to be asked."""
        if image != self.last[0]:
            return sample
        record = sample.known
        texts = tuple(text for text in record.texts if (text.id or None) not in self.last[1])
        return replace(sample, record=replace(record, texts=texts))

    def _checked(self, number: int, line: bytes) -> dict[str, Any]:
        """Returns what a line says. Raises ConfigError for one that is not of this file."""
        try:
            found = json.loads(line)
            if not all(key in found for key in KEYS):
                raise ValueError(f"it lacks one of {', '.join(KEYS)}")
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{self.path}, line {number} was not written by harness predict ({error}): choose "
                "another --out"
            ) from error
        for key, what in COMMON.items():
            if found[key] != self.common[key]:
                raise ConfigError(
                    f"{self.path} holds answers of {what} ({found[key]!r}, now "
                    f"{self.common[key]!r}): choose another --out, or remove it to begin anew"
                )
        return found

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines and waits until they are on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        documents = [{**line, **self.common} for line in lines]
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in documents)
        with self.path.open("ab") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        self.written.update("answer" if "answer" in line else "error" for line in lines)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yields all lines."""
        with self.path.open("rb") as file:
            yield from map(json.loads, file)


def write_results(lines: Lines, out: Path) -> int:
    """Writes the official result file of VQA or of COCO captions, which EvalAI takes, and returns
    how many it holds. Raises ConfigError where that cannot be whole.
    """
    answers: dict[str, list[tuple[str, str]]] = {}
    damaged = []
    for line in lines.read():
        if "answer" not in line:
            damaged.append(line["image"])
            continue
        task = line["task"]
        by = "image_id" if TASKS[task].of_images else "text_id"
        answers.setdefault(task, []).append((line[by], line["answer"]))
    if damaged or len(answers) != 1:
        what = f"holds both {' and '.join(answers)} texts, and a result file one kind"
        if damaged:
            what = (
                f"lacks the answers to {len(damaged)} pictures that cannot be read (the first is "
                f"{damaged[0]}), and a result file must be whole"
            )
        raise ConfigError(f"{out} is not written: {lines.path} {what}")
    entries = [entry for task, pairs in answers.items() for entry in TASKS[task].results(pairs)]
    write_whole(out, json.dumps(entries, ensure_ascii=False).encode())
    return len(entries)
