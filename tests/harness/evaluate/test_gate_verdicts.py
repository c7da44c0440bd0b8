"""The names of verdicts, worst first, and the donors, terms and lines that they rest on."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_image_use import COLOURS, ToyModel, batch_of

from harness.config.schema import DecodingConfig, EvaluationConfig
from harness.evaluate.bootstrap import Interval
from harness.evaluate.image_use.asking import recall_term
from harness.evaluate.image_use.bank import Bank
from harness.evaluate.image_use.evidence import (
    EXCHANGE,
    EXCHANGE_NOTICED,
    MATCHED,
    NEIGHBOUR,
    NO_CONTENT,
    RECALL,
    SHALLOW,
    TEXT_ONLY,
    WORST_FIRST,
    Term,
)
from harness.evaluate.image_use.exchange import matched_captions, matched_questions
from harness.evaluate.image_use.gate import Gate, sums_per_context
from harness.evaluate.image_use.verdict import (
    Evidence,
    judge,
    judge_exchange,
    worst,
)
from harness.evaluate.predict import Prediction, answers
from harness.evaluate.results import TaskResult
from harness.evaluate.told import further_tables, verdict_lines
from harness.model.bridge import BridgeOutput
from harness.model.language.loss import LossOutput

CLEAR = Interval(40.0, 35.0, 45.0)
NONE = Interval(0.0, -0.5, 0.5)
NATS = Interval(1.0, 0.9, 1.1)


def term(name: str, above: Interval | None = CLEAR, score: float = 50.0, **known) -> Term:
    return Term(name, above, score=score, **known)


def evidence(**known) -> Evidence:
    """Of a sound model that answers questions."""
    sound = {
        "exchange": term(EXCHANGE, nats=NATS),
        "matched": term(MATCHED, nats=NATS),
        "further": (term(SHALLOW),),
        "images": 300,
        "highest": 99.0,
    }
    return Evidence(**{**sound, **known})


def verdict(**known) -> str:
    return judge(evidence(**known)).verdict


def test_a_sound_model_uses_the_image_and_every_term_is_told():
    found = judge(evidence(further=(term(TEXT_ONLY), term(SHALLOW))))
    assert found.verdict == "image used"
    assert "above the shallow floor (50.0)" in found.reason
    assert "above the text only (50.0)" in found.reason


def test_what_could_not_be_measured_stands_in_the_verdict_and_is_never_passed():
    unmeasured = Term(NEIGHBOUR, None, missing="no local training set holds captions")
    assert not unmeasured.passed
    found = judge(evidence(further=(term(RECALL, margin=0.0), unmeasured)))
    assert found.verdict == "image used (not measured: neighbour floor)"
    assert "no local training set holds captions" in found.reason


@pytest.mark.parametrize("name", ["exchange", "matched"])
def test_both_exchanges_are_always_needed(name):
    without = Term(name, None, missing="no statistics")
    assert verdict(**{name: without}).startswith("not enough evidence")


def test_a_model_without_a_loss_is_judged_by_scores_in_every_term():
    assert verdict(exchange=term(EXCHANGE), matched=term(MATCHED)) == "image used"
    assert verdict(matched=term(MATCHED, NONE)) == "global statistics only"


def test_a_matched_exchange_whose_loss_alone_is_not_moved_is_not_passed():
    still = Interval(0.0, -0.01, 0.009)
    assert not term(MATCHED, nats=still).passed
    assert verdict(matched=term(MATCHED, nats=still)) != "image used"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"matched": term(MATCHED, NONE)}, "global statistics only"),
        # An interval that reaches the whole exchange shows neither.
        ({"matched": term(MATCHED, Interval(20.0, -5.0, 45.0))}, "not enough evidence"),
        ({"further": (term(SHALLOW, NONE),)}, "not above global statistics"),
        ({"further": (term(RECALL, margin=0.0), term(NEIGHBOUR, NONE))}, "retrieval is as good"),
        (
            {"further": (term(RECALL, NONE, margin=0.0), term(NEIGHBOUR, NONE))},
            "not enough evidence",
        ),
        ({"further": (term(TEXT_ONLY, NONE), term(SHALLOW))}, "not enough evidence"),
        ({"further": (term(SHALLOW, score=97.1),)}, NO_CONTENT),
        ({"further": (term(SHALLOW, score=96.9),)}, "image used"),
        ({"exchange": term(EXCHANGE, NONE, nats=NONE)}, "not enough evidence"),
        (
            {"exchange": term(EXCHANGE, NONE, nats=Interval(0.0, -0.01, 0.01))},
            "image ignored",
        ),
        (
            {
                "exchange": term(EXCHANGE, NONE, nats=Interval(0.0, -0.01, 0.01)),
                "across": term("images of another set"),
            },
            "set only",
        ),
        ({"endless_rate": 0.6, "exchange": term(EXCHANGE, NONE)}, "endless captions"),
        ({"endless_rate": 0.6, "empty_rate": 0.6}, "EOS collapse"),
        ({"images": 29}, "not enough evidence"),
        ({"trained_on": 1}, "not enough evidence"),
        ({"not_finite": "the loss is not finite", "p_eos_first": math.nan}, "not enough evidence"),
    ],
)
def test_the_first_name_that_holds_is_given(known, expected):
    assert verdict(**known) == expected


def test_what_is_lacking_is_told_in_points():
    found = judge(evidence(further=(term(SHALLOW, Interval(2.0, -1.5, 3.0)),)))
    assert "lacking: 2.5 points of the shallow floor" in found.reason
    assert "what the words of the question" in found.advice


def test_exchanges_alone_are_noticed_and_never_use():
    unmatched = Term(MATCHED, None, missing="not asked for")
    alone = {"matched": unmatched, "further": ()}
    assert judge_exchange(evidence(**alone)).verdict == EXCHANGE_NOTICED
    assert judge_exchange(evidence(**alone, images=20)).verdict == EXCHANGE_NOTICED
    assert judge_exchange(evidence(further=())).verdict == EXCHANGE_NOTICED
    # The matched exchange has its say where it was made.
    statistics = evidence(further=(), matched=term(MATCHED, NONE))
    assert judge_exchange(statistics).verdict == "global statistics only"
    ignored = term(EXCHANGE, NONE, nats=Interval(0.0, -0.01, 0.01))
    assert judge_exchange(evidence(exchange=ignored)).verdict == "image ignored"
    assert judge_exchange(evidence(empty_rate=0.9)).verdict == "EOS collapse"


# ---- donors --------------------------------------------------------------------------------------


def asked(key: str, question: str, truth: str, kind: str = "") -> Prediction:
    return Prediction(
        *("d", "s", key, key, key + question, "vqa", question, question, (truth,), truth, 0.0),
        meta={"question_type": kind} if kind else {},
    )


def test_a_donor_of_a_question_is_the_nearest_that_has_another_answer_to_it():
    position = {"a": 0.0, "b": 0.1, "c": 0.4, "d": 0.45}
    scaled_IK = np.array(list(position.values()))[:, None]
    texts = [
        asked("a", "colour?", "red"),
        asked("b", "Colour?", "red"),
        asked("c", "colour?", "blue"),
        asked("d", "shape?", "circle"),
    ]
    found = matched_questions(scaled_IK, np.arange(4), texts)
    # b is asked the same as a and far nearer than c, the nearest with another answer: the
    # statistics tell a's and b's answer. c's nearest has another answer.
    assert found.donor_C.tolist() == [-1, -1, 1, -1]
    assert found.told == 2
    assert found.lonely == 1


def test_a_question_nobody_else_was_asked_takes_a_donor_of_its_type():
    scaled_IK = np.array([[0.0], [1.0], [3.0]])
    texts = [
        asked("a", "is it a dog?", "yes", "is it a"),
        asked("b", "is it a cat?", "no", "is it a"),
        asked("c", "how many?", "no", "how many"),
    ]
    assert matched_questions(scaled_IK, np.arange(3), texts).donor_C.tolist() == [1, 0, -1]


def test_a_donor_of_a_caption_shares_no_caption_with_it_and_is_alike():
    scaled_IK = np.array([[0.0], [1.0], [1.9], [9.0]])
    texts = [
        asked(key, "", words) for key, words in zip("abcd", ("x", "X ", "y", "z"), strict=True)
    ]
    found = matched_captions(scaled_IK, np.arange(4), texts)
    # a's nearest, b, says the same; c is less than twice as far. d's nearest says something else.
    assert found.donor_C.tolist() == [2, 2, 1, 2]
    scaled_IK[2] = 2.1
    assert matched_captions(scaled_IK, np.arange(4), texts).donor_C.tolist() == [-1, 2, 1, 2]


def test_a_picture_without_statistics_gives_and_takes_no_donor():
    scaled_IK = np.array([[0.0], [np.nan], [0.2]])
    texts = [asked(key, "colour?", colour) for key, colour in zip("abc", COLOURS, strict=True)]
    assert matched_captions(scaled_IK, np.arange(3), texts).donor_C.tolist() == [2, -1, 0]
    assert matched_questions(scaled_IK, np.arange(3), texts).donor_C.tolist() == [2, -1, 0]


def gate_of(model, batches, task="vqa") -> Gate:
    gate = Gate(model, task, DecodingConfig(max_new_tokens=5), EvaluationConfig())
    for batch in batches:
        tokens = model.bridge_tokens(batch)
        said = answers(model, batch, gate.decoding, tokens)
        gate.add(batch, tokens, *sums_per_context(model.loss(batch, tokens), batch), said)
    return gate


def test_a_matched_exchange_leaves_out_what_statistics_tell_and_names_it():
    model = ToyModel()
    gate = gate_of(model, [batch_of(60)])
    colour_I = np.arange(60) % 3
    gate.measure(colour_I[:, None] + np.random.default_rng(0).normal(0, 0.01, (60, 1)))
    matched = gate.matched_term()
    assert matched.advantage is None
    assert "for 120 no image alike has another answer" in matched.missing
    use = gate.result(())
    assert use.verdict == "not enough evidence"
    assert "matched exchange was not measured" in use.reason


def test_losses_that_are_not_finite_are_no_evidence_and_are_named():
    gate = gate_of(ToyModel(), [batch_of(60)])
    gate.predictions[7] = replace(gate.predictions[7], p_eos_first=math.nan)
    gate.measure(np.zeros((60, 1)))
    use = gate.result(())
    assert use.verdict == "not enough evidence"
    assert "not finite for 1 of 120 texts (image k3)" in use.reason
    gate = gate_of(ToyModel(), [batch_of(60)])
    gate._nats[4] = math.nan
    gate.measure(np.zeros((60, 1)))
    assert "the loss is not finite for 1 of 120 texts (image k2)" in gate.result(()).reason


# ---- the bank ------------------------------------------------------------------------------------


class QuestionAware(ToyModel):
    """Makes image tokens of a picture and a question: the colour, and how often it was encoded."""

    question_aware = True
    encoded = 0

    def patch_tokens(self, batch):
        self.encoded += 1
        return batch.features_IPD.float()

    def bridge_tokens(self, batch):
        tokens_CQD = batch.features_IPD.float()[batch.image_of_C][:, :1]
        return BridgeOutput(tokens_CQD, torch.arange(len(batch.image_of_C)))


def test_a_bridge_that_reads_the_question_gets_other_patches_and_its_own_words():
    model, plain = QuestionAware(), ToyModel()
    batches = [batch_of(10, start) for start in range(0, 60, 10)]
    aware, other = gate_of(model, batches), gate_of(plain, batches)
    assert model.encoded == len(batches)
    for gate in (aware, other):
        gate.measure(np.zeros((60, 1)))
    assert aware.said["shuffled"] == other.said["shuffled"]
    assert aware.said["matched"] == other.said["matched"]
    assert aware.result(()).verdict == other.result(()).verdict == "image used"


def test_the_bank_gives_any_picture_to_any_context():
    model = ToyModel()
    bank = Bank(model)
    for start in (0, 3):
        batch = batch_of(3, start)
        names = [context.record.key for context in batch.contexts]
        bank.add(batch, model.bridge_tokens(batch), names)
    assert len(bank) == 6
    tokens = bank.tokens(batch, np.array([5, 0, 5, 1, 0, 2]))
    assert tokens.by_context(torch.float32)[:, 0, 0].tolist() == [2, 0, 2, 1, 0, 2]


# ---- captions ------------------------------------------------------------------------------------


class Captioner(ToyModel):
    """Finds captions likely by how near their number is to the picture's; `blind`: to 0."""

    blind = False

    def loss(self, batch, tokens):
        number_C = tokens.tokens_NQD[tokens.token_row_of_C, 0, 0]
        own_T = batch.labels_TL[:, 0].float()
        away_T = (own_T - number_C[batch.context_of_T]).abs()
        nats_T = own_T / 10 if self.blind else away_T
        return LossOutput(nats_T.sum(), batch.weight, nats_T, torch.ones_like(nats_T))


