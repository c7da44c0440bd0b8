"""A fresh process that loads an export as its users will, and says how far it is from its run.

    python -m harness.export.reloaded FOLDER     FOLDER: what `proof.py` wrote

First peft's adapter on the plain base, by transformers and peft alone; then the whole model by
transformers' Auto classes. Writes FOLDER/found.json. Legend: C contexts (one target each), L
target tokens, R rows at a time, S positions, Q image tokens, V vocabulary, D width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    BitsAndBytesConfig,
)

ROWS = 8  # contexts at a time
INPUTS = "inputs.safetensors"
ASKED = "asked.json"
FOUND = "found.json"


def main(folder: Path) -> None:
    asked = json.loads((folder / ASKED).read_text())
    tensors = load_file(folder / INPUTS)
    found: dict[str, Any] = {}
    with torch.no_grad():
        if asked["base"]:
            found["adapter_nats"] = _adapter(asked, tensors)
        found |= _model(asked, tensors, folder)
    (folder / FOUND).write_text(json.dumps(found))


def divergence(
    logits_RLV: torch.Tensor, own_RLV: torch.Tensor, counts_RL: torch.Tensor
) -> torch.Tensor:
    """Returns KL(run || export) in nats of the kept positions."""
    own = own_RLV[counts_RL].double().log_softmax(dim=-1)
    found = logits_RLV[counts_RL].double().log_softmax(dim=-1).to(own.device)
    return (own.exp() * (own - found)).sum(dim=-1)


def _rows(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS):
        yield slice(start, start + ROWS)


def _adapter(asked: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> float:
    """Returns the largest divergence of plain peft on the plain base, given the run's image tokens
    and the prompts.
    """
    lm: Any = PeftModel.from_pretrained(_plain_base(asked), asked["adapter"])
    lm.eval()
    embed = lm.get_input_embeddings()
    worst = 0.0
    for rows in _rows(len(tensors["labels_CL"])):
        labels_RL = tensors["labels_CL"][rows].to(lm.device)
        counts_RL = tensors["counts_CL"][rows].bool()
        ids_RL = tensors["input_ids"][rows].to(lm.device)
        mask_RS = tensors["attention_mask"][rows].bool().to(lm.device)
        tokens_RQD = tensors["adapter_tokens_CQD"][rows].to(lm.device)
        mask_RS = torch.nn.functional.pad(mask_RS, (tokens_RQD.shape[1], 0), value=True)
        embeds_RSD = torch.cat([tokens_RQD, embed(ids_RL)], dim=1)
        given: dict[str, Any] = {}
        if asked["encoder_decoder"]:
            mask_RS[:, 0] |= ~mask_RS.any(dim=1)
            given["labels"] = labels_RL.masked_fill(~counts_RL.to(lm.device), -100)
        else:
            embeds_RSD = torch.cat([embeds_RSD, embed(labels_RL)], dim=1)
            mask_RS = torch.cat([mask_RS, counts_RL.to(lm.device)], dim=1)
            given["position_ids"] = (mask_RS.long().cumsum(dim=1) - 1).clamp(min=0)
        out = lm(inputs_embeds=embeds_RSD, attention_mask=mask_RS.long(), **given).logits
        nats = divergence(_before(out, labels_RL, asked), tensors["adapter_CLV"][rows], counts_RL)
        worst = max(worst, nats.max().item())
    return worst


def _before(
    logits: torch.Tensor, labels_RL: torch.Tensor, asked: Mapping[str, Any]
) -> torch.Tensor:
    """Returns logits_RLV of the position before each label."""
    length = labels_RL.shape[1]
    return logits[:, :length] if asked["encoder_decoder"] else logits[:, -length - 1 : -1]


def _plain_base(asked: Mapping[str, Any]) -> Any:
    quantisation = None
    if asked["four_bits"]:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    auto = AutoModelForSeq2SeqLM if asked["encoder_decoder"] else AutoModelForCausalLM
    base: Any = auto.from_pretrained(
        asked["base"],
        revision=asked["revision"],
        dtype=torch.float32,
        quantization_config=quantisation,
    )
    return base if asked["four_bits"] or not torch.cuda.is_available() else base.to("cuda")


def _model(
    asked: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path
) -> dict[str, Any]:
    """Returns the largest and the mean divergence of the whole model, and its answers."""
    import harness.hub  # noqa: F401  # registers the classes, after the part without them

    auto: Any = AutoModelForImageTextToText
    model = auto.from_pretrained(asked["out"], device_map="auto").eval()
    processor = AutoProcessor.from_pretrained(asked["out"])
    nats = []
    answers: list[str] = []
    for rows in _rows(len(asked["questions"])):
        inputs = _inputs(processor, asked, tensors, folder, rows).to(model.device)
        labels_RL = tensors["labels_CL"][rows].to(model.device)
        counts_RL = tensors["counts_CL"][rows].bool()
        given = dict(inputs)
        if asked["encoder_decoder"]:
            given["labels"] = labels_RL.masked_fill(~counts_RL.to(model.device), -100)
        else:
            follow = {"input_ids": labels_RL, "attention_mask": counts_RL.long().to(model.device)}
            given |= {name: torch.cat([inputs[name], follow[name]], dim=1) for name in follow}
        logits_RLV = _before(model(**given).logits, labels_RL, asked)
        nats.append(divergence(logits_RLV, tensors["logits_CLV"][rows], counts_RL))
    for row in range(len(asked["questions"])):
        inputs = _inputs(processor, asked, tensors, folder, slice(row, row + 1)).to(model.device)
        answers += processor.post_process_image_text_to_text(model.generate(**inputs))
    every = torch.cat(nats)
    return {"nats": every.max().item(), "mean_nats": every.mean().item(), "answers": answers}


def _inputs(
    processor: Any,
    asked: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    rows: slice,
) -> Any:
    """Returns the tensors of some contexts; `patch_features` in place of pixels where the run's
    pictures are gone.
    """
    names = asked["pictures"][rows]
    if names[0] is not None:
        files = [(folder / name).read_bytes() for name in names]
        return processor(images=files, text=asked["questions"][rows])
    blank = [torch.zeros(8, 8, 3, dtype=torch.uint8)] * len(names)
    inputs = processor(images=blank, text=asked["questions"][rows])
    inputs.pop("pixel_values")
    inputs["patch_features"] = tensors["features_CPD"][rows]
    return inputs


if __name__ == "__main__":
    main(Path(sys.argv[1]))
