"""What an evaluation holds in memory besides weights, reckoned from the model's sizes.

Skeleton, sizes of a batch, how answers are written -> bytes by kind. Legend: C contexts, R rows
(contexts x beams, or targets), S positions before the target or answer, L its tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from harness.config.schema import Config, DecodingConfig
from harness.model.bridge import CALIBRATED_ON
from harness.plan.skeleton import Skeleton
from harness.plan.workload import TEXTS_UNKNOWN, Sizes, Workload

FP32 = 4  # bytes
# Logits that are there at once, in fp32. Of a loss: as they are made, and their log-softmax. As
# `generate` of transformers makes them for one position: cast and processed; with beams also their
# log-softmax, and the sums with the scores of the beams.
LOGITS_OF_LOSS = 2
LOGITS_OF_ANSWERS = {False: 3, True: 5}

LAYER_OF_ENCODER = 14  # hidden states and the feed-forward's, in widths


def evaluation_held(
    skeleton: Skeleton, work: Workload, config: Config, batch_images: int
) -> dict[str, int]:
    """Returns the bytes by kind when an evaluation, of so many images at a time, or a look of the
    small gate holds most; {} where nothing is evaluated.
    """
    if not (config.data.dev or config.data.test):
        return {}
    if config.train.objective:  # more than its embeddings alone
        sizes = work.evaluated or replace(work.sizes, targets=TEXTS_UNKNOWN)
        return dict(skeleton.forward(sizes, batch_images).peak)
    sizes = work.evaluated or replace(work.sizes, contexts=TEXTS_UNKNOWN, targets=TEXTS_UNKNOWN)
    checkpointing = config.train.activation_checkpointing
    # Where the dev sets are not here, questions are assumed.
    decodings = [getattr(config.generate, task) for task in work.tasks or ("vqa",)]
    looks = [
        Evaluated(skeleton, sizes, batch_images, decoding, checkpointing).bytes()
        for decoding in decodings
    ]
    if config.train.image_use_every and config.data.dev:
        one = replace(sizes, contexts=1.0, targets=sizes.targets / sizes.contexts)
        images = config.evaluation.small_gate_images
        for decoding in decodings:
            greedy = decoding.model_copy(update={"beams": 1})
            looks.append(Evaluated(skeleton, one, images, greedy, checkpointing).bytes())
    return max(looks, key=lambda kinds: sum(kinds.values()))


def calibration_held(skeleton: Skeleton, work: Workload, config: Config) -> dict[str, int]:
    """Returns the bytes by kind when the bridge's start values are taken from the first images."""
    images = min(config.train.global_batch, CALIBRATED_ON)
    return dict(skeleton.calibrated(work.sizes, images, config.train.micro_batch))


