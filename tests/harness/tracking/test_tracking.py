"""Tracking against real stores: SQLite in a temporary folder, a port where nobody answers, and no
mlflow at all.
"""

import json
import logging
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from harness.config.schema import Config
from harness.errors import ConfigError
from harness.report.pictures import Shown
from harness.tracking import mlflow as mlflow_tracker
from harness.tracking import tracker as tracker_module
from harness.tracking.journal import METRICS, JournalTracker
from harness.tracking.provenance import COMMAND, source_tags
from harness.tracking.store import default_store
from harness.tracking.tracker import check_tracking, open_tracker, recorded_run_id, ui_command
from mlflow_server import MlflowServer


@dataclass
class Shard:
    bytes: int


@dataclass
class Manifest:
    """The parts of shards.manifest.Manifest that are logged."""

    dataset = "flickr8k"
    split = "train"
    digest = "0123456789abcdef" * 4
    folder = "/data/flickr8k/train"
    samples, texts = 6000, 30000
    shards = (Shard(10), Shard(32))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name in ("TRACKING_URI", "EXPERIMENT_NAME", "RUN_NAME", "TAGS"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    monkeypatch.delenv(COMMAND, raising=False)
    monkeypatch.setattr(mlflow_tracker, "PERIOD", 0.05)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One database for the module: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def make_config(out, uri=None, **tracking):
    return Config(name="tiny", out=str(out), tracking={"uri": uri, **tracking})


def client_of(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def lines_of(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def history(uri, run_id, key):
    return [
        (m.step, m.value)
        for m in sorted(client_of(uri).get_metric_history(run_id, key), key=lambda m: m.step)
    ]


SHOWN = [
    Shown(
        Image.new("RGB", (64, 48), "teal"), "What colour?", ("teal", "teal", "green"), "teal", True
    ),
    Shown(None, "What shape?", ("box",), "", False, note="no image kept"),
]


def test_a_run_holds_its_config_code_versions_data_figures_files_and_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config(tmp_path / "out")
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"cache_dir": "x" * 7000})}
    )
    tracker = open_tracker(config, facts={"dtype": "fp32: no GPU"}, datasets=[Manifest()])
    assert tracker.run_id == recorded_run_id(config), (
        "the run id is known, and on disk, before the first step"
    )
    for step in (1, 2, 3):
        tracker.metrics({"train/loss": 3 / step, "odd name (%)": 1}, step)
    page = tracker.predictions(SHOWN, 3)
    tracker.checkpoint(tmp_path / "step-3", "abc", 3)
    tracker.artifact(tmp_path / "gone.json")
    tracker.close()

    uri = f"sqlite:///{tmp_path}/out/mlflow.db"
    client = client_of(uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "0.0001"
    assert run.data.params["model.vision.id"] == "openai/clip-vit-base-patch32"
    assert "data.cache_dir" not in run.data.params, "too long for a param, whole in config.yaml"
    tags = run.data.tags
    assert tags["dtype"] == "fp32: no GPU"
    assert tags["version.torch"]
    assert tags["checkpoint.sha256"] == "abc"
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert history(uri, tracker.run_id, "train/loss") == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert history(uri, tracker.run_id, "odd name ___")
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("flickr8k/train", Manifest.digest[:36])
    assert {t.key: t.value for t in given.tags} == {
        "mlflow.data.context": "train",
        "sha256": Manifest.digest,
    }
    files = tmp_path / "out" / "mlartifacts" / tracker.run_id / "artifacts"
    assert "x" * 7000 in (files / "config.yaml").read_text()
    assert (files / "answers" / page.name).read_bytes() == page.read_bytes()
    table = json.loads((files / "answers" / "step-000003.json").read_text())
    row = dict(zip(table["columns"], table["data"][1], strict=True))
    assert (row["prompt"], row["truth"], row["prediction"], row["right"]) == (
        "What shape?",
        "box",
        "(empty)",
        "no",
    )
    assert Image.open(files / row["image"]["filepath"]).width == 192
    assert not (tmp_path / "mlruns").exists(), "nothing is left in the folder the user stands in"


def test_steps_run_again_after_a_kill_appear_once_and_in_the_same_run(tmp_path, store):
    config = make_config(tmp_path, store)
    killed = open_tracker(config)
    for step in range(1, 11):
        killed.metrics({"loss": step, "clock": 100}, step)
    killed.predictions(SHOWN, 10)
    killed.close("FAILED")  # what it had sent is in the store; its last checkpoint is of step 5

    resumed = open_tracker(config, run_id=killed.run_id, resume_step=5)
    for step in range(6, 13):
        resumed.metrics({"loss": step, "clock": 200}, step)
    resumed.predictions(SHOWN, 10)
    resumed.close()

    assert resumed.run_id == killed.run_id
    assert history(store, killed.run_id, "loss") == [(step, step) for step in range(1, 13)]
    assert history(store, killed.run_id, "clock")[-3:] == [(10, 100), (11, 200), (12, 200)]
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, 13))
    assert client_of(store).get_run(killed.run_id).info.status == "FINISHED"
    place = client_of(store).download_artifacts(
        killed.run_id, "answers/step-000010.json", str(tmp_path)
    )
    table = json.loads(Path(place).read_text())["data"]
    assert len(table) == len(SHOWN), "a table that was there is not appended to"


