"""Answers of a model that runs elsewhere: which pictures to show it, and the verdict on what it
said.

Image sets -> a file of lines to answer, one a text and picture (`write_donors`); the same lines
with their answers -> a report like that of `evaluate_model`, by the score alone (`judge_answers`).
The pictures are those that the gate would show to a model of its own: it asks, and a file answers.
Legend: I images, C contexts, T targets.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from harness.config.load import apply_overrides, validated
from harness.config.schema import Config, DecodingConfig
from harness.errors import ConfigError
from harness.evaluate.beside import add_beside
from harness.evaluate.collected import Collected
from harness.evaluate.image_use.evidence import EXCHANGE, ImageUse
from harness.evaluate.judging import add_verdicts, exchange
from harness.evaluate.measures import TASKS
from harness.evaluate.official import ScoreError, entries, identifier, read_json, text
from harness.evaluate.predict import set_name
from harness.evaluate.published import PictureBatch, Pictures, asked_with_pictures
from harness.evaluate.report import report_of, write_report
from harness.evaluate.run import collect, passes_of
from harness.evaluate.scores import add_scores
from harness.machine.dealing import Progress
from harness.model.batch import Batch, Context
from harness.model.language.loss import Generated, LossOutput
from harness.redact import say
from shards.files import ShardError, decode, write_whole
from shards.manifest import Manifest
from shards.origin import source_of
from shards.read import Sample, records
from shards.record import Record

IMAGES = 2_000  # of each set that are asked about: more texts than the floors look at
_IDS = ("text_id", "question_id", "image_id")
# As the gate asks: a picture that is both is asked about once.
_CONDITIONS = ("true", "shuffled", "matched")
_ADVICE = (
    "answers under other pictures: harness gate --donors FILE DATA writes which picture to show "
    "with each text"
)


class Line(NamedTuple):
    """A text and the picture that is shown with it."""

    task: str
    set: str  # DATASET_SPLIT of the text
    text_id: str
    image_set: str  # DATASET_SPLIT of the picture
    image: str  # its key


@dataclass(frozen=True)
class Texts:
    """The texts of image sets with their own pictures: `lines` by the name and value of an id."""

    data: Sequence[str]
    lines: Mapping[str, Mapping[str, list[Line]]]

    @classmethod
    def of(cls, data: Sequence[str]) -> Texts:
        """Reads every record. Raises ShardError."""
        lines: dict[str, dict[str, list[Line]]] = {name: defaultdict(list) for name in _IDS}
        for record in records(data):
            if not record.has_picture:
                continue
            for known in record.texts:
                line = _true(record, known)
                lines["text_id"][known.id].append(line)
                # As official results name them: a caption stands under its image.
                if TASKS[known.task].of_images:
                    lines["image_id"][record.image_id].append(line)
                else:
                    lines["question_id"][known.id].append(line)
        return cls(data, lines)

    @property
    def own(self) -> set[Line]:
        return {line for lines in self.lines["text_id"].values() for line in lines}

    def line(self, entry: Any, where: str) -> Line:
        """Returns what an entry of a file answers; without an "image" the text with its own
        picture. Raises ScoreError.
        """
        name = next((n for n in _IDS if isinstance(entry, dict) and n in entry), _IDS[0])
        found = identifier(entry, name, where)
        known = self.lines[name].get(found, [])
        if "set" in entry:
            known = [line for line in known if line.set == entry["set"]]
        if not known:
            of = f" of set {entry['set']}" if "set" in entry else ""
            raise ScoreError(f"{where}: {name} {found}{of} is not in {', '.join(self.data)}")
        if len(known) > 1:
            sets = ", ".join(line.set for line in known)
            raise ScoreError(f'{where}: {name} {found} stands in {sets}: add its "set"')
        if "image" not in entry:
            return known[0]
        image_set = text(entry, "image_set", where) if "image_set" in entry else known[0].set
        return known[0]._replace(image_set=image_set, image=identifier(entry, "image", where))


class AnswersElsewhere(nn.Module):
    """Stands for the model: what it says is looked up, None where nothing is there. `asked` holds
    every line that was, in order, with its context and the image id of the picture.
    """

    def __init__(self, answers: Mapping[Line, str]):
        super().__init__()
        self.answers = answers
        self.asked: dict[Line, tuple[Context, str]] = {}
        self.on = nn.Parameter(torch.zeros(0))  # the device

    def bridge_tokens(self, batch: PictureBatch) -> Pictures:
        return Pictures(batch.pictures, batch.image_of_C)

    def loss(self, batch: Batch, tokens: Pictures) -> LossOutput:
        """No loss is known."""
        unknown_T = torch.full((len(batch.labels_TL),), float("nan"))
        return LossOutput(unknown_T.sum(), batch.weight, unknown_T, batch.weight_TL.sum(dim=1))

    def generate(self, batch: Batch, decoding: DecodingConfig, tokens: Pictures) -> Generated:
        said: list[Any] = []
        for context, row in zip(batch.contexts, tokens.token_row_of_C.tolist(), strict=True):
            shown: Any = tokens.tokens_NQD[row]
            own = _true(context.record, context.text)
            line = own._replace(image_set=set_name(shown), image=shown.key)
            self.asked.setdefault(line, (context, shown.image_id))
            said.append(self.answers.get(line))
        empty_C = torch.tensor([float(answer == "") for answer in said])  # it ended at once
        return Generated(said, [[] for _ in said], empty_C)


def image_sets(data: Sequence[str]) -> list[str]:
    """Returns the sets of pictures: of a set of features the one that they were made from. Raises
    ConfigError where that is not at hand, ShardError.
    """
    found = []
    for path in data:
        manifest = Manifest.open(path)
        source = source_of(manifest)
        if source is None:
            raise ConfigError(
                f"{path} holds {manifest.kind}, and the pictures that they were made from are not "
                "at hand: give the set of images"
            )
        found.append(str(path) if source is manifest else source.folder)
    return found


def write_donors(
    out: Path,
    data: Sequence[str],
    *,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> int:
    """Writes the lines that a model elsewhere is to answer, and returns how many they are.

    `limit`: so many images of each set. Raises ConfigError, ShardError.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already: remove it, or choose another file")
    model = AnswersElsewhere({})
    _asked(model, data, _config(out, overrides), limit, progress)
    rows_of: dict[Line, list[dict[str, Any]]] = defaultdict(list)  # together: a part is whole texts
    for line, (context, image_id) in model.asked.items():
        rows = rows_of[_true(context.record, context.text)]
        condition = _CONDITIONS[len(rows)] if line.image_set == line.set else "another set"
        row = line._asdict() | {"image_id": image_id}
        rows.append(row | {"condition": condition, "prompt": context.text.prompt})
    lines = [json.dumps(row, ensure_ascii=False) for rows in rows_of.values() for row in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def judge_answers(
    path: Path,
    data: Sequence[str],
    out: Path | None = None,
    *,
    limit: int | None = None,
    partial: bool = False,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the report on a file of answers: JSON lines, or the official list of results.

    Without any answer to an exchanged picture the exchange is not measured. `limit`: as it was
    given to `write_donors`. `partial`: a text that lacks one of its answers is left out, else the
    file is refused. With `out` the report is written there too. Raises ScoreError, ShardError.
    """
    texts = Texts.of(data)
    answers = read_answers(path, texts, partial)
    model = AnswersElsewhere(answers)
    tasks = {line.task for line in answers}
    collected = _asked(model, data, _config(path, overrides), limit, progress, tasks)
    own = texts.own
    _check_pictures(path, model, own)
    left_out = _leave_out(collected, _missing(path, model, own, partial))
    add_scores(collected, None, None)
    add_verdicts(collected, floors=True)
    add_beside(collected)
    evaluation = collected.evaluation
    for result in evaluation.tasks.values():
        result.uses = {name: _told(use, left_out[use.set]) for name, use in result.uses.items()}
        result.predictions = [replace(p, p_eos_first=math.nan) for p in result.predictions]
    if out:
        return write_report(evaluation, out, data, str(path), None)[0]
    return report_of(evaluation, data, str(path), None)


def _told(use: ImageUse, left_out: int) -> ImageUse:
    """Returns a verdict without what no file tells, and with the way to the exchange."""
    known = replace(use, p_eos_first=math.nan, left_out=left_out)
    if any(term.name == EXCHANGE and term.advantage is None for term in use.terms):
        return replace(known, advice=_ADVICE)
    return known


def read_answers(path: Path, texts: Texts, partial: bool) -> dict[Line, str]:
    """Returns the answers of a file. `partial`: a line may lack its answer. Raises ScoreError."""
    found: dict[Line, str] = {}
    for where, entry in _entries(path):
        line = texts.line(entry, where)
        if line in found:
            again = f"answers text {line.text_id} with picture {line.image} once more"
            raise ScoreError(f"{where} {again}; each needs one answer")
        key = "caption" if "caption" in entry else "answer"
        if key in entry or not partial:
            found[line] = text(entry, key, f"{where} (text {line.text_id})")
    if not found:
        raise ScoreError(f'{path} holds no answers: each line needs an "answer"')
    return found


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (where it stands, entry) of JSON lines or of an official list."""
    raw = Path(path).read_bytes()
    try:
        lines = decode(raw, str(path)).split("\n")
    except ShardError as error:
        raise ScoreError(str(error)) from error
    if "".join(lines).lstrip().startswith("["):
        yield from entries(read_json(path), str(path))
        return
    for number, row in enumerate(lines, 1):
        if not row.strip():
            continue
        try:
            entry = json.loads(row)
        except (ValueError, RecursionError) as error:
            form = "expected a JSON document a line, or one list of official results"
            raise ScoreError(f"{path}: line {number} is not JSON ({error}): {form}") from error
        yield f"{path}: line {number}", entry


def _true(record: Record, known: Any) -> Line:
    """Returns the line of a text with its own picture."""
    return Line(known.task, set_name(record), known.id, set_name(record), record.key)


def _config(path: Path, overrides: Sequence[str]) -> Config:
    document = {"name": path.stem, "tracking": {"kind": "none"}}
    config = validated(Config, apply_overrides(document, overrides), path, overrides)
    without = {"show_images": 0, "space_images": 0}  # nobody looks at a picture here
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=without)})