def captions_of(images: int):
    batch = batch_of(images, task="caption")
    first = [row for row in range(len(batch.contexts)) if row % 2 == 0]
    contexts = tuple(
        replace(
            batch.contexts[row],
            text=replace(batch.contexts[row].text, targets=(f"caption {number}",)),
        )
        for number, row in enumerate(first)
    )
    return replace(
        batch,
        contexts=contexts,
        prompt_ids_CL=batch.prompt_ids_CL[first],
        prompt_mask_CL=batch.prompt_mask_CL[first],
        image_of_C=torch.arange(images),
        labels_TL=torch.arange(images)[:, None],
        weight_TL=torch.ones(images, 1),
        context_of_T=torch.arange(images),
        features_IPD=torch.arange(images, dtype=torch.float16)[:, None, None],
    )


@pytest.mark.parametrize("blind", [False, True])
def test_recall_is_above_chance_for_a_model_that_knows_its_caption_alone(blind):
    model = Captioner()
    model.blind = blind
    gate = gate_of(model, [captions_of(40)], task="caption")
    found = recall_term(gate, np.random.default_rng(0).random((40, 2)), 300)
    assert found.images == 40
    assert found.about == "chance 2.5%"
    assert found.passed == (not blind)
    assert found.score == (0 if blind else 100)
    fewer = recall_term(gate, np.random.default_rng(0).random((40, 2)), 20)
    assert "20 images are fewer than 30" in fewer.missing


