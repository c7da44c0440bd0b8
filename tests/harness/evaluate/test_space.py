"""Models that read one thing each, on pictures of 4 x 4 tiles: what shuffled tiles, a mirror and
missing patches cost them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from harness.config.schema import Config, DataConfig, PromptsConfig
from harness.data.collate import Collator
from harness.data.encode import encode_set
from harness.data.images import ImageDecoder
from harness.evaluate.collected import Collected
from harness.evaluate.space import (
    Source,
    UnmeasuredError,
    mirrored,
    patches_dropped,
    shuffle_tiles,
    tiles_shuffled,
)
from harness.model.batch import Batch
from harness.model.bridge import BridgeOutput
from harness.model.language.loss import Generated, LossOutput
from harness.model.vlm import VisionLanguageModel
from shards.loader import Loader
from shards.record import Record, Text
from shards.write import write_shards

IMAGES = 40
RED, BLUE = (200, 0, 0), (0, 0, 200)
SIDE_QUESTION = "is the light tile on the left?"
COLOUR_QUESTION = "is it red?"


def drawn(index: int) -> np.ndarray:
    """A red or blue picture of 32 x 32, brighter in one tile of its left or right half."""
    pixels_HW3 = np.full((32, 32, 3), RED if index % 2 else BLUE, np.uint8)
    row = index % 4
    column = 2 * (index // 2 % 2) + index // 4 % 2
    pixels_HW3[8 * row : 8 * row + 8, 8 * column : 8 * column + 8, 1] = 255
    return pixels_HW3


def record(index: int, questions: Sequence[str]) -> Record:
    is_red = bool(index % 2)
    is_left = index // 2 % 2 == 0
    texts = [
        Text(
            f"{index}q{place}",
            "vqa",
            ("yes" if (is_red if question == COLOUR_QUESTION else is_left) else "no",),
            question,
        )
        for place, question in enumerate(questions)
    ]
    caption = Text(f"{index}c", "caption", ("a red picture" if is_red else "a blue picture",))
    return Record(f"{index:04d}", "tiles", "test", str(index), (*texts, caption))


def write_pictures(folder, *questions: str):
    def png(index: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(drawn(index)).save(file, "PNG")
        return file.getvalue()

    rows = ((record(i, questions), png(i), "png") for i in range(IMAGES))
    write_shards(rows, folder, dataset="tiles", split="test")
    return folder


class TileModel(nn.Module):
    """A model whose patches are the mean colours of the tiles, and whose answer is a rule on
    them.
    """

    def __init__(self, tokenizer, rule):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.rule = rule
        self.encoded = 0

    def patch_tokens(self, batch: Batch) -> torch.Tensor:
        if batch.features_IPD is not None:
            return batch.features_IPD
        self.encoded += len(batch.pixels_IHW3)
        tiles = batch.pixels_IHW3.float().reshape(-1, 4, 8, 4, 8, 3).mean(dim=(2, 4))
        return tiles.reshape(-1, 16, 3)

    def bridge_tokens(self, batch: Batch) -> BridgeOutput:
        return BridgeOutput(self.patch_tokens(batch), batch.image_of_C)

    def loss(self, batch: Batch, tokens: BridgeOutput) -> LossOutput:
        zeros_T = torch.zeros(len(batch.labels_TL))
        return LossOutput(zeros_T.sum(), batch.weight, zeros_T, batch.weight_TL.sum(dim=1))

    def generate(self, batch: Batch, decoding, tokens: BridgeOutput) -> Generated:
        said = [
            self.rule(tokens.tokens_NQD[row], context.prompt)
            for row, context in zip(tokens.token_row_of_C.tolist(), batch.contexts, strict=True)
        ]
        return Generated(said, [[0]] * len(said), torch.zeros(len(said)))


def reads_the_side(tiles_PD: torch.Tensor, prompt: str) -> str:
    if len(tiles_PD) < 16:
        return "no"
    green_HW = tiles_PD[:, 1].reshape(4, 4)
    return "yes" if green_HW[:, :2].sum() > green_HW[:, 2:].sum() else "no"


def reads_mean_colour(tiles_PD: torch.Tensor, prompt: str) -> str:
    if not len(tiles_PD):
        return "no"
    return "yes" if tiles_PD[:, 0].mean() > tiles_PD[:, 2].mean() else "no"


def reads_the_light_tile(tiles_PD: torch.Tensor, prompt: str) -> str:
    """Knows the colour from the one light tile alone."""
    light_PD = tiles_PD[tiles_PD[:, 1] > 100] if len(tiles_PD) else tiles_PD
    return "yes" if len(light_PD) and light_PD[0, 0] > 100 else "no"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of the same pictures, by the questions that are asked of them."""
    root = tmp_path_factory.mktemp("tiles")
    return {
        "side": write_pictures(root / "side" / "test", SIDE_QUESTION),
        "colour": write_pictures(root / "colour" / "test", COLOUR_QUESTION),
        "both": write_pictures(root / "both" / "test", SIDE_QUESTION, COLOUR_QUESTION),
    }


