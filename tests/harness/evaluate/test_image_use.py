"""The gate: what it does to the images, what it makes of the answers, and the verdict for models
known to be so.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from harness.config.schema import Config, DecodingConfig, EvaluationConfig
from harness.evaluate.bootstrap import Interval, ratio
from harness.evaluate.floor import Majority, epochs_trained
from harness.evaluate.image_use import (
    Gate,
    causes_of_collapse,
    changed_where_truth_differs,
    complementary_pairs,
    donors,
    judge,
    sums_per_context,
)
from harness.evaluate.predict import Prediction, answers
from harness.model.batch import Batch, Context
from harness.model.bridge import BridgeOutput
from harness.model.language.loss import Generated, LossOutput
from shards.record import Record, Text
from toy_runs import make_shards

COLOURS = ("red", "green", "blue")
DECODING = DecodingConfig(max_new_tokens=5)


@dataclass
class ToyModel:
    """Its image token is the number of the image's colour. `looks`: how many nats it gains from the
    right one.
    """

    looks: float = 2.0
    answers_from_image: bool = True
    p_eos: float = 0.01
    noise: float = 0.0
    asked: int = 0
    losses: int = 0

    def bridge_tokens(self, batch: Batch) -> BridgeOutput:
        return BridgeOutput(batch.features_IPD.float()[:, :1], batch.image_of_C)

    def _seen(self, batch: Batch, tokens: BridgeOutput) -> list[int]:
        if not tokens.tokens_NQD.shape[1]:
            return [-1] * len(batch.contexts)
        return tokens.tokens_NQD[tokens.token_row_of_C, 0, 0].round().int().tolist()

    def loss(self, batch: Batch, tokens: BridgeOutput) -> LossOutput:
        self.losses += 1
        rng = np.random.default_rng(self.losses)
        seen = self._seen(batch, tokens)
        right = [
            COLOURS.index(c.text.targets[0]) == s for c, s in zip(batch.contexts, seen, strict=True)
        ]
        nats = torch.tensor([3.0 - self.looks * r for r in right]) + torch.from_numpy(
            rng.normal(0, self.noise, len(right))
        )
        sum_T = nats[batch.context_of_T]
        return LossOutput(sum_T.sum(), batch.weight, sum_T, batch.weight_TL.sum(dim=1))

    def generate(self, batch: Batch, decoding: DecodingConfig, tokens: BridgeOutput) -> Generated:
        self.asked += len(batch.contexts)
        said = [
            COLOURS[s] if self.answers_from_image and s in (0, 1, 2) else "red"
            for s in self._seen(batch, tokens)
        ]
        said = ["" if self.p_eos > 0.5 else text for text in said]
        return Generated(said, [[] for _ in said], torch.full((len(said),), self.p_eos))


def batch_of(images: int, start: int = 0, targets: int = 1, task: str = "vqa") -> Batch:
    """Images of colours in turn, two questions each, every question the same two."""
    contexts, image_of_C = [], []
    for i in range(images):
        colour = COLOURS[(start + i) % 3]
        record = Record(
            f"k{start + i}",
            "toy",
            "test",
            f"i{start + i}",
            tuple(Text(f"{start + i}-{q}", task, (colour,), f"question {q}?") for q in range(2)),
        )
        for text in record.texts:
            contexts.append(Context(record, text, text.prompt))
            image_of_C.append(i)
    count = len(contexts)
    features = torch.tensor([(start + i) % 3 for i in range(images)], dtype=torch.float16)[
        :, None, None
    ]
    return Batch(
        prompt_ids_CL=torch.arange(count)[:, None],
        prompt_mask_CL=torch.ones(count, 1, dtype=torch.bool),
        image_of_C=torch.tensor(image_of_C),
        labels_TL=torch.ones(count * targets, 1, dtype=torch.long),
        weight_TL=torch.ones(count * targets, 1),
        context_of_T=torch.arange(count).repeat_interleave(targets),
        features_IPD=features,
        contexts=tuple(contexts),
    )


def judged(model: ToyModel, images: int = 90, per_batch: int = 10, task: str = "vqa"):
    controls = {"blank": torch.full((1, 1, 1), 7.0), "noise": torch.full((4, 1, 1), 8.0)}
    gate = Gate(model, task, DECODING, EvaluationConfig(), controls)
    for start in range(0, images, per_batch):
        batch = batch_of(min(per_batch, images - start), start, task=task)
        tokens = model.bridge_tokens(batch)
        said = answers(model, batch, DECODING, tokens)
        gate.add(batch, tokens, *sums_per_context(model.loss(batch, tokens), batch), said)
    return gate.result()


def test_every_context_gets_another_image():
    for images in (2, 3, 7):
        for roll in range(20):
            donor = donors(images, roll)
            assert (donor != torch.arange(images)).all()
            assert sorted(donor.tolist()) == list(range(images))
    with pytest.raises(ValueError, match="at least 2"):
        donors(1, 0)


def test_a_model_that_reads_its_image_is_found_to_use_it():
    use = judged(ToyModel())
    assert use.verdict == "image used", use.reason
    assert (use.images, use.contexts, use.left_out) == (90, 180, 0)
    assert use.scores["true"] == 100.0
    assert use.scores["shuffled"] < 80
    assert (
        use.scores["no_image"] == use.scores["blank"] == use.scores["noise"] == pytest.approx(33.33)
    )
    assert use.answers_changed_where_truth_differs == 100.0
    assert use.pairs_where_truth_differs == 180
    assert use.loss_gap.low > 0.5
    assert use.loss_nats["true"] == pytest.approx(1.0)
    assert use.distinct_outputs == 3


def test_a_model_that_never_looks_is_found_to_ignore_its_image():
    use = judged(ToyModel(looks=0.0, answers_from_image=False))
    assert use.verdict == "image ignored", use.reason
    assert use.answers_changed_where_truth_differs == 0.0
    assert use.scores["true"] == use.scores["shuffled"]
    assert use.distinct_outputs == 1


def test_captions_are_judged_by_their_cider_and_its_margin_beside_the_loss():
    seen = judged(ToyModel(), task="caption")
    assert seen.verdict == "image used", seen.reason
    assert "lowers the CIDEr by" in seen.reason
    assert (
        seen.scores["true"] == 250.0
    )  # of 1,000: a caption of one word has one of the four lengths of n-grams
    assert seen.scores["blank"] == pytest.approx(83.33)  # "red" is right for a third
    assert seen.to_dict()["shuffled_CIDEr"] == seen.scores["shuffled"] < seen.scores["true"]
    assert seen.to_dict()["CIDEr_gap_low"] == seen.score_gap.low > 1
    deaf = judged(
        ToyModel(answers_from_image=False), task="caption"
    )  # its loss knows the image, its captions do not
    assert deaf.verdict == "not enough evidence", deaf.reason
    assert "the lower bound of the CIDEr gap is not above 1 points" in deaf.reason
    assert deaf.loss_gap == seen.loss_gap


def test_a_model_that_ends_at_once_has_collapsed_however_well_its_loss_depends_on_the_image():
    use = judged(ToyModel(p_eos=0.9))
    assert use.verdict == "EOS collapse"
    assert "empty" in use.reason
    assert use.empty_rate == 1.0


def test_doubt_is_not_enough_evidence():
    few = judged(ToyModel(), images=20)
    assert few.verdict == "not enough evidence"
    assert "20 images" in few.reason
    unsteady = judged(ToyModel(looks=0.02, noise=1.0, answers_from_image=False))
    assert unsteady.verdict == "not enough evidence", unsteady.reason
    only_the_loss = judged(ToyModel(answers_from_image=False))
    assert only_the_loss.verdict == "not enough evidence"
    assert "the loss depends on the image" in only_the_loss.reason


@pytest.mark.parametrize(
    ("loss_gap", "accuracy_gap", "verdict"),
    [
        ((0.5, 0.011, 1.0), (5.0, 3.0, 9.0), "image used"),
        ((0.5, 0.009, 1.0), (5.0, 3.0, 9.0), "not enough evidence"),
        ((0.5, 0.4, 0.6), (5.0, 1.1, 9.0), "image used"),
        ((0.5, 0.4, 0.6), (5.0, 0.9, 9.0), "not enough evidence"),
        ((0.0, -0.01, 0.019), (0.0, -1.0, 1.0), "image ignored"),
        ((-0.3, -0.5, -0.1), (0.0, -1.0, 1.0), "image ignored"),
        ((0.0, -0.01, 0.021), (0.0, -1.0, 1.0), "not enough evidence"),
        ((0.015, 0.013, 0.017), (0.0, 0.0, 0.0), "not enough evidence"),
        ((0.0, -0.01, 0.01), (5.0, 3.0, 9.0), "not enough evidence"),
        ((0.0, -math.inf, math.inf), (5.0, 3.0, 9.0), "not enough evidence"),
    ],
)
def test_a_verdict_needs_its_bounds(loss_gap, accuracy_gap, verdict):
    assert judge(Interval(*loss_gap), Interval(*accuracy_gap), 0.0, 0.0, images=100)[0] == verdict


def test_the_reason_names_the_evidence_that_was_wanting():
    little, much = Interval(0.005, 0.003, 0.006), Interval(5.0, 3.0, 9.0)
    assert (
        "the lower bound of the loss gap is not above 0.01 nats"
        in judge(little, much, 0.0, 0.0, 100)[1]
    )
    assert (
        "the lower bound of the accuracy gap"
        in judge(Interval(1.0, 0.9, 1.1), little, 0.0, 0.0, 100)[1]
    )
    assert "shows neither" in judge(Interval(0.0, -0.1, 0.1), little, 0.0, 0.0, 100)[1]


def test_either_sign_of_collapse_is_enough():
    clear = Interval(1.5, 1.4, 1.6)
    assert judge(clear, clear, 0.51, 0.0, 100)[0] == "EOS collapse"
    assert judge(clear, clear, 0.0, 0.51, 100)[0] == "EOS collapse"
    assert judge(clear, clear, 0.5, 0.5, 100)[0] == "image used"


def test_without_the_true_image_each_prompt_is_asked_once():
    model = ToyModel()
    judged(model)
    # 180 contexts true and 180 shuffled; 2 prompts without image, 2 blank, 2 x 4 noise images.
    assert model.asked == 360 + 2 + 2 + 8


def test_a_batch_of_one_image_is_left_out_and_counted():
    use = judged(ToyModel(), images=41, per_batch=10)
    assert use.images == 40
    assert use.left_out == 2


def test_the_report_has_the_keys_of_the_issue_and_is_json(tmp_path):
    import json

    use = judged(ToyModel())
    report = json.loads(json.dumps(use.to_dict(), allow_nan=False))
    keys = {
        "shuffled_accuracy",
        "blank_accuracy",
        "no_image_accuracy",
        "loss_gap_nats",
        "empty_rate",
        "verdict",
    }
    assert keys | {"answers_changed_where_truth_differs"} <= report.keys()
    lonely = replace(
        use,
        loss_gap=Interval(1.0, -math.inf, math.inf),
        score_gap=Interval(0.0, -math.inf, math.inf),
    )
    assert json.loads(json.dumps(lonely.to_dict(), allow_nan=False))["loss_gap_nats_low"] is None


def test_losses_are_summed_over_the_targets_of_a_context():
    batch = batch_of(3, targets=5)
    nats_C, weight_C = sums_per_context(
        ToyModel().loss(batch, ToyModel().bridge_tokens(batch)), batch
    )
    assert nats_C == pytest.approx(np.full(6, 5.0))
    assert weight_C == pytest.approx(np.full(6, 5.0))


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        per_I = rng.integers(1, 12, 60).astype(float)
        image_effect_I = rng.normal(0, 1, 60)
        found = ratio((0.3 + image_effect_I) * per_I, per_I, 200, 0.95)
        covered += found.low <= 0.3 <= found.high
    assert 0.87 <= covered / 100 <= 0.99


def test_the_bootstrap_resamples_images_and_not_texts():
    """Ten copies of every text tell nothing new, so the interval must not shrink."""
    rng = np.random.default_rng(2)
    values_I = rng.normal(0, 1, 50)
    once = ratio(values_I, np.ones(50), 500, 0.95)
    ten = ratio(10 * values_I, np.full(50, 10.0), 500, 0.95)
    assert (ten.low, ten.high) == pytest.approx((once.low, once.high))
    assert ratio(np.ones(1), np.ones(1), 10, 0.95).high == math.inf


def test_only_pairs_whose_truth_differs_are_counted():
    def said(key: str, prompt: str, truth: str, answer: str) -> Prediction:
        return Prediction(
            "d", "s", key, key, key + prompt, "vqa", prompt, prompt, (truth,), answer, 0.0
        )

    same_truth = [said("a", "q", "red", "red"), said("b", "q", "Red.", "blue")]
    assert changed_where_truth_differs(same_truth) == (0, 0)
    other_prompt = [said("a", "q", "red", "red"), said("b", "r", "blue", "blue")]
    assert changed_where_truth_differs(other_prompt) == (0, 0)
    unchanged = [said("a", "q", "red", "red"), said("b", "q", "blue", "The red")]
    assert changed_where_truth_differs(unchanged) == (0, 2)
    changed = [said("a", "q", "red", "red"), said("b", "q", "blue", "green")]
    assert changed_where_truth_differs(changed) == (2, 2)


def test_the_causes_of_a_collapse_are_named_and_a_good_batch_has_none():
    @dataclass
    class Tokenizer:
        eos_token_id: int = 1

    def causes(labels, weight, **given):
        batch = replace(batch_of(1), labels_TL=torch.tensor(labels), weight_TL=torch.tensor(weight))
        return causes_of_collapse(batch, Tokenizer(), **given)

    assert causes([[5, 6, 1, 0], [7, 1, 0, 0]], [[1.0, 1, 1, 0], [1, 1, 0, 0]]) == []
    assert causes([[5, 1, 1, 1]], [[1.0, 1, 0, 0]]) == [], (
        "padding without weight teaches nothing, whatever its id"
    )
    (padding, share) = causes([[5, 1, 1, 1]], [[1.0, 1, 1, 1]])
    assert padding.startswith("50% of the weight of the labels lies on padding")
    assert share.startswith("EOS carries 75% of all target weight")
    (padding,) = causes([[5, 1, 0, 0]], [[1.0, 1, 1, 1]])
    assert padding.startswith("50% of the weight"), "also where padding has an id of its own"
    (starting,) = causes([[1, 5, 1], [5, 6, 1]], [[1.0, 0, 0], [1, 1, 1]])
    assert starting.startswith("1 of 2 targets start with EOS")
    (bos,) = causes([[5, 1]], [[1.0, 1]], bos_in_generation_only=True)
    assert "BOS" in bos
    (share,) = causes([[5, 1]], [[1.0, 3]])
    assert share.startswith("EOS carries 75%")
    assert causes([[1]], [[0.0]]) == []


def test_a_complementary_pair_counts_when_both_its_answers_are_right_and_both_were_asked():
    def said(key: str, pair: str | None, truth: str, answer: str, split: str = "val") -> Prediction:
        meta = {"pair_id": pair}
        return Prediction(
            "d", split, key, key, key, "vqa", "q", "q", (truth,) * 10, answer, 0.0, meta
        )

    one = [said("1", "2", "yes", "yes"), said("2", "1", "no", "no")]
    half = [said("3", "4", "yes", "yes"), said("4", "3", "no", "yes")]
    alone = [
        said("5", "6", "yes", "yes"),
        said("7", None, "yes", "yes"),
        said("2", "1", "no", "no", "other"),
    ]
    assert complementary_pairs(one) == (1, 1)
    assert complementary_pairs([*one, *half, *alone]) == (1, 2)
    assert complementary_pairs(alone) == (0, 0)


@pytest.mark.parametrize(
    ("accuracy_gap", "verdict"),
    [
        ((9.0, 1.1, 20.0), "image used"),
        ((0.0, -2.0, 0.9), "image ignored"),
        ((1.0, -2.0, 3.0), "not enough evidence"),
    ],
)
def test_a_model_without_a_loss_is_judged_by_its_scores(accuracy_gap, verdict):
    assert judge(None, Interval(*accuracy_gap), 0.0, 0.0, 100)[0] == verdict


def test_how_often_the_training_set_was_seen_is_known_while_it_is_there(tmp_path):
    make_shards(tmp_path / "train", 8)
    config = Config(name="c", data={"train": [{"path": str(tmp_path / "train")}]})
    assert epochs_trained(config, {"epoch": 0, "position": 2}) == 0.25
    assert epochs_trained(config, {"epoch": 2, "position": 8}) == 3.0
    few = config.model_copy(update={"data": config.data.model_copy(update={"train_images": 4})})
    assert epochs_trained(few, {"epoch": 0, "position": 2}) == 0.5
    moved = Config(name="c", data={"train": [{"path": str(tmp_path / "gone")}]})
    assert epochs_trained(moved, {"epoch": 0, "position": 2}) is None


def test_majority_counts_spellings_as_one_and_answers_with_the_most_frequent_of_them():
    def record(key: str, question: str, *answers: str) -> Record:
        return Record(key, "d", "train", key, (Text(key, "vqa", answers, question),))

    given = ["2", "two", "two", "three", "three", "Three"]
    records = [record(str(n), "How many?", *[answer] * 10) for n, answer in enumerate(given)]
    majority = Majority.of([*records, record("7", "How many?", *["Two"] * 10)])
    assert majority.answer_of["how many?"] == majority.overall == "two"
    # Where all annotators agree the official accuracy compares texts as they are.
    asked = Prediction("d", "s", "k", "k", "1", "vqa", "", "How many?", ("two",) * 10, "", 0.0)
    assert majority.accuracy([asked]) == 100.0


def test_two_spellings_of_one_truth_are_no_pair_whose_truth_differs():
    def said(key: str, answer: str, *truth: str) -> Prediction:
        return Prediction(
            "d", "s", key, key, key, "vqa", "How many?", "How many?", truth, answer, 0.0
        )

    assert changed_where_truth_differs([said("1", "2", "two"), said("2", "3", "2")]).pairs == 0
    assert changed_where_truth_differs([said("1", "2", "two"), said("2", "3", "3")]).pairs == 2


def test_majority_knows_a_questions_answers_and_falls_back_to_the_most_common_of_all():
    def record(key: str, question: str, *answers: str) -> Record:
        return Record(key, "d", "train", key, (Text(key, "vqa", answers, question),))

    records = [
        record("1", "What colour?", "red"),
        record("2", "what  colour?", "blue", "Blue", "red"),
        record("3", "What colour?", "blue"),
        record("4", "Is it?", "yes"),
        record("5", "Is it?", "yes"),
        record("6", "Is she?", "yes"),
    ]
    majority = Majority.of(records)
    assert majority.answer_of["what colour?"] == "blue"
    assert majority.overall == "yes"
    asked = [
        Prediction("d", "s", "k", "k", str(n), "vqa", "", q, (a,), "", 0.0)
        for n, (q, a) in enumerate(
            [("WHAT COLOUR?", "blue"), ("Never seen?", "yes"), ("Is it?", "no")]
        )
    ]
    assert majority.accuracy(asked) == pytest.approx(66.67)
    assert (
        Majority.of([Record("c", "d", "train", "c", (Text("c", "caption", ("a dog",)),))]) is None
    )