def test_a_resumed_run_sends_what_the_store_missed_while_it_was_away(tmp_path, store):
    alone = open_tracker(make_config(tmp_path, "http://127.0.0.1:9"))
    alone.metrics({"loss": 1.0}, 1)
    alone.metrics({"loss": 2.0}, 2)
    alone.close()
    resumed = open_tracker(make_config(tmp_path, store), run_id=alone.run_id, resume_step=1)
    resumed.metrics({"loss": 2.0}, 2)
    resumed.close()
    assert history(store, resumed.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_changed_param_becomes_a_tag_and_a_lost_run_a_new_one(tmp_path, store, caplog):
    first = open_tracker(make_config(tmp_path, store))
    first.close()
    config = make_config(tmp_path, store).model_copy(update={"seed": 7})
    again = open_tracker(config, run_id=first.run_id, resume_step=3)
    again.close()
    run = client_of(store).get_run(first.run_id)
    assert (run.data.params["seed"], run.data.tags["resumed.seed"]) == ("0", "7")
    client_of(store).delete_run(first.run_id)
    with caplog.at_level(logging.WARNING):
        other = open_tracker(config, run_id=first.run_id, resume_step=3)
        other.close()
    assert other.run_id not in (None, first.run_id)
    assert "no longer in" in caplog.text


def test_an_evaluation_adds_to_a_run_and_leaves_its_status_and_journal_alone(tmp_path, store):
    trained = open_tracker(make_config(tmp_path, store))
    trained.metrics({"loss": 1.0}, 4)
    trained.close("FAILED")
    for value in (0.5, 0.6):  # scored twice, e.g. on more images: both are told
        added = open_tracker(make_config(tmp_path, store), run_id=trained.run_id)
        added.metrics({"test/accuracy": value}, 4)
        added.close()
    assert history(store, trained.run_id, "loss") == [(4, 1.0)]
    assert [value for _, value in sorted(history(store, trained.run_id, "test/accuracy"))] == [
        0.5,
        0.6,
    ]
    assert client_of(store).get_run(trained.run_id).info.status == "FAILED"
    assert len(lines_of(tmp_path)) == 3


def test_nan_is_kept_and_infinity_is_a_gap_with_a_tag(tmp_path, store):
    tracker = open_tracker(make_config(tmp_path, store))
    tracker.metrics({"loss": math.inf, "norm": math.nan}, 1)
    tracker.metrics({"loss": 1.0, "norm": 2.0}, 2)
    tracker.close()
    (_, first), (_, second) = history(store, tracker.run_id, "loss")
    assert math.isnan(first)
    assert second == 1.0
    assert math.isnan(history(store, tracker.run_id, "norm")[0][1])
    assert client_of(store).get_run(tracker.run_id).data.tags["infinite.loss"] == "inf at step 1"
    assert lines_of(tmp_path)[0]["values"] == {"loss": "inf", "norm": "nan"}, (
        "strict JSON that float() reads"
    )


def test_a_server_that_does_not_answer_neither_stops_nor_stalls_the_run(tmp_path, caplog):
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING):
        tracker = open_tracker(make_config(tmp_path, "http://user:secret@127.0.0.1:9"))
        assert tracker.run_id is None
        at = time.monotonic()
        for step in range(1000):
            tracker.metrics({"loss": 1.0, "rate": 2.0}, step)
        tracker.artifact(tmp_path / METRICS)
        assert time.monotonic() - at < 1.0, "a thousand steps of figures on the training thread"
        tracker.close()
    assert time.monotonic() - begun < 20
    assert len(lines_of(tmp_path)) == 1000
    assert caplog.text.count("training goes on") == 1, "said once"
    assert "secret" not in caplog.text


def test_close_gives_up_on_a_call_that_hangs(tmp_path, store, monkeypatch):
    tracker = open_tracker(make_config(tmp_path, store, last_wait=0.5))
    monkeypatch.setattr(tracker._sender, "_send_batch", lambda: time.sleep(3))
    tracker.metrics({"loss": 1.0}, 1)
    begun = time.monotonic()
    tracker.close()
    assert time.monotonic() - begun < 2


