"""Frozen weights stored in bf16: the same bits of results, half the bytes, the same identity."""

import pytest
import torch

from harness.config.schema import Config
from harness.data.encode import Encoder
from harness.export.parts import write_parts
from harness.machine.precision import choose
from harness.model.vision import content_hash
from harness.model.vlm import VisionLanguageModel
from harness.plan.skeleton import Skeleton, weights
from toy_batch import gradients, pixel_batch

CPU = torch.device("cpu")
BF16 = choose("bf16", CPU)
FP32 = choose("fp32", CPU)


def config_of(clip, base, kind="t5", tuning="lora") -> Config:
    return Config(
        name="stored",
        model={
            "vision": {"id": str(clip), "image_size": 32},
            "bridge": {"query_tokens": 3, "layers": 1, "width": 32, "heads": 4},
            "lm": {"kind": kind, "id": str(base), "tuning": tuning, "lora": {"r": 4}},
        },
    )


def frozen_dtypes(model, ends):
    return {
        p.dtype for name, p in model.named_parameters() if name.endswith(ends) and p.numel() > 1
    }


@pytest.fixture
def without_storage(monkeypatch):
    """Builds as before: frozen weights in fp32, cast by autocast each time."""

    def build(config):
        with monkeypatch.context() as patch:
            for room in ("vlm", "vision.tower"):
                patch.setattr(f"harness.model.{room}.store_frozen", lambda *_: None)
            return VisionLanguageModel.build(config, precision=BF16)

    return build


@pytest.mark.parametrize(
    ("kind", "tuning"), [("t5", "lora"), ("t5", "qlora"), ("t5", "frozen"), ("gpt2", "lora")]
)
def test_stored_in_bf16_a_step_has_the_same_bits_and_less_to_hold(
    kind, tuning, tiny_clip_folder, tiny_t5_folder, tiny_gpt2_folder, without_storage
):
    base = tiny_t5_folder if kind == "t5" else tiny_gpt2_folder
    config = config_of(tiny_clip_folder, base, kind, tuning)
    as_before = without_storage(config)
    stored = VisionLanguageModel.build(config, precision=BF16)
    batch = pixel_batch(stored)
    for mode in (True, False):
        expected = gradients(as_before.train(mode), batch)
        found = gradients(stored.train(mode), batch)
        assert found[0] == expected[0]
        assert found[1].keys() == expected[1].keys()
        for name, value in found[1].items():
            assert (value is None) == (expected[1][name] is None)
            assert value is None or value.equal(expected[1][name])
    bytes_before = sum(weights(as_before).values())
    assert sum(weights(stored).values()) < 0.9 * bytes_before
    assert weights(stored)["encoder"] < 0.55 * weights(as_before)["encoder"]
    # where autocast computes in fp32, and where a gradient is to arrive, nothing was rounded
    assert frozen_dtypes(stored, ("layer_norm1.weight", "position_embedding.weight")) == {
        torch.float32
    }
    assert {p.dtype for p in stored.parameters() if p.requires_grad} == {torch.float32}


def test_in_fp32_nothing_is_stored_otherwise(tiny_clip_folder, tiny_t5_folder):
    model = VisionLanguageModel.build(config_of(tiny_clip_folder, tiny_t5_folder), precision=FP32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert content_hash(model.vision) == model.config.encoder["hash"]


def test_the_identity_and_a_saved_model_do_not_depend_on_what_is_stored(
    tiny_clip_folder, tiny_t5_folder, tmp_path
):
    config = config_of(tiny_clip_folder, tiny_t5_folder, tuning="qlora")
    models = {
        policy.name: VisionLanguageModel.build(config, precision=policy) for policy in (BF16, FP32)
    }
    first, second = models.values()
    assert first.config.encoder == second.config.encoder
    assert first.config.lm_hash == second.config.lm_hash
    assert content_hash(first.vision) != content_hash(second.vision)
    for name, policy in (("bf16", FP32), ("fp32", BF16)):
        folder = tmp_path / name
        models[name].save_pretrained(folder)
        other = VisionLanguageModel.from_pretrained(folder, precision=policy)
        assert other.vision.network.encoder.layers[0].mlp.fc1.weight.dtype == (
            policy.vision or torch.float32
        )
        for key, value in other.trained_state().items():
            assert value.dtype == torch.float32
            assert value.equal(models[name].trained_state()[key])
        models["fp32" if name == "bf16" else "bf16"].load_trained(folder)  # a resume elsewhere


@pytest.mark.parametrize("tuning", ["qlora", "lora", "full"])
def test_the_plan_counts_what_is_stored(tiny_clip_folder, tiny_t5_folder, tuning):
    config = config_of(tiny_clip_folder, tiny_t5_folder, tuning=tuning)
    real = VisionLanguageModel.build(config, precision=BF16)
    assert weights(Skeleton(config, BF16).model) == weights(real)


def test_features_are_made_by_an_encoder_stored_so_with_the_same_bits(tiny_clip_folder):
    vision = config_of(tiny_clip_folder, tiny_clip_folder).model.vision
    encode = Encoder(vision, "bf16", CPU)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8).numpy()
    found = encode(pixels)
    assert encode.tower.network.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    whole = Encoder(vision, "fp32", CPU)
    assert whole.identity() | {"precision": ""} == encode.identity() | {"precision": ""}
    whole.policy = BF16
    assert (found == whole(pixels)).all()


def test_a_merged_export_holds_the_bases_own_weights_not_rounded_ones(
    tiny_clip_folder, tiny_t5_folder, tmp_path
):
    config = config_of(tiny_clip_folder, tiny_t5_folder)
    merged = []
    for policy in (BF16, FP32):
        model = VisionLanguageModel.build(config, precision=policy)
        write_parts(model.eval(), config, tmp_path / policy.name, merge=True)
        merged.append((tmp_path / policy.name / "lm" / "model.safetensors").read_bytes())
    assert merged[0] == merged[1]
