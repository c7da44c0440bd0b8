"""Planted cheats: fake models of which it is known what they read of a picture. None of those that
read no content may be called `image used`.

Drawings of easy-VQA with planted sizes -> feature sets -> Cheat, a model with the interface that
`evaluate_model` asks -> the verdict of each task. Everything below was fixed before the first
verdict was seen, and is not tuned since.

Pictures. Of the drawings whose questions tell both shape and colour (798 of the 1,000 for testing,
2,901 of 3,600 for training) a seed draws `test` and `train` ones. Four kinds of set:

- plain: the drawings as they are, 64 x 64.
- aspect: padded with the colour of their corner, so that 70% of them have the size of their shape
  (circle 96 x 64, rectangle 64 x 96, triangle 96 x 96), the rest one of the three at random.
- bytes: a comment in the PNG of 256 bytes times the number of the colour (0 to 7, by its name) for
  70% of them, times a number at random for the rest.
- two sets: nine tenths of the circles and a tenth of the other drawings are set A, the rest is B.
- held out: plain, and no training picture has one of eight combinations (each colour with one
  shape), while every test picture has. (held out twice: each colour with two shapes.)

Texts. The questions of easy-VQA; of each picture three captions from five templates.

Features (one patch): shape and colour as ones and zeros times 4, the number of the set, mean red,
green and blue, log(width / height) and the statistics that the gate knows (shards.statistics), all
but the first two standardised over the training pictures.

Rules. A cheat learns from the training pictures the most frequent answer (or caption) for what it
reads: brightness and bytes in 20 quantile bins, mean colour in 7 for each of red, green and blue,
set and aspect as they are; else the most frequent of the question alone. `mixture` answers each
text, by a hash of its id, with the rule of set, brightness or mean colour. `constant` says the most
frequent answer to any question ("no"), and one caption. `nearest` says the first caption of the
training picture whose features are nearest; to questions it answers from that picture's content.
Honest ones read shape and colour for a share of the texts and else say the question's most frequent
answer: `level` is the accuracy that this gives where the latter has 66.9%.

Three models were added when seed 0 had been judged, two of them harder to tell from an honest one
than those above: `statistics neighbour` answers from the content of the training picture that is
nearest in statistics, `statistics forest` from what two random forests tell of the content by all
statistics. The third: an honest one on `held out twice`, since in `held out` the colour of a test
picture tells its shape.

Loss: 0.3 nats for a word that is in what the model says, and for the end; 3 nats for any other.

Legend: I pictures, N training pictures, K columns, D features, C contexts, T targets, L tokens,
V words.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.numpy
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from harness.config.schema import Config, DecodingConfig
from harness.data.collate import Collator
from harness.evaluate import floors
from harness.evaluate.image_use.evidence import ImageUse
from harness.evaluate.run import evaluate_model
from harness.model.batch import Batch, Context
from harness.model.bridge import BridgeOutput
from harness.model.language.loss import Generated, LossOutput
from shards.read import Sample
from shards.record import Record, Text
from shards.sources import easy_vqa
from shards.sources.source import Source
from shards.statistics import COLUMNS, statistics_of
from shards.write import write_shards

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
TEMPLATES = (
    "a {colour} {shape} on a light ground",
    "there is a {colour} {shape} in this picture",
    "the drawing shows one {colour} {shape}",
    "somebody drew a {shape} and painted it {colour}",
    "a simple image of a {shape} , {colour} all over",
)
SIZES = {"circle": (96, 64), "rectangle": (64, 96), "triangle": (96, 96)}
TOLD = 0.7  # share of pictures whose planted statistic tells the content
COMMENT = 256  # bytes, times the number of a colour
IN_A = {"circle": 0.9, "rectangle": 0.1, "triangle": 0.1}
CONTENT_WEIGHT = 4.0
BLIND = 66.9  # percent of easy-VQA that the question's most frequent answer gets
RIGHT, WRONG = 0.3, 3.0  # nats
KINDS = ("plain", "aspect", "bytes", "two sets", "held out", "held out twice")

# Columns of the features.
_SHAPE = slice(0, 3)
_COLOUR = slice(3, 11)
_SET = 11
MEAN = (12, 13, 14)
_ASPECT = 15
_STATISTICS = slice(16, 16 + len(COLUMNS))
_BRIGHTNESS = 16 + COLUMNS.index("brightness")
_BYTES = 16 + COLUMNS.index("bytes")
WIDTH = 16 + len(COLUMNS)
ENCODER = {
    "kind": "clip",
    "id": "planted",
    "hash": "planted",
    "layer": -2,
    "image_size": 32,
    "tokens": 1,
    "width": WIDTH,
}


@dataclass(frozen=True)
class Drawing:
    """A picture of easy-VQA, what it shows, and which set it was put into."""

    record: Record
    png: bytes
    shape: str
    colour: str
    set: int = 0


def true_answer(question: str, shape: str, colour: str) -> str:
    """Returns the answer of somebody who sees the content."""
    words = question.rstrip("?").split()
    if words[0] == "what":
        return colour if "color" in words else shape
    present = shape in words or colour in words
    denied = "not" in words or "no" in words
    return "yes" if present != denied else "no"


def drawn(*names: object) -> float:
    """Returns a number in [0, 1), the same for the same names."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32


