"""An exported model behind the interface of transformers' image-text-to-text models.

    AutoModelForImageTextToText.from_pretrained(OUT) -> model(**inputs, labels=...), model.generate

`VisionLanguageModel` does the work. Legend: C contexts (a picture and its prompt), L tokens of a
text, S positions with the image tokens before them, Q image tokens, P patches, D width, V
vocabulary, H W pixels.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, Seq2SeqLMOutput

from harness.config.schema import DecodingConfig
from harness.data.prompts import prompt
from harness.hub.remote import AUTO_MAP, write_remote_code
from harness.machine.precision import Precision, choose
from harness.model.arguments import (
    OF_AUTO_CLASSES,
    OF_DTYPE,
    OF_THE_HUB,
    device_of,
    model_folder,
)
from harness.model.batch import Batch
from harness.model.bridge import BridgeOutput
from harness.model.language.interface import generate_arguments
from harness.model.language.wording import Wording
from harness.model.vlm import VisionLanguageModel, VLMConfig

logger = logging.getLogger(__name__)

TASKS = ("caption", "vqa")
ADAPTER = "adapter"
# Frozen parts that lie in the folder of the model itself.
LM = "lm"
VISION = "vision"
# Handed on by the Auto classes and pipelines, or so anyway.
SETTLED = (
    *(*OF_AUTO_CLASSES, "_from_pipeline", "code_revision"),
    *("low_cpu_mem_usage", "use_safetensors", "weights_only"),
)
# What a picture may be given as, beside pixel_values, and what a Q-Former reads with it.
PICTURES = ("patch_features", "qformer_input_ids", "qformer_attention_mask")


class VLMForImageTextToText(PreTrainedModel, GenerationMixin):
    """Vision tower, bridge and language model, with tensors of `VLMProcessor` in."""

    config: VLMConfig
    config_class = VLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012  # of transformers
    _supports_sdpa = True

    def __init__(self, config: VLMConfig, vlm: VisionLanguageModel | None = None):
        super().__init__(config)
        if vlm is None:
            raise ValueError(
                "this model is not built from its config alone, which names frozen parts: load an "
                "export, AutoModelForImageTextToText.from_pretrained(FOLDER)"
            )
        self.vlm = vlm
        config.is_encoder_decoder = vlm.lm.has_encoder
        self.folder: Path | None = None  # where it was loaded from
        asked = {task: DecodingConfig(**config.generate.get(task, {})) for task in TASKS}
        self._asked = {task: generate_arguments(asked[task]) for task in TASKS}
        self.generation_config = GenerationConfig(**self._asked["vqa"])
        self._as_loaded = self.generation_config.to_diff_dict()

    # ---- loading and saving ----------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]  # of the many options few make sense here
        cls, pretrained_model_name_or_path: str | Path, *arguments: Any, **given: Any
    ) -> Any:
        """Returns the model of an export (a folder, or a name on the hub) in eval mode.

        `dtype`: of parameters and products; without, or with "auto", float32 (4-bit layers stay in
        4 bits). `device_map`: one device. Raises ValueError, or ConfigError, for what it cannot do.
        """
        if arguments:
            raise ValueError("from_pretrained takes a folder, or a name on the hub, and keywords")
        where = {name: given.pop(name) for name in OF_THE_HUB if name in given}
        folder = model_folder(pretrained_model_name_or_path, where)
        config = given.pop("config", None)
        told = given.pop("output_loading_info", False)
        device_map = given.pop("device_map", None)
        dtype = _dtype(given)
        _refuse_the_rest(given)
        device = device_of(None, device_map)
        vlm = VisionLanguageModel.from_pretrained(
            folder, precision=_precision(dtype, device), device=device
        )
        own = VLMConfig.from_pretrained(folder, local_files_only=True)
        _check_config(config, own)
        model = cls(config or own, vlm).eval()
        model.folder = folder
        if dtype is not None:
            _cast(vlm, dtype)
        if device_map is not None:
            model.hf_device_map = {"": device}
        nothing = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return (model, {name: set() for name in nothing}) if told else model

    def save_pretrained(  # type: ignore[override]  # nothing here is sharded
        self, save_directory: str | Path, push_to_hub: bool = False, **_: Any
    ) -> None:
        """Writes a folder that stands alone as the one it was loaded from, with the weights as they
        are now. Raises ValueError for `push_to_hub`.
        """
        if push_to_hub:
            self.push_to_hub("")
        assert self.folder is not None  # there is no other way to a model
        folder = Path(save_directory)
        for part in (LM, VISION):
            if (self.folder / part).is_dir() and not (folder / part).exists():
                shutil.copytree(self.folder / part, folder / part)
        write_model(self.vlm, self.config, folder)

    def push_to_hub(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]  # refused whatever
        """Raises ValueError: what is published is proven first."""
        raise ValueError(
            "push_to_hub: a model is published by `harness export RUN OUT --push-to-hub "
            "OWNER/NAME`, which first proves that the export answers as its run, and is private "
            "unless --public"
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing: transformers would copy this module beside every model it saves."""

    # ---- what it is asked ------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        **pictures: torch.Tensor,
    ) -> Seq2SeqLMOutput | CausalLMOutput:
        """Returns logits_CLV, and with `labels` (-100 where nothing is asked) the mean loss.

        T5: `labels` are the answers. A decoder: `input_ids` go on with the answer, and `labels` are
        of their shape; logits are of the position before, as everywhere in transformers.
        """
        batch = self._batch(pixel_values, input_ids, attention_mask, pictures)
        image = self._image(batch, pictures)
        vlm = self.vlm
        with vlm.precision.autocast("lm"):
            if not self.config.is_encoder_decoder:
                return self._decoded(image.by_context(vlm.lm.base.dtype), batch, labels)
            asked = {"labels": labels, "decoder_input_ids": decoder_input_ids}
            before = vlm.lm.generation_inputs(image, batch)
            return vlm.lm.base(**before, **asked, return_dict=True)

    def _decoded(
        self, tokens_CQD: torch.Tensor, batch: Batch, labels_CL: torch.Tensor | None
    ) -> CausalLMOutput:
        """Runs a decoder over [image tokens][prompt][answer], whichever side its padding is on."""
        base = self.vlm.lm.base
        embeds_CSD = base.get_input_embeddings()(batch.prompt_ids_CL)
        attended = {"encoder_hidden_states": tokens_CQD}
        if not self.vlm.lm.config.cross_attention:
            embeds_CSD = torch.cat([tokens_CQD, embeds_CSD], dim=1)
            attended = {}
        before = embeds_CSD.shape[1] - batch.prompt_ids_CL.shape[1]
        mask_CS = nn.functional.pad(batch.prompt_mask_CL, (before, 0), value=True)
        if labels_CL is not None:
            labels_CL = nn.functional.pad(labels_CL, (before, 0), value=-100)
        out = base(
            inputs_embeds=embeds_CSD,
            attention_mask=mask_CS.long(),
            position_ids=(mask_CS.long().cumsum(dim=1) - 1).clamp(min=0),
            labels=labels_CL,
            return_dict=True,
            use_cache=False,
            **attended,
        )
        return CausalLMOutput(loss=out.loss, logits=out.logits[:, before:])

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the tensors of the processor by their names
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **given: Any,
    ) -> Any:
        """Returns the token ids of the answers (without the prompts), by transformers' own
        `generate` of the language model, which takes `given`; what is not given is as the run was
        evaluated: beams and lengths of its config for captions and for questions.
        """
        pictures = {name: given.pop(name) for name in PICTURES if name in given}
        batch = self._batch(pixel_values, input_ids, attention_mask, pictures)
        image = self._image(batch, pictures)
        if not self.config.is_encoder_decoder:
            batch = self._without_begin(batch)
        if "generation_config" not in given:
            given = self._defaults(batch, given)
        vlm = self.vlm
        with vlm.precision.autocast("lm"):
            return vlm.lm.base.generate(**(vlm.lm.generation_inputs(image, batch) | given))

    def _defaults(self, batch: Batch, given: dict[str, Any]) -> dict[str, Any]:
        """Returns how these contexts are answered, as far as it is not `given`. Raises ValueError
        where captions and questions stand in one batch and are answered differently.
        """
        now = self.generation_config.to_diff_dict()
        changed = {name: now[name] for name in now if self._as_loaded.get(name) != now[name]}
        tasks = sorted({self._task(batch, row) for row in range(len(batch.prompt_ids_CL))})
        asked = [self._asked[task] | changed | given for task in tasks]
        if asked[0] != asked[-1]:
            raise ValueError(
                "captions and questions in one batch, which this model answers differently "
                f"({self._asked}): ask them in two batches, or say it for both, as "
                "max_new_tokens=20"
            )
        return asked[0]

    def _task(self, batch: Batch, row: int) -> str:
        """Returns whether a row's prompt is that of a caption, or a question."""
        words = prompt("caption", self.config.prompts.get("caption", "describe"), None)
        found = batch.prompt_ids_CL[row][batch.prompt_mask_CL[row]].tolist()
        wording = Wording(self.vlm.tokenizer)
        return "caption" if [found] == wording.prompts([words], len(found)).ids else "vqa"

    def _batch(
        self,
        pixel_values: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        pictures: Mapping[str, torch.Tensor],
    ) -> Batch:
        """Returns our batch of what the processor made. Raises ValueError."""
        features = pictures.get("patch_features")
        seen = features if pixel_values is None else pixel_values
        if seen is None or input_ids is None:
            raise ValueError("pixel_values or input_ids is missing: give **processor(images, text)")
        if len(seen) != len(input_ids):
            raise ValueError(f"{len(seen)} pictures and {len(input_ids)} texts: one for each")
        if pixel_values is not None and pixel_values.dtype != torch.uint8:
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}: expected uint8 of this model's processor"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        rows_C = torch.arange(len(input_ids), device=input_ids.device)
        return Batch(
            prompt_ids_CL=input_ids,
            prompt_mask_CL=attention_mask.bool(),
            image_of_C=rows_C,
            labels_TL=input_ids[:, :0],
            weight_TL=input_ids[:, :0].float(),
            context_of_T=rows_C,
            pixels_IHW3=None if pixel_values is None else pixel_values.permute(0, 2, 3, 1),
            features_IPD=features,
        )

    def _image(self, batch: Batch, pictures: Mapping[str, torch.Tensor]) -> BridgeOutput:
        """Returns the image tokens; a Q-Former that reads the question has it apart from the
        language model's, which may be padded elsewhere and go on with an answer. Raises ValueError.
        """
        vlm = self.vlm
        if unknown := sorted(pictures.keys() - PICTURES):
            raise ValueError(f"{unknown[0]} is nothing that this model takes")
        vlm.precision = replace(vlm.precision, device_type=self.device.type)
        if not vlm.question_aware:
            return vlm.bridge_tokens(batch)
        if "qformer_input_ids" not in pictures:
            raise ValueError(
                "qformer_input_ids is missing: this model's Q-Former reads the question, give "
                "**processor(images, text)"
            )
        ids_CL = pictures["qformer_input_ids"]
        mask_CL = pictures["qformer_attention_mask"].bool()
        return vlm.bridge_tokens(replace(batch, prompt_ids_CL=ids_CL, prompt_mask_CL=mask_CL))

    def _without_begin(self, batch: Batch) -> Batch:
        """Returns the batch without the token that the answers begin after, which a decoder's room
        sets itself. Raises ValueError for rows that do not end with it.
        """
        begins = self.vlm.lm.begins
        if begins is None:
            return batch
        if not batch.prompt_ids_CL[:, -1].eq(begins).all():
            raise ValueError(
                f"input_ids do not end with {begins}, after which this model's answers begin: make "
                "them by its processor"
            )
        return replace(
            batch,
            prompt_ids_CL=batch.prompt_ids_CL[:, :-1],
            prompt_mask_CL=batch.prompt_mask_CL[:, :-1],
        )


