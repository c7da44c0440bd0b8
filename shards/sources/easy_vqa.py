"""easy-VQA, from the package `easy-vqa`: 5,000 drawings of one shape, 48,248 questions, 13 answers.

The package has train and test; `dev` is 400 training images drawn by a fixed hash, so that choices
are never made on the test set.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Annotated

from shards.record import Text
from shards.sources.source import Images, Source, check_limit, order_of

DEV_IMAGES = 400
_NEGATIONS = (" no ", " not ")


def load(limit: Annotated[int | None, "Only so many images of each split."] = None) -> Source:
    """Splits train (3,600 images), dev (400) and test (1,000); ShardError for a bad limit."""
    check_limit(limit)
    import easy_vqa  # an extra: harness.errors says how it is installed

    source = Source("easy_vqa", Images(Path(easy_vqa.__file__).parent / "data"))
    questions = {"train": easy_vqa.get_train_questions(), "test": easy_vqa.get_test_questions()}
    drawn = sorted(set(questions["train"][2]), key=partial(order_of, "easy-vqa dev"))
    dev = set(drawn[:DEV_IMAGES])
    for folder, (prompts, answers, images) in questions.items():
        of_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for prompt, answer, image in zip(prompts, answers, images, strict=True):
            of_image[image].append((prompt, answer))
        for image, rows in of_image.items():
            split = "dev" if folder == "train" and image in dev else folder
            path, key = f"{folder}/images/{image}.png", f"{folder}-{image:04d}"
            if source.find(path, split, len(rows), exact=True):
                texts = [
                    _text(f"{key}-{n}", prompt, answer) for n, (prompt, answer) in enumerate(rows)
                ]
                source.add(split, key, key, texts, path)
    source.skip_rest("no question asks about it")
    for split, items in source.splits.items():
        source.notes["images not taken, by --limit"] += len(items[limit:]) if limit else 0
        source.splits[split] = items[:limit]
    return source


def _text(text_id: str, prompt: str, answer: str) -> Text:
    if answer in ("yes", "no"):
        kind = "absence" if any(word in f" {prompt} " for word in _NEGATIONS) else "presence"
    else:
        kind = "what color" if "color" in prompt else "what shape"
    answer_type = "yes/no" if answer in ("yes", "no") else "other"
    return Text(
        text_id, "vqa", (answer,), prompt, {"answer_type": answer_type, "question_type": kind}
    )