# ---- what is told --------------------------------------------------------------------------------


def test_the_worst_set_decides_and_one_of_few_images_does_not_beside_larger_ones():
    gate = gate_of(ToyModel(), [batch_of(60)])
    gate.measure(np.zeros((60, 1)))
    good = gate.result(())
    poor = replace(good, verdict="set only", set="other")
    tiny = replace(good, verdict="image ignored", images=10)
    assert worst([good, poor]) is poor
    assert worst([good, tiny]) is good
    assert worst([tiny]) is tiny
    assert worst([]) is None
    assert WORST_FIRST[-1] == good.name == "image used"


def test_several_sets_and_types_of_questions_have_their_tables():
    gate = gate_of(ToyModel(), [batch_of(60)])
    kinds = [
        replace(p, meta={"question_type": f"kind {n % 2}"}) for n, p in enumerate(gate.predictions)
    ]
    gate.predictions[:] = kinds
    gate.measure(np.zeros((60, 1)))
    use = gate.result(())
    (types,) = further_tables("vqa", use.to_dict())
    assert "vqa: type of question" in types
    assert types.count("kind") == 2
    tiny = replace(use, set="b_test", verdict="not enough evidence", images=10, gap_by_type={})
    result = TaskResult("vqa", gate.predictions, uses={"a_test": use, "b_test": tiny})
    result.pooled = Interval(3.0, 2.0, 4.0)
    sets, types = further_tables("vqa", result.to_dict())
    assert "not enough evidence" in sets
    assert "all sets pooled (decides nothing)" in sets
    assert "3.0 [2.0, 4.0]" in sets
    assert "vqa, a_test: type of question" in types