def write_model(vlm: VisionLanguageModel, config: VLMConfig, folder: Path) -> None:
    """Writes config.json, the trained weights, peft's adapter of them, and what transformers needs
    to find our classes.
    """
    config = copy.deepcopy(config)
    config.architectures = [VLMForImageTextToText.__name__]
    config.auto_map = AUTO_MAP
    config.is_encoder_decoder = vlm.lm.has_encoder
    vlm.save_pretrained(folder)
    config.save_pretrained(folder)
    write_remote_code(folder)
    if isinstance(vlm.lm.lm, PeftModel):
        _write_adapter(vlm.lm.lm, config, folder / ADAPTER)


def _write_adapter(lm: PeftModel, config: VLMConfig, folder: Path) -> None:
    """Writes the LoRA matrices as peft reads them. In a folder of their own: beside config.json
    transformers would take the whole repository for an adapter and load its base in its place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = config.model["lm"]
    own = copy.copy(lm.peft_config["default"])
    own.base_model_name_or_path = f"../{LM}" if base["id"] == LM else base["id"]
    own.revision = base.get("revision")
    own.inference_mode = True
    own.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(lm, save_embedding_layers=False)
    save_file(
        {name: value.cpu().contiguous() for name, value in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def _dtype(given: dict[str, Any]) -> torch.dtype | None:
    """Takes the dtype out of what was given; None: float32, as the weights are stored. Raises
    ValueError.
    """
    asked = [given.pop(name) for name in OF_DTYPE if given.get(name) is not None]
    dtype = asked[0] if asked else None
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype, dtype)
    if dtype in (None, "auto", torch.float32):
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype}: expected float32, bfloat16, float16 or auto")
    return dtype


def _precision(dtype: torch.dtype | None, device: torch.device) -> Precision:
    """Returns what the parts compute in. A T5 in float16 follows the T4's policy of training: fp16
    in its frozen layers alone, since the rest of it overflows.
    """
    if dtype is None:
        return choose("fp32", device)
    return Precision(
        "bf16" if dtype == torch.bfloat16 else "fp16",
        device.type,
        vision=dtype,
        bridge=dtype,
        lm=None,
        compute_dtype=dtype,
        loss_scaler=False,
        reason="as dtype says",
    )


def _cast(vlm: VisionLanguageModel, dtype: torch.dtype) -> None:
    """Casts all weights that are not in 4 bits, and says which it does not."""
    parts = [vlm.vision and vlm.vision.network, vlm.bridge]
    if dtype == torch.float16 and vlm.lm.has_encoder:
        logger.warning(
            "dtype=float16: T5 overflows in it, so its `wo`, norms, embeddings and what was "
            "trained stay in float32"
        )
    else:
        parts.append(vlm.lm)
    for part in filter(None, parts):
        for tensor in (*part.parameters(), *part.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _check_config(given: VLMConfig | None, own: VLMConfig) -> None:
    """Raises ValueError for a config that describes another model than the folder's, or holds an
    option that was meant for it.
    """
    if given is None:
        return
    for name in ("model", "encoder", "lm_hash", "known_mistakes"):
        if getattr(given, name) != getattr(own, name):
            raise ValueError(
                f"config: its {name} is not that of the folder, whose weights would not fit it; "
                "prompts and generate can be changed"
            )
    # AutoConfig has taken it out of what was given.
    _refuse_the_rest({"attn_implementation": given._attn_implementation})


def _refuse_the_rest(given: Mapping[str, Any]) -> None:
    """Raises ValueError for the first option that would have no effect."""
    for name, value in given.items():
        if name in SETTLED or value is None or (name, value) == ("attn_implementation", "sdpa"):
            continue
        reason = "its base is in 4 bits where its config.json says so, model.lm.tuning: qlora"
        if name != "quantization_config":
            reason = "this model is loaded as its config.json says, on one device in one dtype"
        raise ValueError(f"{name}={value!r} cannot be obeyed: {reason}")
