"""The frozen image encoder: uint8 pixels in, patch tokens out; it never learns and never changes.

Legend: I images, H W pixels, 3 colours, P patch tokens, D width of the encoder, C channels.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from harness.config.encoder import encoder_name
from harness.config.schema import VisionConfig
from harness.model.products import use_products
from harness.model.storage import store_frozen


class VisionTower(nn.Module):
    """A pretrained network that stays as it was loaded: in eval mode whatever is asked, without
    gradients.

    `network` maps normalised float32 pixels_I3HW to patch_tokens_IPD, so many `tokens` of `width`.
    Normalisation is done here, on the device: (pixels x scale - mean) / std. With `flips` the
    tokens of the mirrored picture follow, in the order of that picture.
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
        self.flips = config.flips
        self.tokens = 2 * tokens if self.flips else tokens
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
        normed_I3HW = normed_IHW3.permute(0, 3, 1, 2)
        patch_tokens_IPD = self.network(normed_I3HW)
        if not self.flips:
            return patch_tokens_IPD
        return torch.cat([patch_tokens_IPD, self.network(normed_I3HW.flip(-1))], dim=1)

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