def _nothing(sample: Sample) -> Any:
    """Leaves a picture as it is stored."""
    return sample.payload


def _asked(
    model: AnswersElsewhere,
    data: Sequence[str],
    config: Config,
    limit: int | None,
    progress: Progress | None,
    tasks: set[str] | None = None,
) -> Collected:
    """Returns what the gates asked, of these tasks (None: of all). Raises ConfigError where no
    record has a picture to ask with.
    """

    def collate(samples: Sequence[Sample]) -> PictureBatch | None:
        shown = [s.known for s in samples if s.record is not None and s.weight]
        return _batch([record for record in shown if record.has_picture], tasks)

    asked_with_pictures([Manifest.open(path) for path in data])
    passes = passes_of(
        model, data, config, decode=_nothing, collate=collate, controls_of=lambda *_: {}
    )
    with closing(passes):
        collected = collect(passes, limit or IMAGES, progress)
    exchange(collected)
    return collected


def _batch(shown: Sequence[Record], tasks: set[str] | None) -> PictureBatch | None:
    """Returns a batch whose pictures are their records, and whose targets hold nothing."""
    rows = [
        (Context(record, known, known.prompt or ""), image)
        for image, record in enumerate(shown)
        for known in record.texts
        if tasks is None or known.task in tasks
    ]
    if not rows:
        return None
    nothing_C1 = torch.zeros(len(rows), 1, dtype=torch.int64)
    return PictureBatch(
        prompt_ids_CL=nothing_C1,
        prompt_mask_CL=nothing_C1.bool(),
        image_of_C=torch.tensor([image for _, image in rows]),
        labels_TL=nothing_C1,
        weight_TL=torch.ones(len(rows), 1),
        context_of_T=torch.arange(len(rows)),
        pixels_IHW3=torch.zeros(len(shown), 1, 1, 3, dtype=torch.uint8),
        contexts=tuple(context for context, _ in rows),
        pictures=tuple(shown),  # type: ignore[arg-type]  # they are named, not shown
    )


