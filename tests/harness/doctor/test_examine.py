"""Each check of a config, its data and its model, once where its trouble is really there and once
where it is not.
"""

import json
import os
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pytest
from test_doctor_machine import A100, T4

from harness.config.schema import Config
from harness.data.encode import encode_set
from harness.doctor import examine
from harness.doctor.findings import Finding, run
from harness.machine.launch_file import Launch, read_launch
from shards.manifest import Manifest
from shards.record import Record, Text
from shards.write import write_shards
from toy_runs import make_config, picture

ZERO2 = read_launch("zero2")


@pytest.fixture
def base(tmp_path, tiny_clip_folder, tiny_t5_folder) -> Config:
    return make_config(tmp_path, tiny_clip_folder, tiny_t5_folder)


def changed(config: Config, **keys: object) -> Config:
    """`train__micro_batch=2` reaches into sections."""
    document = config.model_dump()
    for name, value in keys.items():
        *above, last = name.split("__")
        at = document
        for part in above:
            at = at[part]
        at[last] = value
    return Config(**document)


def states(findings) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def damage(folder, sample: int) -> None:
    manifest = Manifest.open(folder)
    file = folder / manifest.shards[0].name
    data = bytearray(file.read_bytes())
    row = manifest.sidecar[sample]
    middle = int(row["offset"]) + int(row["size"]) // 2
    data[middle : middle + 64] = b"\xff" * 64
    file.write_bytes(data)


def a_set(folder, *records) -> list[dict[str, str]]:
    """Shards of given texts, on one picture each."""
    samples = [
        (Record(f"{i:03d}", "toy", "train", str(i), tuple(texts)), picture(i), "png")
        for i, texts in enumerate(records)
    ]
    write_shards(samples, folder, dataset="toy", split="train")
    return [{"path": str(folder)}]


def question(asked: str, answer: str, name: str = "q") -> Text:
    return Text(name, "vqa", (answer,), asked)


def test_a_sound_set_decodes_and_a_damaged_one_is_named(base):
    path = base.data.train[0].path
    (sound,) = run(
        "data.train.0.path", lambda: examine.first_sample("data.train.0.path", path, base)
    )
    assert sound == Finding(
        "data.train.0.path",
        "OK",
        "14 images, 35 texts; the first and the last decode to 32 x 32 x 3",
    )
    damage(Path(path), 0)
    (damaged,) = run(
        "data.train.0.path", lambda: examine.first_sample("data.train.0.path", path, base)
    )
    assert damaged.state == "error"
    assert path in damaged.found


def test_features_of_another_shape_than_their_index_says_are_an_error(base, tmp_path):
    made = encode_set(base.data.train[0].path, tmp_path / "features", base.model.vision)
    assert examine.first_sample("data.train.0.path", made.folder, base).state == "OK"
    document = json.loads((tmp_path / "features" / "index.json").read_text())
    document["encoder"]["tokens"] = 5
    changed_index = replace(made, encoder=document["encoder"])
    (tmp_path / "features" / "index.json").write_text(json.dumps(changed_index.document()))
    assert examine.first_sample("data.train.0.path", made.folder, base).state == "error"


def test_scoring_what_was_trained_on_is_warned_of(base):
    assert states(examine.sets_apart(base)) == {}
    same = changed(base, data__test=[{"path": base.data.train[0].path}], data__dev=[])
    assert states(examine.sets_apart(same)) == {"data.dev": "warning", "data.test": "warning"}


def test_bf16_on_a_t4_is_an_error_and_auto_is_not(base, monkeypatch):
    asked = changed(base, train__precision="bf16")
    (found,) = run("train.precision", lambda: examine.precision(asked, [T4]))
    assert (found.state, "has no native bf16" in found.found) == ("error", True)
    assert states(examine.precision(asked, [A100])) == {"train.precision": "OK"}
    monkeypatch.setattr(examine, "multiplies_bf16", lambda: False)
    assert states(examine.precision(asked, [])) == {"train.precision": "warning"}
    monkeypatch.setattr(examine, "multiplies_bf16", lambda: True)
    assert not list(examine.precision(asked, []))
    (auto,) = examine.precision(changed(base, train__precision="auto"), [T4, T4])
    assert "fp16 autocast" in auto.found


