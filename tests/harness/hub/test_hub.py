"""The classes of an export as users of transformers expect them: what they are given is obeyed or
refused in a sentence.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TextStreamer,
)

import harness.hub  # noqa: F401  # registers the classes
from harness.config.schema import Config
from harness.data.images import ImageDecoder
from harness.evaluate.ask import one_picture
from harness.export.parts import write_parts
from harness.model.vlm import VisionLanguageModel
from saved_runs import saved_run
from tiny_models import tiny_decoder
from toy_runs import picture

QUESTIONS = ["what colour is it?", "is it red, or is it a blue dog in the street?", "", "is it?"]
KINDS = {
    "t5": [],
    "t5, question-aware": ["model.bridge.question_aware=true"],
    "gpt2": ["model.lm.kind=gpt2"],
    "gpt2, question-aware, no caption prompt": [
        *("model.lm.kind=gpt2", "model.bridge.question_aware=true", "prompts.caption=none")
    ],
    "qwen2, as a chat": ["model.lm.kind=decoder"],
    "gpt2, cross-attention": ["model.lm.kind=gpt2", "model.lm.cross_attention=true"],
    "t5 in 4 bits": ["model.lm.tuning=qlora"],
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory, tiny_clip_folder, tiny_t5_folder, tiny_gpt2_folder):
    """(the run's model, its config, the exported model, its processor, four pictures)."""
    root = tmp_path_factory.mktemp("hub")
    lm = tiny_gpt2_folder if "gpt2" in request.param else tiny_t5_folder
    if "qwen2" in request.param:
        lm = tiny_decoder(root / "qwen2", "qwen2")
    run = saved_run(root, "run", *KINDS[request.param], clip=tiny_clip_folder, lm=lm)
    state = json.loads(next(run.glob("checkpoints/*/state.json")).read_text())
    config = Config(**state["config"])
    own = VisionLanguageModel.from_pretrained(next(run.glob("checkpoints/*/model")))
    out = root / "out"
    out.mkdir()
    write_parts(own, config, out, merge=False)
    files = []
    for number in range(4):
        files.append(root / f"{number}.png")
        files[-1].write_bytes(picture(number, side=40 + 8 * number))
    model = AutoModelForImageTextToText.from_pretrained(out)
    return own, config, model, AutoProcessor.from_pretrained(out), files


def test_tensors_and_answers_of_a_padded_batch_are_those_of_harness_ask(kind):
    own, config, model, processor, files = kind
    inputs = processor(images=files, text=QUESTIONS)
    said = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    alone = []
    for row, (file, question) in enumerate(zip(files, QUESTIONS, strict=True)):
        batch = one_picture(own, config, file, question or None)
        assert torch.equal(inputs["pixel_values"][row].permute(1, 2, 0), batch.pixels_IHW3[0])
        decoding = config.generate.vqa if question else config.generate.caption
        alone += own.generate(batch, decoding).texts
    assert [text.strip() for text in said] == alone
    assert len(set(alone)) > 2


def test_loss_and_gradients_are_those_of_the_run(kind):
    own, config, model, processor, files = kind
    inputs = dict(processor(images=files[:2], text=QUESTIONS[:2]))
    batch = one_picture(own, config, files[0], QUESTIONS[0])
    labels = batch.labels_TL.repeat(2, 1)
    if not model.config.is_encoder_decoder:
        asked = inputs["input_ids"]
        inputs["input_ids"] = torch.cat([asked, labels], dim=1)
        inputs["attention_mask"] = torch.cat(
            [inputs["attention_mask"], torch.ones_like(labels)], dim=1
        )
        labels = torch.cat([torch.full_like(asked, -100), labels], dim=1)
    out = model(**inputs, labels=labels)
    expected = sum(
        own.loss(one_picture(own, config, file, question)).sum
        for file, question in zip(files[:2], QUESTIONS[:2], strict=True)
    )
    count = (labels != -100).sum()
    assert out.loss.item() == pytest.approx(expected.item() / count.item(), rel=1e-4)
    assert out.logits.shape[:2] == labels.shape
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_it_writes_a_folder_that_answers_the_same_and_has_its_new_weights(kind, tmp_path):
    _, _, model, processor, files = kind
    inputs = processor(images=files[:2], text=QUESTIONS[:2])
    with torch.no_grad():
        model.vlm.bridge.projection.gain_D.mul_(1.5)
        model.save_pretrained(tmp_path / "saved")
        processor.save_pretrained(tmp_path / "saved")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
        answers = [m.generate(**inputs).tolist() for m in (model, loaded)]
        model.vlm.bridge.projection.gain_D.div_(1.5)
    assert answers[0] == answers[1]
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert again(images=files[:2], text=QUESTIONS[:2]).keys() == inputs.keys()


# ---- one kind is enough --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    root = tmp_path_factory.mktemp("hub")
    run = saved_run(
        *(root, "run", "generate.caption.max_new_tokens=6", "generate.vqa.beams=2"),
        clip=tiny_clip_folder,
        lm=tiny_t5_folder,
    )
    state = json.loads(next(run.glob("checkpoints/*/state.json")).read_text())
    own = VisionLanguageModel.from_pretrained(next(run.glob("checkpoints/*/model")))
    (root / "out").mkdir()
    write_parts(own, Config(**state["config"]), root / "out", merge=False)
    return root / "out"


@pytest.fixture(scope="module")
def model(out):
    return AutoModelForImageTextToText.from_pretrained(out)


@pytest.fixture(scope="module")
def processor(out):
    return AutoProcessor.from_pretrained(out)


def test_pictures_in_any_form_are_the_pixels_of_the_training(processor, out, tmp_path):
    drawn = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(drawn).save(file)
    turned = Image.fromarray(drawn[..., :3])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    decode = ImageDecoder(32, "crop", 10_000)
    for path in (file, tmp_path / "turned.jpg"):
        expected = decode(type("Sample", (), {"payload": path.read_bytes(), "extension": "png"}))
        forms = [path, str(path), path.read_bytes(), Image.open(path)]
        if path is not file:
            upright = np.array(Image.open(path).convert("RGB").transpose(Image.ROTATE_270))
            forms += [upright, torch.from_numpy(upright).permute(2, 0, 1)]
        for form in forms:
            found = processor(images=form, text="is it red?")["pixel_values"][0]
            assert np.array_equal(found.permute(1, 2, 0), expected), type(form)


def test_what_is_given_to_generate_decides_and_what_is_not_is_as_the_run_was_evaluated(
    model, processor, capsys
):
    images = [picture(0), picture(1)]
    asked = processor(images=images, text=["is it red?"] * 2)
    told = processor(images=images)
    assert model.generate(**told, min_new_tokens=6).shape[1] == 7  # as generate.caption says
    assert model.generate(**asked, min_new_tokens=3).shape[1] == 4
    assert model.generate(**asked, num_beams=3, num_return_sequences=3, max_new_tokens=2).shape == (
        *(6, 3),
    )
    torch.manual_seed(0)
    drawn = {
        tuple(row)
        for row in model.generate(
            **asked, num_beams=1, do_sample=True, temperature=5.0, num_return_sequences=8
        ).tolist()
    }
    assert len(drawn) > 8
    one = processor(images=images[:1], text="is it red?")
    streamer = TextStreamer(processor.tokenizer, skip_special_tokens=True)
    ids = model.generate(**one, num_beams=1, streamer=streamer)
    assert capsys.readouterr().out.strip() == processor.tokenizer.decode(
        ids[0], skip_special_tokens=True
    )
    both = processor(images=images, text=["", "is it red?"])
    with pytest.raises(ValueError, match="captions and questions in one batch"):
        model.generate(**both)
    assert model.generate(**both, max_new_tokens=2, num_beams=1).shape == (2, 3)
    model.generation_config.max_new_tokens = 1
    assert model.generate(**told, min_new_tokens=1).shape[1] == 2
    model.generation_config.max_new_tokens = 3


def test_a_dtype_and_a_device_are_obeyed(out, processor, caplog):
    inputs = processor(images=[picture(0)], text=["is it red?"])
    model = AutoModelForImageTextToText.from_pretrained(
        out, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.hf_device_map == {"": torch.device("cpu")}
    labels = torch.tensor([[5, 1]])
    whole = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    rough = model(**inputs, labels=labels).loss.item()
    assert rough == pytest.approx(whole(**inputs, labels=labels).loss.item(), rel=0.05)
    assert model.generate(**inputs).shape[0] == 1
    half = AutoModelForImageTextToText.from_pretrained(out, dtype="float16")
    assert {p.dtype for p in half.vlm.bridge.parameters()} == {torch.float16}
    for name, parameter in half.vlm.lm.named_parameters():
        is_frozen_product = ("Attention." in name or ".wi_" in name) and "lora_" not in name
        is_half = is_frozen_product and "relative_" not in name
        assert parameter.dtype == (torch.float16 if is_half else torch.float32), name
    assert "T5 overflows in it" in caplog.text
    assert half(**inputs, labels=labels).loss.item() == pytest.approx(rough, rel=0.05)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"dtype": torch.float64}, "expected float32, bfloat16, float16 or auto"),
        ({"device_map": "balanced"}, "one device"),
        ({"device_map": {"vlm.lm": 0, "vlm.bridge": "cpu"}}, "one device"),
        ({"quantization_config": {"load_in_4bit": True}}, "model.lm.tuning: qlora"),
        ({"attn_implementation": "eager"}, "cannot be obeyed"),
        ({"max_memory": {0: "1GB"}}, "max_memory=.* cannot be obeyed"),
    ],
    ids=str,
)
def test_what_cannot_be_obeyed_is_refused(out, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        AutoModelForImageTextToText.from_pretrained(out, **given)


def test_a_processor_and_a_model_refuse_what_they_cannot_do(model, processor, out):
    with pytest.raises(ValueError, match="2 images and 1 texts: give one text for each image"):
        processor(images=[picture(0), picture(1)], text=["is it red?"])
    with pytest.raises(ValueError, match="expected a PIL image, a path, a URL, or uint8"):
        processor(images=np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="cannot be decoded as an image"):
        processor(images=b"no picture")
    with pytest.raises(ValueError, match="max_length=5: this processor"):
        processor(images=picture(0), max_length=5)
    with pytest.raises(ValueError, match="answers about a picture"):
        processor(text="is it red?")
    chat = [{"role": "user", "content": "is it red?"}]
    with pytest.raises(ValueError, match="1 turns and 0 pictures"):
        processor.apply_chat_template(chat)
    with pytest.raises(ValueError, match="--push-to-hub OWNER/NAME"):
        model.push_to_hub("someone/model")
    with pytest.raises(ValueError, match="not built from its config alone"):
        AutoModelForImageTextToText.from_config(model.config)
    with pytest.raises(ValueError, match=r"expected uint8"):
        model(pixel_values=torch.zeros(1, 3, 32, 32), input_ids=torch.zeros(1, 1).long())
    other = copy.deepcopy(AutoConfig.from_pretrained(out))
    other.model["bridge"]["query_tokens"] = 5
    with pytest.raises(ValueError, match="its model is not that of the folder"):
        AutoModelForImageTextToText.from_pretrained(out, config=other)


def test_the_tokenizer_is_the_base_models(out, tiny_t5_folder):
    own, base = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny_t5_folder)
    assert own.get_vocab() == base.get_vocab()


def test_without_the_package_the_file_in_the_folder_says_what_is_missing(out, tmp_path):
    shutil.copy(out / "vl_harness.py", tmp_path)
    code = (tmp_path / "vl_harness.py").read_text().replace("harness.hub", "no_such_package.hub")
    with pytest.raises(ImportError, match="needs the package vl-harness"):
        exec(compile(code, "vl_harness.py", "exec"), {})
    assert len(code.splitlines()) < 12
