"""harness export: a folder that stands alone, answers as its run, and tells nothing of its home."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import T5ForConditionalGeneration

from harness import checkpoint
from harness.config.schema import Config
from harness.evaluate.ask import ask
from harness.evaluate.published import evaluate_published
from harness.evaluate.report import read_scores
from harness.evaluate.run_on_disk import evaluate_run, load_model
from harness.export.contexts import dev_contexts
from toy_runs import picture

# What a user types, in a process that knows nothing of harness but that it is installed.
PIPELINE = """
import json, sys
from transformers import pipeline
out, image, *questions = sys.argv[1:]
pipe = pipeline("image-text-to-text", model=out, trust_remote_code=True, device="cpu")
said = [pipe(images=image, text=q, return_full_text=False)[0]["generated_text"] for q in questions]
both = pipe(images=[image] * len(questions), text=questions, return_full_text=False)
print(json.dumps([said, [answer["generated_text"] for answer in both]]))
"""


def test_a_pipeline_of_plain_transformers_answers_as_harness_ask(exported, run, tmp_path):
    image = tmp_path / "picture.png"
    image.write_bytes(picture(100, side=50))
    moved = shutil.copytree(exported.out, tmp_path / "moved")
    questions = ["what colour is it?", "is it red?"]
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, moved, image, *questions],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hub")},
    )
    assert done.returncode == 0, done.stderr
    expected = [ask(run, image, question) for question in questions]
    assert len(set(expected)) == 2
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, expected]


def test_the_adapter_on_a_plain_base_by_plain_peft_gives_the_runs_logits(
    exported, run, tiny_t5_folder
):
    found = checkpoint.at(run)
    config = Config(**found.state["config"])
    model = load_model(found, config)
    batch = dev_contexts(config, model.tokenizer, 3).batch
    image = model.bridge_tokens(batch)
    base = T5ForConditionalGeneration.from_pretrained(tiny_t5_folder)
    lm = PeftModel.from_pretrained(base, exported.out / "adapter").eval()
    embeds_CSD = torch.cat(
        [image.by_context(torch.float32), base.shared(batch.prompt_ids_CL)], dim=1
    )
    mask_CS = torch.nn.functional.pad(batch.prompt_mask_CL, (4, 0), value=True)
    with torch.no_grad():
        own = model.lm.logits(image, batch)
        plain = lm(inputs_embeds=embeds_CSD, attention_mask=mask_CS, labels=batch.labels_TL).logits
        lm.disable_adapter_layers()
        bare = lm(inputs_embeds=embeds_CSD, attention_mask=mask_CS, labels=batch.labels_TL).logits
    counts_TL = batch.weight_TL != 0  # no other logits are made
    assert torch.allclose(plain[counts_TL], own[counts_TL], atol=1e-4)
    assert not torch.allclose(bare[counts_TL], own[counts_TL], atol=1e-1)


def test_the_proof_says_how_far_the_export_is(exported):
    proof = exported.proof
    assert proof.contexts == 10
    assert proof.source == "toy/dev"
    assert proof.nats <= 1e-5 == proof.limit
    assert proof.adapter_nats <= 1e-5 == proof.adapter_limit
    assert proof.same_answers == 10
    assert not list(exported.out.parent.glob(".out*"))


@pytest.mark.parametrize("name", ["config.json", "lm/config.json", "vision/config.json"])
def test_the_folder_stands_alone(exported, name):
    assert (exported.out / name).is_file()


def test_harness_evaluate_scores_an_export_as_its_run(exported, run, tmp_path):
    short = ["evaluation.bootstrap=20", "evaluation.counterfactual_texts=4"]
    evaluate_run(run, out=tmp_path / "run", overrides=short)
    evaluate_published(
        str(exported.out), [str(run.parent / "test")], tmp_path / "out", overrides=short
    )
    for name in ("toy_test_answers.json", "toy_test_captions.json"):
        found, expected = (
            json.loads((tmp_path / where / name).read_text()) for where in ("out", "run")
        )
        assert found == expected
        assert len(found) == {"toy_test_answers.json": 9, "toy_test_captions.json": 6}[name]
    losses = [read_scores(tmp_path / where / "scores.json")["tasks"] for where in ("out", "run")]
    for task in ("vqa", "caption"):
        assert losses[0][task]["loss_nats"] == pytest.approx(losses[1][task]["loss_nats"], rel=1e-4)