def test_options_that_cannot_work_together(base, tmp_path, monkeypatch):
    assert list(examine.options(base, Launch())) == []
    monkeypatch.setitem(sys.modules, "deepspeed", object())
    assert list(examine.options(base, ZERO2)) == []
    (fp16,) = examine.options(changed(base, train__precision="fp16"), ZERO2)
    assert (fp16.state, "multi_gpu" in fp16.fix) == ("error", True)
    assert list(examine.options(changed(base, train__precision="auto"), ZERO2, [T4])) == [fp16]
    assert list(examine.options(changed(base, train__precision="auto"), ZERO2, [A100])) == []
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    (absent,) = run("options", lambda: examine.options(base, ZERO2))
    assert absent.found == "deepspeed is not installed: pip install -e '.[deepspeed]'"

    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "config.json").write_text(
        '{"quantization_config": {"quant_method": "gptq"}}'
    )
    quantised = changed(base, model__lm__id=str(tmp_path / "quantised"), model__lm__tuning="full")
    (found,) = examine.options(quantised, Launch())
    assert (found.name, found.state, "gptq" in found.found) == ("model.lm.id", "error", True)
    assert states(examine.options(changed(base, train__eos_loss_weight=0), Launch())) == {
        "train.eos_loss_weight": "warning"
    }
    frozen = changed(base, model__lm__tuning="frozen", model__bridge__trainable=False)
    assert states(examine.options(frozen, Launch())) == {"model": "error"}


def test_a_run_on_features_without_its_encoder_cannot_be_asked_about_new_pictures(base, tmp_path):
    made = encode_set(base.data.train[0].path, tmp_path / "features", base.model.vision)
    on_features = changed(base, data__train=[{"path": made.folder}])
    assert list(examine.encoder_for_later(on_features)) == []
    gone = changed(on_features, model__vision__id="./gone")
    (found,) = examine.encoder_for_later(gone)
    assert (found.state, "harness ask" in found.fix) == ("warning", True)


@pytest.mark.parametrize(
    ("keys", "processes", "name", "state"),
    [
        ({}, 1, "global batch", "OK"),
        ({}, 2, "global batch", "OK"),
        ({}, 3, "global batch", "warning"),
        ({}, 8, "global batch", "warning"),
        ({}, 1, "steps", "warning"),
        ({"train__epochs": 20}, 1, "steps", "OK"),
        ({}, 1, "learning rate", "OK"),
        ({"train__learning_rate": 1.0}, 1, "learning rate", "warning"),
        (
            {"train__learning_rate": 3e-3, "model__lm__tuning": "full"},
            1,
            "learning rate",
            "warning",
        ),
        ({"train__learning_rate": 1e-8}, 1, "learning rate", "warning"),
        ({"data__lanes": 4}, 3, "lanes", "warning"),
    ],
)
def test_batch_steps_and_learning_rate_against_the_processes(base, keys, processes, name, state):
    found = {finding.name: finding for finding in examine.world(changed(base, **keys), processes)}
    assert found[name].state == state
    assert bool(found[name].fix) == (state != "OK")


def test_a_cache_too_small_for_its_windows_is_an_error(base):
    fsspec.filesystem("memory").put(base.data.train[0].path, "/doctor", recursive=True)
    remote = changed(base, data__train=[{"path": "memory://doctor"}])
    found = run("global batch", lambda: examine.world(remote, 1))
    assert found[-1].state == "error"
    assert "give cache_dir and a larger cache, or smaller windows" in found[-1].found


