"""Tiny random models of others' classes, saved with their processors in the hub's own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tiny_models import SENTENCES, tiny_tokenizer

QUERIES, SIDE = 4, 32
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
VISION = {**WIDTHS, "num_hidden_layers": 1, "image_size": SIDE, "patch_size": 8}
QFORMER = {
    **WIDTHS,
    "num_hidden_layers": 1,
    "encoder_hidden_size": 64,
    "cross_attention_frequency": 1,
}
IMAGES = {"height": SIDE, "width": SIDE}


def t5(vocabulary: int) -> T5Config:
    sizes = {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 4,
    }
    return T5Config(
        vocab_size=vocabulary, **sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1
    )


def random(model: torch.nn.Module) -> torch.nn.Module:
    """With weights large enough for the picture to change what is said."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


def parts(tokenizer: PreTrainedTokenizerFast, **qformer: int) -> dict[str, Any]:
    """Of a BLIP-2's config, or of an InstructBLIP's."""
    return {
        "vision_config": VISION,
        "qformer_config": QFORMER | qformer,
        "text_config": t5(len(tokenizer)).to_dict(),
        "num_query_tokens": QUERIES,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }


def saved(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> Path:
    random(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_blip2(folder: Path) -> Path:
    processor = Blip2Processor(
        BlipImageProcessorPil(size=IMAGES), tiny_tokenizer(), num_query_tokens=QUERIES
    )
    config = Blip2Config(**parts(processor.tokenizer))
    return saved(Blip2ForConditionalGeneration(config), processor, folder)


def tiny_instructblip(folder: Path) -> Path:
    words = sorted({word.strip("?.,:") for text in SENTENCES for word in text.lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for word in words if word)]
    processor = InstructBlipProcessor(
        BlipImageProcessorPil(size=IMAGES),
        tiny_tokenizer(),
        BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}),
        num_query_tokens=QUERIES,
    )
    config = InstructBlipConfig(**parts(processor.tokenizer, vocab_size=len(vocabulary)))
    return saved(InstructBlipForConditionalGeneration(config), processor, folder)


CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in "
    "message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif "
    "%}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)  # as that of llava-hf/llava-1.5-7b-hf


def tiny_llava(folder: Path, chat_template: str | None = CHAT) -> Path:
    words = sorted({word for text in (*SENTENCES, "USER: ASSISTANT:") for word in text.split()})
    vocabulary = {
        word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", "<image>", *words])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=IMAGES),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    text = LlamaConfig(
        **{
            **WIDTHS,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "tie_word_embeddings": False,
        },
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    vision = CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3, "projection_dim": 16})
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary["<image>"]
    )
    return saved(LlavaForConditionalGeneration(config), processor, folder)