@dataclass(frozen=True)
class Evaluated:
    """One batch of an evaluation: `images` at a time, of `sizes`; answers are written as `decoding`
    says.
    """

    skeleton: Skeleton
    sizes: Sizes
    images: int
    decoding: DecodingConfig
    checkpointing: bool = False

    def bytes(self) -> dict[str, int]:
        """Returns the bytes by kind when the batch holds most: as its images are encoded, in its
        losses, or in its answers.
        """
        looks = self.encoding(), self.losses(), self.answers()
        most = max(looks, key=lambda kinds: sum(kinds.values()))
        return {"images, image tokens and states": self.held()} | most

    def encoding(self) -> dict[str, int]:
        """Returns the work of one layer of the vision tower, about: of all patches hidden states
        and a feed-forward of four times their width.
        """
        if self.skeleton.model.vision is None:
            return {}
        encoder = self.skeleton.encoder
        width = 2 if self.skeleton.precision.vision else FP32
        hidden = self.images * encoder["tokens"] * encoder["width"]
        return {"temporaries": LAYER_OF_ENCODER * hidden * width}

    def losses(self) -> dict[str, int]:
        """Of a T5 keys and values of what stands before the targets are kept once per context, and
        copied for the targets of a group of like length; a decoder packs targets into rows.
        """
        targets = max(1, round(self.images * self.sizes.targets))
        groups = self.sizes.groups(targets, self.skeleton.on_gpu)
        rows = max((len(group) for group, _ in groups), default=targets)
        kept = self.sizes.kept * targets * self.sizes.target_tokens
        logits = LOGITS_OF_LOSS * int(kept) * self._vocabulary * FP32
        if not self._has_encoder:
            # those by context, as exchanged pictures are seen, come to the same
            packed = self.sizes.packed(True)
            rows = max(1, round(self.images * packed.rows))
            layer = self._layer(rows, self._queries + packed.positions, 0)
            return {"logits": logits, "temporaries": layer}
        positions = self._contexts * self._before
        positions += rows * (self._before + self.sizes.target_tokens)
        if self.checkpointing:  # which drops caches
            positions = 0
        return {
            "KV cache": positions * self._position,
            "logits": logits,
            "temporaries": self._layer(rows, self.sizes.target_tokens, self._before),
        }

    def answers(self) -> dict[str, int]:
        """When the last token is chosen: transformers repeats everything by beam, and keeps keys
        and values of all layers. Or when a decoder reads what stands before, once per context.
        """
        beams = self.decoding.beams
        rows = self._contexts * beams
        length = self._before + self.decoding.max_new_tokens
        last = {
            "KV cache": rows * length * self._position,
            "logits": LOGITS_OF_ANSWERS[beams > 1] * rows * self._vocabulary * FP32,
            "temporaries": self._layer(rows, 1, self._before),
        }
        if self._has_encoder:
            return last
        reading = {
            "KV cache": self._contexts * self._before * self._position,
            "temporaries": self._layer(self._contexts, self._before, self._before),
        }
        return max(last, reading, key=lambda kinds: sum(kinds.values()))

    def held(self) -> int:
        """Returns the bytes that are there from the first loss to the last answer."""
        encoder = self.skeleton.encoder
        if self.skeleton.model.vision is None:
            batch = self.images * encoder["tokens"] * encoder["width"] * 2
        else:
            batch = self.images * encoder["image_size"] ** 2 * 3
        rows = self._contexts if self.skeleton.model.question_aware else self.images
        beams = self.decoding.beams
        states = self._contexts * (1 + (beams if beams > 1 else 0)) * self._before
        return batch + (rows * self._queries + states) * self._lm.width * FP32

    def _layer(self, rows: int, tokens: int, before: int) -> int:
        """Returns the bytes of one decoder layer's work, about: hidden states, the feed-forward,
        and attention's scores before and after their softmax.
        """
        config = self._lm.base.config
        named = (getattr(config, name, None) for name in ("d_ff", "intermediate_size", "ffn_dim"))
        inner = next(filter(None, named), 4 * config.hidden_size)
        scores = 2 * config.num_attention_heads * (before + tokens)
        return rows * tokens * (6 * config.hidden_size + 2 * inner + scores) * FP32

    @property
    def _lm(self) -> Any:
        return self.skeleton.model.lm

    @property
    def _has_encoder(self) -> bool:
        return self._lm.has_encoder

    @property
    def _contexts(self) -> int:
        return max(1, round(self.images * self.sizes.contexts))

    @property
    def _queries(self) -> int:
        return self.skeleton.model.bridge.body.tokens or self.skeleton.encoder["tokens"]

    @property
    def _before(self) -> int:
        return self.sizes.prompt_tokens + self._queries

    @property
    def _vocabulary(self) -> int:
        return self._lm.base.config.vocab_size

    @property
    def _position(self) -> int:
        """Returns the bytes of one position's keys and values in all layers of the decoder."""
        config = self._lm.base.config
        width = 2 if self.skeleton.precision.lm else FP32
        if self._has_encoder:
            return 2 * config.num_decoder_layers * config.num_heads * config.d_kv * width
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        each = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * each * width