@cache
def _source() -> Source:
    return easy_vqa.load()


@cache
def drawings(split: str) -> tuple[Drawing, ...]:
    """Returns those drawings of a split whose questions tell shape and colour."""
    source = _source()
    found = []
    for item in source.splits[split]:
        texts = item.record.texts
        content = [
            (shape, colour)
            for shape in SHAPES
            for colour in COLOURS
            if all(true_answer(t.prompt or "", shape, colour) == t.targets[0] for t in texts)
        ]
        if len(content) == 1:
            found.append(Drawing(item.record, source.images.read(item.image), *content[0]))
    return tuple(found)


# ---- planting -----------------------------------------------------------------------------------


def planted(drawing: Drawing, kind: str, seed: int) -> Drawing:
    """Returns the drawing as it is in a set of this kind."""
    name = (kind, seed, drawing.record.split, drawing.record.key)
    told = drawn(*name, "told") < TOLD
    if kind == "aspect":
        shape = drawing.shape if told else SHAPES[int(3 * drawn(*name, "shape"))]
        return replace(drawing, png=_padded(drawing.png, SIZES[shape]))
    if kind == "bytes":
        own = COLOURS.index(drawing.colour)
        return replace(
            drawing,
            png=_commented(drawing.png, COMMENT * (own if told else int(8 * drawn(*name, "size")))),
        )
    if kind == "two sets":
        return replace(drawing, set=int(drawn(*name, "set") >= IN_A[drawing.shape]))
    return drawing


def _padded(png: bytes, size: tuple[int, int]) -> bytes:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    wider = Image.new("RGB", size, picture.getpixel((0, 0)))
    wider.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return _png(wider)


def _commented(png: bytes, size: int) -> bytes:
    comment = PngInfo()
    comment.add_text("Comment", "x" * size)
    return _png(Image.open(io.BytesIO(png)).convert("RGB"), pnginfo=comment)


def _png(picture: Image.Image, **settings: PngInfo) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **settings)
    return file.getvalue()


def _held_out(drawing: Drawing, seed: int) -> bool:
    return SHAPES[(COLOURS.index(drawing.colour) + seed) % len(SHAPES)] == drawing.shape


def _has_combination(drawing: Drawing, kind: str, split: str, seed: int) -> bool:
    """Whether a picture of this split may show this shape in this colour."""
    if kind == "held out":
        return _held_out(drawing, seed) == (split == "test")
    if kind == "held out twice":
        return _held_out(drawing, seed) != (split == "test")
    return True


def chosen(kind: str, split: str, seed: int, count: int) -> list[Drawing]:
    """Returns the planted drawings of a kind of set, drawn by the seed."""
    known = [d for d in drawings(split) if _has_combination(d, kind, split, seed)]
    order = np.random.default_rng(seed).permutation(len(known))[:count]
    return [planted(known[row], kind, seed) for row in order]


def captions(drawing: Drawing, seed: int) -> tuple[str, ...]:
    """Returns three captions of a drawing."""
    order = sorted(TEMPLATES, key=lambda template: drawn(seed, drawing.record.key, template))
    return tuple(
        template.format(shape=drawing.shape, colour=drawing.colour) for template in order[:3]
    )


