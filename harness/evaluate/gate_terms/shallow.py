"""The shallow floor: what a question's words and statistics of its picture would still score.

Questions, their true answers and statistics -> an answer to each from a random forest (Breiman
2001) that never saw its picture. scikit-learn is imported where it is used: nothing else needs it.
Legend: C texts, I pictures, K columns, V answers.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.evaluate.bootstrap import image_rows
from harness.evaluate.gate_terms.scale import aspect
from harness.evaluate.vqa import same_question

_WORDS = 200  # words and pairs of words that become columns, the most frequent ones
_TREES_AT_ONCE = 10  # a full forest over 100 answers would hold a gigabyte
_TEXTS_FOR_CHOICE = 2_000
_MOST_COMMON = "most common answer"
# Columns that a split may choose from: the usual few drown the statistics among words, many make
# the trees alike.
_FORESTS: dict[str, str | float] = {
    "forest, square root of the columns": "sqrt",
    "forest, a third of the columns": 1 / 3,
}


@dataclass(frozen=True)
class ShallowFloor:
    """The answers of the floor, to be scored as the model's are."""

    answers: list[str]  # of each text used, by a rule that saw neither it nor its picture
    rows_C: np.ndarray  # which texts these are
    rules: tuple[str, ...]  # that answered, by fold
    seconds: float


@dataclass(frozen=True)
class _Texts:
    question_C: np.ndarray  # as `same_question` writes them
    truth_C: np.ndarray
    inputs_CK: np.ndarray
    learnable_C: np.ndarray  # whether the truth is one of the answers that may be given
    trees: int
    seed: int


def shallow_answers(
    questions: Sequence[str],
    truths: Sequence[str],
    statistics_CK: np.ndarray,
    image_C: Sequence[Hashable],
    *,
    trees: int = 100,
    folds: int = 5,
    seed: int = 0,
    most_texts: int = 10_000,
    most_answers: int = 100,
) -> ShallowFloor | None:
    """Answers every text from the pictures of the other folds, by the best of three rules: a forest
    of one of two widths, or the question's most common answer. The rule is chosen on pictures of
    the other folds alone, so no figure is chosen by what it is scored on.

    truths: the most common answer of each text. Beyond `most_texts` it takes pictures at even steps
    with all their texts; other answers than the `most_answers` most frequent are never given. None
    with fewer than three pictures, or fewer than `folds`.
    """
    begun = time.perf_counter()
    rows_C = _used(image_rows(image_C), most_texts)
    picture_C = image_rows(image_C[row] for row in rows_C)
    if not len(rows_C) or picture_C.max() + 1 < max(3, folds):
        return None
    question_C = np.array([same_question(questions[row]) for row in rows_C])
    truth_C = np.array([truths[row] for row in rows_C])
    given = [answer for answer, _ in Counter(truth_C.tolist()).most_common(most_answers)]
    texts = _Texts(
        question_C=question_C,
        truth_C=truth_C,
        inputs_CK=_inputs(question_C, np.asarray(statistics_CK)[rows_C]),
        learnable_C=np.isin(truth_C, given),
        trees=trees,
        seed=seed,
    )
    fold_C = _folds(picture_C, folds)
    answer_C = np.empty(len(rows_C), object)
    rules = []
    for fold in range(folds):
        rule = _chosen_rule(texts, fold_C, fold)
        scored = np.flatnonzero(fold_C == fold)
        answer_C[scored] = _answers(texts, rule, np.flatnonzero(fold_C != fold), scored)
        rules.append(rule)
    return ShallowFloor(answer_C.tolist(), rows_C, tuple(rules), time.perf_counter() - begun)


