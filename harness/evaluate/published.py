"""Published models through the same door: any of transformers' image-text-to-text models over our
shards and scores.

    harness evaluate --model Salesforce/blip2-flan-t5-xl --data DIR          3.9B parameters
    harness evaluate --model Salesforce/instructblip-flan-t5-xl --data DIR   4.0B
    harness evaluate --model llava-hf/llava-1.5-7b-hf --data DIR --load-in-4bit

A hub id or folder and paths of image sets -> a report like that of `evaluate_run`. The model sees
each picture through its own processor. Legend: I images, C contexts, T targets, L target tokens, R
rows at a time, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForImageTextToText, AutoProcessor

from harness.config.load import apply_overrides, validated
from harness.config.schema import Config, DecodingConfig
from harness.data.collate import Collator
from harness.data.features import control_pixels
from harness.data.images import ImageDecoder
from harness.errors import ConfigError
from harness.evaluate.encoded_once import encode_once
from harness.evaluate.report import folder, names, variant, write_report
from harness.evaluate.run import evaluate_model
from harness.hub import VLMConfig  # and registers what our own exports are loaded by
from harness.machine.dealing import Alone, Progress
from harness.machine.precision import choose
from harness.model.batch import Batch
from harness.model.language.interface import generate_arguments
from harness.model.language.loss import Generated, LossOutput
from harness.model.language.quantise import nf4
from harness.model.language.wording import Wording
from harness.model.pretrained import loading, quiet_transformers
from harness.redact import say
from shards.manifest import Manifest
from shards.read import Sample

REMEDY = (
    "give an image-text-to-text model: a folder in the hub's format, or an id that is on the hub "
    "or in its local cache"
)
_ROWS = 8  # contexts or targets at a time: a 7B model's logits for them are 0.6 GB

# What each model was asked with in its paper; any other model gets the defaults of `prompts`.
PROMPTS: Mapping[str, dict[str, str]] = {
    "blip-2": {
        "caption": "a photo of",
        "vqa": "Question: {question} Short answer:",
    },  # Li et al. 2023, section 4
    "instructblip": {  # Dai et al. 2023, appendix E
        "caption": "A short image description:",
        "vqa": "Question: {question} Short answer:",
    },
    # An export of harness: its processor puts the words of the training around a question itself.
    VLMConfig.model_type: {"caption": "none", "vqa": "none"},
    "llava": {  # Liu et al. 2023 (LLaVA-1.5), section 3
        "caption": "Provide a one-sentence caption for the provided image.",
        "vqa": "{question}\nAnswer the question using a single word or phrase.",
    },
}


@dataclass(frozen=True)
class PictureBatch(Batch):
    """A batch whose pictures keep their own sizes; `pixels_IHW3` only counts them."""

    pictures: tuple[np.ndarray, ...] = ()  # uint8 HxWx3 each


@dataclass(frozen=True)
class PictureCollator(Collator):
    """Samples of pictures of any size -> PictureBatch; records without one are left out, as
    `asked_with_pictures` says.
    """

    @cached_property
    def wording(self) -> Wording:
        """That of plain text: the model's own processor is what writes its prompts."""
        return Wording(self.tokenizer, chat=False)

    def __call__(self, samples: Sequence[Sample]) -> PictureBatch | None:
        readable = [
            s for s in samples if s.record is not None and s.record.has_picture and s.weight
        ]
        batch = super().__call__(
            [replace(sample, payload=np.zeros((1, 1, 3), np.uint8)) for sample in readable]
        )
        if batch is None:
            return None
        pictures = tuple(sample.payload for sample in readable)
        return PictureBatch(**vars(batch), pictures=pictures)


@dataclass(frozen=True)
class Pictures:
    """What a model of others is given in place of image tokens: pictures, and which of them each
    context sees.
    """

    tokens_NQD: Sequence[np.ndarray]
    token_row_of_C: torch.Tensor

    def with_rows(self, row_of_C: torch.Tensor) -> Pictures:
        return replace(self, token_row_of_C=row_of_C)

    def without_tokens(self) -> None:
        """There is no one way to leave the image out of any model."""

    def of(self, contexts: Sequence[int]) -> list[np.ndarray]:
        return [self.tokens_NQD[row] for row in self.token_row_of_C[list(contexts)].tolist()]