@pytest.fixture(scope="module")
def tokenizer(tiny_t5_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_t5_folder)


def gates_of(model, folder, config: Config | None = None):
    """(gate by task, source) of a set that the model answered whole."""
    config = config or Config(name="tiles", evaluation={"bootstrap": 100})
    decode = ImageDecoder(32, "crop", 10_000)
    collate = Collator(model.tokenizer, DataConfig(), PromptsConfig(), training=False)
    loader = Loader([str(folder)], global_batch=16, shuffle=False, decode=decode)
    collected = Collected(model, config, 1000, (), None, loader.manifests, decode)
    with torch.no_grad():
        for _, samples in loader.iterate(epochs=1):
            samples = [sample for sample in samples if sample.weight]
            places = {("tiles", s.known.split, s.known.key): s.index for s in samples}
            collected.note_places(0, places)
            collected.add(collate(samples), True, None)
    for gate in collected.gates.values():
        gate.measure()
    gates = {stratum.task: gate for stratum, gate in collected.gates.items()}
    return gates, Source(collected)


def test_shuffled_tiles_hold_the_same_pixels_and_leave_the_rest_of_a_side_alone():
    pixels_HW3 = np.arange(9 * 10 * 3).reshape(9, 10, 3)
    shuffled_HW3 = shuffle_tiles(pixels_HW3, np.random.default_rng(0))
    assert np.array_equal(shuffled_HW3[8:], pixels_HW3[8:])
    assert np.array_equal(shuffled_HW3[:, 8:], pixels_HW3[:, 8:])
    assert np.array_equal(np.sort(shuffled_HW3.ravel()), pixels_HW3.ravel())
    tiles = shuffled_HW3[:8, :8].reshape(4, 2, 4, 2, 3).swapaxes(1, 2).reshape(16, -1)
    whole = pixels_HW3[:8, :8].reshape(4, 2, 4, 2, 3).swapaxes(1, 2).reshape(16, -1)
    assert sorted(map(tuple, tiles)) == sorted(map(tuple, whole))
    assert (tiles != whole).any(axis=1).sum() > 8


def test_a_model_that_reads_only_where_something_stands_loses_under_shuffled_tiles(
    pictures, tokenizer
):
    gates, source = gates_of(TileModel(tokenizer, reads_the_side), pictures["side"])
    figure = tiles_shuffled(gates["vqa"], source, 100)
    assert figure["true_score"] == 100
    assert 20 < figure["cost_low"] < figure["cost"] < 80
    assert figure["score"] == pytest.approx(100 - figure["cost"])
    assert (figure["images"], figure["texts"]) == (IMAGES, IMAGES)


def test_a_model_that_reads_the_mean_colour_loses_nothing_under_shuffled_tiles_or_in_a_mirror(
    pictures, tokenizer
):
    gates, source = gates_of(TileModel(tokenizer, reads_mean_colour), pictures["colour"])
    figure = tiles_shuffled(gates["vqa"], source, 100)
    assert (figure["true_score"], figure["cost"]) == (100, 0)
    gates, source = gates_of(TileModel(tokenizer, reads_mean_colour), pictures["side"])
    assert mirrored(gates["vqa"], source, 100)["changed"] == 0


def test_a_mirror_turns_the_answers_of_a_model_that_tells_left_from_right(pictures, tokenizer):
    gates, source = gates_of(TileModel(tokenizer, reads_the_side), pictures["both"])
    figure = mirrored(gates["vqa"], source, 100)
    assert (figure["true_score"], figure["score"], figure["cost"]) == (100, 0, 100)
    assert (figure["changed"], figure["texts"]) == (
        100,
        IMAGES,
    )  # questions of colour are not asked
    assert mirrored(gates["caption"], source, 100) is None


def test_without_questions_of_left_and_right_no_mirror_is_measured(tmp_path, tokenizer):
    folder = write_pictures(tmp_path / "test", "is it bright, lefty?")
    gates, source = gates_of(TileModel(tokenizer, reads_the_side), folder)
    with pytest.raises(UnmeasuredError, match="no question holds the word left or right"):
        mirrored(gates["vqa"], source, 100)


