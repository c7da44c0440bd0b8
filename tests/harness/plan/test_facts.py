"""The facts that ship with us are those of the published models, and a plan from them needs no
network and no patience.
"""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from harness.config.load import load
from harness.config.schema import Config, LanguageModelConfig
from harness.errors import ConfigError
from harness.machine.devices import DEVICES
from harness.machine.launch_file import Launch
from harness.model.language.t5 import T5Language
from harness.plan import facts
from harness.plan.facts import FOLDER, located
from harness.plan.planner import Planner
from harness.plan.skeleton import Skeleton, _Meter
from harness.plan.workload import Sizes, workload

ROOT = Path(__file__).resolve().parents[3]
NAMES = sorted(str(file.parent.relative_to(FOLDER)) for file in FOLDER.rglob("config.json"))
NAMED = (
    r"google/flan-t5-[a-z]+|openai/clip-vit-[a-z]+-patch[0-9]+(?:-[0-9]+)?|openai-community/\w+"
    r"|google/siglip2?-[a-z0-9]+-patch[0-9]+-[0-9]+|HuggingFaceTB/SmolLM2-\w+-Instruct"
)
# Of the weights on the hub; of a CLIP and a SigLIP those of its vision tower, without CLIP's final
# projection.
PARAMETERS = {
    "google/flan-t5-small": 76_961_152,
    "google/flan-t5-base": 247_577_856,
    "google/flan-t5-large": 783_150_080,
    "google/flan-t5-xl": 2_849_757_184,
    "google/flan-t5-xxl": 11_135_332_352,
    "openai/clip-vit-base-patch16": 85_799_424,
    "openai/clip-vit-base-patch32": 87_456_000,
    "openai/clip-vit-large-patch14": 303_179_776,
    "openai/clip-vit-large-patch14-336": 303_507_456,
    "openai-community/gpt2": 124_439_808,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "facebook/opt-125m": 125_239_296,
    "facebook/dinov2-small": 22_056_576,
    "facebook/dinov2-base": 86_580_480,
    "facebook/dinov2-large": 304_368_640,
    "google/siglip-base-patch16-224": 92_884_224,
    "google/siglip-so400m-patch14-384": 428_225_600,
    "google/siglip2-base-patch16-224": 92_884_224,
    "google/siglip2-base-patch16-256": 92_930_304,
}


def t4(config: Config) -> Skeleton:
    return Skeleton.planned_for(DEVICES["t4"], config, None)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_these_facts_has_as_many_weights_as_the_published_one(name):
    found = AutoConfig.from_pretrained(FOLDER / name)
    with torch.device("meta"):
        if found.model_type in ("clip", "siglip"):
            model = AutoModel.from_config(found.vision_config)
        elif found.model_type == "dinov2":
            model = AutoModel.from_config(found)
        elif found.model_type == "t5":  # ours: transformers would tie its two matrices
            model = T5Language(LanguageModelConfig(id=str(FOLDER / name), tuning="frozen"))
        else:
            model = AutoModelForCausalLM.from_config(found)
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_model_that_configs_and_pages_name_is_known_without_a_network():
    pages = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    named = {name for page in pages for name in re.findall(NAMED, page.read_text())}
    assert {"google/flan-t5-base", "openai/clip-vit-large-patch14"} <= named
    assert named <= set(NAMES)
    for name in NAMES:
        about = json.loads((FOLDER / name / "config.json").read_text())
        assert name in about["facts_source"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", about["facts_date"])


def test_a_plan_without_a_network_asks_once_and_says_whose_facts_it_took(silent_hub):
    skeleton = t4(load(ROOT / "configs/vqav2_t4.yaml"))
    assert len(silent_hub) == 1
    assert skeleton.parameters["vision encoder"] > 290e6
    assert [note.partition(":")[0] for note in skeleton.notes] == [
        "openai/clip-vit-large-patch14",
        "google/flan-t5-base",
    ]
    assert "ship with harness" in skeleton.notes[0]


@pytest.mark.parametrize(
    ("vision", "size", "lm"),
    [
        ("google/siglip-so400m-patch14-384", 384, "HuggingFaceTB/SmolLM2-360M-Instruct"),
        ("facebook/dinov2-small", 224, "Qwen/Qwen3-0.6B"),
    ],
)
def test_a_plan_of_a_newer_encoder_and_decoder_needs_no_network_either(
    silent_hub, vision, size, lm
):
    encoder = f"{{kind: auto, id: {vision}, image_size: {size}}}"
    named = [f"model.vision={encoder}", f"model.lm={{kind: decoder, id: {lm}}}"]
    skeleton = t4(load(ROOT / "configs/vqav2_t4.yaml", named))
    # The encoder's last layers and pooling head are left out, the projection is the bridge's.
    assert 0.8 < skeleton.parameters["vision encoder"] / PARAMETERS[vision] < 1
    assert skeleton.parameters["language model"] >= PARAMETERS[lm]
    assert [note.partition(":")[0] for note in skeleton.notes] == [vision, lm]


def test_an_unknown_model_without_a_network_is_one_sentence_at_once(silent_hub):
    config = load(ROOT / "configs/vqav2_t4.yaml", ["model.lm.id=nobody/flan-t5-gone"])
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"nobody/flan-t5-gone' .*planned .*cannot be reached"):
        t4(config)
    assert time.monotonic() - started < 10
    assert len(silent_hub) == 1