class PublishedModel(nn.Module):
    """A model and its processor, with the interface that `evaluate_model` and the gate ask of a
    model.
    """

    def __init__(self, name: str, load_in_4bit: bool = False):
        """Loads by hub id or folder, onto the GPU where there is one. Raises ConfigError."""
        super().__init__()
        if name.rstrip("/").endswith("instructblip-flan-t5-base"):
            raise ConfigError(
                f"--model {name}: there is no instructblip-flan-t5-base; published are "
                "Salesforce/instructblip-"
                "flan-t5-xl, -flan-t5-xxl, -vicuna-7b and -vicuna-13b"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = choose("auto", device).compute_dtype
        self._load(name, nf4(self.dtype) if load_in_4bit else None)
        self.to(device).eval()
        self._encoder = encode_once(self.model)
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        text = self.model.config.get_text_config()
        self.encoder_decoder = self.model.config.is_encoder_decoder or text.is_encoder_decoder
        if not self.encoder_decoder:
            self.tokenizer.padding_side = "left"  # the answer goes on from the prompt's last token
        # BLIP-2's kind of processor places the picture itself; others without a chat template want
        # its token named.
        self.picture = ""
        if not hasattr(self.processor, "num_query_tokens"):
            self.picture = f"{getattr(self.processor, 'image_token', '')}\n".lstrip()
        elif self.processor.num_query_tokens is None:  # saved before transformers knew of it
            self.processor.num_query_tokens = self.model.config.num_query_tokens

    def _load(self, name: str, quantisation: Any) -> None:
        """Loads processor and model. Raises ConfigError."""
        with loading("--model", name, REMEDY), quiet_transformers():
            self.processor = AutoProcessor.from_pretrained(name)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                name,
                dtype=self.dtype,
                quantization_config=quantisation,
                output_loading_info=True,
            )
        self.model: Any = loaded[0]
        if absent := sorted(loaded[1]["missing_keys"]):
            raise ConfigError(
                f"--model {name}: it lacks {len(absent)} weights of a "
                f"{type(self.model).__name__} ({absent[0]}, ...), "
                "which would be random: use a complete model"
            )

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Sections of a config that say how this model is asked, and how it answers if it says."""
        own = self.model.config
        return {
            "prompts": PROMPTS.get(own.model_type, {}),
            "generate": getattr(own, "generate", None) or {},
        }

    def bridge_tokens(self, batch: PictureBatch) -> Pictures:
        return Pictures(batch.pictures, batch.image_of_C)

    def _inputs(
        self, pictures: Sequence[np.ndarray], prompts: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Returns the processor's tensors, on the model's device and in its dtype."""
        if self._encoder is not None:
            self._encoder.shown = pictures
        begins = self.tokenizer.bos_token
        if getattr(self.processor, "chat_template", None):
            chats = [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
                for prompt in prompts
            ]
            texts = self.processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=False
            )
        else:
            texts = [self.picture + prompt for prompt in prompts]
        twice = begins is not None and all(text.startswith(begins) for text in texts)
        given = {"add_special_tokens": False} if twice else {}
        inputs = self.processor(
            images=[Image.fromarray(picture) for picture in pictures],
            text=texts,
            return_tensors="pt",
            padding=True,
            **given,
        )
        return dict(inputs.to(self.model.device, self.dtype))

    @torch.no_grad()
    def loss(self, batch: Batch, tokens: Pictures) -> LossOutput:
        """Cross entropy of `labels_TL` weighted by `weight_TL`, NaN for a model that gives no
        logits.
        """
        sums = []
        for rows in _parts(len(batch.labels_TL)):
            contexts = batch.context_of_T[rows].tolist()
            inputs = self._inputs(tokens.of(contexts), [batch.contexts[c].prompt for c in contexts])
            labels_RL, weight_RL = batch.labels_TL[rows], batch.weight_TL[rows]
            logits_RLV = self._logits(inputs, labels_RL, weight_RL != 0)
            if logits_RLV is None:
                sums.append(torch.full((len(contexts),), float("nan"), device=self.model.device))
                continue
            nats_RL = F.cross_entropy(
                logits_RLV.float().transpose(1, 2), labels_RL, reduction="none"
            )
            sums.append((nats_RL * weight_RL).sum(dim=1))
        sum_T = torch.cat(sums)
        return LossOutput(sum_T.sum(), batch.weight, sum_T, batch.weight_TL.sum(dim=1))

    def _logits(
        self, inputs: dict[str, torch.Tensor], labels_RL: torch.Tensor, counts_RL: torch.Tensor
    ):
        """logits_RLV of the position before each label."""
        length = labels_RL.shape[1]
        if self.encoder_decoder:
            logits = self.model(**inputs, labels=labels_RL.masked_fill(~counts_RL, -100)).logits
            return None if logits is None else logits[:, :length]
        before = inputs["input_ids"].shape
        follow = {
            "input_ids": labels_RL,
            "attention_mask": counts_RL.to(inputs["attention_mask"].dtype),
        }
        for name, values in inputs.items():
            # What has a value for each token (token_type_ids) goes on with zeros over the answer.
            if values.shape == before and not name.startswith("qformer"):
                inputs[name] = torch.cat(
                    [values, follow.get(name, torch.zeros_like(labels_RL)).to(values)], dim=1
                )
        logits = self.model(**inputs).logits
        return None if logits is None else logits[:, -length - 1 : -1]

    @torch.no_grad()
    def generate(self, batch: Batch, decoding: DecodingConfig, tokens: Pictures) -> Generated:
        """Greedy or beam search, one answer per context."""
        ids, p_eos = [], []
        # Those of like length together: less of a part is padding.
        order = sorted(range(len(batch.contexts)), key=lambda c: len(batch.contexts[c].prompt))
        for rows in _parts(len(batch.contexts)):
            contexts = order[rows]
            inputs = self._inputs(tokens.of(contexts), [batch.contexts[c].prompt for c in contexts])
            out = self.model.generate(
                **inputs,
                **generate_arguments(decoding),
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
            asked, said = inputs["input_ids"], out.sequences
            if not self.encoder_decoder and torch.equal(said[:, : asked.shape[1]], asked):
                said = said[:, asked.shape[1] :]
            ids += said.tolist()
            first_RV = out.logits[0][:: decoding.beams].float().softmax(dim=-1)
            p_eos.append(first_RV[:, self.tokenizer.eos_token_id])
        place_C = np.argsort(order)
        ids = [ids[place] for place in place_C]
        texts = [
            text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ]
        return Generated(texts, ids, torch.cat(p_eos)[torch.from_numpy(place_C)])


def _parts(count: int) -> list[slice]:
    """_ROWS at a time; slices may end behind the last."""
    return [slice(start, start + _ROWS) for start in range(0, count, _ROWS)]


def control_pictures(
    model: Any, like: PictureBatch, manifest: Manifest
) -> dict[str, list[np.ndarray]]:
    """Returns a blank and some noise pictures, of the size of the first one."""
    return {
        name: list(pictures) for name, pictures in control_pixels(like.pictures[0].shape).items()
    }


def evaluate_published(
    name: str,
    data: Sequence[str],
    out: Path | None = None,
    *,
    load_in_4bit: bool = False,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    dealer: Alone | None = None,
) -> dict[str, Any]:
    """Scores a published model on the image sets `data`; `limit`: so many images, the same for
    every model.

    `overrides` are `key=value` of a config's prompts, generate, evaluation and data. Writes into
    `out`, else a folder in runs/published/NAME that says what was scored and how, what
    `evaluate_run` writes, and returns the same; `dealer`: as there. Raises ConfigError, ShardError.
    """
    if not data:
        raise ConfigError(f"--model {name}: give the shards to score with --data DIR")
    manifests = [Manifest.open(path) for path in data]
    for path, manifest in zip(data, manifests, strict=True):
        if manifest.kind != "images":
            raise ConfigError(
                f"{path} holds {manifest.kind}: a published model needs images, give the set "
                "they were made from"
            )
    asked_with_pictures(manifests)
    model = PublishedModel(name, load_in_4bit)
    config = _config(name, model.settings, overrides)
    evaluation = evaluate_model(
        model,
        data,
        config,
        limit=limit,
        progress=progress,
        decode=ImageDecoder(image_size=1, mode="whole", max_pixels=config.data.max_image_pixels),
        collate=PictureCollator(model.tokenizer, config.data, config.prompts, training=False),
        controls_of=control_pictures,  # its batches hold pictures
        dealer=dealer,
    )
    if evaluation is None:
        return {}
    parts = [*names(manifests), *["4bit"] * load_in_4bit, *variant(limit, overrides)]
    out = Path(out or Path("runs", "published", name.strip("/").replace("/", "--"), folder(parts)))
    return write_report(evaluation, out, data, checkpoint=name, step=None)[0]


def asked_with_pictures(manifests: Sequence[Manifest]) -> None:
    """Says how many records are not asked, since a model of others is shown a picture with each
    text. Raises ConfigError where all have none.
    """
    alone = sum(manifest.without_picture for manifest in manifests)
    places = ", ".join(manifest.folder for manifest in manifests)
    if not any(manifest.has_pictures for manifest in manifests):
        raise ConfigError(f"{places}: no record has a picture, and there is nothing to show")
    if alone:
        say(f"{places}: {alone:,} records without a picture are left out", sys.stderr)


def _config(
    name: str, settings: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]
) -> Config:
    document = {
        "name": Path(name).name,
        **settings,
        # Prompts go to the model's own processor whole; the Collator's copy is not to be cut and
        # warned of.
        "data": {"max_prompt_tokens": 4096},
        "evaluation": {"batch_images": 32},
        "tracking": {"kind": "none"},
    }
    return validated(Config, apply_overrides(document, overrides), Path(name), overrides)