def _check_pictures(path: Path, model: AnswersElsewhere, own: set[Line]) -> None:
    """Raises ScoreError for a picture that the gate would not show with its text. Whether images of
    another set are needed, only the others tell. `own`: all texts with their own pictures.
    """
    for line in model.answers:
        if line.image_set == line.set and line not in own and line not in model.asked:
            raise ScoreError(
                f"{path} answers text {line.text_id} of {line.set} with picture {line.image}, "
                "which the gate does not show with it: answer the lines that harness gate --donors "
                "writes for the same data and --limit"
            )


def _missing(
    path: Path, model: AnswersElsewhere, own: set[Line], partial: bool
) -> set[tuple[str, str, str]]:
    """Returns the texts that lack one of their answers: in a file of none but true pictures, that
    one. Raises ScoreError, unless `partial`.
    """
    asked = list(model.asked)
    if own.issuperset(model.answers):
        asked = [line for line in asked if line in own]
    missing = [line for line in asked if line not in model.answers]
    if missing and not partial:
        first = missing[0]
        raise ScoreError(
            f"{path} lacks {len(missing):,} of {len(asked):,} answers, the first to text "
            f"{first.text_id} of {first.set} with picture {first.image} of {first.image_set}: "
            "answer every line that harness gate --donors writes for the same data and --limit, or "
            "give --partial"
        )
    contexts = [model.asked[line][0] for line in missing]
    texts = {(c.record.dataset, c.record.split, c.text.id) for c in contexts}
    if texts:
        all_texts = len({line[:3] for line in asked})
        say(f"harness: {len(texts):,} of {all_texts:,} texts lack answers: left out", sys.stderr)
    return texts


def _leave_out(collected: Collected, texts: set[tuple[str, str, str]]) -> Counter[str]:
    """Forgets texts once the donors of all are known, and returns how many of each gate's set they
    were. Raises ScoreError where none is left.
    """
    for task, result in collected.evaluation.tasks.items():
        result.predictions = [p for p in result.predictions if p.id not in texts]
        if not result.predictions:
            raise ScoreError(f"no text of task {task} has all its answers")
    left_out: Counter[str] = Counter()
    for gate in collected.gates.values():
        left_out[gate.set] += gate.texts
        gate.leave_out(texts)
        left_out[gate.set] -= gate.texts
    return left_out
