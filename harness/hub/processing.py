"""The processor of an exported model: pictures and questions -> the tensors it was trained on.

    processor(images=[...], text=["What color is it?", ...]) -> pixel_values, input_ids, ...

A question is put into the template of the training; without a text (None, or "") the prompt is
that of a caption. Pictures are fitted by harness/data/images.py. Legend: C contexts, one picture
and one text each; L prompt tokens, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import load_image

from harness.config.schema import DataConfig, PromptsConfig, VisionConfig
from harness.data.collate import Collator
from harness.data.images import ImageDecoder, fitted, pixels_of
from harness.data.prompts import prompt
from harness.hub.remote import NAME, write_remote_code
from harness.model.batch import Context
from harness.model.preprocessing import Fit
from shards.images import on_white

PIXELS = "pixel_values"
QFORMER = ("qformer_input_ids", "qformer_attention_mask")
# What transformers' pipelines and examples give and what is so anyway.
GRANTED = {
    "return_tensors": ("pt",),
    "padding": (True, "longest"),
    "truncation": (True, "longest_first"),
    "add_special_tokens": (True,),
}


class VLMProcessor(ProcessorMixin):
    """Tokenizer and pictures of an export together."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vision: Mapping[str, Any] | None = None,
        prompts: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        begins: int | None = None,
        question_aware: bool = False,
        fit: Mapping[str, Any] | None = None,
        on_the_left: bool = False,
    ):
        """Takes fields of a config's model.vision, prompts and data; `begins`: the token id that
        stands before the answers of a decoder, None where none does; `fit`: how pictures are
        fitted, where the kind of the encoder does not say it; `on_the_left`: where a decoder's
        prompts are padded, as those of every one with `begins`.
        """
        super().__init__(tokenizer)
        self.vision = dict(vision or {})
        self.prompts = dict(prompts or {})
        self.data = dict(data or {})
        self.begins = begins
        self.on_the_left = on_the_left or begins is not None
        self.question_aware = question_aware
        self.fit = dict(fit or {})
        limits = DataConfig(**self.data)
        self._decode = ImageDecoder.of(VisionConfig(**self.vision), limits.max_image_pixels)
        if self.fit:
            self._decode = replace(self._decode, said=Fit(**self.fit))
        self._collate = Collator(tokenizer, limits, PromptsConfig(**self.prompts), training=False)

    def __call__(self, images: Any = None, text: Any = None, **given: Any) -> BatchFeature:
        """Returns one row a picture: uint8 pixel_values_C3HW (the model normalises them), input_ids
        and attention_mask, padded; of a Q-Former that reads the question also its own.

        `images`: a picture or a list of them (PIL, uint8 arrays, paths, URLs, the bytes of a file).
        `text`: as many questions, None or "" for the prompt of a caption. Raises ValueError.
        """
        for name, value in given.items():
            if value is not None and value not in GRANTED.get(name, ()):
                expected = ", ".join(map(repr, GRANTED.get(name, ()))) or "nothing of that name"
                raise ValueError(
                    f"{name}={value!r}: this processor makes padded tensors of questions and "
                    f"pictures as its model was trained on them, and takes {expected}"
                )
        if images is None:
            raise ValueError("images is None: this model answers about a picture, give one a text")
        pixels = np.stack([self._pixels(image) for image in _flat(images)])
        questions = [text] * len(pixels) if text is None or isinstance(text, str) else list(text)
        if len(questions) != len(pixels):
            raise ValueError(
                f"{len(pixels)} images and {len(questions)} texts: give one text for each image"
            )
        return self._tensors(pixels, [self.prompt(question) for question in questions])

    def prompt(self, question: str | None = None) -> str:
        """Returns what the language model reads beside the picture."""
        task = "vqa" if (question or "").strip() else "caption"
        return prompt(task, getattr(self._collate.prompts, task), question)

    def _tensors(self, pixels_CHW3: np.ndarray, prompts: Sequence[str]) -> BatchFeature:
        rows = list(range(len(prompts)))
        contexts = [Context(None, _NoText, words) for words in prompts]
        batch = self._collate.assemble(pixels_CHW3, contexts, rows, [""] * len(rows), rows)
        ids_CL = batch.prompt_ids_CL
        mask_CL = batch.prompt_mask_CL.long()
        own = dict(zip(QFORMER, (ids_CL, mask_CL), strict=True)) if self.question_aware else {}
        pixels = torch.from_numpy(pixels_CHW3).permute(0, 3, 1, 2).contiguous()
        read = as_read(ids_CL, mask_CL, self.begins, self.on_the_left)
        return BatchFeature({PIXELS: pixels, **read, **own})

    def _pixels(self, image: Any) -> np.ndarray:
        """Returns uint8 pixels_HW3. Raises ValueError for what is no picture."""
        decode = self._decode
        if isinstance(image, str | os.PathLike) and Path(image).is_file():
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            return pixels_of(image, decode.fit, decode.max_pixels)
        if isinstance(image, str):
            image = load_image(image)
        if not isinstance(image, Image.Image):
            image = _from_array(image)
        return fitted(on_white(ImageOps.exif_transpose(image)), decode.fit)

    def apply_chat_template(  # type: ignore[override]  # there is no template to choose
        self, conversation: Any, tokenize: bool = False, **given: Any
    ) -> Any:
        """Returns the question of a chat of one turn, or with `tokenize` the tensors of picture and
        question. Raises ValueError for more turns, or more pictures: the model answers one.
        """
        chats = conversation if isinstance(conversation[0], list | tuple) else [conversation]
        asked = [_question(chat) for chat in chats]
        if tokenize:
            return self([picture for picture, _ in asked], [words for _, words in asked])
        words = [words for _, words in asked]
        return words if chats is conversation else words[0]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **given: Any
    ) -> list[str]:
        """Returns the answers in words, as `harness ask` prints them."""
        texts = self.tokenizer.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, **given
        )
        return [text.strip() for text in texts]

    @property
    def model_input_names(self) -> list[str]:
        own = QFORMER if self.question_aware else ()
        return [PIXELS, "input_ids", "attention_mask", *own]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoProcessor") -> None:
        """Does nothing: transformers would copy this module beside every processor it saves."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **given: Any
    ) -> Any:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_remote_code(Path(save_directory))
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **given)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": {"AutoProcessor": f"{NAME}.VLMProcessor"}}


class _NoText:
    """The text of a context that only asks."""

    id = ""


def as_read(
    ids_CL: torch.Tensor, mask_CL: torch.Tensor, begins: int | None, on_the_left: bool
) -> dict[str, torch.Tensor]:
    """Returns prompts that are padded on the right as the language model reads them: a decoder's
    padded on the left, with the token that answers begin after.
    """
    if on_the_left:
        order_CL = mask_CL.argsort(dim=1, stable=True)
        ids_CL = ids_CL.gather(1, order_CL)
        mask_CL = mask_CL.gather(1, order_CL)
    if begins is not None:
        ids_CL = torch.nn.functional.pad(ids_CL, (0, 1), value=begins)
        mask_CL = torch.nn.functional.pad(mask_CL, (0, 1), value=1)
    return {"input_ids": ids_CL, "attention_mask": mask_CL}


def _flat(images: Any) -> list[Any]:
    """Returns pictures as one list, also of lists of one picture each, or of one stacked array."""
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        return [picture for part in images for picture in _flat(part)]
    return [images]


def _from_array(image: Any) -> Image.Image:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(
            f"an image is {type(image).__name__} of {array.dtype} {list(array.shape)}: expected a "
            "PIL image, a path, a URL, or uint8 values as HxWx3 or 3xHxW"
        )
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    return Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)


def _question(chat: Sequence[Mapping[str, Any]]) -> tuple[Any, str]:
    """Returns picture and words of a chat. Raises ValueError."""
    parts: list[Mapping[str, Any]] = []
    for turn in chat:
        content = turn["content"]
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    keys = ("image", "url", "path", "base64")
    pictures = [next((p[k] for k in keys if k in p), None) for p in parts if p["type"] == "image"]
    if len(chat) != 1 or chat[0]["role"] != "user" or len(pictures) != 1:
        raise ValueError(
            f"a chat of {len(chat)} turns and {len(pictures)} pictures: this model answers one "
            "question about one picture, in a single turn of the user"
        )
    return pictures[0], " ".join(p["text"] for p in parts if p["type"] == "text")
