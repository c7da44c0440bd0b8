"""The three parts put together: what is trained, what is saved, and that a saved model is the same
model.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, T5Config, T5ForConditionalGeneration

import toy_batch
from harness import checkpoint
from harness.config.schema import Config, DecodingConfig
from harness.errors import ConfigError
from harness.model.vlm import VisionLanguageModel, VLMConfig
from harness.train.guards import GradientGuard, frozen_hash
from harness.train.prepare import build_model
from toy_batch import moved, outputs, pixel_batch, same

TUNINGS = ("qlora", "lora", "frozen", "full")


def with_pixels(t5: Path, clip: Path, tuning: str = "qlora", **model) -> Config:
    vision = {"id": str(clip), "image_size": 32}
    bridge = {"query_tokens": 3, "layers": 1, "width": 32, "heads": 4}
    lm = {"id": str(t5), "tuning": tuning, "lora": {"r": 4}}
    return Config(name="saved", model={"vision": vision, "bridge": bridge, "lm": lm} | model)


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qformer", "mean_pool", "linear"])
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("trainable", [True, False])
def test_what_is_trainable_gets_a_gradient_and_is_what_the_config_says(
    tiny_t5_folder, tuning, kind, trainable
):
    bridge = {"kind": kind, "trainable": trainable}
    model = VisionLanguageModel.build(
        toy_batch.config(tiny_t5_folder, bridge=bridge, tuning=tuning), toy_batch.ENCODER
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    bridge_names = {name for name in everything if name.startswith("bridge.")}
    lm_names = everything - bridge_names
    expected = {"frozen": set(), "full": lm_names}.get(
        tuning, {name for name in lm_names if ".lora_" in name}
    )
    assert bool(expected) == (tuning != "frozen")
    assert trained == expected | (bridge_names if trainable else set())
    if not trained:
        return
    guard, before = GradientGuard(model), frozen_hash(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
    _, gradients = toy_batch.gradients(model.train(), batch)
    optimizer.step()
    guard.check()
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert frozen_hash(model) == before


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_vision_tower_is_in_no_tuning_trainable_and_never_leaves_eval_mode(
    tiny_t5_folder, tiny_clip_folder, tuning
):
    model = VisionLanguageModel.build(with_pixels(tiny_t5_folder, tiny_clip_folder, tuning)).train()
    before = frozen_hash(model.vision)
    assert model.lm.training
    assert not any(module.training for module in model.vision.modules())
    assert not any(p.requires_grad for p in model.vision.parameters())
    loss, gradients = toy_batch.gradients(model, pixel_batch(model))
    assert np.isfinite(loss)
    assert not any(name.startswith("vision.") for name in gradients)
    assert frozen_hash(model.vision) == before


def test_the_table_of_parts_counts_every_parameter_once(tiny_t5_folder, tiny_clip_folder):
    model = VisionLanguageModel.build(with_pixels(tiny_t5_folder, tiny_clip_folder))
    counted = [id(p) for part in model.parts.values() for p in part.parameters()]
    assert sorted(counted) == sorted(id(p) for p in model.parameters())


def test_image_tokens_have_the_scale_of_the_embeddings_and_both_are_told(tiny_t5_folder):
    model = toy_batch.model(tiny_t5_folder)
    batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
    model.bridge.calibrate(model.patch_tokens(batch))
    scales = model.scales(batch)
    embeddings = load_file(tiny_t5_folder / "model.safetensors")["shared.weight"]
    assert scales["embedding_rms"] == pytest.approx(
        embeddings.pow(2).mean().sqrt().item(), rel=1e-5
    )
    assert scales["image_token_rms"] == pytest.approx(scales["embedding_rms"], rel=1e-3)


def test_new_parts_are_drawn_from_the_seed_alone(tiny_t5_folder):
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 3)
        config = toy_batch.config(tiny_t5_folder).model_copy(update={"seed": seed})
        return VisionLanguageModel.build(config, toy_batch.ENCODER).trained_state()

    one, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(
        one["bridge.projection.linear.weight"], other["bridge.projection.linear.weight"]
    )


def test_an_autocast_around_the_model_does_not_reach_the_language_model(tiny_t5_folder):
    """As on a T4, where fp16 makes infinities of what T5's `wo` gives; bf16 stands in for it on the
    CPU.
    """
    model = VisionLanguageModel.build(toy_batch.config(tiny_t5_folder), toy_batch.ENCODER).eval()
    batch, seen = toy_batch.collator(model.tokenizer)(toy_batch.samples()), set()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    for run in (model.loss, lambda b: model.generate(b, DecodingConfig(max_new_tokens=2))):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(batch)
        assert seen == {torch.float32}


def test_pixels_without_a_vision_tower_are_refused_in_words(tiny_t5_folder):
    model = toy_batch.model(tiny_t5_folder)
    with pytest.raises(ValueError, match="without its vision tower"):
        model.loss(pixel_batch(model))


# ---- what is saved -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tiny_t5_folder, tiny_clip_folder, tmp_path_factory):
    """A 4-bit model after something like training, and the folder it was saved in."""
    model = moved(VisionLanguageModel.build(with_pixels(tiny_t5_folder, tiny_clip_folder)))
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return model, folder


def test_a_fully_tuned_t5_of_version_1_whose_matrices_are_tied_comes_back_tied(
    tiny_t5_folder, tmp_path
):
    shutil.copytree(tiny_t5_folder, tmp_path / "t5")
    fields = json.loads((tmp_path / "t5" / "config.json").read_text()) | {
        "tie_word_embeddings": True
    }
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**fields)).save_pretrained(tmp_path / "t5")
    model = moved(toy_batch.model(tmp_path / "t5", tuning="full"))
    model.save_pretrained(tmp_path / "saved")
    again = VisionLanguageModel.from_pretrained(tmp_path / "saved", with_vision=False)
    assert again.lm.t5.lm_head.weight is again.lm.t5.shared.weight
    batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
    assert same(outputs(again, batch), outputs(model, batch))


def test_a_bridge_frozen_at_random_is_saved_since_nothing_else_could_restore_it(
    tiny_t5_folder, tmp_path
):
    model = moved(toy_batch.model(tiny_t5_folder, bridge={"trainable": False}))
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    again = VisionLanguageModel.from_pretrained(tmp_path, with_vision=False)
    batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
    assert same(outputs(again, batch), outputs(model, batch))


def test_the_folder_holds_what_was_trained_and_the_names_of_the_rest(saved):
    model, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert (
        trained
        < (folder / "model.safetensors").stat().st_size
        < trained + 200 * len(weights) + 1000
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["VisionLanguageModel"]
    assert len(config["lm_hash"]) == len(config["encoder"]["hash"]) == 64
    assert config["model"]["lm"]["id"].endswith("tiny-t5")
    assert config["prompts"]["vqa"] == "question"
    assert config["generate"]["vqa"]["max_new_tokens"] == 10


def test_auto_classes_find_it(saved):
    model, folder = saved
    assert isinstance(AutoConfig.from_pretrained(folder), VLMConfig)
    again = AutoModel.from_pretrained(folder)
    assert isinstance(again, VisionLanguageModel)
    assert same(outputs(again, pixel_batch(model)), outputs(model, pixel_batch(model)))


def test_it_loads_under_the_meta_device_and_where_transformers_initialises_nothing(saved):
    from transformers import initialization

    model, folder = saved
    expected = outputs(model, pixel_batch(model))
    with torch.device("meta"):
        under_meta = VisionLanguageModel.from_pretrained(folder)
    with initialization.no_init_weights():
        without_init = AutoModel.from_pretrained(folder)
    assert {p.device.type for p in under_meta.parameters()} == {"cpu"}
    assert same(outputs(under_meta, pixel_batch(model)), expected)
    assert same(outputs(without_init, pixel_batch(model)), expected)


def test_a_base_that_was_moved_is_found_by_lm_and_the_new_place_is_saved(tiny_t5_folder, tmp_path):
    base = shutil.copytree(tiny_t5_folder, tmp_path / "base")
    model = moved(toy_batch.model(base))
    model.save_pretrained(tmp_path / "saved")
    elsewhere = base.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="lm=PATH"):
        VisionLanguageModel.from_pretrained(tmp_path / "saved", with_vision=False)
    again = VisionLanguageModel.from_pretrained(tmp_path / "saved", lm=elsewhere, with_vision=False)
    batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
    assert same(outputs(again, batch), outputs(model, batch))
    again.save_pretrained(tmp_path / "again")
    VisionLanguageModel.from_pretrained(tmp_path / "again", with_vision=False)


def other_base(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    weights["shared.weight"] += 0.01
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_another_base_or_encoder_is_refused_naming_both_hashes(saved, tiny_t5_folder, tmp_path):
    model, folder = saved
    with pytest.raises(
        ConfigError, match=rf"hash {model.config.lm_hash[:12]}.*hash [0-9a-f]{{12}}.*lm=PATH"
    ):
        VisionLanguageModel.from_pretrained(
            folder, lm=other_base(tiny_t5_folder, tmp_path / "other")
        )
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["encoder"]["hash"] = "f" * 64
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=rf"encoder .*ffffffffffff.*{model.config.encoder['hash'][:12]}"
    ):
        VisionLanguageModel.from_pretrained(copy)


def rewrite(change):
    def damage(file: Path) -> None:
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("config.json", Path.unlink, "is no saved model"),
        ("config.json", lambda f: f.write_text("{"), "is no saved model"),
        (
            "config.json",
            lambda f: f.write_text('{"model_type": "harness_vlm"}'),
            "names no frozen parts",
        ),
        (
            "model.safetensors",
            Path.unlink,
            r"model\.safetensors: the trained weights cannot be read",
        ),
        (
            "model.safetensors",
            lambda f: f.write_bytes(f.read_bytes()[:-9]),
            r"model\.safetensors: .* cannot be read",
        ),
        (
            "model.safetensors",
            lambda f: f.write_bytes(b"x" * 50),
            r"model\.safetensors: .* cannot be read",
        ),
        (
            "model.safetensors",
            rewrite(lambda w: w.pop("bridge.projection.linear.bias")),
            r"1 weights .*projection\.linear\.bias",
        ),
        (
            "model.safetensors",
            rewrite(lambda w: w.update({"bridge.projection.linear.bias": torch.zeros(3)})),
            r"projection\.linear\.bias has shape \(3,\)",
        ),
    ],
)
def test_a_missing_or_damaged_file_is_one_sentence(saved, tmp_path, name, damage, expected):
    copy = shutil.copytree(saved[1], tmp_path / "copy")
    damage(copy / name)
    with pytest.raises(ConfigError, match=expected) as error:
        VisionLanguageModel.from_pretrained(copy, with_vision=False)
    assert str(copy) in str(error.value)


def test_another_kind_of_model_is_no_saved_model(tiny_t5_folder):
    with pytest.raises(ConfigError, match="is no saved model"):
        VisionLanguageModel.from_pretrained(tiny_t5_folder)


# ---- going on from an earlier model --------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "checkpoints/step-000003", "checkpoints/step-000003/model"])
def test_an_earlier_models_weights_are_the_start_whatever_the_data_prompts_and_seed(
    tiny_t5_folder, tmp_path, place
):
    earlier = moved(toy_batch.model(tiny_t5_folder))
    checkpoint.write(tmp_path, 3, earlier.save_pretrained, {"step/a": torch.zeros(1)}, {"step": 3})
    config = toy_batch.config(tiny_t5_folder, train={"learning_rate": 1e-3})
    start = {"init_from": str(tmp_path / place)}
    config = config.model_copy(update={"seed": 7, "model": config.model.model_copy(update=start)})
    model = build_model(config, toy_batch.ENCODER)
    assert all(
        torch.equal(w, earlier.trained_state()[name]) for name, w in model.trained_state().items()
    )
    assert all(p.requires_grad for n, p in model.named_parameters() if n.startswith("bridge."))


def test_weights_trained_on_another_base_or_for_other_parts_are_no_start(tiny_t5_folder, tmp_path):
    toy_batch.model(tiny_t5_folder).save_pretrained(tmp_path / "saved")
    start = {"init_from": str(tmp_path / "saved")}

    def build(t5: Path, **settings):
        config = toy_batch.config(t5, **settings)
        return build_model(
            config.model_copy(update={"model": config.model.model_copy(update=start)}),
            toy_batch.ENCODER,
        )

    build(tiny_t5_folder)
    with pytest.raises(ConfigError, match=r"base language model .* has hash"):
        build(other_base(tiny_t5_folder, tmp_path / "other"))
    with pytest.raises(ConfigError, match="weights do not match this model's"):
        build(tiny_t5_folder, tuning="frozen")
    with pytest.raises(ConfigError, match="has shape"):
        build(tiny_t5_folder, bridge={"query_tokens": 5})
    start["init_from"] = str(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no whole checkpoint"):
        build(tiny_t5_folder)