def test_the_curve_falls_for_a_model_that_needs_one_patch_and_not_for_one_that_needs_any(
    pictures, tokenizer
):
    def curve(rule) -> list[float]:
        gates, source = gates_of(TileModel(tokenizer, rule), pictures["colour"])
        figure = patches_dropped(gates["vqa"], source, 100)
        assert figure["patches"] == 16
        assert list(figure["scores"]) == ["0", "25", "50", "75", "100"]
        return [score["value"] for score in figure["scores"].values()]

    falling = curve(reads_the_light_tile)
    assert falling == sorted(falling, reverse=True)  # the patches that are left out are nested
    assert falling[0] == 100
    assert falling[3] < 80
    assert falling[4] == 50  # with no image token it says no
    assert curve(reads_mean_colour) == [100, 100, 100, 100, 50]


def test_at_most_so_many_pictures_are_looked_at_and_each_is_encoded_once(pictures, tokenizer):
    model = TileModel(tokenizer, reads_mean_colour)
    gates, source = gates_of(model, pictures["both"])
    for measure, encoded in ((tiles_shuffled, 10), (patches_dropped, 10)):
        model.encoded = 0
        figure = measure(gates["vqa"], source, 10)
        assert (figure["images"], figure["texts"]) == (10, 20)
        assert model.encoded == encoded


def test_captions_are_looked_at_too(pictures, tokenizer):
    model = TileModel(tokenizer, lambda tiles, prompt: "a red picture")
    gates, source = gates_of(model, pictures["both"])
    assert tiles_shuffled(gates["caption"], source, 100)["cost"] == 0


def test_a_model_without_patches_has_no_curve(pictures, tokenizer):
    gates, source = gates_of(TileModel(tokenizer, reads_mean_colour), pictures["colour"])
    gate = gates["vqa"]
    gate.model = SimpleNamespace()
    with pytest.raises(UnmeasuredError, match="the model shows no patches"):
        patches_dropped(gate, source, 100)


# ---- feature sets --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def feature_setting(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    """(features made from pictures, config of a model with a bridge of any kind)."""
    root = tmp_path_factory.mktemp("made")
    folder = write_pictures(root / "pictures" / "test", SIDE_QUESTION, COLOUR_QUESTION)

    def config(**bridge) -> Config:
        return Config(
            name="tiles",
            model={
                "vision": {"kind": "clip", "id": str(tiny_clip_folder), "image_size": 32},
                "bridge": bridge,
                "lm": {"id": str(tiny_t5_folder)},
            },
            generate={"vqa": {"max_new_tokens": 3}, "caption": {"max_new_tokens": 3}},
            evaluation={"bootstrap": 50},
        )

    made = encode_set(folder, root / "features" / "test", config().model.vision)
    return made, config


def test_features_are_made_anew_from_the_pictures_that_they_were_made_from(
    feature_setting, monkeypatch
):
    made, config = feature_setting
    given = config(kind="mean_pool")
    model = VisionLanguageModel.build(given, made.encoder).eval()
    assert model.vision is None
    gates, source = gates_of(model, made.folder, given)
    found = source.pixels([gates["vqa"].predictions[0].picture])
    assert np.array_equal(next(iter(found.values())), drawn(0))
    batch = next(gates["vqa"].batches([0]))[1]
    again = source.shown(batch, [drawn(0)]).features_IPD
    stored = torch.from_numpy(next(iter(source.payloads(found).values()))).float()
    assert torch.allclose(again[0], stored, rtol=1e-2, atol=1e-2)
    assert model.vision is None
    assert tiles_shuffled(gates["vqa"], source, 100)["images"] == IMAGES
    monkeypatch.setattr("harness.evaluate.space.source_of", lambda manifest: None)
    with pytest.raises(UnmeasuredError, match="the pictures that the features were made from"):
        tiles_shuffled(gates["vqa"], source, 100)


@pytest.mark.parametrize(
    "bridge",
    [
        {"kind": "linear"},
        {"kind": "mean_pool"},
        {"query_tokens": 4, "width": 32, "heads": 4, "layers": 1},
        {"query_tokens": 4, "width": 32, "heads": 4, "layers": 1, "question_aware": True},
    ],
    ids=["linear", "mean pool", "Q-Former", "question-aware"],
)
def test_every_bridge_can_do_with_fewer_patches(feature_setting, bridge, monkeypatch):
    made, config = feature_setting
    given = config(**bridge)
    model = VisionLanguageModel.build(given, made.encoder).eval()
    gates, source = gates_of(model, made.folder, given)
    seen = []
    generate = model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda batch, decoding, tokens: (
            seen.append(tokens.tokens_NQD) or generate(batch, decoding, tokens)
        ),
    )
    figure = patches_dropped(gates["vqa"], source, 10)
    assert list(figure["scores"]) == ["0", "25", "50", "75", "100"]
    assert figure["patches"] == 17
    assert all(tokens.isfinite().all() for tokens in seen)
    if bridge.get("kind") == "linear":
        assert [tokens.shape[1] for tokens in seen] == [13, 8, 4]
    assert not torch.equal(seen[0][:, :1], seen[2][:, :1])