def test_retries_are_limited_unless_the_user_says_otherwise(tmp_path, store, monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    open_tracker(make_config(tmp_path, store)).close()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    open_tracker(make_config(tmp_path, store)).close()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "5"


def test_kind_none_runs_where_mlflow_is_not_installed(tmp_path):
    code = f"""
import sys
class NotThere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mlflow":
            raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")
sys.meta_path.insert(0, NotThere())
from pathlib import Path
from harness.config import Config
from harness.report.pictures import Shown
from harness.tracking.tracker import open_tracker
config = Config(name="tiny", out={str(tmp_path)!r}, tracking={{"kind": "none"}})
tracker = open_tracker(config, facts={{"dtype": "fp32"}})
tracker.metrics({{"loss": 1.5}}, 1)
tracker.predictions([Shown(None, "what?", ("a",), "b", False)], 1)
tracker.checkpoint(Path("x"), "abc", 1)
tracker.close()
assert tracker.run_id is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert lines_of(tmp_path)[0]["values"] == {"loss": 1.5}
    assert (tmp_path / "answers" / "step-000001.html").exists()


def test_other_ranks_report_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = JournalTracker()
    tracker.metrics({"loss": 1.0}, 1)
    assert tracker.predictions(SHOWN, 1) is None
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_one_is_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"tracking\.uri is \./mlruns, expected a database or a server"
    ):
        open_tracker(make_config(tmp_path, "./mlruns"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://me:secret@host")
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI is ftp://me:\*\*\*@host"):
        open_tracker(make_config(tmp_path))


def test_the_command_that_shows_a_run_is_typed_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert ui_command(Config(name="a b")).endswith("harness ui 'runs/a b'")


def test_mlflows_own_variables_stand_between_the_config_and_its_defaults(
    tmp_path, store, monkeypatch
):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "tuesday")
    monkeypatch.setenv("MLFLOW_TAGS", '{"team": "vision", "try": 2}')
    told = {}
    for name, given in (("silent", {}), ("given", {"experiment": "harness", "run_name": "mine"})):
        tracker = open_tracker(make_config(tmp_path / name, store, **given))
        tracker.close()
        run = client_of(store).get_run(tracker.run_id)
        experiment = client_of(store).get_experiment(run.info.experiment_id).name
        told[name] = (experiment, run.info.run_name)
        assert (run.data.tags["team"], run.data.tags["try"]) == ("vision", "2")
    assert told == {"silent": ("theirs", "tuesday"), "given": ("harness", "mine")}
    monkeypatch.setenv("MLFLOW_TAGS", "team=vision")
    with pytest.raises(ConfigError, match=r"MLFLOW_TAGS is 'team=vision', expected a JSON object"):
        check_tracking(make_config(tmp_path, store))


def test_a_deleted_experiment_is_refused_before_anything_starts_and_by_a_server_too(
    tmp_path, store, monkeypatch
):
    client = client_of(store)
    place = client.create_experiment("old")
    client.delete_experiment(place)
    refusal = rf"tracking.experiment is 'old', which was deleted in .*--experiment-id {place}`"
    config = make_config(tmp_path, store, experiment="old")
    with pytest.raises(ConfigError, match=refusal):
        check_tracking(config)
    # A store that answers only after the check, or is asked by a rank that leaves that to another.
    monkeypatch.setattr(tracker_module, "check_experiment", lambda config: None)
    with pytest.raises(ConfigError, match=refusal):
        open_tracker(config)
    monkeypatch.undo()
    server = MlflowServer(tmp_path)
    try:
        client_of(server.uri).delete_experiment(client_of(server.uri).create_experiment("gone"))
        config = make_config(tmp_path, server.uri, experiment="gone")
        with pytest.raises(ConfigError, match=r"'gone', which was deleted in http://127\.0\.0\.1"):
            check_tracking(config)
    finally:
        server.close()


def _forget_places():
    """Has mlflow ask its store where a run's files are, as it does in a new process."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()


@pytest.mark.parametrize("folder", ["a b ü?c", "d#e%20f"])
def test_an_output_folder_may_have_any_name_and_be_moved(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / folder
    tracker = open_tracker(make_config(out))
    tracker.predictions(SHOWN, 1)
    tracker.describe("**image used**: because")
    tracker.close()
    assert [entry.name for entry in tmp_path.iterdir()] == [folder], "nothing beside it"
    assert (out / "mlflow.db").is_file()
    kept = out / "mlartifacts" / tracker.run_id / "artifacts" / "answers" / "step-000001.json"
    assert len(json.loads(kept.read_text())["data"]) == len(SHOWN)
    run = client_of(default_store(out)).get_run(tracker.run_id)
    assert run.data.tags["mlflow.note.content"] == "**image used**: because"
    check_tracking(make_config(out))
    now = out.rename(tmp_path / f"{folder} moved")
    (now / "report.html").write_text("scored after that")
    _forget_places()
    added = open_tracker(make_config(now), run_id=tracker.run_id)
    added.artifact(now / "report.html", "evaluation")
    added.close()
    assert [entry.name for entry in tmp_path.iterdir()] == [now.name], "nothing at the old place"
    client = client_of(default_store(now))
    known = {file.path for file in client.list_artifacts(tracker.run_id)}
    assert {"answers", "evaluation", "config.yaml"} <= known


def test_the_source_of_a_run_is_what_was_typed(tmp_path, monkeypatch):
    monkeypatch.delenv(COMMAND, raising=False)
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python", "train.py", "a b"])
    assert source_tags()["mlflow.source.name"] == "python train.py 'a b'"
    monkeypatch.setenv(COMMAND, "harness train demo out=runs/x")
    assert source_tags()["mlflow.source.name"] == "harness train demo out=runs/x"
