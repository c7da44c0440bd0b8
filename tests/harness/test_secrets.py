"""Runs that are given secrets in every form leave none: not in their folders, logs or database."""

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.config.load import dump
from harness.config.schema import Config
from mlflow_server import MlflowServer
from secret_forms import BASIC, FORMS, SECRET
from shards.record import Record
from shards.write import write_shards
from toy_runs import make_config, picture, texts

pytestmark = pytest.mark.timeout(900)  # eight real programs, one after the other

PLACE = f"token={SECRET}"  # in the path of a set: a local folder stands for a URL here


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    """Returns the folder that is searched, what makes a run tell secrets, and the server."""
    root = tmp_path_factory.mktemp("searched")
    given = tmp_path_factory.mktemp("given")  # what the user wrote holds secrets, and may
    plain = make_config(given / PLACE, tiny_clip_folder, tiny_t5_folder, "run")
    images = [b"no picture", *map(picture, (1, 2, 3))]
    records = [(Record(f"{n}", "toy", "bad", f"{n}", texts(n)), images[n], "png") for n in range(4)]
    write_shards(records, given / PLACE / "bad", dataset="toy", split="bad")
    server = MlflowServer(root)
    document = plain.model_dump(mode="json")
    document["data"]["train"].append({"path": str(given / PLACE / "bad")})
    document["data"]["test"] = document["data"]["dev"]
    document["train"] |= {"global_batch": 18, "epochs": 1, "evaluate_every": None}
    uri = f"http://me:{SECRET}@{server.address}"
    document["tracking"] = {
        "kind": "mlflow",
        "uri": uri,
        "experiment": FORMS[0],
        "run_name": " ".join(FORMS),
        "last_wait": 20,
    }
    file = given / "toy.yaml"
    file.write_text(yaml.safe_dump(document))
    yield root, file, server, uri
    server.close()


def harness(
    root: Path, *arguments: object, program: str = "harness", **environment: str
) -> subprocess.CompletedProcess:
    """Runs the real program; what it says is written into the searched folder.

    `program`: harness.train is what `harness train` starts in the end, in half the time.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "HARNESS_SEC"))}
    done = subprocess.run(
        [sys.executable, "-m", program, *map(str, arguments)],
        capture_output=True,
        env=env | environment,
    )
    with (root / "said.log").open("ab") as log:
        log.write(done.stdout + done.stderr)
    return done


def planted(root: Path) -> list[str]:
    """Returns where the secret or its base64 forms stand, in any file or name under a folder."""
    raw = [base64.b64encode(SECRET.encode()[shift:]).decode()[:14] for shift in range(3)]
    looked_for = [SECRET.encode(), BASIC.encode(), *(part.encode() for part in raw)]
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [
        str(path.relative_to(root))
        for path in files
        if SECRET in str(path) or any(each in path.read_bytes() for each in looked_for)
    ]


def test_a_run_an_evaluation_and_a_server_that_echoes_leave_no_secret(world):
    root, file, server, uri = world
    out = root / "run"
    trained = harness(root, "train", file, f"out={out}", f"tracking.uri={uri}")
    assert trained.returncode == 0, trained.stderr.decode()[-2000:]
    (run,) = server.runs()
    assert run.data.params["tracking.uri"] == f"http://***@{server.address}"
    assert f"tracking.uri=http://***@{server.address}" in run.data.tags["mlflow.source.name"]
    assert "***" in (out / "quarantine.jsonl").read_text()

    further = (file, f"out={out}", "train.epochs=2", "--resume", "auto")
    resumed = harness(root, *further, program="harness.train")
    assert resumed.returncode == 0, resumed.stderr.decode()[-2000:]
    assert b"from here on train.epochs is 2" in resumed.stderr
    assert b"tracking.uri is" not in resumed.stderr, "masked or not, it is the same"

    masked_set = harness(root, "evaluate", out)
    assert masked_set.returncode == 2
    assert b"data.test.0.path was stored without its secret" in masked_set.stderr
    whole_set = f"data.test.0.path={file.parent / PLACE / 'dev'}"
    no_store = harness(root, "evaluate", out, "--override", whole_set)
    assert no_store.returncode == 2
    assert b"tracking.uri was stored without its secret" in no_store.stderr
    scored = harness(root, "evaluate", out, "--override", whole_set, MLFLOW_TRACKING_URI=uri)
    assert scored.returncode == 0, scored.stderr.decode()[-2000:]
    assert (out / "evaluation" / "scores.json").exists(), "it is the run's own evaluation"
    assert any(key.startswith("test/") for key in server.runs()[0].data.metrics)

    server.echoes = True
    echoed = (file, f"out={root / 'echoed'}", "tracking.last_wait=2")
    refused = harness(root, *echoed, program="harness.train")
    server.echoes = False
    assert refused.returncode == 0
    assert b"no entry with Authorization: ***" in refused.stderr
    assert b"\x1b" not in refused.stderr
    assert planted(root) == []


def test_an_ablation_leaves_no_secret_and_its_children_know_it(world):
    root, file, server, _ = world
    asked = {
        "name": "toy",
        "question": "Which?",
        "base": str(file),
        "seeds": [0],
        "variants": {
            "a": {"expected": "-"},
            "b": {"expected": "-", "overrides": [f"model.lm.id={file.parent}/token={SECRET}x"]},
        },
    }
    (file.parent / "ablation.yaml").write_text(yaml.safe_dump(asked))
    out = root / "ablation"
    before = len(server.runs())
    done = harness(root, "ablate", file.parent / "ablation.yaml", "--out", out)
    assert done.returncode == 1, done.stderr.decode()[-2000:]
    assert b"b, seed 0, failed: model.lm.id: " in done.stdout
    assert (out / "a" / "seed-0" / "evaluation" / "scores.json").exists()
    assert f"http://***@{server.address}" in (out / "a" / "seed-0" / "config.yaml").read_text()
    assert len(server.runs()) == before + 2, "the ablation and its child are there"
    shutil.copytree(out, root / "copy")
    assert planted(root) == []


def test_a_real_uri_is_still_used_where_only_its_mask_is_stored(tmp_path):
    config = Config(name="x", tracking={"uri": f"http://me:{SECRET}@h"})
    assert config.tracking.uri.endswith("@h")
    assert SECRET in config.tracking.uri
    assert SECRET not in dump(config)
