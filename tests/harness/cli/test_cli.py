"""The command line: fast, thin, and a user's mistake is one sentence and exit code 2 before
anything is started.
"""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from harness.cli import main as cli
from harness.cli.progress import told
from harness.errors import ConfigError
from harness.machine import launcher
from shards.record import Record, Text
from shards.write import write_shards


def refused(result: tuple[int, str, str]) -> str:
    code, _, said = result
    assert code == 2
    assert said.startswith("harness: ")
    assert said.count("\n") == 1
    return said


def imported(*arguments: str) -> tuple[set[str], str]:
    """The modules a fresh interpreter holds after a command line, and its stderr."""
    program = (
        "import json, sys\nfrom harness.cli import main as cli\nsys.argv = ['harness', "
        "*sys.argv[1:]]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\nprint('\\n' + "
        "json.dumps(sorted(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(ran.stdout.rsplit("\n", 2)[-2])), ran.stderr


def test_help_and_a_refusal_before_a_launch_import_no_torch():
    heavy = {"torch", "transformers", "accelerate", "mlflow"}
    modules, _ = imported("--help")
    assert not modules & (heavy | {"numpy", "pydantic"})
    modules, said = imported("train", "vqav2_t4", "out=/nowhere")
    assert "data.train.0.path" in said
    assert not modules & heavy


def test_threads_wait_without_spinning_however_harness_is_started():
    code = "import os, harness; print(os.environ['OMP_WAIT_POLICY'])"
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean
    )
    assert ran.stdout == "PASSIVE\n"


def test_help_names_every_verb(harness):
    code, shown, _ = harness("--help")
    assert code == 0
    assert all(
        verb in shown for verb in ("demo", "train", "evaluate", "ask", "shards", "--version")
    )
    code, shown, _ = harness("shards", "build", "--help")
    assert all(
        name in shown
        for name in ("flickr8k", "vqav2", "coco-captions", "karpathy", "easy-vqa", "image-folder")
    )
    assert harness("--version")[:2] == (0, "harness 0.1.0\n")


