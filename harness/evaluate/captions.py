"""BLEU, ROUGE-L and CIDEr-D of captions, each equal to pycocoevalcap's, and the COCO files they are
computed from.

Captions and references by image id -> CaptionScores: per-image counts, from which the corpus
figures and their intervals follow. As in pycocoevalcap BLEU and ROUGE are in [0, 1] and CIDEr in
[0, 10]; papers print 100 times that. Legend: I images, N = 4 lengths of n-grams, K columns of
counts, R resamples.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from harness.evaluate.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Interval,
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
from harness.evaluate.ptb import tokenise

MEASURES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")
_N = 4
_BETA = 1.2  # of ROUGE-L: recall counts for more than precision
_SIGMA = 6.0  # words, of CIDEr-D's penalty for another length

Ngrams = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class CaptionScores:
    """`sums_IK`: matched and possible n-grams (4 + 4), own and reference length, ROUGE-L, CIDEr-D,
    1; by image.
    """

    image_ids: tuple[str, ...]
    sums_IK: np.ndarray

    @cached_property
    def corpus(self) -> dict[str, float]:
        """The official figures, by measure."""
        return {
            name: float(values[0])
            for name, values in figures(self.sums_IK.sum(axis=0)[None]).items()
        }

    def with_intervals(
        self, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = SEED
    ) -> dict[str, Interval]:
        """Returns the same with intervals over images; document frequencies stay those of the whole
        set.
        """
        values_R = figures(resampled_sums(self.sums_IK, resamples, seed))
        images = len(self.image_ids)
        return {
            name: percentile(value, values_R[name], images, confidence)
            for name, value in self.corpus.items()
        }


def figures(sums_RK: np.ndarray) -> dict[str, np.ndarray]:
    """Sums of `CaptionScores.sums_IK` over images -> each measure, for each row.

    BLEU is that of the corpus: ratios of sums (Papineni et al. 2002), with the two constants of
    pycocoevalcap's scorer.
    """
    matched_RN = sums_RK[:, :4]
    possible_RN = sums_RK[:, 4:8]
    own_R = sums_RK[:, 8]
    wanted_R = sums_RK[:, 9]
    precisions_RN = (matched_RN + 1e-15) / (possible_RN + 1e-9)
    brevity_R = np.exp(np.minimum(0.0, 1 - 1 / ((own_R + 1e-15) / (wanted_R + 1e-9))))
    bleu_RN = np.cumprod(precisions_RN, axis=1) ** (1 / np.arange(1, _N + 1)) * brevity_R[:, None]
    means_R2 = sums_RK[:, 10:12] / sums_RK[:, 12:]
    return dict(zip(MEASURES, np.concatenate([bleu_RN, means_R2], axis=1).T, strict=True))


def score(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> CaptionScores:
    """Scores one caption per image id against its references. Raises ScoreError naming ids that are
    missing or extra.

    Images are taken in the order of `references`, which the tokeniser notices (see ptb.py).
    """
    refuse(
        "the predictions lack image",
        [i for i in references if i not in hypotheses],
        "which the references hold",
    )
    refuse(
        "the predictions hold image",
        [i for i in hypotheses if i not in references],
        "which the references lack",
    )
    refuse(
        "the references hold image",
        [i for i, texts in references.items() if not texts],
        "without a caption",
    )
    if not references:
        raise ScoreError("there is no caption to score; give at least one image with references")
    said, wanted = _tokenised(hypotheses, references)
    own_I, refs_I = _all_ngrams(said, wanted)
    columns = [
        np.array([_bleu_counts(own, refs) for own, refs in zip(own_I, refs_I, strict=True)]),
        np.array([_rouge_l(own, refs) for own, refs in zip(said, wanted, strict=True)])[:, None],
        np.array(_cider_d(own_I, refs_I))[:, None],
        np.ones((len(said), 1)),
    ]
    return CaptionScores(tuple(references), np.concatenate(columns, axis=1))


def stripped_scores(
    said: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> CaptionScores:
    """Scores as `score` does, captions and references stripped alike: what some projects publish.

    Beside the official figures only: words that are hard to get right count no longer. A reference
    of which nothing is left counts only where nothing is left of the others. Raises ScoreError.
    """
    return score(
        {image: stripped(caption) for image, caption in said.items()},
        {
            image: [kept for kept in map(stripped, texts) if kept] or [""] * bool(texts)
            for image, texts in references.items()
        },
    )


def stripped(text: str) -> str:
    """Returns the text in lower case without punctuation and digits (each removed, so that what
    stood beside it is joined), then without words of one letter.
    """
    letters = re.sub(r"[^\w\s]|[\d_]", "", text.lower())
    return " ".join(word for word in letters.split() if len(word) > 1)


def cider_d_per_image(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """CIDEr-D in [0, 10] of each caption, by image id, with the document frequencies of exactly
    these references.
    """
    return dict(
        zip(references, _cider_d(*_all_ngrams(*_tokenised(hypotheses, references))), strict=True)
    )


def _all_ngrams(
    said: Sequence[str], wanted: Sequence[Sequence[str]]
) -> tuple[list[Ngrams], list[list[Ngrams]]]:
    return [_ngrams(own) for own in said], [[_ngrams(ref) for ref in refs] for refs in wanted]


def _tokenised(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    tokens = iter(tokenise([text for texts in references.values() for text in texts]))
    return tokenise([hypotheses[i] for i in references]), [
        [next(tokens) for _ in t] for t in references.values()
    ]


def _ngrams(text: str) -> Ngrams:
    words = text.split()
    return Counter(
        tuple(words[i : i + n]) for n in range(1, _N + 1) for i in range(len(words) - n + 1)
    )


def _bleu_counts(own: Ngrams, refs: Sequence[Ngrams]) -> list[int]:
    """Matched and possible n-grams by length, own length, length of the closest reference (of
    equals the shorter).
    """
    matched_N = [0] * _N
    for ngram, count in own.items():
        matched_N[len(ngram) - 1] += min(count, max(ref.get(ngram, 0) for ref in refs))
    lengths = [
        sum(count for ngram, count in ngrams.items() if len(ngram) == 1) for ngrams in (own, *refs)
    ]
    length = lengths[0]
    closest = min((abs(other - length), other) for other in lengths[1:])[1]
    return [*matched_N, *(max(0, length - n) for n in range(_N)), length, closest]


def _rouge_l(own: str, refs: Sequence[str]) -> float:
    """F of the best precision and the best recall among the references, which may be of two of them
    (Lin 2004).

    Split at single spaces, as officially: an empty caption is one empty word.
    """
    words = own.split(" ")
    common = [_longest_common_subsequence(words, ref.split(" ")) for ref in refs]
    precision = max(common) / len(words)
    recall = max(c / len(ref.split(" ")) for c, ref in zip(common, refs, strict=True))
    return (
        (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
        if precision and recall
        else 0.0
    )


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length, a row of the table held in the bits of one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(one) - row.bit_count()


def _cider_d(said_I: Sequence[Ngrams], refs_I: Sequence[Sequence[Ngrams]]) -> list[float]:
    """Per image, times 10 (Vedantam et al. 2015, section 8): the mean over n and references of the
    cosine of tf-idf vectors, the caption's clipped at the reference's, times a Gaussian penalty for
    another length.
    """
    documents = Counter(ngram for refs in refs_I for ngram in set().union(*refs))
    log_images = math.log(len(refs_I))
    rarity = {ngram: log_images - math.log(count) for ngram, count in documents.items()}

    def vector(ngrams: Ngrams) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        """tf-idf weights, their norms by length of n-gram, and the number of words."""
        weights: dict[tuple[str, ...], float] = {}
        squares_N = [0.0] * _N
        words = 0
        for ngram, count in ngrams.items():
            weights[ngram] = weight = count * rarity.get(ngram, log_images)
            squares_N[len(ngram) - 1] += weight * weight
            words += count if len(ngram) == 1 else 0
        return weights, [math.sqrt(square) for square in squares_N], words

    def similarity(own: Ngrams, refs: Sequence[Ngrams]) -> float:
        weights, norms_N, length = vector(own)
        total = 0.0
        for ref_weights, ref_norms_N, ref_length in map(vector, refs):
            products_N = [0.0] * _N
            # In the caption's own order: a set's differs from process to process, and with it the
            # last digit of the sum.
            for ngram, weight in weights.items():
                if ngram in ref_weights:
                    products_N[len(ngram) - 1] += (
                        min(weight, ref_weights[ngram]) * ref_weights[ngram]
                    )
            scales_N = [
                own_norm * norm for own_norm, norm in zip(norms_N, ref_norms_N, strict=True)
            ]
            cosine = (
                sum(
                    product / scale
                    for product, scale in zip(products_N, scales_N, strict=True)
                    if scale
                )
                / _N
            )
            total += cosine * math.exp(-((length - ref_length) ** 2) / (2 * _SIGMA**2))
        return 10 * total / len(refs)

    return [similarity(own, refs) for own, refs in zip(said_I, refs_I, strict=True)]


# ---- files ---------------------------------------------------------------------------------------


def read_caption_results(path: Path) -> dict[str, str]:
    """Reads the COCO results file `[{"image_id": ..., "caption": ...}]`: captions by image id."""
    return read_pairs(path, "image_id", "caption", f"{path} holds image", "caption")


def read_references(path: Path, partial: bool = False) -> dict[str, list[str]]:
    """Reads the COCO caption annotations {"images", "annotations"}: captions by image id, in the
    order of `images`. Raises ScoreError; `partial`: an image may be without captions.
    """
    form = f'{path} is not a COCO caption file of "images" and "annotations"'
    document = read_json(path)
    images = field(document, "images", f"{form}: it")
    ids = [identifier(image, "id", f"{where} of images") for where, image in entries(images, form)]
    found: dict[str, list[str]] = {image_id: [] for image_id in ids}
    unknown = []
    for where, annotation in entries(field(document, "annotations", f"{form}: it"), form):
        where = f"{where} of annotations"
        image_id = identifier(annotation, "image_id", where)
        if image_id in found:
            found[image_id].append(text(annotation, "caption", f"{where} (image_id {image_id})"))
        else:
            unknown.append(image_id)
    refuse(f"{path} has captions of image", unknown, 'which is not among its "images"')
    refuse(f"{path} lists image", [i for i, n in Counter(ids).items() if n > 1], "more than once")
    if not partial:
        refuse(
            f"{path} has no caption of image",
            [i for i in found if not found[i]],
            "listed among its images; `harness score captions --partial` scores the rest",
        )
    return found
