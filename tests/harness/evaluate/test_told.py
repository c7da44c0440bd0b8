"""The line and the description that a person reads of an evaluation."""

from harness.evaluate.told import described, score_line


def test_a_score_stands_beside_what_it_falls_to_in_the_same_unit():
    captions = {"CIDEr": 0.432, "shuffled_CIDEr": 12.3, "no_image_CIDEr": None, "loss_nats": 2.0}
    assert score_line("caption", captions) == (
        "caption: CIDEr 0.432, with other images 0.123; loss 2.000"
    )
    questions = {"accuracy": 82.13, "shuffled_accuracy": 43.2, "no_image_accuracy": 41.0}
    assert score_line("vqa", questions) == (
        "vqa: accuracy 82.1%, with other images 43.2%, with none 41.0%; loss unknown"
    )


def test_a_description_gives_verdict_reason_and_terms_of_every_set():
    exchange = {"exchange_advantage": 41.2, "exchange_advantage_low": 38.0}
    own = {"verdict": "image used", "reason": "it costs 41", **exchange}
    other = {"verdict": "image ignored", "reason": "it costs nothing"}
    told = described("test, step 9", {"vqa": {"sets": {"a": own, "b": other}}, "caption": other})
    assert told == (
        "**image used** (vqa, a; test, step 9): it costs 41\n\n"
        "- 41.2 [38.0, unknown] points lost with another image\n\n"
        "**image ignored** (vqa, b; test, step 9): it costs nothing\n\n\n"
        "**image ignored** (caption; test, step 9): it costs nothing\n\n"
    )
