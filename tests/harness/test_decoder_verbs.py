"""Every verb on a run of a decoder with a chat template: scored and judged, asked, asked in bulk,
looked into, planned, checked, and taken away; the export answers as the run in a fresh process that
imports transformers alone.
"""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from saved_runs import saved_run
from tiny_models import tiny_decoder
from toy_runs import picture

QUESTION = "what colour is it?"
ALONE = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image, question = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[image], text=[question])
print(processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])
"""


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def run(request, tmp_path_factory, tiny_clip_folder):
    """A run whose weights were drawn; `picture.png` beside it is none of its sets'."""
    root = tmp_path_factory.mktemp("verbs")
    lm = tiny_decoder(root / request.param, request.param)
    (root / "picture.png").write_bytes(picture(100, side=50))
    few = ["evaluation.recall_images=2", "evaluation.look_images=1", "evaluation.space_images=2"]
    return saved_run(root, "run", "model.lm.kind=decoder", *few, clip=tiny_clip_folder, lm=lm)


def test_it_is_scored_with_a_verdict_and_a_page(run, harness):
    code, said, errors = harness("evaluate", run)
    assert code == 0, errors
    scores = json.loads((run / "evaluation" / "scores.json").read_text())
    assert {task: bool(found["verdict"]) for task, found in scores["tasks"].items()} == {
        "caption": True,
        "vqa": True,
    }
    page = (run / "report.html").read_text()
    assert all(
        found["verdict"] in text for found in scores["tasks"].values() for text in (page, said)
    )


def test_it_answers_about_one_picture_as_about_many(run, harness, tmp_path):
    code, said, errors = harness(
        "ask", run, "--image", run.parent / "picture.png", "--prompt", QUESTION
    )
    assert code == 0, errors
    out = tmp_path / "answers.jsonl"
    (tmp_path / "pictures").mkdir()
    os.link(run.parent / "picture.png", tmp_path / "pictures" / "picture.png")
    many = ("--images", tmp_path / "pictures", "--prompt", QUESTION, "--out", out)
    code, _, errors = harness("predict", run, *many)
    assert code == 0, errors
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["answer"].strip() == said.strip()


def test_what_it_looked_at_what_it_needs_and_whether_it_is_sound_is_told(run, harness, tmp_path):
    image = run.parent / "picture.png"
    look = ("look", run, "--image", image, "--prompt", QUESTION, "--out", tmp_path / "look.png")
    code, _, errors = harness(*look)
    assert code == 0, errors
    config = run / "as_it_was.yaml"
    (state,) = run.glob("checkpoints/*/state.json")
    config.write_text(json.dumps(json.loads(state.read_text())["config"]))
    for verb in ("plan", "doctor"):
        code, said, errors = harness(verb, config)
        assert code == 0, said + errors


def test_its_export_answers_as_it_does_in_a_process_of_plain_transformers(run, harness, tmp_path):
    image = run.parent / "picture.png"
    code, said, errors = harness("export", run, tmp_path / "out")
    assert code == 0, said + errors
    code, asked, _ = harness("ask", run, "--image", image, "--prompt", QUESTION)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "out", image, QUESTION],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hub")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == asked.strip()


def test_a_merged_export_of_a_run_without_its_template_has_none(
    harness, tmp_path, tiny_clip_folder
):
    pytest.importorskip("bitsandbytes", reason="4-bit layers need bitsandbytes")
    lm = tiny_decoder(tmp_path / "llama", "llama")
    settings = ("model.lm.kind=decoder", "model.lm.tuning=qlora", "prompts.chat=none")
    run = saved_run(tmp_path, "run", *settings, clip=tiny_clip_folder, lm=lm)
    code, said, errors = harness("export", run, tmp_path / "out", "--merge")
    assert code == 0, said + errors
    for folder in (tmp_path / "out", tmp_path / "out" / "lm"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (tokenizer.chat_template, tokenizer.eos_token) == (None, "</s>"), folder