def test_a_store_that_does_not_answer_is_warned_of_and_one_that_does_is_not(
    base, tmp_path, monkeypatch
):
    # mlflow itself leaves the store of an earlier test there
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "set, so that the test's end takes it back")
        monkeypatch.delenv(name)
    assert examine.tracking(base).state == "OK"

    def tracked(uri: str | None) -> Finding:
        return examine.tracking(changed(base, tracking={"kind": "mlflow", "uri": uri}))

    assert "which the run will make" in tracked(None).found
    (tmp_path / "broken.db").write_text("this is no database, nor was it ever one")
    assert tracked(f"sqlite:///{tmp_path}/broken.db").state == "warning"
    dead = tracked("http://user:secret@127.0.0.1:9")
    assert (dead.state, "secret" in dead.found) == ("warning", False)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"  # else it takes 246 s

    class Store(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert tracked(f"http://127.0.0.1:{server.server_port}").state == "OK"
    server.shutdown()
    server.server_close()


def test_sound_texts_are_whole_and_have_labels(base):
    assert states(examine.texts(base)) == {"prompts": "OK", "targets": "OK", "labels": "OK"}


def test_a_template_that_cuts_the_question_is_an_error_and_one_long_question_a_warning(
    base, tmp_path
):
    long = changed(base, prompts__vqa="look at the picture with great care " * 8 + "{question}")
    prompts, *_ = examine.texts(long)
    assert (prompts.state, "lose a part of the question itself" in prompts.found) == ("error", True)
    after = changed(base, prompts__vqa="{question}" + " look at the picture with great care" * 8)
    prompts, *_ = examine.texts(after)
    assert (prompts.state, "lose a part" in prompts.found) == ("warning", False)
    asked = [[question("is it red?", "yes")] for _ in range(30)] + [
        [question("is it red? " * 40, "yes")]
    ]
    prompts, *_ = examine.texts(changed(base, data__train=a_set(tmp_path / "long", *asked)))
    assert (prompts.state, "1 of 31 lose" in prompts.found) == ("warning", True)


def test_targets_that_are_cut_are_counted_and_targets_without_a_word_are_an_error(base):
    _, targets, labels = examine.texts(changed(base, data__max_target_tokens=3))
    assert (targets.state, labels.state) == ("warning", "OK")
    _, targets, labels = examine.texts(changed(base, data__max_target_tokens=1))
    assert (targets.state, labels.state) == ("warning", "error")
    assert "no word that counts" in labels.found


def test_images_that_cannot_be_used_are_counted(base, tmp_path):
    damage(tmp_path / "train", 1)
    assert states(examine.texts(base))["images"] == "warning"


def test_image_tokens_outside_the_scale_of_the_embeddings_are_warned_of(base, monkeypatch):
    tokens, disk = examine.model(base, "cpu")
    assert (tokens.name, tokens.state) == ("image tokens", "OK")
    assert disk.state == "OK"
    monkeypatch.setattr(
        "harness.doctor.examine.calibrate",
        lambda model, config: model.bridge.projection.gain_D.data.mul_(1e4),
    )
    tokens, _ = examine.model(base, "cpu")
    assert (tokens.state, "reads noise" in tokens.found) == ("warning", True)


def test_the_plans_verdict_is_a_line(base, monkeypatch):
    from harness.errors import ConfigError

    def fits(config, launch, processes, say, force):
        say(f"fits {processes}\n processes")

    def fits_not(*_, **__):
        raise ConfigError("it needs 20 GB and there are 16")

    monkeypatch.setattr("harness.doctor.examine.check", fits)
    assert examine.plan(base, ZERO2, 2) == Finding("plan", "OK", "fits 2 processes")
    monkeypatch.setattr("harness.doctor.examine.check", fits_not)
    assert run("plan", lambda: examine.plan(base, ZERO2, 2)) == [
        Finding("plan", "error", "it needs 20 GB and there are 16")
    ]
