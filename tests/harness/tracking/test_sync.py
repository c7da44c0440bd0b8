"""What a store could not be sent while a run went on is sent later by `harness sync`, each thing
once: against a real MLflow server that is slow, down or behind a password.
"""

import json
import logging
import time
from pathlib import Path

import pytest

from harness.config.schema import Config
from harness.errors import ConfigError
from harness.report.pictures import Shown
from harness.tracking import mlflow as mlflow_tracker
from harness.tracking.journal import TRACKED
from harness.tracking.outbox import FOLDER
from harness.tracking.tracker import open_tracker, sync
from mlflow_server import MlflowServer

SHOWN = [Shown(None, "What shape?", ("box",), "box", True)]
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mlflow_tracker, "PERIOD", 0.05)
    monkeypatch.setattr(mlflow_tracker, "START_SECONDS", {True: 60.0, False: 0.2})


@pytest.fixture
def server(tmp_path):
    server = MlflowServer(tmp_path)
    yield server
    server.close()


def config_of(out, uri, **tracking):
    return Config(name="late", out=str(out), tracking={"uri": uri, "last_wait": 0.6, **tracking})


def history(server, run_id, key):
    from mlflow import MlflowClient

    return sorted(
        (m.step, m.value) for m in MlflowClient(server.uri).get_metric_history(run_id, key)
    )


def files_of(server, run):
    place = Path(run.info.artifact_uri.removeprefix("file://"))
    return {str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()}


def test_the_end_of_a_run_waits_for_last_wait_in_all_and_sync_sends_the_rest_once(
    tmp_path, server, caplog, harness
):
    out = tmp_path / "out"
    server.delay = 60.0  # even the answer to the first call is missed
    with caplog.at_level(logging.WARNING):
        tracker = open_tracker(config_of(out, server.uri))
        for step in range(1, 21):
            tracker.metrics({"loss": step}, step)
        page = tracker.predictions(SHOWN, 20)
        tracker.tags({"colour": "teal"})
        begun = time.monotonic()
        tracker.close()
        assert 0.5 < time.monotonic() - begun < 10
    assert "was not sent within 0.6 s 20 figures, answers/step-000020.html" in caplog.text
    assert f"harness sync {out}" in caplog.text
    assert len(list((out / FOLDER).iterdir())) == 4, "page, table, tags and status, on disk"

    server.delay = 0.0
    server.released.set()
    tracker._thread.join(10)  # the call on its way ends, and nothing after it is sent
    assert not server.runs()
    code, said, _ = harness("sync", out)
    assert code == 0
    assert "sent 20 figures and 4 files" in said
    (run,) = server.runs()
    assert history(server, run.info.run_id, "loss") == [(step, step) for step in range(1, 21)]
    assert run.info.status == "FINISHED"
    assert run.data.tags["colour"] == "teal"
    assert run.data.params["tracking.last_wait"] == "0.6"
    assert {f"answers/{page.name}", "answers/step-000020.json", "config.yaml"} <= files_of(
        server, run
    )

    code, said, _ = harness("sync", out)
    assert "sent 0 figures and 0 files" in said
    assert len(history(server, run.info.run_id, "loss")) == 20
    assert len(server.runs()) == 1


def test_a_server_that_hangs_in_the_middle_costs_a_bounded_time_and_no_step_is_sent_twice(
    tmp_path, server, caplog
):
    out = tmp_path / "out"
    tracker = open_tracker(config_of(out, server.uri))
    tracker.metrics({"loss": 1}, 1)
    deadline = time.monotonic() + 20
    while not (server.runs() and history(server, server.runs()[0].info.run_id, "loss")):
        assert time.monotonic() < deadline
    server.delay = 30.0
    tracker.metrics({"loss": 2}, 2)
    seen = server.requests
    while server.requests == seen:
        assert time.monotonic() < deadline
    tracker.metrics({"loss": 3}, 3)
    begun = time.monotonic()
    tracker.close("KILLED")
    assert time.monotonic() - begun < 10
    server.delay = 0.0
    server.released.set()  # the batch of step 2 arrives after all
    tracker._thread.join(10)
    sync(out)
    (run,) = server.runs()
    assert history(server, run.info.run_id, "loss") == [(1, 1), (2, 2), (3, 3)]
    assert run.info.status == "KILLED"


