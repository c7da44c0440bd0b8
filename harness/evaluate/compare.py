"""Is A better than B, or would other images have said otherwise? The paired bootstrap (Koehn 2004).

Two sets of answers to the same questions, or captions of the same images -> for each measure both
figures, their difference with its interval, and the share of resamples in which A is ahead. Both
are resampled together: an image that is hard for both moves neither. Legend: I images, K sums, R
resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import ConfigError
from harness.evaluate import FOLDER, captions, vqa
from harness.evaluate.bootstrap import Interval, image_rows, percentile, resampled_sums
from harness.evaluate.measures import TASKS
from harness.evaluate.moved import Move
from harness.evaluate.report import SCORES, read_scores
from shards.files import is_remote
from shards.read import records


@dataclass(frozen=True)
class Compared:
    """One measure of A and of B on the texts that both answered."""

    a: float
    b: float
    difference: Interval  # a - b
    a_better: float  # share of resamples, in [0, 1]; ties count for B
    texts: int
    left_out: int  # texts that one of the two, or both, did not answer

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "difference": self.difference.to_dict()}


def answers(
    a: Mapping[str, str], b: Mapping[str, str], truths: Sequence[vqa.VQATruth]
) -> dict[str, Compared]:
    """Compares VQA accuracy in percent."""
    common = [truth for truth in truths if truth.question_id in a and truth.question_id in b]
    _need(common, "question")
    row_C = image_rows(truth.image_id for truth in common)
    grades_2C = [
        [vqa.accuracy(said[truth.question_id], truth.answers) for truth in common]
        for said in (a, b)
    ]
    columns: list[list[float]] = [*grades_2C, [1.0] * len(common)]
    sums_IK = np.stack([np.bincount(row_C, weights) for weights in columns], axis=1)

    def accuracy(sums_RK: np.ndarray) -> list[dict[str, np.ndarray]]:
        return [{"accuracy": 100 * sums_RK[:, k] / sums_RK[:, 2]} for k in (0, 1)]

    return _compared(sums_IK, accuracy, len(common), len(truths))


def descriptions(
    a: Mapping[str, str], b: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, Compared]:
    """Returns BLEU, ROUGE-L and CIDEr-D; document frequencies are those of the images that both
    described.
    """
    common = {image: texts for image, texts in references.items() if image in a and image in b}
    _need(common, "image")
    scores = [captions.score({image: said[image] for image in common}, common) for said in (a, b)]
    columns = scores[0].sums_IK.shape[1]

    def measures(sums_RK: np.ndarray) -> list[dict[str, np.ndarray]]:
        return [captions.figures(sums_RK[:, :columns]), captions.figures(sums_RK[:, columns:])]

    return _compared(
        np.concatenate([s.sums_IK for s in scores], 1), measures, len(common), len(references)
    )


def _need(common: Any, what: str) -> None:
    if not common:
        raise ConfigError(
            f"A and B have no {what} in common that the references hold too: "
            "nothing can be compared"
        )


def _compared(
    sums_IK: np.ndarray,
    figures: Callable[[np.ndarray], list[dict[str, np.ndarray]]],
    texts: int,
    asked: int,
) -> dict[str, Compared]:
    of_all = figures(sums_IK.sum(axis=0)[None])
    resampled = figures(resampled_sums(sums_IK))
    found = {}
    for name in of_all[0]:
        a = float(of_all[0][name][0])
        b = float(of_all[1][name][0])
        difference_R = resampled[0][name] - resampled[1][name]
        found[name] = Compared(
            a=a,
            b=b,
            difference=percentile(a - b, difference_R, len(sums_IK)),
            a_better=float(np.mean(difference_R > 0)),
            texts=texts,
            left_out=asked - texts,
        )
    return found


def runs(
    run_a: Path, run_b: Path, data: Sequence[str] | None = None
) -> dict[str, dict[str, Compared]]:
    """Two evaluated runs, by task, on the test sets `data`; none: those that A was evaluated on.

    Reads the result files that `harness evaluate` left in RUN/evaluation. Raises ConfigError,
    ShardError.
    """
    evaluated = [evaluation_of(run_a), evaluation_of(run_b)]
    truths, references = _test_texts(data or evaluated[0][1])
    found: dict[str, dict[str, Compared]] = {}
    of_vqa = [said(folder, "vqa") for folder, _ in evaluated]
    if truths and all(of_vqa):
        found["vqa"] = answers(of_vqa[0], of_vqa[1], truths)
    of_captions = [said(folder, "caption") for folder, _ in evaluated]
    if references and all(of_captions):
        found["caption"] = descriptions(of_captions[0], of_captions[1], references)
    if not found:
        raise ConfigError(
            f"{run_a} and {run_b} have no task in common on these test sets: "
            "nothing can be compared"
        )
    return found


def evaluation_of(run: Path) -> tuple[Path, list[str]]:
    """Returns the folder of a run's result files, and the sets they are about, where these lie
    now.
    """
    folder = run if (run / SCORES).is_file() else run / FOLDER
    if not (folder / SCORES).is_file():
        raise ConfigError(f"{run} holds no {FOLDER}/{SCORES}; run `harness evaluate {run}` first")
    report = read_scores(folder / SCORES)
    move = Move.since(report, folder)
    return folder, [move.path(path) for path in report["data"]] if move else report["data"]


def _test_texts(paths: Sequence[str]) -> tuple[list[vqa.VQATruth], dict[str, tuple[str, ...]]]:
    """Returns the questions of all sets, and the captions of their images, by an id that is unique
    over the sets.
    """
    truths: list[vqa.VQATruth] = []
    references: dict[str, tuple[str, ...]] = {}
    for path in paths:
        if is_remote(path) or not Path(path).exists():
            where = "remote" if is_remote(path) else "gone"
            raise ConfigError(
                f"the runs were evaluated on {path}, which is {where}; "
                "give the test set with --data DIR"
            )
    for record in records(paths):
        of_set = f"{record.dataset}_{record.split}"
        for text in record.texts:
            if text.task == "vqa":
                image = f"{of_set}/{record.image_id}"
                truths.append(vqa.VQATruth(f"{of_set}/{text.id}", text.targets, image_id=image))
            else:
                references[f"{of_set}/{record.image_id}"] = text.targets
    return truths, references


def said(folder: Path, task: str) -> dict[str, str]:
    """Returns DATASET_SPLIT/ID -> answer or caption, of the result files that an evaluation left.

    Raises ScoreError.
    """
    kind = f"_{TASKS[task].files}.json"
    read = TASKS[task].read
    files = sorted(folder.glob(f"*{kind}"))
    return {
        f"{file.name.removesuffix(kind)}/{i}": text
        for file in files
        for i, text in read(file).items()
    }
