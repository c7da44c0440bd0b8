"""Where did it look? What an answer's likelihood loses when a part of the picture is hidden.

A model, a picture with its prompt and the answer -> a heat map, coarse to fine (Zeiler & Fergus
2014, section 4.2), its deletion curve beside random ones (Petsiuk et al. 2018), and
how far a bridge with random weights gives the same map (Adebayo et al. 2018). Attention is not
asked: it says little of what an answer rests on. Legend: M masks, G cells a side of the finest
grid, N cells a side of one, H W pixels, P patches, D width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from scipy.stats import rankdata

from harness.config.schema import Config, ModelConfig
from harness.data.collate import Collator
from harness.evaluate.space import UnmeasuredError
from harness.model.batch import Batch, Context
from harness.model.bridge import Bridge
from harness.model.vlm import VisionLanguageModel, new_bridge

LEVELS = (2, 4, 8, 16)  # cells a side: all up to `PATCHES`, of a finer grid those that matter
PATCHES = 4
REFINED = 8  # cells of a grid that are looked at on the next one
DELETED_CELLS = 8  # a side, in deletion curves
# shares of the picture, the hottest first
DELETED = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
RANDOM_ORDERS = 3
AT_ONCE = 32  # masks in a batch
_SEED = 0  # of random orders and weights: the same for every run, so that runs compare


@dataclass(frozen=True)
class Asked:
    """A picture as the model gets it (pixels_HW3 uint8, or features_PD), what it was asked and
    what it said.
    """

    payload: np.ndarray
    context: Context
    answer: str


@dataclass(frozen=True)
class Look:
    """Where a model looked. Heat in nats a token of the answer: what a cell of `heat_GG` costs
    alone, with its share of what larger ones around it cost beyond that. `patch_NN`: what each cell
    costs alone, on the finest grid whose cells were all asked.
    """

    heat_GG: np.ndarray
    patch_NN: np.ndarray
    nats: float  # a token of the whole picture's answer
    deleted: tuple[float, ...] = ()  # likelihood a token, at the shares of DELETED
    deleted_at_random: tuple[float, ...] = ()  # the same, mean over random orders


class Hiding(Protocol):
    """A picture whose parts can be hidden."""

    @property
    def levels(self) -> tuple[int, ...]: ...
    def patches(self, hidden_MGG: np.ndarray) -> list[torch.Tensor]: ...


@dataclass
class Pixels:
    """A picture whose cells are painted over, in the mean of its colours, before the frozen encoder
    sees it. The same grey for all pictures would be a thing of its own in a drawing: a model that
    was asked for a rectangle found it there.
    """

    model: VisionLanguageModel
    encoder: Any
    pixels_HW3: np.ndarray
    _known: dict[bytes, torch.Tensor] = field(default_factory=dict)

    levels = LEVELS

    def patches(self, hidden_MGG: np.ndarray) -> list[torch.Tensor]:
        """Returns M of patches_PD; each masked picture is encoded once, whichever bridge asks."""
        new = [hidden_GG for hidden_GG in hidden_MGG if hidden_GG.tobytes() not in self._known]
        for start in range(0, len(new), AT_ONCE):
            chunk = new[start : start + AT_ONCE]
            painted = torch.from_numpy(
                np.stack([self._painted_over(hidden_GG) for hidden_GG in chunk])
            )
            with self.model.precision.autocast("vision"):
                patches_MPD = self.encoder(painted.to(self.model.device)).float()
            for hidden_GG, patches_PD in zip(chunk, patches_MPD, strict=True):
                self._known[hidden_GG.tobytes()] = patches_PD
        return [self._known[hidden_GG.tobytes()] for hidden_GG in hidden_MGG]

    def _painted_over(self, hidden_GG: np.ndarray) -> np.ndarray:
        high, wide, _ = self.pixels_HW3.shape
        row_H = np.arange(high) * len(hidden_GG) // high
        column_W = np.arange(wide) * len(hidden_GG) // wide
        hidden_HW1 = hidden_GG[np.ix_(row_H, column_W)][:, :, None]
        mean_3 = self.pixels_HW3.mean(axis=(0, 1)).round().astype(np.uint8)
        return np.where(hidden_HW1, mean_3, self.pixels_HW3)


@dataclass
class Tokens:
    """A picture that is gone, of which patch tokens are left out: each has seen the whole picture,
    so this tells less of places. A token that stands for no place (CLIP's first) always stays.
    """

    features_PD: torch.Tensor

    @property
    def side(self) -> int:
        return math.isqrt(len(self.features_PD))

    @property
    def levels(self) -> tuple[int, ...]:
        side = self.side
        return (side // 2, side) if side > DELETED_CELLS and side % 2 == 0 else (side,)

    def patches(self, hidden_MGG: np.ndarray) -> list[torch.Tensor]:
        """Returns M of patches_PD with fewer patches; where all are hidden one of no content."""
        further = len(self.features_PD) - self.side**2
        found = []
        for hidden_GG in hidden_MGG:
            kept_P = torch.from_numpy(np.r_[np.ones(further, bool), ~hidden_GG.ravel()])
            kept = self.features_PD[kept_P.to(self.features_PD.device)]
            found.append(kept if len(kept) else torch.zeros_like(self.features_PD[:1]))
        return found


@dataclass
class Likelihood:
    """The nats a token of one answer, with parts of its picture hidden."""

    model: VisionLanguageModel
    config: Config
    asked: Asked
    hiding: Hiding

    @property
    def side(self) -> int:
        return self.hiding.levels[-1]

    @torch.no_grad()
    def __call__(self, hidden_MGG: np.ndarray) -> np.ndarray:
        """Returns nats_M."""
        nats_M = np.empty(len(hidden_MGG))
        by_length: dict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        for mask, patches_PD in enumerate(self.hiding.patches(hidden_MGG)):
            by_length[len(patches_PD)].append((mask, patches_PD))
        for masks in by_length.values():
            for start in range(0, len(masks), AT_ONCE):
                chunk = masks[start : start + AT_ONCE]
                patches_MPD = torch.stack([patches_PD for _, patches_PD in chunk])
                asked = [self.asked] * len(chunk)
                nats_M[[mask for mask, _ in chunk]] = nats(
                    self.model, self.config, asked, patches_MPD
                )
        return nats_M


@torch.no_grad()
def nats(
    model: VisionLanguageModel,
    config: Config,
    asked: Sequence[Asked],
    patches_IPD: torch.Tensor | None = None,
    *,
    whole: bool = False,
) -> np.ndarray:
    """Returns nats_I a token of each answer (`whole`: of all its tokens, so that exp(-nats) is its
    probability), with `patches_IPD` in place of the pictures' own.
    """
    batch = batch_of(model, config, asked)
    if patches_IPD is not None:
        batch = replace(batch, pixels_IHW3=None, features_IPD=patches_IPD)
    loss = model.loss(batch)
    sums = loss.sum_T.double()
    return (sums if whole else sums / loss.weight_T).cpu().numpy()


def batch_of(model: VisionLanguageModel, config: Config, asked: Sequence[Asked]) -> Batch:
    """Returns the batch of pictures with their prompts, each with its answer as the target."""
    collator = Collator.of(config, model.tokenizer, training=False)
    rows = list(range(len(asked)))
    payloads = np.stack([one.payload for one in asked])
    contexts = [one.context for one in asked]
    answers = [one.answer for one in asked]
    return collator.assemble(payloads, contexts, rows, answers, rows).to(model.device)


def hiding_of(
    model: VisionLanguageModel, encoder: Any, asked: Asked, pixels_HW3: np.ndarray | None
) -> Hiding:
    """Returns the picture as one whose parts can be hidden: its pixels, or where these or the
    `encoder` are None its patch tokens. Raises UnmeasuredError where those can not be left out.
    """
    if pixels_HW3 is not None and encoder is not None:
        return Pixels(model, encoder, pixels_HW3)
    tokens = Tokens(torch.from_numpy(asked.payload).float().to(model.device))
    further = len(asked.payload) - tokens.side**2
    of_two = model.config.encoder.get("flips")  # 2 x 25 tokens are one more than 7 x 7
    if asked.payload.ndim != 2 or further > 1 or of_two or model.token_per_patch:
        raise UnmeasuredError("its patch tokens are in no square, or none can be left out")
    return tokens


def look(likelihood: Likelihood, curve: bool = True) -> Look:
    """Returns where the model looked when it gave the answer; `curve`: with its deletion curve."""
    side = likelihood.side
    whole = float(likelihood(np.zeros((1, side, side), bool))[0])
    found = _map(likelihood, whole)
    if not curve:
        return found
    levels = likelihood.hiding.levels
    count = max((level for level in levels if level <= DELETED_CELLS), default=side)
    heat_NN = found.heat_GG.reshape(count, side // count, count, side // count).sum(axis=(1, 3))
    rng = np.random.default_rng(_SEED)
    own = _deleted(likelihood, np.argsort(-heat_NN.ravel(), kind="stable"))
    at_random = [_deleted(likelihood, rng.permutation(count * count)) for _ in range(RANDOM_ORDERS)]
    return replace(
        found,
        deleted=tuple(own.tolist()),
        deleted_at_random=tuple(np.mean(at_random, axis=0).tolist()),
    )


def _map(likelihood: Likelihood, whole: float) -> Look:
    """Hides the cells of a coarse grid one by one, then on finer grids the parts of those that cost
    most.
    """
    side = likelihood.side
    heat_NN = patch_NN = np.zeros((0, 0))
    for count in likelihood.hiding.levels:
        wanted_NN = np.ones((count, count), bool)
        if len(heat_NN) and count > PATCHES:
            wanted_NN = _enlarged(_hottest(heat_NN)[None], count)[0]
        hidden_MNN = np.zeros((int(wanted_NN.sum()), count, count), bool)
        hidden_MNN[(np.arange(len(hidden_MNN)), *np.nonzero(wanted_NN))] = True
        alone_NN = np.full((count, count), np.nan)
        alone_NN[wanted_NN] = likelihood(_enlarged(hidden_MNN, side)) - whole
        if wanted_NN.all():
            patch_NN = alone_NN
        heat_NN = _shared_out(heat_NN, alone_NN) if len(heat_NN) else alone_NN
    return Look(heat_NN, patch_NN, whole)


def _hottest(heat_NN: np.ndarray) -> np.ndarray:
    """Returns which cells are looked at more closely: those that cost most, if anything."""
    chosen_N = np.zeros(heat_NN.size, bool)
    chosen_N[np.argsort(-heat_NN.ravel(), kind="stable")[:REFINED]] = True
    return chosen_N.reshape(heat_NN.shape) & (heat_NN > 0)


def _shared_out(heat_NN: np.ndarray, alone_NN: np.ndarray) -> np.ndarray:
    """Returns the heat of a finer grid: what each cell costs alone, and an even share of what the
    coarser cell costs beyond that, which is lost only when several of its parts are hidden.
    `alone_NN` of the finer grid; NaN: not asked.
    """
    count = len(heat_NN)
    parts = len(alone_NN) // count
    blocks = np.nan_to_num(alone_NN).reshape(count, parts, count, parts)
    sign_N1N1 = np.sign(heat_NN)[:, None, :, None]
    explained_N1N1 = np.maximum(sign_N1N1 * blocks, 0).sum(axis=(1, 3), keepdims=True)
    rest_N1N1 = np.maximum(np.abs(heat_NN)[:, None, :, None] - explained_N1N1, 0)
    return (blocks + sign_N1N1 * rest_N1N1 / parts**2).reshape(alone_NN.shape)


def _enlarged(hidden_MNN: np.ndarray, side: int) -> np.ndarray:
    times = side // hidden_MNN.shape[1]
    return hidden_MNN.repeat(times, axis=1).repeat(times, axis=2)


def _deleted(likelihood: Likelihood, order: np.ndarray) -> np.ndarray:
    """Returns the likelihood a token with the first cells of the order hidden, at DELETED."""
    count = math.isqrt(len(order))
    hidden_MNN = np.zeros((len(DELETED), len(order)), bool)
    for row, share in enumerate(DELETED):
        hidden_MNN[row, order[: round(share * len(order))]] = True
    masks = _enlarged(hidden_MNN.reshape(-1, count, count), likelihood.side)
    return np.exp(-likelihood(masks))


def area(curve_D: Sequence[float]) -> float:
    """Returns the area under a deletion curve, in [0, 1]: the smaller, the sooner it falls."""
    return float(np.trapezoid(curve_D, DELETED))


# ---- the sanity check ----------------------------------------------------------------------------


@torch.no_grad()
def random_bridge(model: VisionLanguageModel, config: Config, pictures: Sequence[Asked]) -> Bridge:
    """Returns a bridge like the model's with random weights, calibrated on these pictures as a run
    begins.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        bridge = new_bridge(ModelConfig(**model.config.model).bridge, model.config, model.lm)
    bridge = bridge.to(model.device).eval()
    batch = batch_of(model, config, pictures)
    bridge.calibrate(*model.bridge_inputs(batch, model.patch_tokens(batch)))
    return bridge


@contextmanager
def replaced(model: VisionLanguageModel, bridge: Bridge) -> Iterator[None]:
    """Has the model look through another bridge for as long as the block lasts."""
    own = model.bridge
    model.bridge = bridge
    try:
        yield
    finally:
        model.bridge = own


def agreement(one: Look, other: Look) -> float | None:
    """Returns Spearman's rank correlation of what single patches cost in two maps; None where one
    is flat.
    """
    ranks = [rankdata(look.patch_NN) for look in (one, other)]
    if min(np.ptp(rank) for rank in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])