# ---- features -----------------------------------------------------------------------------------


def statistics(pictures: Sequence[Drawing]) -> np.ndarray:
    return np.stack([statistics_of(picture.png) for picture in pictures])


def _readings(pictures: Sequence[Drawing], statistics_IK: np.ndarray) -> np.ndarray:
    """Returns set, mean colour, aspect and statistics of each picture."""
    rows = []
    for picture, row_K in zip(pictures, statistics_IK, strict=True):
        pixels_HW3 = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))
        width, height = pixels_HW3.shape[1::-1]
        mean_3 = pixels_HW3.mean(axis=(0, 1))
        rows.append([picture.set, *mean_3, math.log(width / height), *row_K])
    return np.array(rows)


def _content(pictures: Sequence[Drawing]) -> np.ndarray:
    content_ID = np.zeros((len(pictures), len(SHAPES) + len(COLOURS)))
    for row, picture in enumerate(pictures):
        content_ID[row, SHAPES.index(picture.shape)] = CONTENT_WEIGHT
        content_ID[row, len(SHAPES) + COLOURS.index(picture.colour)] = CONTENT_WEIGHT
    return content_ID


@dataclass(frozen=True)
class World:
    """The sets of one kind and seed: folders of features, and the training pictures."""

    kind: str
    seed: int
    test: tuple[str, ...]  # folders
    train: tuple[str, ...]
    pictures: tuple[Drawing, ...]  # for training
    features_ND: np.ndarray
    tokenizer: PreTrainedTokenizerFast


def make_world(
    folder: Path,
    kind: str,
    seed: int,
    *,
    test: int,
    train: int,
    seen: Sequence[int] = range(WIDTH),
    captioned: bool = True,
) -> World:
    """Writes the sets of a kind into `folder`: so many pictures, over two sets where it has two.
    `seen`: the features that are there at all, the others are 0.
    """
    learnt = chosen(kind, "train", seed, train)
    asked = chosen(kind, "test", seed, test)
    statistics_NK = statistics(learnt)
    readings_NK = _readings(learnt, statistics_NK)
    mean_K = readings_NK.mean(axis=0)
    deviation_K = np.where(readings_NK.std(axis=0) > 0, readings_NK.std(axis=0), 1)

    def features(pictures: Sequence[Drawing], statistics_IK: np.ndarray) -> np.ndarray:
        standard_IK = (_readings(pictures, statistics_IK) - mean_K) / deviation_K
        all_ID = np.concatenate([_content(pictures), standard_IK], axis=1)
        seen_ID = np.zeros_like(all_ID, np.float16)
        seen_ID[:, list(seen)] = all_ID[:, list(seen)]
        return seen_ID

    def records(pictures: Sequence[Drawing]) -> list[Record]:
        return [_record(picture, seed) if captioned else picture.record for picture in pictures]

    statistics_IK = statistics(asked)
    features_ID = features(asked, statistics_IK)
    features_ND = features(learnt, statistics_NK)
    return World(
        kind,
        seed,
        _write(folder / "test", asked, records(asked), features_ID, statistics_IK),
        _write(folder / "train", learnt, records(learnt), features_ND, statistics_NK),
        tuple(learnt),
        features_ND.astype(np.float32),
        _tokenizer(learnt),
    )


def _write(
    folder: Path,
    pictures: Sequence[Drawing],
    records: Sequence[Record],
    features_ID: np.ndarray,
    statistics_IK: np.ndarray,
) -> tuple[str, ...]:
    """Writes a feature set for each of the sets that the pictures are in."""
    paths = []
    split = records[0].split
    for number in sorted({picture.set for picture in pictures}):
        dataset = f"drawings_{'ab'[number]}"
        samples = [
            (
                replace(records[row], dataset=dataset),
                safetensors.numpy.save({"patches_PD": features_ID[row : row + 1]}),
                "safetensors",
                statistics_IK[row],
            )
            for row, picture in enumerate(pictures)
            if picture.set == number
        ]
        path = folder / dataset
        write_shards(samples, path, dataset=dataset, split=split, kind="features", encoder=ENCODER)
        paths.append(str(path))
    return tuple(paths)