def test_the_last_lines_tell_verdict_terms_and_what_would_change_it():
    gate = gate_of(ToyModel(), [batch_of(90)])
    gate.measure(np.zeros((90, 1)))
    floor = term(SHALLOW, NONE)
    unmeasured = Term(TEXT_ONLY, None, missing="x" * 100)
    use = gate.result((floor, unmeasured))
    lines = verdict_lines("vqa", use.to_dict())
    assert lines[0] == "vqa: not above global statistics"
    assert any("points above words, colours and sizes" in line for line in lines)
    assert any("text only: not measured" in line for line in lines)
    assert any("what would change it: train further" in line for line in lines)
    assert len(lines) <= 10
    assert all(len(line) <= 80 for line in lines)


IGNORED = {"exchange": term(EXCHANGE, NONE, nats=Interval(0.0, -0.001, 0.001))}


@pytest.mark.parametrize(("share", "collapsed"), [(0.0001, True), (0.2, False), (None, False)])
def test_an_ignored_image_is_the_bridges_fault_where_its_tokens_are_the_same(share, collapsed):
    found = judge(evidence(**IGNORED, image_share=share))
    assert found.verdict == "image ignored"
    assert ("the bridge has collapsed" in found.reason) == collapsed
    assert ("lower train.bridge_learning_rate" in found.advice) == collapsed
    assert judge(evidence(image_share=share)).advice == ""


def test_the_share_of_the_image_tokens_that_is_the_pictures_own():
    bank = Bank(SimpleNamespace(question_aware=False))
    assert bank.image_share() is None
    own_IQD = torch.randn(200, 4, 8)
    for same, expected in ((0.0, 1.0), (3.0, 0.1), (1000.0, 0.0)):
        bank._rows = list(own_IQD + same)
        assert bank.image_share() == pytest.approx(expected, abs=0.02)
    bank._rows[0] = torch.randn(5, 8)  # a published model's picture of another size
    assert bank.image_share() is None
