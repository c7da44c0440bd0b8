"""`tracking.log_model`: a run's model in MLflow's registry answers as the run, in a process of its
own, and no pickle lies in it.
"""

import json
import os
import subprocess
import sys

import pytest

from harness.config.load import dump
from harness.errors import ConfigError
from harness.evaluate.ask import ask
from harness.tracking.tracker import check_tracking
from harness.train.__main__ import main
from toy_runs import make_config, picture

pytestmark = pytest.mark.slow
ASK = """
import json, sys
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/toy_run/1")
picture = open(sys.argv[2], "rb").read()
rows = [{"image": picture, "prompt": "what colour is it?"}, {"image": picture, "prompt": None}]
print(json.dumps(list(model.predict(pandas.DataFrame(rows)))))
"""


def test_a_run_registers_a_model_that_answers_a_picture_and_a_prompt(
    tmp_path, tiny_clip_folder, tiny_t5_folder, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    config = make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, "run", dev=False, max_steps=2)
    tracking = config.tracking.model_copy(update={"kind": "mlflow", "log_model": True})
    config = config.model_copy(update={"tracking": tracking, "name": "toy/run"})
    file = tmp_path / "toy.yaml"
    file.write_text(dump(config))
    assert main([str(file)]) == 0
    assert "MLFLOW_TRACKING_URI" not in os.environ, "the next run would be sent to this store"

    image = tmp_path / "picture.png"
    image.write_bytes(picture(1))
    said = subprocess.run(
        [sys.executable, "-c", ASK, f"sqlite:///{config.out_dir}/mlflow.db", str(image)],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr[-3000:]
    own = [ask(config.out_dir, image, "what colour is it?"), ask(config.out_dir, image)]
    assert json.loads(said.stdout) == own
    logged = [file for file in (config.out_dir / "mlartifacts").rglob("*") if file.is_file()]
    assert not (tmp_path / "mlruns").exists(), "nothing is left where the user stands"
    assert any(file.name == "model.safetensors" for file in logged)
    assert not [file for file in logged if file.suffix in (".pkl", ".bin", ".pt")]


def test_log_model_without_mlflow_is_refused(tmp_path):
    config = make_config(tmp_path, tmp_path, tmp_path)
    tracking = config.tracking.model_copy(update={"log_model": True})
    with pytest.raises(ConfigError, match=r"log_model is true, which needs tracking\.kind=mlflow"):
        check_tracking(config.model_copy(update={"tracking": tracking}))