def _record(picture: Drawing, seed: int) -> Record:
    """Returns the record with captions."""
    own = picture.record
    caption = Text(f"{own.key}-caption", "caption", captions(picture, seed))
    return replace(own, texts=(*own.texts, caption))


def _tokenizer(pictures: Sequence[Drawing]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose tokens are words."""
    texts = {text.prompt or "" for picture in pictures for text in picture.record.texts}
    texts |= {*TEMPLATES, " ".join((*SHAPES, *COLOURS)), "yes no"}
    words = sorted({word for text in texts for word in text.replace("?", " ").split()})
    vocabulary = {word: row for row, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


# ---- rules --------------------------------------------------------------------------------------

# What a model says to a context, from the features of the picture that it is shown; None: no image.
Rule = Callable[[np.ndarray | None, Context], str]


def _asked(text: Text) -> str:
    return text.prompt or ""


def _lessons(world: World) -> Iterator[tuple[int, str, str]]:
    """Yields (training picture, question, answer); the question of a caption is empty."""
    for row, picture in enumerate(world.pictures):
        for text in picture.record.texts:
            yield row, _asked(text), text.targets[0]
        for caption in captions(picture, world.seed):
            yield row, "", caption


class Learnt:
    """The most frequent answer to a question for what is read of the picture."""

    def __init__(self, world: World, columns: Sequence[int], bins: int | None):
        self.columns = list(columns)
        read_NK = world.features_ND[:, self.columns]
        self.edges_K = [
            np.quantile(read_NK[:, k], np.linspace(0, 1, bins + 1)[1:-1]) if bins else None
            for k in range(len(self.columns))
        ]
        keys = [self.key(features_D) for features_D in world.features_ND]
        counts: dict[Hashable, Counter[str]] = defaultdict(Counter)
        for row, question, answer in _lessons(world):
            counts[question, keys[row]][answer] += 1
            counts[question][answer] += 1
        self.answer_of = {key: found.most_common(1)[0][0] for key, found in counts.items()}

    def key(self, features_D: np.ndarray) -> tuple[float, ...]:
        read_K = features_D[self.columns]
        return tuple(
            float(value) if edges is None else float(np.searchsorted(edges, value))
            for value, edges in zip(read_K, self.edges_K, strict=True)
        )

    def __call__(self, features_D: np.ndarray | None, context: Context) -> str:
        question = _asked(context.text)
        blind = self.answer_of.get(question, "no")
        if features_D is None:
            return blind
        return self.answer_of.get((question, self.key(features_D)), blind)


def constant(world: World) -> Rule:
    answers = Counter(answer for _, question, answer in _lessons(world) if question)
    captions_ = Counter(answer for _, question, answer in _lessons(world) if not question)
    said = {"vqa": answers.most_common(1)[0][0], "caption": captions_.most_common(1)[0][0]}
    return lambda features_D, context: said[context.text.task]


def mixture(world: World) -> Rule:
    parts = [CHEATS[name](world) for name in ("set", "brightness", "mean colour")]

    def rule(features_D: np.ndarray | None, context: Context) -> str:
        part = int(len(parts) * drawn(world.seed, context.text.id, "part"))
        return parts[part](features_D, context)

    return rule


def nearest(world: World, columns: slice = slice(None)) -> Rule:
    blind = Learnt(world, (), None)

    def rule(features_D: np.ndarray | None, context: Context) -> str:
        if features_D is None:
            return blind(None, context)
        distance_N = np.square((world.features_ND - features_D)[:, columns]).sum(axis=1)
        picture = world.pictures[int(distance_N.argmin())]
        if context.text.task == "caption":
            return captions(picture, world.seed)[0]
        return true_answer(_asked(context.text), picture.shape, picture.colour)

    return rule


def forest(world: World) -> Rule:
    from sklearn.ensemble import RandomForestClassifier

    blind = Learnt(world, (), None)
    read_NK = world.features_ND[:, _STATISTICS]
    shape_of = RandomForestClassifier(100, random_state=world.seed, n_jobs=1)
    shape_of.fit(read_NK, [picture.shape for picture in world.pictures])
    colour_of = RandomForestClassifier(100, random_state=world.seed, n_jobs=1)
    colour_of.fit(read_NK, [picture.colour for picture in world.pictures])
    told: dict[bytes, tuple[str, str]] = {}

    def rule(features_D: np.ndarray | None, context: Context) -> str:
        if features_D is None:
            return blind(None, context)
        name = features_D.tobytes()
        if name not in told:
            read_1K = features_D[None, _STATISTICS]
            told[name] = (shape_of.predict(read_1K)[0], colour_of.predict(read_1K)[0])
        return _answer(context, *told[name])

    return rule


def _answer(context: Context, shape: str, colour: str) -> str:
    """Returns what somebody says who takes this for the content of the picture."""
    if context.text.task == "caption":
        return TEMPLATES[0].format(shape=shape, colour=colour)
    return true_answer(_asked(context.text), shape, colour)


def honest(level: float) -> Callable[[World], Rule]:
    """Returns a model that reads shape and colour, so often that `level` percent are right."""
    share = (level - BLIND) / (100 - BLIND)

    def made(world: World) -> Rule:
        blind = Learnt(world, (), None)

        def rule(features_D: np.ndarray | None, context: Context) -> str:
            if features_D is None or drawn(world.seed, context.text.id, "reads") >= share:
                return blind(None, context)
            shape = SHAPES[int(features_D[_SHAPE].argmax())]
            colour = COLOURS[int(features_D[_COLOUR].argmax())]
            return _answer(context, shape, colour)

        return rule

    return made


CHEATS: dict[str, Callable[[World], Rule]] = {
    "brightness": lambda world: Learnt(world, (_BRIGHTNESS,), 20),
    "set": lambda world: Learnt(world, (_SET,), None),
    "aspect": lambda world: Learnt(world, (_ASPECT,), None),
    "mean colour": lambda world: Learnt(world, MEAN, 7),
    "file size": lambda world: Learnt(world, (_BYTES,), 20),
    "mixture": mixture,
    "constant": constant,
    "nearest": nearest,
    "statistics neighbour": lambda world: nearest(world, _STATISTICS),
    "statistics forest": forest,
}


# ---- the fake model -----------------------------------------------------------------------------


class Cheat(nn.Module):
    """A model that says what its rule says."""

    def __init__(self, rule: Rule, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.rule = rule
        self.tokenizer = tokenizer
        self.unused = nn.Parameter(torch.zeros(1))  # says on which device the model is

    def bridge_tokens(self, batch: Batch) -> BridgeOutput:
        assert batch.features_IPD is not None
        return BridgeOutput(batch.features_IPD.float(), batch.image_of_C)

    def _said(self, batch: Batch, tokens: BridgeOutput) -> list[str]:
        if not tokens.tokens_NQD.shape[1]:
            return [self.rule(None, context) for context in batch.contexts]
        features_CD = tokens.tokens_NQD[tokens.token_row_of_C, 0].numpy()
        return [
            self.rule(features_D, context)
            for features_D, context in zip(features_CD, batch.contexts, strict=True)
        ]

    def loss(self, batch: Batch, tokens: BridgeOutput) -> LossOutput:
        likely_CV = torch.zeros(len(batch.contexts), len(self.tokenizer), dtype=torch.bool)
        likely_CV[:, self.tokenizer.eos_token_id] = True
        for row, text in enumerate(self._said(batch, tokens)):
            likely_CV[row, self.tokenizer(text)["input_ids"]] = True
        is_likely_TL = likely_CV[batch.context_of_T[:, None], batch.labels_TL]
        nats_TL = torch.where(is_likely_TL, RIGHT, WRONG) * batch.weight_TL
        sum_T = nats_TL.sum(dim=1)
        return LossOutput(sum_T.sum(), batch.weight, sum_T, batch.weight_TL.sum(dim=1))

    def generate(self, batch: Batch, decoding: DecodingConfig, tokens: BridgeOutput) -> Generated:
        said = self._said(batch, tokens)
        return Generated(said, [[] for _ in said], torch.full((len(said),), 0.01))


# ---- cases --------------------------------------------------------------------------------------

STATISTICS_ONLY = ("global statistics only", "not above global statistics")
IGNORED = ("image ignored",)
USED = ("image used",)
ANY_CHEAT = (
    "set only",
    "image ignored",
    "global statistics only",
    "not above global statistics",
    "retrieval is as good",
    "not enough evidence",
)


@dataclass(frozen=True)
class Case:
    """A model over a kind of set, and the names that its verdicts may have."""

    name: str
    kind: str
    rule: Callable[[World], Rule]
    expected: dict[str, tuple[str, ...]]  # by task
    alone: bool = False  # judged on set A only

    @property
    def is_honest(self) -> bool:
        return self.name.startswith("honest")


def _both(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {"vqa": names, "caption": names}


CASES = (
    Case("brightness", "plain", CHEATS["brightness"], _both(STATISTICS_ONLY)),
    Case("set", "two sets", CHEATS["set"], _both(("set only",))),
    Case("set, one alone", "two sets", CHEATS["set"], _both(IGNORED), alone=True),
    Case("aspect ratio", "aspect", CHEATS["aspect"], _both(STATISTICS_ONLY)),
    Case("mean colour", "plain", CHEATS["mean colour"], _both(STATISTICS_ONLY)),
    Case("file size", "bytes", CHEATS["file size"], _both(STATISTICS_ONLY)),
    Case("mixture", "two sets", CHEATS["mixture"], _both(ANY_CHEAT)),
    Case("constant", "plain", CHEATS["constant"], _both(IGNORED)),
    Case("nearest neighbour", "plain", CHEATS["nearest"], {"caption": ("retrieval is as good",)}),
    Case("statistics neighbour", "plain", CHEATS["statistics neighbour"], _both(STATISTICS_ONLY)),
    Case("statistics forest", "plain", CHEATS["statistics forest"], _both(STATISTICS_ONLY)),
    Case("honest, 99.6% right", "plain", honest(99.6), {"vqa": USED}),
    Case("honest, new combinations", "held out", honest(99.6), {"caption": USED}),
    Case("honest, more new combinations", "held out twice", honest(99.6), {"caption": USED}),
    Case("honest, known combinations", "plain", honest(99.6), {"caption": ANY_CHEAT[4:5]}),
    *(
        Case(f"honest, {level}% right", "plain", honest(level), {"vqa": STATISTICS_ONLY[1:]})
        for level in (78, 82, 87)
    ),
)


@dataclass(frozen=True)
class TaskCollator(Collator):
    """Leaves out the texts of other tasks: what nobody asks for costs time."""

    tasks: Collection[str] = ()

    def __call__(self, samples: Sequence[Sample]) -> Batch | None:
        kept = [
            replace(s, record=replace(s.known, texts=tuple(self._asked(s.known)))) for s in samples
        ]
        return super().__call__(kept)

    def _asked(self, record: Record) -> list[Text]:
        return [text for text in record.texts if text.task in self.tasks]


def judged(case: Case, world: World) -> dict[str, ImageUse]:
    """Returns the verdict of each task that the case expects one of."""
    config = Config(
        name="cheats",
        data={"train": [{"path": path} for path in world.train]},
        evaluation={"batch_images": 100},
        tracking={"kind": "none"},
    )
    model = Cheat(case.rule(world), world.tokenizer)
    paths = world.test[:1] if case.alone else world.test
    collate = TaskCollator(
        world.tokenizer, config.data, config.prompts, training=False, tasks=case.expected
    )
    found = evaluate_model(model, paths, config, collate=collate)
    uses = {task: found.tasks[task].image_use for task in case.expected}
    return {task: use for task, use in uses.items() if use is not None}


@contextmanager
def floors_made_once(trees: int = 100) -> Iterator[None]:
    """Makes the floors of the same texts and pictures once for all models: no model changes them.
    With fewer `trees` the shallow floor is lower, so that a cheat is above it more easily.
    """
    known: dict[bytes, object] = {}

    def once(make, **settings):
        def made(*given):
            parts = [x.tobytes() if isinstance(x, np.ndarray) else repr(x).encode() for x in given]
            key = make.__name__.encode() + b"\0".join(parts)
            if key not in known:
                known[key] = make(*given, **settings)
            return known[key]

        return made

    forest = once(floors.shallow_answers, trees=trees)
    copied = once(floors.consensus_captions)
    with (
        mock.patch.object(floors, "shallow_answers", forest),
        mock.patch.object(floors, "consensus_captions", copied),
    ):
        yield
