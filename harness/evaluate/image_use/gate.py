"""The gate of one set and task: what a model says and loses when its images are exchanged.

Batches with their image tokens, losses and answers (`add`) -> the same under other images of the
set, the most alike ones with another answer, none, blank or noise (`measure`) -> ImageUse
(`result`). The evidence is paired: every context is its own control, so only the image differs.
Legend: I images, C contexts, T targets, N bridge rows, Q queries, D width, K columns.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from harness.config.schema import DecodingConfig, EvaluationConfig
from harness.evaluate import vqa
from harness.evaluate.bootstrap import Interval, image_rows, per_text
from harness.evaluate.image_use.bank import Bank, without_images
from harness.evaluate.image_use.changes import changed_where_truth_differs
from harness.evaluate.image_use.collapse import bos_in_generation_only_of, causes_of_collapse
from harness.evaluate.image_use.evidence import (
    EXCHANGE,
    FEWEST_IMAGES,
    MATCHED,
    ImageUse,
    Term,
)
from harness.evaluate.image_use.exchange import (
    Matched,
    donors,
    matched_captions,
    matched_questions,
)
from harness.evaluate.image_use.verdict import Evidence, Judgement, judge, judge_exchange
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import ImageTokens, Prediction, select
from harness.machine.dealing import Alone, Item, Progress
from harness.model.batch import Batch

_SEED = 0  # of donors: the same for every run, so that runs compare
_TYPES_SHOWN = 20  # of questions, the most frequent ones


def exchanged(
    model: Any, batch: Batch, tokens: ImageTokens, image_of_C: torch.Tensor
) -> ImageTokens:
    """Returns the image tokens of other images of the batch. A bridge that reads the question makes
    them anew, with each context's own words; all others have made them already.
    """
    if getattr(model, "question_aware", False):
        return model.bridge_tokens(replace(batch, image_of_C=image_of_C))
    return tokens.with_rows(image_of_C)


class ContextSums(NamedTuple):
    """Sums over the targets of each context."""

    nats_C: np.ndarray
    weight_C: np.ndarray


def sums_per_context(loss: Any, batch: Batch) -> ContextSums:
    """Sums a LossOutput over the targets of each context."""

    def summed(values_T: torch.Tensor) -> np.ndarray:
        zeros_C = torch.zeros(len(batch.image_of_C), dtype=torch.float64, device=values_T.device)
        return zeros_C.index_add_(0, batch.context_of_T, values_T.double()).cpu().numpy()

    return ContextSums(summed(loss.sum_T), summed(loss.weight_T))


class _Part(NamedTuple):
    """A batch without its images, and where its contexts stand among those of the gate."""

    batch: Batch
    start: int


_Key = tuple[str, str, int]  # control, prompt, image of the control


def _first_rows(keys: Sequence[_Key], known: Container[_Key]) -> dict[_Key, int]:
    """Returns the first row of each key that is not known."""
    return {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}


def _control_image(batch: Batch, number: int, images: int) -> torch.Tensor:
    """image_of_C among the images of a control, for the part of this number."""
    return (batch.image_of_C + number + 1) % images


_ABOUT = {  # what is asked again, by the name of the work
    "asked": "with other images",
    "controlled": "without their image",
    "likely": "captions of alike images",
    "seen_otherwise": "with parts of images",
}


@dataclass
class Gate:
    """Collects the evidence of one set and task batch by batch; `measure` exchanges the images,
    `result` judges.

    On a rank that does not lead it knows batches and pictures (`keep`), and asks what it is told.
    `bank` holds the pictures of the gates, `controls` the image tokens (N, Q, D) of the blank and
    the noise images, by condition. `trained_on` holds the (dataset, split, key) of images that the
    model was trained on, `epochs` says how often it saw its training set (none: unknown),
    `training_batch` makes a batch as in training, asked only for the causes of an EOS collapse.
    """

    model: Any
    task: str
    decoding: DecodingConfig
    config: EvaluationConfig
    controls: Mapping[str, torch.Tensor] = field(default_factory=dict)
    set: str = ""
    bank: Bank | None = None
    no_image: bool = True  # measure it too, where the model can do without an image
    trained_on: Container[tuple[str, str, str]] = ()
    epochs: float | None = None
    training_batch: Callable[[], Batch | None] | None = None
    dealer: Alone = field(default_factory=Alone)
    progress: Progress | None = None  # told by `about` which question is asked again
    pictures: list[tuple[str, str, str]] = field(default_factory=list)  # of the contexts
    predictions: list[Prediction] = field(default_factory=list)
    # By condition; NaN or None for a context that was not asked under it.
    nats: dict[str, np.ndarray] = field(default_factory=dict)
    said: dict[str, list[str | None]] = field(default_factory=dict)
    matched: Matched | None = None
    why_not_matched: str = ""
    # The contexts whose captions were crossed last, and these: labels_PL and weight_PL.
    crossed: tuple[list[int], torch.Tensor, torch.Tensor] | None = None
    _parts: list[_Part] = field(default_factory=list)
    _weight: list[float] = field(default_factory=list)
    _nats: list[float] = field(default_factory=list)
    _rows: list[int] = field(default_factory=list)  # of the bank

    def add(
        self,
        batch: Batch,
        tokens: ImageTokens,
        nats_C: np.ndarray,
        weight_C: np.ndarray,
        said: Sequence[Prediction],
    ) -> None:
        """Takes a batch of this set and task, its image tokens, its losses per context and its
        predictions under the true images.
        """
        self.keep(batch, tokens)
        self.note(nats_C, weight_C, said)

    @torch.no_grad()
    def keep(self, batch: Batch, tokens: ImageTokens) -> None:
        """Takes a batch of this set and task and its image tokens."""
        if self.bank is None:
            self.bank = Bank(self.model)
        records = [context.record for context in batch.contexts]
        pictures = [(record.dataset, record.split, record.key) for record in records]
        self._rows += self.bank.add(batch, tokens, pictures).tolist()
        self._parts.append(_Part(without_images(batch), len(self.pictures)))
        self.pictures += pictures

    def note(self, nats_C: np.ndarray, weight_C: np.ndarray, said: Sequence[Prediction]) -> None:
        """Takes the losses and predictions under the true images of what was kept last."""
        self.predictions += said
        self._nats += map(float, nats_C)
        self._weight += map(float, weight_C)

    def dealt(self, name: str, do: Callable[..., Any], items: Sequence[Item]) -> Iterator[Any]:
        """Yields what `do(self, *item)` gives on whichever rank does it."""

        def own(_set: str, _task: str, *item: Any) -> Any:
            return do(self, *item)

        told = self.dealer.dealt(name, [(self.set, self.task, *item) for item in items], own)
        for done, found in enumerate(told, 1):
            if self.progress:
                self.progress(done, len(items), about=_ABOUT[name])
            yield found

    @property
    def texts(self) -> int:
        return len(self.pictures)

    @property
    def bank_rows(self) -> np.ndarray:
        """The pictures of the contexts, as rows of the bank."""
        return np.array(self._rows, int)

    @property
    def picture_rows(self) -> np.ndarray:
        """The pictures of the contexts, numbered as they came."""
        return image_rows(self._rows)

    def context_batch(self, context: int) -> Batch:
        """Returns the batch of one context, without its image."""
        part = next(part for part in reversed(self._parts) if part.start <= context)
        return select(part.batch, [context - part.start])

    def batches(self, context_c: Iterable[int]) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yields the contexts that are asked for batch by batch as they came: which they are, and
        their batch without images.
        """
        wanted = set(context_c)
        for part in self._parts:
            rows = [r for r in range(len(part.batch.contexts)) if part.start + r in wanted]
            if rows:
                yield part.start + np.array(rows), select(part.batch, rows)

    # ---- the counterfactuals ---------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, scaled_IK: np.ndarray | None = None, why_not: str = "") -> None:
        """Asks every context again under other images. `scaled_IK`: statistics of this gate's
        pictures as they came, scaled for distances; without them `why_not` says why no exchange
        can be matched.
        """
        self._note_true()
        row_C = self.shuffled_rows()
        if row_C is None:
            return
        self._ask("shuffled", row_C)
        self._control()
        self.why_not_matched = why_not
        if scaled_IK is not None:
            match = matched_questions if TASKS[self.task].has_right else matched_captions
            self.matched = match(scaled_IK, self.picture_rows, self.predictions)
            donor_C = self.matched.donor_C
            row_I = np.array(list(dict.fromkeys(self._rows)))
            self._ask("matched", np.where(donor_C < 0, -1, row_I[donor_C]))

    def compare(self, nats_C: np.ndarray | None, said_C: Sequence[str] | None) -> None:
        """Takes, in place of `measure`, what was lost and said under exchanged images; None where
        there were no others.
        """
        self._note_true()
        if nats_C is not None and said_C is not None:
            self.nats["shuffled"] = nats_C
            self.said["shuffled"] = list(said_C)

    def shuffled_rows(self) -> np.ndarray | None:
        """row_C of the bank: another picture of this gate for each context; None without one."""
        row_I = np.array(list(dict.fromkeys(self._rows)))
        if len(row_I) < 2:
            return None
        roll = int(np.random.default_rng(_SEED).integers(1 << 30))
        return row_I[donors(len(row_I), roll).numpy()[self.picture_rows]]

    def _note_true(self) -> None:
        self.nats["true"] = np.array(self._nats)
        self.said["true"] = [p.answer for p in self.predictions]

    @torch.no_grad()
    def measure_across(self, row_others: np.ndarray) -> None:
        """Asks again with images of another set, `row_others` of the same bank."""
        place_C = self.picture_rows % len(row_others)
        self._ask("across", row_others[place_C])

    def leave_out(self, texts: Container[tuple[str, str, str]]) -> None:
        """Forgets these texts, once all are measured: whoever answers elsewhere may leave gaps, and
        the donors of the others stay what they were.
        """
        kept = [c for c, p in enumerate(self.predictions) if p.id not in texts]
        if len(kept) == self.texts:
            return
        batches = [self.context_batch(context) for context in kept]
        self._parts = [_Part(batch, start) for start, batch in enumerate(batches)]
        self.pictures = [self.pictures[c] for c in kept]
        self.predictions = [self.predictions[c] for c in kept]
        self._rows = [self._rows[c] for c in kept]
        self._weight = [self._weight[c] for c in kept]
        self._nats = [self._nats[c] for c in kept]
        self.nats = {name: nats_C[kept] for name, nats_C in self.nats.items()}
        self.said = {name: [said[c] for c in kept] for name, said in self.said.items()}
        if self.matched:
            self.matched = self.matched._replace(donor_C=self.matched.donor_C[kept])

    def _ask(self, condition: str, row_C: np.ndarray) -> None:
        """Notes losses and answers with the bank's pictures `row_C`; -1: not asked."""
        nats_C = np.full(len(row_C), np.nan)
        said_C: list[str | None] = [None] * len(row_C)
        items = []
        for number, part in enumerate(self._parts):
            row_c = row_C[part.start : part.start + len(part.batch.contexts)]
            if (row_c >= 0).any():
                items.append((number, row_c.tolist()))
        told = self.dealt("asked", Gate.asked, items)
        for (number, rows), (nats_c, answers) in zip(items, told, strict=True):
            places = self._parts[number].start + np.flatnonzero(np.array(rows) >= 0)
            nats_C[places] = nats_c
            for place, answer in zip(places, answers, strict=True):
                said_C[place] = answer
        self.nats[condition] = nats_C
        self.said[condition] = said_C

    def asked(self, number: int, rows: Sequence[int]) -> tuple[np.ndarray, list[str]]:
        """Returns losses and answers of a part of the gate with these pictures of the bank, of the
        contexts that have one.
        """
        assert self.bank is not None  # something was added
        row_c = np.array(rows)
        asked = np.flatnonzero(row_c >= 0)
        batch = select(self._parts[number].batch, asked.tolist())
        tokens = self.bank.tokens(batch, row_c[asked])
        nats_c = sums_per_context(self.model.loss(batch, tokens), batch).nats_C
        return nats_c, self.model.generate(batch, self.decoding, tokens).texts

    def _control(self) -> None:
        """Notes losses and answers without an image, and with blank and noise ones. Without the
        true image many contexts are the same (image, prompt): each is asked once in all.
        """
        keys_of = [self._control_keys(number) for number in range(len(self._parts))]
        planned: set[_Key] = set()
        new_of: list[dict[str, dict[_Key, int]]] = []
        for keys in keys_of:
            new_of.append({name: _first_rows(own, planned) for name, own in keys.items()})
            planned.update(*new_of[-1].values())
        items = [
            (number, {name: list(rows.values()) for name, rows in new.items()})
            for number, new in enumerate(new_of)
        ]
        nats: dict[str, list[np.ndarray]] = defaultdict(list)
        said: dict[str, list[str | None]] = defaultdict(list)
        answer_of: dict[_Key, str] = {}
        told = self.dealt("controlled", Gate.controlled, items)
        for keys, new, found in zip(keys_of, new_of, told, strict=True):
            for name, (nats_c, answers) in found.items():
                nats[name].append(nats_c)
                answer_of |= zip(new[name], answers, strict=True)
                said[name] += [answer_of[key] for key in keys[name]]
        self.nats |= {name: np.concatenate(parts) for name, parts in nats.items()}
        self.said |= said

    def controlled(
        self, number: int, asked: Mapping[str, Sequence[int]]
    ) -> dict[str, tuple[np.ndarray, list[str]]]:
        """Returns by control the losses of a part of the gate, and the answers of its contexts in
        `asked`.
        """
        batch = self._parts[number].batch
        found = {}
        for name, tokens in self._control_tokens(number).items():
            nats_c = sums_per_context(self.model.loss(batch, tokens), batch).nats_C
            rows = asked[name]
            answers: list[str] = []
            if rows:
                part = tokens.with_rows(tokens.token_row_of_C[rows])
                answers = self.model.generate(select(batch, rows), self.decoding, part).texts
            found[name] = (nats_c, answers)
        return found

    def _control_keys(self, number: int) -> dict[str, list[_Key]]:
        """Returns by control what each context of a part is asked: (control, prompt, its image)."""
        batch = self._parts[number].batch
        images = {"no_image": torch.zeros_like(batch.image_of_C)} if self.no_image else {}
        for name, tokens_NQD in self.controls.items():
            images[name] = _control_image(batch, number, len(tokens_NQD))
        return {
            name: [
                (name, context.prompt, image)
                for context, image in zip(batch.contexts, image_C.tolist(), strict=True)
            ]
            for name, image_C in images.items()
        }

    def _control_tokens(self, number: int) -> dict[str, ImageTokens]:
        """Returns the image tokens of every control for a part."""
        assert self.bank is not None  # something was added
        part = self._parts[number]
        own_c = self.bank_rows[part.start : part.start + len(part.batch.contexts)]
        true = self.bank.tokens(part.batch, own_c)
        found = {}
        if self.no_image and (without := true.without_tokens()) is not None:
            found["no_image"] = without
        for name, tokens_NQD in self.controls.items():
            made: Any = type(true)
            found[name] = made(tokens_NQD, _control_image(part.batch, number, len(tokens_NQD)))
        return found

    # ---- what came of them -----------------------------------------------------------------------

    def scores(self, condition: str, asked_C: np.ndarray | None = None) -> np.ndarray:
        """Returns the score of each context (of those in `asked_C`), in points."""
        truths = [p.references for p in self.predictions]
        said = self.said[condition]
        rows = range(len(said)) if asked_C is None else asked_C.tolist()
        score = TASKS[self.task].scores([said[c] or "" for c in rows], [truths[c] for c in rows])
        return 100 * np.array(score)

    def _term(self, name: str, condition: str) -> Term:
        """Returns how much an exchange costs, over the contexts that were asked under it."""
        said = self.said.get(condition, [])
        asked_C = np.array([c for c, text in enumerate(said) if text is not None], int)
        images = len(np.unique(self.bank_rows[asked_C])) if len(asked_C) else 0
        if not images:
            return Term(name, None, missing="no text was answered with another image")
        other_C = self.scores(condition, asked_C)
        gap_C = self.scores("true", asked_C) - other_C
        change_C = (self.nats[condition] - self.nats["true"])[asked_C]
        weight_C = np.array(self._weight)[asked_C]
        has_loss = bool(np.isfinite(change_C).all())
        return Term(
            name,
            self._gap(gap_C, np.ones(len(asked_C)), asked_C),
            nats=self._gap(change_C, weight_C, asked_C) if has_loss else None,
            score=float(other_C.mean()),
            images=images,
        )

    def _gap(self, difference_C: np.ndarray, per_C: np.ndarray, asked_C: np.ndarray) -> Interval:
        """Returns sum(difference) / sum(per) with its interval over images."""
        row_C = image_rows(self.bank_rows[asked_C].tolist())
        settings = self.config
        return per_text(difference_C, row_C, settings.bootstrap, settings.confidence, per_C)

    def exchange_term(self) -> Term:
        """Returns the cost of giving each context any other image of the set."""
        return self._term(EXCHANGE, "shuffled")

    @property
    def across(self) -> Term | None:
        """The cost of images of another set, where it was measured."""
        return self._term("images of another set", "across") if "across" in self.said else None

    @property
    def is_exchanged(self) -> bool:
        """Whether any text was answered with another image."""
        return any(text is not None for text in self.said.get("shuffled", ()))

    def matched_term(self) -> Term:
        """Returns the cost of giving each context the most alike image (with another answer)."""
        if self.matched is None:
            return Term(MATCHED, None, missing=self.why_not_matched or "not asked for")
        term = self._term(MATCHED, "matched")
        asked = int((self.matched.donor_C >= 0).sum())
        if asked and term.advantage is None:
            return term
        about = f"{asked} of {self.texts} texts"
        if self.matched.told:
            about += f"; for {self.matched.told} no image alike has another answer"
        if self.matched.lonely:
            about += f"; {self.matched.lonely} were asked of one image alone"
        if term.images < FEWEST_IMAGES:
            return Term(
                MATCHED,
                None,
                missing=f"{term.images} images are fewer than {FEWEST_IMAGES}: {about}",
            )
        return replace(term, about=about)

    def result(self, further: tuple[Term, ...] | None = ()) -> ImageUse | None:
        """Returns the verdict on what was collected; None if that is nothing. `further`: the floors
        and the recall; None: the exchange alone is judged, which is never use.
        """
        if not self.predictions or "shuffled" not in self.said:
            return None
        evidence = self._evidence(further or ())
        judgement = judge_exchange(evidence) if further is None else judge(evidence)
        causes = self._causes() if judgement.verdict == "EOS collapse" else None
        return self._use(evidence, judgement, causes)

    def _evidence(self, further: tuple[Term, ...]) -> Evidence:
        weight = sum(self._weight)
        change_C = self.nats["shuffled"] - self.nats["true"]
        pictures = {p.picture for p in self.predictions}
        truths = [p.references for p in self.predictions]
        best = TASKS[self.task].scores([vqa.most_common(t) for t in truths], truths)
        return Evidence(
            exchange=self.exchange_term(),
            matched=self.matched_term(),
            further=further,
            across=self.across,
            images=len(pictures),
            trained_on=sum(picture in self.trained_on for picture in pictures),
            epochs=self.epochs,
            measure=TASKS[self.task].measure,
            loss_moved=float(np.abs(change_C).sum() / weight),
            empty_rate=float(np.mean([not p.answer.strip() for p in self.predictions])),
            endless_rate=self._endless(),
            p_eos_first=float(np.mean([p.p_eos_first for p in self.predictions])),
            not_finite=self._not_finite(),
            highest=100 * float(np.mean(best)) if TASKS[self.task].has_right else None,
            image_share=self.bank.image_share() if self.bank else None,
        )

    def _endless(self) -> float:
        """Returns the share of captions that were cut before they ended; a short answer that is
        cut is no sign of anything.
        """
        if TASKS[self.task].has_right:
            return 0.0
        return float(np.mean([not p.ended for p in self.predictions]))

    def _not_finite(self) -> str:
        """Says what of the evidence is NaN or infinite; "" where all is finite. A model that gives
        no loss at all, and sound probabilities, is judged by its scores.
        """
        places = [c for c, p in enumerate(self.predictions) if not np.isfinite(p.p_eos_first)]
        if places:
            key = self.predictions[places[0]].key
            return (
                f"the probability of ending is not finite for {len(places)} of {self.texts} texts "
                f"(image {key})"
            )
        bad_C = ~np.isfinite(self.nats["true"] + self.nats["shuffled"])
        if bad_C.any() and not bad_C.all():
            key = self.predictions[int(bad_C.argmax())].key
            return f"the loss is not finite for {bad_C.sum()} of {self.texts} texts (image {key})"
        return ""

    def _use(self, e: Evidence, judgement: Judgement, causes: tuple[str, ...] | None) -> ImageUse:
        """Returns the evidence and the verdict as they are told."""
        weight = sum(self._weight)
        changed = changed_where_truth_differs(self.predictions)
        reason = judgement.reason
        if causes is not None:
            known = "; ".join(causes) or "none of the known causes"
            reason += f"; found in a batch made as in training: {known}"
        terms = (e.exchange, e.matched, *e.further, *((e.across,) if e.across else ()))
        apart = ("matched", "across") if self.is_exchanged else ("matched", "across", "shuffled")
        scored = [name for name in self.said if name not in apart]
        return ImageUse(
            verdict=judgement.verdict,
            reason=reason,
            advice=judgement.advice,
            set=self.set,
            causes=causes or (),
            images=e.images,
            trained_on=e.trained_on,
            contexts=self.texts,
            left_out=0,
            loss_nats={name: float(self.nats[name].sum() / weight) for name in scored},
            loss_gap=e.exchange.nats,
            loss_moved=e.loss_moved,
            measure=e.measure,
            scores={name: round(float(np.mean(self.scores(name))), 2) for name in scored},
            score_gap=e.exchange.advantage or Interval(math.nan, math.nan, math.nan),
            answers_changed_where_truth_differs=changed.percent,
            pairs_where_truth_differs=changed.pairs,
            distinct_outputs=len({vqa.normalise(p.answer) for p in self.predictions}),
            empty_rate=e.empty_rate,
            p_eos_first=e.p_eos_first,
            terms=terms,
            gap_by_type=self._gap_by_type(),
            image_share=e.image_share,
        )

    def _gap_by_type(self) -> dict[str, Interval]:
        """Returns what the exchange costs in points, by type of question."""
        types = [str(p.meta.get("question_type") or "") for p in self.predictions]
        frequent = [name for name, _ in Counter(types).most_common(_TYPES_SHOWN)]
        if len(frequent) < 2 or not self.is_exchanged:
            return {}
        gap_C = self.scores("true") - self.scores("shuffled")
        found = {}
        for name in frequent:
            rows = np.array([c for c, own in enumerate(types) if own == name])
            found[name or "none"] = self._gap(gap_C[rows], np.ones(len(rows)), rows)
        return found

    def _causes(self) -> tuple[str, ...] | None:
        """Returns what a batch made as in training shows of a collapse; None without a batch."""
        batch = self.training_batch() if self.training_batch else None
        if batch is None:
            return None
        bos = bos_in_generation_only_of(self.model)
        return tuple(causes_of_collapse(batch, self.model.tokenizer, bos))
