"""VQA accuracy to the last digit of the official evaluation program, and its results format.

Answers by question id, and the annotators' answers -> overall, per answer type, per question type,
in percent; the same with intervals over images. The rules are those of
github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, oddities included: a
better rule would give scores that compare with no published figure.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from harness.evaluate.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Interval,
    image_rows,
    percentile,
    resampled_sums,
)
from harness.evaluate.official import (
    ScoreError,
    entries,
    field,
    identifier,
    read_json,
    read_pairs,
    refuse,
    text,
)

# The official table maps each of these words with any one of its apostrophes left out to the word
# itself.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTIONS.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the official table too
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(n) for n, word in enumerate(_DIGITS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
# Officially `(?!<=\d)(\.)(?!\d)`: "<=" in place of "<" makes the first part always true, so "3."
# loses its period too.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_STRIPPED = (
    32  # officially `sub("", text, re.UNICODE)`: the flag, 32, is taken for the count
)


@dataclass(frozen=True, slots=True)
class VQATruth:
    """One question: the annotators' answers in their order, and its two official classes."""

    question_id: str
    answers: tuple[str, ...]
    answer_type: str | None = None
    question_type: str | None = None
    image_id: str | None = None  # asked for by intervals only


@dataclass(frozen=True, slots=True)
class VQAScores:
    """Percent, rounded to 2 decimals as the official program does; `n` questions."""

    overall: float
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]
    n: int


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """Normalises a text officially: punctuation, then lower case, number words, articles,
    contractions.
    """
    joined = _COMMA_BETWEEN_DIGITS.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        # Looked up in the text as it came; a mark next to a space vanishes everywhere, else it
        # becomes a space.
        out = out.replace(mark, "" if joined or mark + " " in text or " " + mark in text else " ")
    out = _PERIOD.sub("", out, count=_PERIODS_STRIPPED)
    words = (NUMBER_WORDS.get(word, word) for word in out.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, answers: Sequence[str]) -> float:
    """Returns in [0, 1] the mean over annotators of min(1, matches among the others / 3).

    As officially, texts are normalised only where the annotators' answers are not all the same.
    With one answer alone (easy-VQA and the like, which the official rule does not cover: there is
    no other annotator) it is 1 for an exact match after normalisation, else 0.
    """
    if not answers:
        raise ScoreError("a question without answers cannot be scored; give at least one")
    answer = _clean(answer)
    answers = [_clean(a) for a in answers]
    if len(answers) == 1:
        return float(normalise(answer) == normalise(answers[0]))
    if len(set(answers)) > 1:
        answer = normalise(answer)
        answers = [normalise(a) for a in answers]
    matches = sum(a == answer for a in answers)
    return added(min(1.0, (matches - (a == answer)) / 3) for a in answers) / len(answers)


def added(values: Iterable[float]) -> float:
    """Returns the sum from left to right, as in the official program's Python: from 3.12 on,
    `sum` corrects its rounding, and a figure of VQAv2 gets another last digit.
    """
    total = 0.0
    for value in values:
        total += value
    return total


def same_question(text: str | None) -> str:
    """Returns the question in lower case with single spaces: equal ones are the same question."""
    return " ".join((text or "").lower().split())


def most_common(answers: Iterable[str]) -> str:
    """Returns the answer given most often after normalisation, in its most frequent spelling; of
    equals, the one given first.

    As it was spelled: `accuracy` does not normalise where all annotators agree, so the normalised
    text could be wrong there ("2" for "two").
    """
    spelled = [_clean(answer) for answer in answers]
    winner = Counter(map(normalise, spelled)).most_common(1)[0][0]
    return Counter(s for s in spelled if normalise(s) == winner).most_common(1)[0][0]


def graded(
    predictions: Mapping[str, str], truths: Iterable[VQATruth]
) -> list[tuple[VQATruth, float]]:
    """Grades one answer per question in [0, 1]. Raises ScoreError naming ids that are missing,
    extra or there twice.
    """
    truths = list(truths)
    counts = Counter(truth.question_id for truth in truths)
    twice = [i for i, n in counts.items() if n > 1]
    extra = [i for i in predictions if i not in counts]
    missing = [i for i in counts if i not in predictions]
    refuse("the annotations hold question id", twice, "twice; each question may occur once")
    refuse(
        "the predictions lack question id",
        missing,
        "which the annotations ask; every question needs one answer",
    )
    refuse("the predictions answer question id", extra, "which the annotations do not hold")
    if not truths:
        raise ScoreError("there is no question to score; give at least one")
    return [(truth, accuracy(predictions[truth.question_id], truth.answers)) for truth in truths]


def score(predictions: Mapping[str, str], truths: Iterable[VQATruth]) -> VQAScores:
    """Returns the official figures of one answer per question. Raises what `graded` raises."""
    grades = graded(predictions, truths)
    by_answer: dict[str, list[float]] = defaultdict(list)
    by_question: dict[str, list[float]] = defaultdict(list)
    for truth, value in grades:
        if truth.answer_type is not None:
            by_answer[truth.answer_type].append(value)
        if truth.question_type is not None:
            by_question[truth.question_type].append(value)
    return VQAScores(
        overall=percent([value for _, value in grades]),
        per_answer_type={name: percent(values) for name, values in by_answer.items()},
        per_question_type={name: percent(values) for name, values in by_question.items()},
        n=len(grades),
    )