def test_a_mistyped_verb_or_a_missing_flag_exits_with_2(harness):
    code, _, said = harness("trian")
    assert code == 2
    assert "Did you mean 'train'?" in said
    code, _, said = harness("shards", "build", "flickr8k", "--out", "x")
    assert code == 2
    assert "--images" in said


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("train", "nope.yaml"), "nope.yaml: no such config file"),
        (("train", "flickr8k_t4", "train.epoch=3"), "did you mean train.epochs?"),
        (("train", "flickr8k_t4", "data.train=[]"), "data.train is empty"),
        (("train", "flickr8k_t4", "--resume", "gone"), "--resume gone: there is no such folder"),
        (
            ("train", "flickr8k_t4", "--launch", "zero2"),
            "DeepSpeed would stall it in silence, take --launch multi_gpu",
        ),
        (
            ("train", "flickr8k_t4"),
            "data.train.0.path: there is no folder of shards at data/flickr8k/train",
        ),
        (("shards", "verify", "nope"), "there is no folder of shards at nope"),
        (("shards", "stats", "nope"), "nope"),
        (
            ("shards", "build", "flickr8k", "--images", ".", "--captions", "nope", "--out", "made"),
            "--captions nope",
        ),
        (
            ("shards", "features", "nope", "--config", "flickr8k_t4", "--out", "made"),
            "model.vision.id",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(
    harness, tmp_path, monkeypatch, arguments, place
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "launch", lambda *_, **__: pytest.fail("a process was started"))
    assert place in refused(harness(*arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_users_error_shows_its_traceback_only_when_asked_and_a_bug_always(harness, monkeypatch):
    def bug(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(sys, "argv", ["harness", "train", "nope.yaml"])
    monkeypatch.setenv("HARNESS_DEBUG", "1")
    with pytest.raises(ConfigError):
        cli.main()
    monkeypatch.delenv("HARNESS_DEBUG")
    monkeypatch.setattr("harness.config.load.load", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


def test_train_checks_first_and_hands_its_arguments_to_the_launcher(harness, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "harness.checks.check_before_launch", lambda config: calls.append(config.train.epochs)
    )
    monkeypatch.setattr(
        "harness.plan.plan.check",
        lambda config, launch, *rest: calls.append(("planned", launch.name)),
    )
    monkeypatch.setattr(
        launcher,
        "launch",
        lambda *given, launch_file: calls.append((*given, launch_file.name)) or 7,
    )
    code, _, _ = harness(
        "train",
        "demo",
        "train.epochs=2",
        "seed=1",
        "--processes",
        2,
        "--resume",
        "auto",
        "--launch",
        "zero2",
    )
    assert code == 7
    assert calls == [
        2,
        ("planned", "zero2"),
        (["demo", "train.epochs=2", "seed=1", "--resume", "auto"], 2, "zero2"),
    ]


@pytest.mark.parametrize(
    ("asked", "before", "handed_on"),
    [("true", None, ":4096:8"), ("true", ":16:8", ":16:8"), ("false", None, None)],
)
def test_a_run_that_is_to_be_deterministic_is_launched_with_the_work_space_for_it(
    harness, monkeypatch, tmp_path, asked, before, handed_on
):
    monkeypatch.setattr("harness.checks.check_before_launch", lambda config: None)
    monkeypatch.setattr("harness.plan.plan.check", lambda *given: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before or "")  # so that it is restored
    if before is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen = []

    def launch(arguments, processes, **_):
        _, environment = launcher.command(arguments, processes, environment=os.environ)
        seen.append(environment.get("CUBLAS_WORKSPACE_CONFIG"))
        return 0

    monkeypatch.setattr(launcher, "launch", launch)
    # Not runs/demo, where a finished demo may lie.
    given = ["train", "demo", f"train.deterministic={asked}", f"out={tmp_path / 'run'}"]
    code, _, errors = harness(*given)
    assert (code, seen) == (0, [handed_on]), errors


def test_real_questions_are_built_verified_counted_and_indexed(harness, shared_data, tmp_path):
    vqa, out = shared_data / "vqav2", tmp_path / "vqav2"
    build = [
        "shards",
        "build",
        "vqav2",
        "--images",
        vqa / "images",
        "--split",
        "val",
        "--out",
        out,
        "--limit",
        20,
    ]
    build += ["--questions", vqa / "v2_OpenEnded_mscoco_val2014_questions.json"]
    build += ["--annotations", vqa / "v2_mscoco_val2014_annotations.json", "--short-side", 64]
    code, shown, _ = harness(*build)
    assert code == 0
    assert f"{out}/val: 20 records" in shown
    assert f"each is named in {out}/skipped.jsonl" in shown
    assert harness("shards", "verify", out / "val")[0] == 0
    code, shown, _ = harness("shards", "stats", out / "val")
    assert json.loads(shown)["samples"] == 20
    assert "holds the splits val" in refused(harness("shards", "stats", out))
    code, shown, _ = harness("shards", "index", out / "val", "--out", tmp_path / "index")
    assert (code, "20 samples" in shown) == (0, True)
    refused(harness("shards", "index", out / "val", "--out", tmp_path / "index"))

    tar = next((out / "val").glob("*.tar"))
    damaged = bytearray(tar.read_bytes())
    damaged[2000] ^= 1
    tar.write_bytes(damaged)
    code, _, said = harness("shards", "verify", out / "val")
    assert code == 2
    assert all(line.startswith("harness: ") for line in said.splitlines())


def test_a_base_language_model_is_made_of_the_texts_alone_whole_or_not_at_all(harness, tmp_path):
    texts = (Text("1", "caption", ("a red dog runs", "a dog")),)
    samples = [
        (Record(f"k{n}", "toy", "train", f"{n}", texts), b"never read", "jpg") for n in range(3)
    ]
    write_shards(samples, tmp_path / "train", dataset="toy", split="train")
    call = ["base-lm", tmp_path / "train", "--config", "flickr8k_offline", "--out", tmp_path / "lm"]
    call += ["--d-model", 16, "--layers", 1, "--steps", 2]
    code, shown, _ = harness(*call)
    assert (code, shown.count("\n")) == (0, 1)
    assert f"model.lm.id={tmp_path / 'lm'}" in shown
    assert json.loads((tmp_path / "lm" / "config.json").read_text())["d_model"] == 16
    assert str(tmp_path) not in (tmp_path / "lm" / "config.json").read_text()
    assert "is there already" in refused(harness(*call))
    assert "a multiple of 4" in refused(harness(*call[:-6], "--d-model", 18))
    call[1], call[5] = tmp_path / "nowhere", tmp_path / "other"
    assert "no folder of shards" in refused(harness(*call))
    assert {path.name for path in tmp_path.iterdir()} == {"train", "lm"}


def test_a_second_run_into_the_same_folder_is_refused_before_it_starts(harness, tmp_path):
    (tmp_path / "checkpoints" / "step-000010").mkdir(parents=True)
    said = refused(harness("train", "flickr8k_t4", f"out={tmp_path}"))
    assert "go on with --resume auto" in said


def test_an_answer_and_a_figure_are_shown_without_what_a_terminal_would_obey(
    harness, monkeypatch, tmp_path
):
    (tmp_path / "a.jpg").write_bytes(b"")
    monkeypatch.setattr("harness.checks.check_model", lambda model: None)
    monkeypatch.setattr("harness.evaluate.ask.ask", lambda *_, **__: "a\x1b]0;owned\x07 [red]dog")
    assert harness("ask", tmp_path, "--image", tmp_path / "a.jpg") == (
        0,
        "a\\u001b]0;owned\\u0007 [red]dog\n",
        "",
    )
    code, _, said = harness("evaluate", f"{tmp_path}/\x1b[2Jrun")
    assert code == 2
    assert "\\u001b[2Jrun is not a folder" in said


def test_a_url_with_a_secret_is_not_indexed_since_the_index_would_hold_it(harness, tmp_path):
    code, _, said = harness(
        "shards", "index", "https://me:opensesame@host/set", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "https://***@host/set" in said
    assert "opensesame" not in said
    assert not list(tmp_path.iterdir())


def test_a_long_verb_says_in_a_log_how_far_it_is_now_and_then(capfd, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with told("evaluating") as progress:
        for done in range(8, 41, 8):
            progress(done, 40)
            now[0] += 6
        progress(2, 10)  # of the next model
        now[0] += 10
        progress(6, 10)
        now[0] += 10
        progress(1, 3, about="with other images")
    with told("answering") as progress:  # of pictures that nobody has counted
        now[0] += 10
        progress(3, None)
    lines = [line.split("  ") for line in capfd.readouterr().err.splitlines()]
    assert [line[1:] for line in lines] == [
        ["evaluating 24/40", "0:00:12 left"],
        ["evaluating 40/40"],
        ["evaluating 6/10", "0:00:10 left"],
        ["evaluating, with other images 1/3", "-:--:-- left"],
        ["answering 3"],
    ]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", line[0]) for line in lines)