def test_a_mistake_in_a_config_of_known_models_names_the_id_and_no_folder_of_ours():
    overrides = ["model.vision.id=openai/clip-vit-large-patch14-336", "model.vision.image_size=230"]
    config = load(ROOT / "configs/vqav2_t4.yaml", overrides)
    with pytest.raises(ConfigError, match="which openai/clip-vit-large-patch14-336 ca") as raised:
        t4(config)
    assert str(FOLDER) not in str(raised.value)


def test_a_hub_that_says_otherwise_is_believed_and_told_in_one_line(monkeypatch, tmp_path):
    config = load(ROOT / "configs/flickr8k_t4.yaml")
    changes = {"google/flan-t5-base": {"d_ff": 4096, "new": 1}, "openai/clip-vit-base-patch32": {}}

    def on_the_hub(name, file, revision):
        fields = json.loads((FOLDER / name / file).read_text()) | changes[name]
        del fields["facts_source"], fields["facts_date"]
        copy = tmp_path / file
        copy.write_text(json.dumps(fields))
        return copy

    monkeypatch.setattr(facts, "hub_answers", lambda: True)
    monkeypatch.setattr(facts, "needed_file", on_the_hub)
    found = located(config, with_vision=True)
    assert found.config == config
    (note,) = found.notes
    assert note.startswith("google/flan-t5-base: its config.json differs from the facts that ship")
    assert note.endswith(": d_ff 4096 in place of 2048; planned from its own")


def test_a_hub_that_keeps_the_file_back_leaves_the_facts_that_ship(monkeypatch):
    def refused(*_):
        raise OSError("403")

    monkeypatch.setattr(facts, "hub_answers", lambda: True)
    monkeypatch.setattr(facts, "needed_file", refused)
    config = load(ROOT / "configs/flickr8k_t4.yaml")
    found = located(config, with_vision=True)
    assert len(found.notes) == 2
    assert found.config.model.lm.id == str(FOLDER / "google/flan-t5-base")
    named = config.model.lm.model_copy(update={"revision": "0000"})
    model = config.model.model_copy(update={"lm": named})
    asked = located(config.model_copy(update={"model": model}), with_vision=False)
    assert asked.config.model.lm == named, "a revision that is not there is told by the plan"


@pytest.mark.slow
def test_the_short_way_of_frequent_operations_gives_what_torchs_own_gives(monkeypatch):
    config = load(ROOT / "configs/vqav2_t4.yaml")
    sizes = Sizes(2.0, 2.0, 9, 5, 1.0)
    short = t4(config).run(sizes, 2, checkpointing=False, gradients_held=True)
    monkeypatch.setattr(_Meter, "_shaped", lambda *_: None)
    assert t4(config).run(sizes, 2, checkpointing=False, gradients_held=True) == short


@pytest.mark.slow
def test_the_largest_micro_batch_is_found_in_two_passes_where_a_line_leaves_no_doubt():
    config = load(ROOT / "configs/vqav2_t4.yaml")
    planner = Planner(config, DEVICES["t4"], Launch(), 1, workload(config), None)
    found = planner.largest()
    assert len(planner.passes) == 2
    assert planner.fits(found)
    assert not planner.fits(found + 1)