def _used(picture_C: np.ndarray, most_texts: int) -> np.ndarray:
    """Returns the rows of at most so many texts, of pictures at even steps."""
    if len(picture_C) <= most_texts:
        return np.arange(len(picture_C))
    pictures = picture_C.max() + 1
    wanted = max(1, pictures * most_texts // len(picture_C))
    chosen = np.linspace(0, pictures - 1, wanted).astype(int)
    return np.flatnonzero(np.isin(picture_C, chosen))[:most_texts]


def _inputs(question_C: np.ndarray, statistics_CK: np.ndarray) -> np.ndarray:
    """Returns words and statistics as columns; those that never vary are left out."""
    inputs_CK = np.concatenate(
        [_words(question_C), statistics_CK, aspect(statistics_CK)], axis=1, dtype=np.float32
    )
    varies_K = (inputs_CK != inputs_CK[0]).any(axis=0)
    return inputs_CK[:, varies_K] if varies_K.any() else inputs_CK[:, :1]  # a forest needs one


def _words(question_C: np.ndarray) -> np.ndarray:
    from sklearn.feature_extraction.text import CountVectorizer

    if not any(re.search(r"\w", question) for question in question_C):
        return np.zeros((len(question_C), 0), np.float32)
    counter = CountVectorizer(
        binary=True,
        ngram_range=(1, 2),
        max_features=_WORDS,
        token_pattern=r"\w+",  # the default leaves out words of one letter
        dtype=np.float32,
    )
    return counter.fit_transform(question_C).toarray()


def _folds(picture_C: np.ndarray, folds: int) -> np.ndarray:
    """Returns the fold of each text; all texts of a picture are in one."""
    from sklearn.model_selection import GroupKFold

    fold_C = np.zeros(len(picture_C), int)
    split = GroupKFold(folds).split(picture_C, groups=picture_C)
    for fold, (_, rows) in enumerate(split):
        fold_C[rows] = fold
    return fold_C


def _chosen_rule(texts: _Texts, fold_C: np.ndarray, fold: int) -> str:
    """Returns the rule that is right most often on the next fold when it learns from the rest."""
    following = (fold + 1) % (fold_C.max() + 1)
    held = _even_steps(np.flatnonzero(fold_C == following))
    learnt = _even_steps(np.flatnonzero((fold_C != fold) & (fold_C != following)))
    return max(
        (*_FORESTS, _MOST_COMMON),
        key=lambda rule: (_answers(texts, rule, learnt, held) == texts.truth_C[held]).sum(),
    )


def _even_steps(rows: np.ndarray) -> np.ndarray:
    wanted = min(len(rows), _TEXTS_FOR_CHOICE)
    return rows[np.linspace(0, len(rows) - 1, wanted).astype(int)]


def _answers(texts: _Texts, rule: str, learnt: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Returns the rule's answers to the texts `asked`, from those `learnt`."""
    learnt = learnt[texts.learnable_C[learnt]]
    if not len(learnt):
        return np.full(len(asked), "", object)
    if rule == _MOST_COMMON:
        return _most_common(texts, learnt, asked)
    return _of_forest(texts, _FORESTS[rule], learnt, asked)


def _most_common(texts: _Texts, learnt: np.ndarray, asked: np.ndarray) -> np.ndarray:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question, truth in zip(texts.question_C[learnt], texts.truth_C[learnt], strict=True):
        counts[question][truth] += 1
    overall = sum(counts.values(), Counter())
    found = [counts.get(question, overall) for question in texts.question_C[asked]]
    return np.array([counter.most_common(1)[0][0] for counter in found], object)


def _of_forest(
    texts: _Texts, columns: str | float, learnt: np.ndarray, asked: np.ndarray
) -> np.ndarray:
    from sklearn.ensemble import RandomForestClassifier

    votes_CV = np.zeros((len(asked), len(set(texts.truth_C[learnt]))))
    for done in range(0, texts.trees, _TREES_AT_ONCE):
        count = min(_TREES_AT_ONCE, texts.trees - done)
        forest = RandomForestClassifier(
            count, max_features=columns, random_state=texts.seed + done, n_jobs=1
        )
        forest.fit(texts.inputs_CK[learnt], texts.truth_C[learnt])
        votes_CV += count * forest.predict_proba(texts.inputs_CK[asked])
    return forest.classes_[votes_CV.argmax(axis=1)]
