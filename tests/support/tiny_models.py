"""Tiny random models saved in the hub's own format, so that a test takes the code path of a real
model id.

A folder in; the same folder out, holding config.json, model.safetensors and the processor's or
tokenizer's files.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.image_processing_backends import PilBackend
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SENTENCES = (
    "Question: what shape is in the image? Answer: a circle, a triangle, a rectangle",
    "Question: is there a red shape in the picture? Answer: yes, no",
    "Based on the image, answer the question. Question: Where is he looking? Answer: down, "
    "at the table",
    "Describe the image. a photo of a child in a pink dress climbing up a set of stairs",
    "a black dog and a white dog with brown spots are staring at each other in the street .",
    "two girls paint a rainbow with blue, green, yellow, teal, brown, gray and black colours",
    "a man in a hat lays on the grass with his dogs while a boy jumps over a wall with a "
    "skateboard",
)


_TEXT_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 8,
}


def tiny_clip(
    folder: Path,
    *,
    image_size: int = 32,
    patch: int = 8,
    width: int = 32,
    layers: int = 2,
    full: bool = True,
) -> Path:
    """Saves a random CLIP. `full`: both towers in one checkpoint, as openai/clip-vit-base-patch32
    comes; else vision.

    Its vision tower gives (image_size / patch)^2 + 1 tokens of `width`.
    """
    torch.manual_seed(0)
    vision = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch,
        "projection_dim": 16,
    }
    text = {
        **_TEXT_TOWER,
        "projection_dim": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if full:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**vision))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    ).save_pretrained(folder)
    return Path(folder)


def tiny_tower(kind: str, folder: Path, *, full: bool = False) -> Path:
    """Saves a random vision transformer of a kind for `vision.kind: auto` with its processor: 4 x 4
    patches of 8 pixels, or of 7 in DINOv2, whose processor cuts 28 pixels out of 32. `full`: with
    a text tower, as SigLIP and CLIP come.
    """
    torch.manual_seed(0)
    model, processor = _TOWERS[kind](full)
    for parameter in model.parameters():  # some start at zero or one, as nothing that is trained
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_SQUARE = {"size": {"height": 32, "width": 32}}
_BIT = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
# The position embeddings are of 6 x 6 patches, more than the processor's picture has, as published.
_DINO = {**_SIZES, "image_size": 42, "patch_size": 7}


def _siglip(full: bool) -> tuple[PreTrainedModel, PilBackend]:
    vision = {**_SIZES, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
    processor = SiglipImageProcessorPil(**_SQUARE, resample=2)
    if not full:
        return SiglipVisionModel(SiglipVisionConfig(**vision)), processor
    text = {**_TEXT_TOWER, "projection_size": 32}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), processor


def _dinov2(full: bool) -> tuple[PreTrainedModel, PilBackend]:
    return Dinov2Model(Dinov2Config(**_DINO)), BitImageProcessorPil(**_BIT)


def _dinov2_with_registers(full: bool) -> tuple[PreTrainedModel, PilBackend]:
    config = Dinov2WithRegistersConfig(**_DINO, num_register_tokens=4)
    return Dinov2WithRegistersModel(config), BitImageProcessorPil(**_BIT)


def _vit(full: bool) -> tuple[PreTrainedModel, PilBackend]:
    config = ViTConfig(**_SIZES, intermediate_size=48, image_size=32, patch_size=8)
    return ViTModel(config, add_pooling_layer=full), ViTImageProcessorPil(**_SQUARE)


def _deit(full: bool) -> tuple[PreTrainedModel, PilBackend]:
    config = DeiTConfig(**_SIZES, intermediate_size=48, image_size=32, patch_size=8)
    size = {"size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}}
    return DeiTModel(config, add_pooling_layer=full), DeiTImageProcessorPil(**size)


def _dinov3_vit(full: bool) -> tuple[PreTrainedModel, PilBackend]:
    """With ViT's processor in place of its own, whose pixels are no whole numbers."""
    sizes = {**_SIZES, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
    config = DINOv3ViTConfig(**sizes, num_register_tokens=4)
    return DINOv3ViTModel(config), ViTImageProcessorPil(**_SQUARE)


_TOWERS = {
    "dinov3_vit": _dinov3_vit,
    "siglip": _siglip,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2_with_registers,
    "vit": _vit,
    "deit": _deit,
}


def tiny_tokenizer(
    sentences: Iterable[str] = SENTENCES, vocabulary: int = 200
) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer laid out like T5's: pad 0, </s> 1, <unk> 2, every text closed by </s>.

    Its pieces are counted here, as the library's own trainer gives others in every process (it
    walks a hash map): the characters, and of what stands in the words the substrings that save most
    characters.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    words = [
        word for text in sentences for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)
    ]
    counts = Counter(
        word[at:end]
        for word in words
        for at in range(len(word))
        for end in range(at + 1, len(word) + 1)
    )
    letters = sorted(
        set("abcdefghijklmnopqrstuvwxyz?.,:▁") | {piece for piece in counts if len(piece) == 1}
    )
    longer = sorted(
        counts.keys() - letters, key=lambda piece: (-counts[piece] * (len(piece) - 1), piece)
    )
    pieces = (letters + longer)[: vocabulary - 3]
    scored = [(piece, math.log((counts[piece] or 0.1) / counts.total())) for piece in pieces]
    tokenizer.model = models.Unigram(
        [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scored], unk_id=2
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def tiny_t5(
    folder: Path,
    sentences: Iterable[str] = SENTENCES,
    *,
    width: int = 64,
    layers: int = 2,
    vocabulary: int = 200,
) -> Path:
    """Saves a random T5 built as Flan-T5 is (gated GELU, an `lm_head` of its own) with its
    tokenizer.

    Widths are multiples of 64, which bitsandbytes' 4-bit layers need.
    """
    tokenizer = tiny_tokenizer(sentences, vocabulary)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_layers=layers,
            num_decoder_layers=layers,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    # transformers >= 5.20 ties `lm_head` in every new T5; Flan-T5's file holds two matrices, and so
    # must this one.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * width**-0.5)
    model.save_pretrained(folder)
    config = Path(folder, "config.json")
    fields = json.loads(config.read_text()) | {"tie_word_embeddings": False}
    fields.pop(
        "scale_decoder_outputs", None
    )  # the hub's config does not know it; transformers derives it
    config.write_text(json.dumps(fields, indent=2))
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_gpt2_tokenizer(
    sentences: Iterable[str] = SENTENCES, vocabulary: int = 400
) -> GPT2Tokenizer:
    """Byte-level BPE as GPT-2's: <|endoftext|> is BOS and EOS, there is no padding, and no text
    gets a token added.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        sentences,
        trainers.BpeTrainer(
            vocab_size=vocabulary - 1, initial_alphabet=alphabet, show_progress=False
        ),
    )
    learnt = json.loads(trained.to_str())["model"]
    vocab = learnt["vocab"] | {"<|endoftext|>": len(learnt["vocab"])}
    return GPT2Tokenizer(
        vocab=vocab, merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=256
    )


def tiny_gpt2(
    folder: Path,
    sentences: Iterable[str] = SENTENCES,
    *,
    width: int = 64,
    layers: int = 2,
    vocabulary: int = 400,
) -> Path:
    """Saves a random GPT-2 (tied embeddings, dropout as published) with its tokenizer."""
    tokenizer = tiny_gpt2_tokenizer(sentences, vocabulary)
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=256,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            initializer_range=0.2,  # a random model whose answers differ
            bos_token_id=end,
            eos_token_id=end,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


CHAT = (  # as ChatML: SmolLM2's and Qwen's
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_decoder_tokenizer(*, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a token to pad with; `bos`: <s> before every text, as OPT's and
    Llama's; `chat`: a template whose turn ends with another token than EOS.
    """
    plain = tiny_gpt2_tokenizer(vocabulary=300)
    tokenizer = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        additional_special_tokens=special[2:],
        model_max_length=256,
    )
    made.chat_template = CHAT if chat else None
    return made


# model type -> what its tokenizer does, and fields of its config beside the common ones; as they
# are published: tied or not, with or without grouped queries
DECODERS: dict[str, tuple[dict, dict]] = {
    "gpt2": ({}, {"n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "opt": (
        {"bos": True},
        {"ffn_dim": 128, "word_embed_proj_dim": 32, "max_position_embeddings": 256},
    ),
    "llama": ({"bos": True, "chat": True}, {"num_key_value_heads": 2}),
    "qwen2": ({"chat": True}, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ({}, {"num_key_value_heads": 2, "head_dim": 32}),
    "gemma": ({"bos": True}, {"num_key_value_heads": 1, "head_dim": 32}),
    "gemma2": (
        {"bos": True, "chat": True},
        {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "sliding_window": 200,
            "final_logit_softcapping": 2.0,
        },
    ),
}


def tiny_decoder(folder: Path, kind: str, **fields) -> Path:
    """Saves a random decoder of this model type, of width 64 and two layers, with its tokenizer."""
    asked, own = DECODERS.get(kind, ({}, {}))
    tokenizer = tiny_decoder_tokenizer(**asked)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
            **own,
            **fields,
        },
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # a random model whose answers differ
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
