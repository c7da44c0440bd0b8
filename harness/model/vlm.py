"""VisionLanguageModel: frozen vision tower, bridge and language model put together; what is saved
is what was trained.

    Batch -> patch tokens -> image tokens -> loss or answers

A saved model is a folder: config.json (with id, revision and hash of every frozen part) and
model.safetensors (the trained weights by name). Loading builds the frozen parts from where they
are found (places.py), or from `lm=PATH` and `vision=PATH`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from harness.config import schema as settings
from harness.config.encoder import PACKAGES, place_of_weights, with_weights_at
from harness.config.known_mistakes import at_their_new_place
from harness.errors import ConfigError
from harness.machine.precision import Precision, choose
from harness.model import arguments
from harness.model.batch import Batch
from harness.model.bridge import Bridge, BridgeOutput
from harness.model.compiled import Compilations, compile_forwards
from harness.model.language import quantise
from harness.model.language.decoder import DecoderLanguage
from harness.model.language.interface import LanguageModel
from harness.model.language.loss import Generated, LossOutput
from harness.model.language.t5 import T5Language
from harness.model.places import Found, Part, find
from harness.model.pretrained import without_weights
from harness.model.start import start_from
from harness.model.storage import store_frozen
from harness.model.vision import VisionTower, load_vision
from harness.redact import masked_document

logger = logging.getLogger(__name__)

LANGUAGES: dict[str, type[LanguageModel]] = {
    "t5": T5Language,
    "decoder": DecoderLanguage,
    "gpt2": DecoderLanguage,
}
WEIGHTS = "model.safetensors"
Fields = Mapping[str, Any]


class VLMConfig(PretrainedConfig):
    """The description of a saved model: the config's `model`, `prompts` and `generate`, and
    its frozen parts.
    """

    model_type = arguments.MODEL_TYPE

    def __init__(
        self,
        model: Fields | None = None,
        prompts: Fields | None = None,
        generate: Fields | None = None,
        encoder: Fields | None = None,
        known_mistakes: Fields | None = None,
        lm_hash: str = "",
        objective: Sequence[str] = (),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.model = dict(model or {})
        self.prompts = dict(prompts or {})
        self.generate = dict(generate or {})
        # VisionTower.identity(): kind, id, revision, hash, tokens, width, ...
        self.encoder = dict(encoder or {})
        self.known_mistakes = dict(known_mistakes or {})
        self.lm_hash = lm_hash
        self.objective = list(objective)  # of a first stage; [] of a model that answers


class VisionLanguageModel(PreTrainedModel):
    """The three parts and how they meet. `vision` is None where features replace images."""

    config: VLMConfig
    config_class = VLMConfig
    base_model_prefix = ""
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    is_first_stage = False

    def __init__(
        self, config: VLMConfig, vision: VisionTower | None, bridge: Bridge, lm: LanguageModel
    ):
        super().__init__(config)
        self.vision = vision
        self.bridge = bridge
        self.lm = lm
        self.precision: Precision = choose("fp32", torch.device("cpu"))
        self.label_smoothing = 0.0
        self.compilations: Compilations | None = None  # of train.compile
        self.checkpoints_bridge = False

    @classmethod
    def build(
        cls,
        config: settings.Config,
        encoder: Fields | None = None,
        *,
        precision: Precision | None = None,
        device: torch.device | str = "cpu",
    ) -> VisionLanguageModel:
        """Returns a model for training, its new parts drawn from `config.seed`.

        `encoder` is the identity in a feature set's index; with it no vision tower is loaded.
        Raises ConfigError.
        """
        torch.manual_seed(config.seed)
        precision = precision or choose(config.train.precision, torch.device(device))
        vision = None
        if not encoder:
            vision = load_vision(config.model.vision)
            encoder = vision.identity()
        own = VLMConfig(
            model=masked_document(config.model.model_dump(mode="json")),
            prompts=config.prompts.model_dump(mode="json"),
            generate=config.generate.model_dump(mode="json"),
            encoder=encoder,
            known_mistakes=config.known_mistakes.model_dump(mode="json"),
            lm_hash=cls._base_hash(config.model),
            objective=config.train.objective or (),
        )
        model = cls._assemble(own, config.model, vision, precision, device)
        model.label_smoothing = config.train.label_smoothing
        if config.train.activation_checkpointing:
            model.checkpoint_activations()
        if config.train.compile and not without_weights():
            model.compilations = compile_forwards(model, (vision, model.bridge))
        if config.model.bridge.init_from and not without_weights():
            logger.warning("%s", start_from(model.bridge, config.model.bridge, encoder))
        return model

    @classmethod
    def _assemble(
        cls,
        own: VLMConfig,
        parts: settings.ModelConfig,
        vision: VisionTower | None,
        precision: Precision,
        device: torch.device | str,
    ) -> VisionLanguageModel:
        model = cls(own, vision, *cls._trained_parts(own, parts, precision))
        model.precision = precision
        if vision is not None:
            vision.store(precision.vision)
        store_frozen(model.lm, precision.lm)
        return model.to(device)  # type: ignore[arg-type]  # transformers' wrapper loses self

    @classmethod
    def _base_hash(cls, parts: settings.ModelConfig) -> str:
        return quantise.weights_hash(parts.lm)

    @classmethod
    def _trained_parts(
        cls, own: VLMConfig, parts: settings.ModelConfig, precision: Precision
    ) -> tuple[Bridge, LanguageModel]:
        lm = LANGUAGES[parts.lm.kind](
            parts.lm,
            chat=own.prompts.get("chat", "none"),
            dtype=precision.lm_dtype,
            compute_dtype=precision.compute_dtype,
        )
        lm.bos_in_training = own.known_mistakes.get("bos") != "generation_only"
        return new_bridge(parts.bridge, own, lm), lm

    @classmethod
    def _find_base(cls, saved: VLMConfig, folder: Path, given: str | Path | None) -> Found:
        config = settings.ModelConfig(**saved.model).lm

        def look(place: str) -> Found:
            named = config.model_copy(update={"id": place})
            return Found(place, quantise.weights_hash(named), None)

        part = Part("base language model", "lm", config.id, saved.lm_hash)
        return find(part, folder, given, look)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.lm.tokenizer

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts by the names that the table of parts and the plan use."""
        vision = {} if self.vision is None else {"vision encoder": self.vision}
        return vision | {
            "bridge": nn.ModuleList([self.bridge.patch_norm, self.bridge.body]),
            "projection": self.bridge.projection,
            "language model": self.lm,
        }

    def checkpoint_activations(self) -> None:
        """Has the language model, layer by layer, and the bridge, whole, compute their activations
        again in the backward pass. The encoder has none to keep.
        """
        self.checkpoints_bridge = True
        base = self.lm.base  # the method's name changed in transformers 5
        enable = (
            getattr(base, "activation_checkpointing_enable", None)
            or base.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})

    def patch_tokens(self, batch: Batch) -> torch.Tensor:
        """Returns patches_IPD: the features of the batch, or what the tower makes of its pixels.

        Of a batch without pictures one row that nothing reads: so every part that is trained gets
        its gradient, of zeros, and ranks whose weights are partitioned ask for them alike.
        """
        if batch.images == 0:
            batch = self._with_filler(batch)
        if batch.features_IPD is not None:
            return batch.features_IPD.float()
        if self.vision is None:
            raise ValueError(
                "this model was loaded without its vision tower (with_vision=False): it reads "
                "features only"
            )
        with self.precision.autocast("vision"):
            return self.vision(batch.pixels_IHW3).float()

    def _with_filler(self, batch: Batch) -> Batch:
        device = batch.image_of_C.device
        if self.vision is None:
            shape = [1, self.config.encoder["tokens"], self.config.encoder["width"]]
            return replace(batch, features_IPD=torch.zeros(shape, device=device))
        shape = [1, self.vision.image_size, self.vision.image_size, 3]
        return replace(batch, pixels_IHW3=torch.zeros(shape, dtype=torch.uint8, device=device))

    def bridge_tokens(self, batch: Batch) -> BridgeOutput:
        """Returns image tokens, made once per image and shared by its contexts; once per context
        where they read the prompt.
        """
        patches_IPD = self.patch_tokens(batch)
        with self.precision.autocast("bridge"):
            inputs = self.bridge_inputs(batch, patches_IPD)
            if self.checkpoints_bridge and self.training:
                tokens_NQD = checkpoint(self.bridge, *inputs, use_reentrant=False).float()
            else:
                tokens_NQD = self.bridge(*inputs).float()
        if not self.question_aware:
            return BridgeOutput(tokens_NQD, batch.image_of_C)
        rows_C = torch.arange(len(batch.image_of_C), device=patches_IPD.device)
        return BridgeOutput(tokens_NQD, rows_C.where(batch.image_of_C >= 0, -1))

    @property
    def question_aware(self) -> bool:
        """Whether image tokens belong to one context: then another image for it means to make them
        anew.
        """
        return self.bridge.question_aware

    @property
    def token_per_patch(self) -> bool:
        """Whether each patch is an image token of its own: then none can be left out before the
        bridge, which has a mean for each.
        """
        return self.bridge.body.tokens is None

    def bridge_inputs(self, batch: Batch, patches_IPD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns what the bridge takes for a batch and the patches of its images."""
        if not self.question_aware:
            return (patches_IPD,)
        image_C = batch.image_of_C.clamp(min=0)
        return patches_IPD[image_C], batch.prompt_ids_CL, batch.prompt_mask_CL

    def loss(self, batch: Batch, tokens: BridgeOutput | None = None) -> LossOutput:
        """Returns sums of weighted nats over the batch; `tokens` stand in place of the batch's own
        image tokens.
        """
        tokens = tokens or self.bridge_tokens(batch)
        # Smoothing is for training alone: an evaluated loss is a cross entropy.
        with self.precision.autocast("lm"):
            return self.lm.loss(tokens, batch, self.label_smoothing if self.training else 0.0)

    def forward(self, batch: Batch) -> LossOutput:
        return self.loss(batch)

    @torch.no_grad()
    def generate(
        self, batch: Batch, decoding: settings.DecodingConfig, tokens: BridgeOutput | None = None
    ) -> Generated:
        """Returns one answer per context."""
        tokens = tokens or self.bridge_tokens(batch)
        with self.precision.autocast("lm"):
            return self.lm.generate(tokens, batch, decoding)

    @torch.no_grad()
    def scales(self, batch: Batch) -> dict[str, float]:
        """Returns root mean squares of the image tokens and of the LM's embeddings: far apart, the
        LM reads noise.
        """
        image_rms = self.bridge_tokens(batch).tokens_NQD.pow(2).mean().sqrt().item()
        return {"image_token_rms": image_rms, "embedding_rms": self.bridge.embedding_rms}

    # ---- what was trained ------------------------------------------------------------------------

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Returns every trained parameter by name, and those of a bridge frozen at random, which
        nothing else could restore.
        """
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad or name.startswith("bridge.")
        }

    def load_trained(self, folder: Path) -> None:
        """Puts saved weights into this model. Raises ConfigError where frozen parts, names or
        shapes differ.
        """
        before = _saved_config(folder)
        _check_objective(folder, before.objective, self.config.objective)
        file = folder / WEIGHTS
        _check_base(folder, before, self.config.model["lm"]["id"], self.config.lm_hash)
        _check_encoder(folder, before, self.config.encoder)
        own = self.trained_state()
        try:
            saved = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: the trained weights cannot be read: {error}") from error
        if missing := sorted(own.keys() - saved.keys()) + sorted(saved.keys() - own.keys()):
            raise ConfigError(
                f"{file}: {len(missing)} weights do not match this model's, the first is "
                f"{missing[0]}"
            )
        for name, value in saved.items():
            if own[name].shape != value.shape:
                raise ConfigError(
                    f"{file}: {name} has shape {tuple(value.shape)}, this model's "
                    f"{tuple(own[name].shape)}"
                )
            own[name].copy_(value)

    def save_pretrained(  # type: ignore[override]  # transformers' options shard what we never do
        self, save_directory: str | Path, state: Mapping[str, torch.Tensor] | None = None, **_: Any
    ) -> None:
        """Writes config.json and the trained weights; `state` when an engine has gathered them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.trained_state() if state is None else state
        save_file(
            {k: v.cpu().contiguous() for k, v in state.items()},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # transformers allows no folder at all
        cls,
        pretrained_model_name_or_path: str | Path,
        *positional: Any,
        lm: str | Path | None = None,
        vision: str | Path | None = None,
        with_vision: bool = True,
        precision: Precision | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> VisionLanguageModel:
        """Returns the model saved in a folder or on the hub, in eval mode, with the same outputs
        bit for bit on the same device.

        `lm` and `vision` name the folders of the base and the encoder; without them these are
        looked for as places.py says. Their hashes must be the saved ones. `options`: `dtype`,
        `device_map` and where the hub is asked, as arguments.py says. Raises ConfigError.
        """
        arguments.check_known(positional, options)
        folder = arguments.model_folder(pretrained_model_name_or_path, options)
        on = arguments.device_of(device, options.get("device_map"))
        precision = arguments.precision_of(precision, options, on)
        own = _saved_config(folder, options.get("config"))
        _check_objective(folder, own.objective, own.objective if cls.is_first_stage else [])
        # Not transformers' own loading: under its meta-device context the frozen parts could not be
        # loaded inside.
        with torch.device("cpu"):
            own.model["lm"]["id"] = cls._find_base(own, folder, lm).place
            tower = None
            if with_vision:
                encoder = _find_encoder(own, folder, vision)
                saved = settings.ModelConfig(**own.model).vision
                own.model["vision"] = with_weights_at(saved, encoder.place).model_dump()
                tower = encoder.loaded
            parts = settings.ModelConfig(**own.model)
            model = cls._assemble(own, parts, tower, precision, on)
        model.load_trained(folder)
        return model.eval()


def new_bridge(bridge: settings.BridgeConfig, own: VLMConfig, lm: LanguageModel) -> Bridge:
    """Returns a bridge between a model's encoder and its language model, with new weights."""
    return Bridge(
        bridge,
        patch_width=own.encoder["width"],
        lm_width=lm.width,
        patches=own.encoder["tokens"],
        embedding_rms=lm.embedding_rms,
        vocabulary=lm.base.config.vocab_size,
    )


