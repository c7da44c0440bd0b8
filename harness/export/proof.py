"""The proof of an export: a fresh process loads it, and its token distributions are the run's.

Contexts and the run's own logits -> how far the export is from them, beside the limit. The limits
and their reasons were written down before anything was measured (docs/export.md). Legend: C
contexts (one target each), L target tokens, V vocabulary, D width, P patches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import harness
from harness.config.schema import Config
from harness.evaluate.predict import Prediction, answers, by_stratum
from harness.export import reloaded
from harness.export.contexts import Contexts
from harness.export.reloaded import INPUTS
from harness.hub.modeling import ADAPTER
from harness.hub.processing import as_read
from harness.machine.precision import Precision
from harness.model.vlm import VisionLanguageModel

# The largest KL divergence, in nats, of a token distribution of the export from the run's.
#
# fp32: the same products in the same order but for padding and fused kernels. Logits of size 10
# differ by some of their last bits, 1e-5; the divergence is half the variance of the difference,
# far below. 1e-5 shows any weight, token or pixel that is not the same.
FP32 = 1e-5
# bf16: a run on bf16 rounds each activation to 8 bits, 2^-9 of its size. Some hundred roundings on
# the way add up like a random walk to about 3% of the logits' spread, which is about 4: 0.12, and
# half its square is 7e-3.
BF16 = 1e-2
# A 4-bit base merged into its full-precision weights: NF4 moves each weight by 9% of its size, so
# this is another model, close to the run's. At 0.5 nats half of the probability may have moved
# (Pinsker: at most sqrt(0.5 / 2)); above, some context is answered by what was never measured.
MERGED_4_BITS = 0.5
# bitsandbytes on a CPU with avx512_bf16 multiplies 4-bit weights in bf16 where nothing bars it
# from that, as harness does: plain peft is then compared at bf16's limit.
PLAIN_4_BITS = BF16


class UnprovenError(RuntimeError):
    """An export that does not answer as its run; nothing of it is published."""

    is_for_user = True


@dataclass(frozen=True)
class Measured:
    """What the run itself says to the contexts."""

    contexts: Contexts
    logits_CLV: torch.Tensor
    adapter_CLV: torch.Tensor  # of the language model with what its adapter alone can see
    tokens_CQD: torch.Tensor  # image tokens that go with them
    answers: list[Prediction]  # in the order of the contexts
    precision: Precision
    begins: int | None  # of its language model


@dataclass(frozen=True)
class Proof:
    """How far an export is from its run, and the limit of that."""

    nats: float  # largest divergence of a token distribution
    mean_nats: float
    limit: float
    contexts: int
    source: str  # of the contexts
    adapter_nats: float | None  # of plain peft on the plain base; None without an adapter
    adapter_limit: float
    answers: list[Prediction]  # the export's
    same_answers: int

    @property
    def holds(self) -> bool:
        adapter = self.adapter_nats is None or self.adapter_nats <= self.adapter_limit
        return self.nats <= self.limit and adapter

    def lines(self) -> list[str]:
        """Returns what is told of it, each line with its limit."""
        told = [
            f"largest KL divergence from the run: {self.nats:.1e} nats (limit {self.limit:g}), "
            f"mean {self.mean_nats:.1e}; {self.contexts} contexts of {self.source}",
            f"same answers: {self.same_answers} of {self.contexts}",
        ]
        if self.adapter_nats is not None:
            told.append(
                f"peft's adapter on the plain base: {self.adapter_nats:.1e} nats (limit "
                f"{self.adapter_limit:g})"
            )
        return told


@torch.no_grad()
def measure(model: VisionLanguageModel, config: Config, contexts: Contexts) -> Measured:
    """Returns what the run says, by its own code in its own precision."""
    model.lm.bos_in_training = True  # as it answers; a known mistake trains otherwise
    batch = contexts.batch.to(model.device)
    image = model.bridge_tokens(batch)
    seen = image.without_tokens() if config.model.lm.cross_attention else image
    with model.precision.autocast("lm"):
        logits_CLV = model.lm.logits(image, batch).float().cpu()
        adapter_CLV = logits_CLV
        if seen is not image:
            adapter_CLV = model.lm.logits(seen, batch).float().cpu()
    said: list[Prediction | None] = [None] * len(batch.contexts)
    for stratum, part, rows in by_stratum(batch):
        decoding = getattr(config.generate, stratum.task)
        tokens: Any = model.bridge_tokens(part)
        told = answers(model, part, decoding, tokens)
        for row, prediction in zip(rows.tolist(), told, strict=True):
            said[row] = prediction
    tokens_CQD = seen.by_context(torch.float32).cpu()
    every = [prediction for prediction in said if prediction is not None]
    return Measured(
        contexts, logits_CLV, adapter_CLV, tokens_CQD, every, model.precision, model.lm.begins
    )


def prove(out: Path, own: Measured, config: Config, *, merged: bool) -> Proof:
    """Returns how far the export in `out` is from the run. Raises UnprovenError where it cannot be
    loaded at all.
    """
    four_bits = config.model.lm.tuning == "qlora"
    with tempfile.TemporaryDirectory(prefix="harness-export-") as place:
        folder = Path(place)
        _write_asked(folder, out, own, config, four_bits=four_bits)
        found = _in_fresh_process(folder)
    limit = FP32 if own.precision.name == "fp32" else BF16
    told = zip(own.answers, found["answers"], strict=True)
    said = [replace(prediction, answer=answer) for prediction, answer in told]
    return Proof(
        nats=found["nats"],
        mean_nats=found["mean_nats"],
        limit=MERGED_4_BITS if merged and four_bits else limit,
        contexts=len(said),
        source=own.contexts.source,
        adapter_nats=found.get("adapter_nats"),
        adapter_limit=max(limit, PLAIN_4_BITS) if four_bits else limit,
        answers=said,
        same_answers=sum(map(_same, own.answers, said)),
    )


def _same(one: Prediction, other: Prediction) -> bool:
    return one.answer == other.answer


def _write_asked(
    folder: Path, out: Path, own: Measured, config: Config, *, four_bits: bool
) -> None:
    """Writes the contexts, the run's logits, and where the export lies, for the fresh process."""
    batch = own.contexts.batch
    names = [f"{number}.picture" for number in range(len(own.contexts.pictures))]
    for name, picture in zip(names, own.contexts.pictures, strict=True):
        (folder / name).write_bytes(picture)
    image_of_C = batch.image_of_C.tolist()
    lm = json.loads((out / "config.json").read_text())["model"]["lm"]
    has_adapter = (out / ADAPTER).is_dir()
    in_out = (out / lm["id"]).is_dir()
    asked = {
        "out": str(out),
        "adapter": str(out / ADAPTER),
        "base": (str(out / lm["id"]) if in_out else lm["id"]) if has_adapter else None,
        "revision": None if in_out else lm["revision"],
        "four_bits": four_bits,
        "encoder_decoder": config.model.lm.has_encoder,
        "pictures": [names[image] if names else None for image in image_of_C],
        "questions": [context.text.prompt or "" for context in batch.contexts],
    }
    (folder / reloaded.ASKED).write_text(json.dumps(asked))
    tensors = {
        "logits_CLV": own.logits_CLV,
        "adapter_CLV": own.adapter_CLV,
        "adapter_tokens_CQD": own.tokens_CQD,
        "labels_CL": batch.labels_TL,
        "counts_CL": (batch.weight_TL != 0).to(torch.uint8),
        **as_read(
            batch.prompt_ids_CL,
            batch.prompt_mask_CL.long(),
            own.begins,
            not config.model.lm.has_encoder,
        ),
    }
    if not names:
        assert batch.features_IPD is not None  # the pictures are gone
        tensors["features_CPD"] = batch.features_IPD[batch.image_of_C]
    # Copied: safetensors writes no two names for one memory.
    save_file({name: value.cpu().clone() for name, value in tensors.items()}, folder / INPUTS)


def _in_fresh_process(folder: Path) -> dict[str, Any]:
    """Returns what reloaded.py found. Raises UnprovenError with the end of what it said."""
    package = Path(harness.__file__).parents[1]
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if constants.HF_HUB_OFFLINE:  # asked for, or found out as the run was loaded
        environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", reloaded.__name__, str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    found = folder / reloaded.FOUND
    if not found.is_file():
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UnprovenError(f"the export cannot be loaded again by transformers: {last}")
    return json.loads(found.read_text())
