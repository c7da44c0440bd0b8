"""Vision transformers by AutoModel: the hidden state of the layer asked for, at the model's own
resolution or another one, and one sentence for what cannot be used.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, SiglipVisionModel

from harness.config.schema import Config, VisionConfig
from harness.errors import ConfigError
from harness.machine.precision import choose
from harness.model.vision.load import load_vision
from harness.model.vision.tower import content_hash
from harness.plan.skeleton import Skeleton
from tiny_models import tiny_clip, tiny_t5, tiny_tower

# The picture's side, at the model's own resolution and at a larger one, and tokens before patches.
SIDES = {"siglip": 32, "dinov2": 28, "dinov2_with_registers": 28, "dinov3_vit": 32, "vit": 32}
SIDES["deit"] = 32
LARGER = {kind: {28: 35, 32: 48}[side] for kind, side in SIDES.items()}
BEFORE = {"siglip": 0, "dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 5, "vit": 1}
BEFORE["deit"] = 2
KINDS = list(SIDES)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return {kind: tiny_tower(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def pixels(images: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator)


def config_of(folder, kind: str, **fields) -> VisionConfig:
    return VisionConfig(**{"kind": "auto", "id": str(folder), "image_size": SIDES[kind]} | fields)


def states_of(folder, tower, pixels_IHW3, **given) -> list[torch.Tensor]:
    """Returns transformers' own hidden states, which it takes before each layer and after the last,
    by hooks of ours: what it calls the last one has been through the norm in some versions.
    """
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = getattr(model, "vision_model", model)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    seen = []
    layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, out: seen.append(out))
    normed = (pixels_IHW3.float() * tower.scale - tower.mean_3) / tower.std_3
    with torch.no_grad():
        model(normed.permute(0, 3, 1, 2), **given)
    return [out[0] if isinstance(out, tuple) else out for out in seen]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_hidden_state_of_the_layer_asked_for(towers, kind):
    side = SIDES[kind]
    for layer in (-1, -2, 0):
        tower = load_vision(config_of(towers[kind], kind, layer=layer))
        patch_tokens_IPD = tower(pixels(2, side))
        assert patch_tokens_IPD.shape == (2, 16 + BEFORE[kind], 32)
        assert (tower.tokens, tower.width) == patch_tokens_IPD.shape[1:]
        expected = states_of(towers[kind], tower, pixels(2, side))[layer]
        torch.testing.assert_close(patch_tokens_IPD, expected, atol=1e-5, rtol=1e-5)
        kept = [m for m in tower.modules() if type(m).__name__.endswith("Layer")]
        assert len(kept) == layer % 4


@pytest.mark.parametrize("kind", KINDS)
def test_another_resolution_interpolates_the_position_embeddings(towers, kind):
    side = LARGER[kind]
    tower = load_vision(config_of(towers[kind], kind, layer=-1, image_size=side))
    grid = side // (7 if kind.startswith("dinov2") else 8)
    asked = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    expected = states_of(towers[kind], tower, pixels(2, side), **asked)[-1]
    assert expected.shape[1] == tower.tokens == grid**2 + BEFORE[kind]
    torch.testing.assert_close(tower(pixels(2, side)), expected, atol=1e-5, rtol=1e-5)


def test_clip_interpolates_too_and_is_one_of_the_kinds(tmp_path):
    folder = tiny_clip(tmp_path / "clip")
    tower = load_vision(VisionConfig(id=str(folder), image_size=48))
    as_auto = load_vision(VisionConfig(kind="auto", id=str(folder), image_size=48))
    assert tower.tokens == as_auto.tokens == 37
    assert torch.equal(tower(pixels(2, 48)), as_auto(pixels(2, 48)))
    own = load_vision(VisionConfig(id=str(folder), image_size=32))
    assert own.identity()["hash"] == tower.identity()["hash"]


def test_of_a_model_with_a_text_tower_the_vision_tower_alone_is_kept(tmp_path):
    folder = tiny_tower("siglip", tmp_path / "siglip", full=True)
    tower = load_vision(config_of(folder, "siglip"))
    names = [name for name, _ in tower.named_parameters()]
    assert not [name for name in names if "text" in name or "head" in name or "logit" in name]
    assert not [name for name in names if "post_layernorm" in name or "layers.2" in name]
    alone = SiglipVisionModel.from_pretrained(folder).eval()
    inputs = (pixels(2, 32).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = alone(inputs.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tower(pixels(2, 32)), expected, atol=1e-5, rtol=1e-5)


def test_the_tokens_of_the_mirrored_picture_follow(towers):
    plain = load_vision(config_of(towers["dinov2"], "dinov2"))
    both = load_vision(config_of(towers["dinov2"], "dinov2", flips=True))
    shown = pixels(2, 28)
    expected = torch.cat([plain(shown), plain(shown.flip(2))], dim=1)
    assert torch.equal(both(shown), expected)
    assert both.tokens == 2 * plain.tokens
    assert both.identity()["flips"] is True
    assert "flips" not in plain.identity()
    assert both.identity()["hash"] == plain.identity()["hash"]


def test_a_checkpoint_without_what_pools_its_tokens_is_whole(tmp_path):
    folder = tiny_tower("vit", tmp_path / "vit", full=True)
    weights = load_file(folder / "model.safetensors")
    without = {name: value for name, value in weights.items() if "pooler" not in name}
    assert len(without) < len(weights)
    save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    load_vision(config_of(folder, "vit"))
    without.pop("layernorm.bias")
    save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights of a ViTModel \(layernorm.bias"):
        load_vision(config_of(folder, "vit"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer": 4}, "layer is 4, but .* hidden states -4 to 3"),
        (
            {"image_size": 36},
            "image_size is 36, .* of 8 pixels: .*image_size=32.* 32 or 40",
        ),
        ({"id": "nobody/no-such-siglip"}, "nobody/no-such-siglip"),
        ({"id": "./no/such/folder"}, "'./no/such/folder' cannot be loaded"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(towers, change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_vision(config_of(towers["siglip"], "siglip", **change))
    assert "\n" not in str(caught.value)


def test_a_size_that_is_not_given_is_never_interpolated_to(towers, tiny_clip_folder):
    for kind, folder in {"auto": towers["siglip"], "clip": tiny_clip_folder}.items():
        with pytest.raises(ConfigError, match=r"not given and stands for 224, .* image_size=32"):
            load_vision(VisionConfig(kind=kind, id=str(folder)))


def test_models_of_other_types_are_refused_by_name(tmp_path):
    folder = tiny_t5(tmp_path / "t5")
    with pytest.raises(ConfigError, match=r"type 't5', expected one of .*siglip_vision_model"):
        load_vision(VisionConfig(kind="auto", id=str(folder)))
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(ConfigError, match=r"NaFlex kind.* google/siglip2-base-patch16-224"):
        load_vision(VisionConfig(kind="auto", id=str(folder)))


@pytest.mark.parametrize("kind", ["siglip", "dinov2_with_registers"])
def test_a_plan_without_weights_has_the_same_tokens_and_parameters(towers, kind, tiny_t5_folder):
    config = Config(
        name="planned",
        model={
            "vision": config_of(towers[kind], kind, image_size=LARGER[kind], flips=True),
            "bridge": {"width": 32, "heads": 4},
            "lm": {"id": str(tiny_t5_folder), "tuning": "frozen"},
        },
    )
    skeleton = Skeleton(config, choose("fp32", torch.device("cpu")))
    tower = load_vision(config.model.vision)
    assert skeleton.encoder["tokens"] == tower.tokens
    assert skeleton.encoder["width"] == tower.width
    counted = sum(parameter.numel() for parameter in tower.parameters())
    assert skeleton.parameters["vision encoder"] == counted


def test_the_tower_never_changes_and_takes_no_gradient(towers):
    tower = load_vision(config_of(towers["dinov2"], "dinov2"))
    before = content_hash(tower)
    nn.ModuleList([tower]).train()
    assert not tower(pixels(1, 28)).requires_grad
    assert not any(module.training for module in tower.modules())
    assert content_hash(tower) == before
    again = load_vision(config_of(towers["dinov2"], "dinov2"))
    assert again.identity() == tower.identity()