def _check_objective(folder: Path, saved: Sequence[str], own: Sequence[str]) -> None:
    if saved and not own:
        raise ConfigError(
            f"{folder} is a first stage (train.objective {', '.join(saved)}), without a language "
            "model that could answer: `harness evaluate` scores it by retrieval, and a run with "
            "model.bridge.init_from set to it goes on with a language model"
        )
    if saved != own:
        raise ConfigError(
            f"{folder}: its train.objective is {', '.join(saved) or 'null'}, this run's "
            f"{', '.join(own)}"
        )


def _saved_config(folder: Path, given: VLMConfig | None = None) -> VLMConfig:
    """Returns what a folder's config.json says, or the one that an auto class made of it, keys of
    an older version at their new places.
    """
    try:
        saved = given or VLMConfig.from_pretrained(folder, local_files_only=True)
        older = at_their_new_place({"model": saved.model})
        saved.model = older["model"]
        saved.known_mistakes |= older.get("known_mistakes", {})
        settings.ModelConfig(**saved.model)
        if not (saved.lm_hash and saved.encoder.get("hash")):
            raise ValueError("it names no frozen parts")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{folder} is no saved model: its config.json cannot be used: {reason}"
        ) from error
    return saved


def _find_encoder(saved: VLMConfig, folder: Path, given: str | Path | None) -> Found:
    config = settings.ModelConfig(**saved.model).vision

    def look(place: str) -> Found:
        tower = load_vision(with_weights_at(config, place))
        return Found(place, tower.identity()["hash"], tower)

    package = PACKAGES.get(config.kind)
    if package and not config.weights:
        if given is not None:
            raise ConfigError(f"--vision {given}: {config.kind} comes with the package {package}")
        found = look(config.id)
        _check_encoder(folder, saved, found.loaded.identity())
        return found
    part = Part("vision encoder", "vision", place_of_weights(config), saved.encoder["hash"])
    return find(part, folder, given, look)


def _check_base(folder: Path, saved: VLMConfig, name: str, found: str) -> None:
    if found != saved.lm_hash:
        raise ConfigError(
            f"{folder}: the base language model {name!r} has hash {found[:12]}, the saved parts "
            f"were trained on one with hash {saved.lm_hash[:12]}: use that one"
        )


def _check_encoder(folder: Path, saved: VLMConfig, found: Fields) -> None:
    if found["hash"] != saved.encoder["hash"]:
        raise ConfigError(
            f"{folder}: the vision encoder {found['id']!r} has hash {found['hash'][:12]}, the "
            f"saved parts were trained on {saved.encoder['id']!r} with hash "
            f"{saved.encoder['hash'][:12]}: use that one"
        )


AutoConfig.register(VLMConfig.model_type, VLMConfig)
AutoModel.register(VLMConfig, VisionLanguageModel)