def intervals(
    grades: Sequence[tuple[VQATruth, float]],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Any]:
    """Returns `score`'s figures of what `graded` returned, each an Interval over images, the bounds
    rounded likewise: {"overall": Interval, "per_answer_type": {name: Interval},
    "per_question_type": {name: Interval}}.
    """
    row_C = image_rows(truth.image_id for truth, _ in grades)
    images = row_C.max() + 1
    value_C = np.array([value for _, value in grades])

    def intervals_of(name_C: Sequence[str | None]) -> dict[str, Interval]:
        column_of = {
            name: column
            for column, name in enumerate(dict.fromkeys(n for n in name_C if n is not None))
        }
        sums_I2K = np.zeros((images, 2, len(column_of)))
        known_C = np.array([name is not None for name in name_C])
        column_C = np.array([column_of[name] for name in name_C if name is not None], int)
        np.add.at(sums_I2K[:, 0], (row_C[known_C], column_C), value_C[known_C])
        np.add.at(sums_I2K[:, 1], (row_C[known_C], column_C), 1)
        sums_R2K = resampled_sums(sums_I2K.reshape(images, -1), resamples, seed).reshape(
            resamples, *sums_I2K[0].shape
        )
        with np.errstate(invalid="ignore"):
            share_RK = 100 * sums_R2K[:, 0] / sums_R2K[:, 1]
        images_K = np.count_nonzero(sums_I2K[:, 1], axis=0)
        found = {}
        for name, k in column_of.items():
            value = percent(value_C[known_C][column_C == k])
            drawn = percentile(value, share_RK[:, k], images_K[k], confidence)
            found[name] = Interval(value, round(drawn.low, 2), round(drawn.high, 2))
        return found

    return {
        "overall": intervals_of(["all"] * len(grades))["all"],
        "per_answer_type": intervals_of([truth.answer_type for truth, _ in grades]),
        "per_question_type": intervals_of([truth.question_type for truth, _ in grades]),
    }


def percent(values: Sequence[float]) -> float:
    """Returns the mean in percent with the official rounding."""
    return round(100 * added(values) / len(values), 2)


def read_results(path: Path) -> dict[str, str]:
    """Reads the official results file `[{"question_id": ..., "answer": ...}]`: answers by question
    id, as text.
    """
    return read_pairs(path, "question_id", "answer", f"{path} answers question id", "answer")


def read_truths(questions: Path, annotations: Path) -> list[VQATruth]:
    """Reads the official question and annotation files, which must hold the same questions. Raises
    ScoreError.
    """
    form = f'{questions} is not an official file of "questions"'
    asked = [
        identifier(entry, "question_id", where)
        for where, entry in entries(field(read_json(questions), "questions", f"{form}: it"), form)
    ]
    form = f'{annotations} is not an official file of "annotations"'
    answered = field(read_json(annotations), "annotations", f"{form}: it")
    truths = [_truth(entry, where) for where, entry in entries(answered, form)]
    known = Counter(asked)
    held = {truth.question_id for truth in truths}
    refuse(
        f"{questions} asks question id", [i for i, n in known.items() if n > 1], "more than once"
    )
    refuse(
        f"{annotations} lacks question id",
        [i for i in known if i not in held],
        f"which {questions} asks",
    )
    refuse(
        f"{annotations} answers question id",
        [i for i in held if i not in known],
        f"which {questions} does not ask",
    )
    refuse(
        f"{annotations} has no answer to question id",
        [truth.question_id for truth in truths if not truth.answers],
        "which cannot be scored",
    )
    return truths


def _truth(entry: Any, where: str) -> VQATruth:
    """Reads an entry of "annotations". Raises ScoreError."""
    question_id = identifier(entry, "question_id", where)
    where = f"{where} (question_id {question_id})"
    return VQATruth(
        question_id=question_id,
        answers=tuple(
            text(given, "answer", place)
            for place, given in entries(field(entry, "answers", where), f"{where}, answers")
        ),
        answer_type=_class(entry, "answer_type", where),
        question_type=_class(entry, "question_type", where),
        image_id=identifier(entry, "image_id", where),
    )


def _class(entry: dict[str, Any], key: str, where: str) -> str | None:
    return None if entry.get(key) is None else text(entry, key, where)


def vqa_results(answers: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Returns (question id, answer) in the official results format; ids that are whole numbers are
    written as such.
    """
    return [{"question_id": number_if_official(i), "answer": answer} for i, answer in answers]


def caption_results(captions: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Returns (image id, caption) in the COCO results format."""
    return [{"image_id": number_if_official(i), "caption": caption} for i, caption in captions]


def number_if_official(identifier: str) -> int | str:
    """COCO's and VQA's ids are integers; an id like '007' or 'a.jpg' would not survive that and
    stays a string.
    """
    return (
        int(identifier)
        if identifier.isascii() and identifier.isdigit() and str(int(identifier)) == identifier
        else identifier
    )
