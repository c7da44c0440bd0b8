"""What an export is made of: frozen parts that came from local folders, the merged language model,
the config that names them from inside the folder.

A loaded model and a new folder in; the folder's weights, config, tokenizer and processor out.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from harness.config.encoder import PACKAGES
from harness.config.schema import Config, LanguageModelConfig, VisionConfig
from harness.errors import ConfigError
from harness.hub.modeling import LM, VISION, write_model
from harness.hub.processing import VLMProcessor
from harness.model.language import quantise
from harness.model.language.interface import LanguageModel
from harness.model.preprocessing import preprocessing_of
from harness.model.pretrained import quiet_transformers, weight_files
from harness.model.vlm import VisionLanguageModel, VLMConfig

# Files of a saved model beside its weights; others in its folder are nobody's business.
BESIDE_WEIGHTS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)
# Keys by which libraries note the folder that something was loaded from.
TELLING = ("_name_or_path", "name_or_path")


def write_parts(model: VisionLanguageModel, config: Config, folder: Path, *, merge: bool) -> None:
    """Writes all that loading needs. With `merge`, and where the language model was trained whole,
    its weights are written in full and `model.lm` becomes the one without LoRA.
    """
    own = copy.deepcopy(model.config)
    if own.model["lm"].get("gguf_file") and not merge:
        raise ConfigError(
            "model.lm.gguf_file: peft cannot read a base from a GGUF file; export with --merge, or "
            "train on the folder that `harness unpack` makes of it"
        )
    whole = merge or config.model.lm.tuning == "full"
    if whole:
        _make_whole(model, own, folder / LM)
    elif Path(own.model["lm"]["id"]).is_dir():
        copy_model(Path(own.model["lm"]["id"]), folder / LM)
        own.model["lm"] |= {"id": LM, "revision": None}
    vision = own.model["vision"]
    if vision.get("weights"):
        copy_model(Path(vision["weights"]), folder / VISION)
        vision |= {"id": PACKAGES[vision["kind"]], "revision": None, "weights": VISION}
        own.encoder |= {"id": VISION}
    elif vision["kind"] in PACKAGES:  # it comes with a package; an id says nothing of it
        vision |= {"id": own.encoder["id"], "revision": None}
    elif Path(vision["id"]).is_dir():
        copy_model(Path(vision["id"]), folder / VISION)
        vision |= {"id": VISION, "revision": None}
        own.encoder |= {"id": VISION, "revision": None}
    own.model["bridge"]["init_from"] = None  # where training began, which loading does not ask
    own.model["init_from"] = None
    write_model(model, own, folder)
    processor(model, config, own).save_pretrained(folder)
    for file in folder.rglob("*.json"):
        _tell_no_place(file)


def processor(model: VisionLanguageModel, config: Config, own: VLMConfig) -> VLMProcessor:
    """Returns the processor of a model, with its run's limits."""
    tokenizer = copy.deepcopy(model.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as the Collator pads
    if not model.lm.has_encoder:
        tokenizer.padding_side = "left"  # the answer goes on from the prompt's last token
    vision = VisionConfig(**model.config.model["vision"])
    limits = config.data.model_dump(include={"max_prompt_tokens", "max_image_pixels"})
    return VLMProcessor(
        tokenizer,
        own.model["vision"],
        own.prompts,
        limits,
        model.lm.begins,
        model.question_aware,
        asdict(preprocessing_of(vision).fit) if vision.kind == "auto" else None,
        not model.lm.has_encoder,
    )


def copy_model(source: Path, folder: Path) -> None:
    """Copies the files of a saved model that loading reads, its weights bit for bit."""
    folder.mkdir()
    weights = list(weight_files(str(source)))
    indices = [file.name for file in source.glob("*.index.json")]
    for name in (*weights, *indices, *BESIDE_WEIGHTS):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _make_whole(model: VisionLanguageModel, own: VLMConfig, folder: Path) -> None:
    """Folds LoRA into the language model, in full precision, and writes that."""
    lm = model.lm
    stored = {p.dtype for p in lm.parameters() if p.is_floating_point()}
    if quantise.quantised_layers(lm) or stored != {torch.float32}:
        lm = _in_full_precision(lm, own.prompts.get("chat", "none")).to(model.device)
    base: Any = lm.lm
    if hasattr(base, "merge_and_unload"):
        base = base.merge_and_unload()
    inside = {"id": LM, "revision": None, "gguf_file": None, "tuning": "frozen"}
    frozen = lm.config.model_copy(update=inside)
    lm.config = frozen
    lm.lm = quantise.tune(base, frozen)
    model.lm = lm
    with quiet_transformers():
        base.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    own.model["lm"] = frozen.model_dump(mode="json")
    own.lm_hash = quantise.weights_hash(LanguageModelConfig(id=str(folder)))


def _in_full_precision(lm: LanguageModel, chat: str) -> LanguageModel:
    """Returns the same language model on its base in 32 bits, its trained weights copied; `chat`:
    the run's prompts.chat, on which tokenizer and template depend.
    """
    tuning = "lora" if lm.config.tuning == "qlora" else lm.config.tuning
    whole = type(lm)(lm.config.model_copy(update={"tuning": tuning}), chat=chat)
    trained = {name: value for name, value in lm.named_parameters() if value.requires_grad}
    for name, value in whole.named_parameters():
        if name in trained:
            value.data.copy_(trained[name].data)
    return whole.eval()


def _tell_no_place(file: Path) -> None:
    """Takes out of a JSON file what libraries note of the place that it was loaded from."""
    document = json.loads(file.read_text())
    if isinstance(document, dict) and any(key in document for key in TELLING):
        kept = {key: value for key, value in document.items() if key not in TELLING}
        file.write_text(json.dumps(kept, indent=2) + "\n")
