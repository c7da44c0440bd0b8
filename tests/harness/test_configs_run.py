"""Every shipped experiment takes a few steps, with its model ids replaced by tiny random models in
the hub's format.

The code path is that of real ids. What the CPU cannot do is overridden: precision is `auto` (fp32
here), and image_size is the tiny CLIP's.
"""

import json
import math

import pytest

from harness import checkpoint as checkpoints
from harness.config.load import load, shipped
from harness.data.encode import encode_set
from harness.evaluate.run_on_disk import evaluate_run
from harness.train.__main__ import main
from tiny_models import tiny_decoder
from toy_runs import make_shards

TASKS = {
    "flickr8k_t4": {"questions": False},
    "flickr8k_offline": {"questions": False},
    "flickr8k_smollm2": {"questions": False},
    "vqav2_t4": {"captions": False},
    "scale": {},
    "demo": {"captions": False},
    "captions_and_vqa_t4": {},
    "eos_collapse": {"questions": False},
}


def replacements(file, root, clip, t5, gpt2) -> list[str]:
    """Overrides that put tiny models and sets in the place of real ones, a wide bridge included;
    everything else stays the experiment's.
    """
    config = load(file)
    lm = {"t5": t5, "gpt2": gpt2, "decoder": root / "llama"}[config.model.lm.kind]
    if config.model.lm.kind == "decoder":
        tiny_decoder(lm, "llama")
    overrides = [
        f"out={root / 'run'}",
        f"model.lm.id={lm}",
        "train.max_steps=2",
        "train.precision=auto",
    ]
    overrides += [
        "train.global_batch=4",
        "train.micro_batch=3",
        "train.log_every=1",
        "data.workers=0",
    ]
    overrides += [
        "evaluation.counterfactual_texts=4",
        "evaluation.bootstrap=20",
        "evaluation.batch_images=4",
    ]
    overrides += ["tracking.kind=none"]
    if config.model.bridge.init_from:
        overrides += ["model.bridge.init_from=null"]
    if config.model.bridge.width == 768:
        overrides += ["model.bridge.width=96"]
    if config.model.vision.kind == "clip":
        overrides += [f"model.vision.id={clip}", "model.vision.image_size=32"]
    else:
        pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `demo` is not installed")
        overrides += ["model.vision.image_size=64"]
    for part in ("train", "dev", "test"):
        for position, dataset in enumerate(getattr(config.data, part)):
            kinds = TASKS.get(file.stem, {})
            if len(config.data.train) > 1:  # captions from one set and questions from the other
                kinds = {"questions": "vqa" in dataset.path, "captions": "flickr" in dataset.path}
            folder = make_shards(
                root / f"{part}-{position}", 9 if part == "train" else 4, part, **kinds
            )
            if "features" in dataset.path:
                encode_set(folder, root / f"{part}-features", load(file, overrides).model.vision)
                folder = root / f"{part}-features"
            overrides.append(f"data.{part}.{position}.path={folder}")
    return overrides


@pytest.mark.parametrize("file", sorted(shipped("configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_an_experiment_takes_a_few_steps_is_saved_and_scored(
    file, tmp_path, tiny_clip_folder, tiny_t5_folder, tiny_gpt2_folder
):
    overrides = replacements(file, tmp_path, tiny_clip_folder, tiny_t5_folder, tiny_gpt2_folder)
    assert main([str(file), *overrides]) == 0
    rows = [
        json.loads(line)["values"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [float(row["train/loss"]) for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    found = checkpoints.newest(tmp_path / "run")
    assert found.state["train"]["skipped"] == 0
    real, ran = load(file), load(file, overrides)
    changed = {"width": ran.model.bridge.width, "init_from": None}
    narrow = real.model.bridge.model_copy(update=changed)
    assert (ran.model.bridge, ran.model.lm.tuning, ran.prompts) == (
        narrow,
        real.model.lm.tuning,
        real.prompts,
    )
    tasks = {"caption", "vqa"} - {
        {"captions": "caption", "questions": "vqa"}[kind] for kind in TASKS.get(file.stem, {})
    }
    assert set(evaluate_run(tmp_path / "run")["tasks"]) == tasks