def test_a_run_that_was_made_without_an_answer_is_found_again_and_not_made_twice(tmp_path, server):
    out = tmp_path / "out"
    tracker = open_tracker(config_of(out, server.uri))
    tracker.close()
    (out / mlflow_tracker.RUN_ID).unlink()  # as if the answer to create_run had been lost
    sync(out)
    assert len(server.runs()) == 1


def test_what_a_killed_process_had_not_sent_is_sent_by_the_resumed_one(tmp_path, server):
    out = tmp_path / "out"
    killed = open_tracker(config_of(out, NOBODY))  # and never closed
    killed.metrics({"loss": 1}, 1)
    killed.predictions(SHOWN, 1)
    resumed = open_tracker(config_of(out, server.uri, last_wait=30), run_id=None, resume_step=1)
    resumed.metrics({"loss": 2}, 2)
    resumed.close()
    (run,) = server.runs()
    assert history(server, run.info.run_id, "loss") == [(1, 1), (2, 2)]
    assert {"answers/step-000001.html", "answers/step-000001.json"} <= files_of(server, run)
    assert not list((out / FOLDER).iterdir())


def test_an_evaluation_without_a_server_is_sent_later_beside_an_earlier_one(tmp_path, server):
    out = tmp_path / "out"
    trained = open_tracker(config_of(out, server.uri, last_wait=30))
    trained.metrics({"loss": 1}, 4)
    trained.close()
    (run,) = server.runs()
    for uri, value in ((server.uri, 0.5), (NOBODY, 0.75)):
        added = open_tracker(config_of(out, uri, last_wait=10), run_id=run.info.run_id)
        added.metrics({"test/accuracy": value}, 4)
        added.artifact(out / TRACKED, "evaluation")
        added.close()
    assert history(server, run.info.run_id, "test/accuracy") == [(4, 0.5)]
    sync(out)
    sync(out)
    assert history(server, run.info.run_id, "test/accuracy") == [(4, 0.5), (4, 0.75)]
    assert history(server, run.info.run_id, "loss") == [(4, 1)]


def test_sync_takes_the_store_from_the_environment_or_an_override_where_the_stored_one_is_masked(
    tmp_path, server, harness, monkeypatch
):
    out = tmp_path / "out"
    open_tracker(config_of(out, "http://me:opensesame@127.0.0.1:9")).close()
    assert json.loads((out / TRACKED).read_text())["uri"] == "http://***@127.0.0.1:9"
    monkeypatch.setattr("harness.redact._hidden", {})  # as in another process
    code, _, said = harness("sync", out)
    assert code == 2
    assert "tracking.uri was stored without its secret (http://***@127.0.0.1:9)" in said
    assert "set MLFLOW_TRACKING_URI" in said
    code, _, said = harness("sync", out, "tracking.uri=http://me:opensesame@127.0.0.1:9")
    assert code == 2
    assert "does not answer" in said
    assert "opensesame" not in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:opensesame@{server.address}")
    assert harness("sync", out)[0] == 0
    assert len(server.runs()) == 1


def test_a_damaged_file_of_the_outbox_is_named_and_keeps_nothing_else_back(
    tmp_path, server, caplog
):
    out = tmp_path / "out"
    open_tracker(config_of(out, NOBODY)).close()
    for number, text in ((2, "[1]"), (3, "{torn"), (4, "5")):
        (out / FOLDER / f"0000000{number}-1.json").write_text(text)
    sync(out, server.uri)
    assert caplog.text.count("is damaged and reaches no store") == 3
    assert server.runs()[0].info.status == "FINISHED"
    for text in ("5", "[1]", "{}", "{torn", "[" * 100_000):
        (out / TRACKED).write_text(text)
        with pytest.raises(ConfigError, match=r"holds no tracking\.json that can be read"):
            sync(out, server.uri)


def test_sync_names_a_folder_that_was_not_tracked_and_an_override_that_is_none(tmp_path, harness):
    assert "holds no tracking.json" in harness("sync", tmp_path)[2]
    assert "only tracking.uri can be given" in harness("sync", tmp_path, "train.epochs=2")[2]
