"""harness predict: what a model says to pictures without labels, in a file (data/formats)."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from harness.redact import printable
from shards.manifest import Manifest
from shards.read import Reader
from shards.write import write_shards
from toy_runs import make_shards, picture

FORMATS = Path(__file__).parents[2] / "data" / "formats" / "version_1"
PROMPT = "what colour is it?"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working folder: runs, their models, sets, and a folder of pictures."""
    copy = shutil.copytree(FORMATS, tmp_path / "here")
    monkeypatch.chdir(copy)
    (copy / "pictures" / "below").mkdir(parents=True)
    shutil.copy("picture.jpg", "pictures/a.jpg")
    for index, name in enumerate(("b.png", "below/c.PNG", "below/d.png", "e.png")):
        (copy / "pictures" / name).write_bytes(picture(index))
    (copy / "pictures" / "damaged.png").write_bytes(picture(0)[:50])
    (copy / "pictures" / "notes.txt").write_text("no picture")
    return copy


def lines(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def answers(file: str) -> dict[tuple[str, str | None], str]:
    found = [line for line in lines(file) if "answer" in line]
    by_text = {(line["image"], line["text_id"]): line["answer"] for line in found}
    assert len(by_text) == len(found), "each text once"
    return by_text


def known(name: str) -> str:
    runs = json.loads((FORMATS / "expected.json").read_text())["runs"]
    return runs["t5_run"][name].rstrip("\n")


def write_unanswered(folder: str, source: str) -> Path:
    """A set of the questions of another, without their answers."""
    samples = []
    reader = Reader(Manifest.open(source))
    for sample in map(reader.read, range(reader.manifest.samples)):
        texts = sample.known.texts
        withheld = tuple(replace(text, targets=()) for text in texts if text.task == "vqa")
        asked = replace(sample.known, texts=withheld, split="asked")
        samples.append((asked, sample.payload, sample.extension))
    write_shards(samples, folder, dataset="toy", split="asked")
    return Path(folder)


def test_a_folder_is_asked_as_one_picture_is_and_what_is_left_out_is_named(here, harness):
    code, said, errors = harness("predict", "t5_run", "--images", "pictures", "--out", "o/a.jsonl")
    assert code == 0, errors
    assert said == "o/a.jsonl: 5 answers\n"
    assert "1 left alone, no pictures by their names: notes.txt" in errors
    assert "1 cannot be read, named with the reason in o/a.jsonl" in errors
    found = lines("o/a.jsonl")
    assert [line["image"] for line in found] == [
        *("a.jpg", "b.png", "below/c.PNG", "below/d.png", "e.png"),
        "damaged.png",
    ]
    assert printable(found[0]["answer"]) == printable(known("caption"))
    assert found[0]["prompt"] == "Describe the image."
    assert "cannot be decoded" in found[-1]["error"]
    asked = ("--prompt", PROMPT, "--batch-size", "2")
    (model,) = Path("t5_run/checkpoints").glob("*/model")
    assert harness("predict", model, "--images", "pictures", "--out", "b.jsonl", *asked)[0] == 0
    assert printable(lines("b.jsonl")[0]["answer"]) == printable(known("answer"))
    assert {line.get("question", PROMPT) for line in lines("b.jsonl")} == {PROMPT}


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(here, harness):
    """Also in the middle of a line and between two texts of one picture; what was damaged and is
    mended since is asked now.
    """
    go = ("predict", "t5_run", "--batch-size", "2", "--images", "shards/dev", "--out", "cut.jsonl")
    assert harness(*go)[0] == 0
    whole = answers("cut.jsonl")
    text = Path("cut.jsonl").read_bytes()
    ends = [place for place, byte in enumerate(text) if byte == ord("\n")]
    for end in (ends[-1], ends[4] + 1, ends[5] + 9, ends[7] + 1):
        Path("cut.jsonl").write_bytes(text[:end])
        there = text[:end].count(b"\n")
        code, said, _ = harness(*go)
        assert (code, answers("cut.jsonl")) == (0, whole)
        were = f", {there} were there" if there else ""
        assert said == f"cut.jsonl: {len(whole) - there} answers{were}\n"
    go = ("predict", "t5_run", "--images", "pictures", "--out", "a.jsonl")
    assert harness(*go)[0] == 0
    Path("pictures/damaged.png").write_bytes(picture(9))
    code, said, errors = harness(*go)
    assert (code, said) == (0, "a.jsonl: 1 answers, 5 were there\n")
    assert "cannot be read" not in errors
    assert len(answers("a.jsonl")) == len(lines("a.jsonl")) == 6


def test_another_prompt_model_set_or_file_is_refused_and_leaves_the_file_as_it_was(here, harness):
    go = ("predict", "t5_run", "--images", "pictures", "--out", "a.jsonl")
    assert harness(*go)[0] == 0
    before = Path("a.jsonl").read_bytes()
    Path("mine.jsonl").write_text('{"image": "a"}\n')
    for more, expected in (
        (("--prompt", PROMPT), f"holds answers of another --prompt (None, now {PROMPT!r})"),
        (("--override", "generate.caption.beams=2"), "of another model, or the same with other"),
        (("--override", "train.epochs=2"), "a model answers as it was trained, only generate."),
        (("--images", "shards/dev"), "of another set of pictures (None, now 'toy_dev')"),
        (("--out", "mine.jsonl"), "mine.jsonl, line 1 was not written by harness predict"),
        (("--out", "a.csv"), "--out a.csv: expected FILE.jsonl"),
        (("--out", "a.json"), "a result file has the ids of a set's own texts"),
        (("--images", "nowhere"), "--images nowhere: there is no such folder"),
        (("--images", "shards"), "it holds the sets dev, train: name one of them"),
        (("--checkpoint", "9"), "--checkpoint 9: t5_run holds step-000004"),
    ):
        code, _, errors = harness(*go, *more)
        assert code == 2, expected
        assert expected in errors
    assert Path("a.jsonl").read_bytes() == before


def test_questions_without_answers_become_the_file_that_evalai_takes(here, harness):
    """They are answered as the same questions with answers are, and from features too."""
    write_unanswered("asked", "shards/dev")
    go = ("predict", "t5_run", "--images", "asked", "--out")
    code, said, errors = harness(*go, "test.json")
    assert code == 0, errors
    assert "test.json: 9 entries, as EvalAI takes them" in said
    entries = json.loads(Path("test.json").read_text())
    assert harness("predict", "t5_run", "--images", "shards/dev", "--out", "dev.jsonl")[0] == 0
    assert answers("test.jsonl").items() < answers("dev.jsonl").items()
    assert [(e["question_id"], e["answer"]) for e in entries] == [
        (line["text_id"], line["answer"]) for line in lines("test.jsonl")
    ]
    assert all(entry.keys() == {"question_id", "answer"} for entry in entries)
    config = ("--config", "t5_run/config.yaml")
    assert harness("shards", "features", "asked", *config, "--out", "features/asked")[0] == 0
    go = ("predict", "t5_run", "--images", "features/asked", "--out", "features.json")
    assert harness(*go)[0] == 0
    assert answers("features.jsonl").keys() == answers("test.jsonl").keys()
    code, _, errors = harness("predict", "gpt2_run", *go[2:-1], "other.jsonl", "--prompt", PROMPT)
    assert code == 0, errors


def test_what_cannot_become_a_whole_result_file_is_refused_and_its_lines_are_kept(here, harness):
    make_shards(here / "damaged", 3, "x", unreadable=[1], captions=False)
    make_shards(here / "both", 2, "x")
    for folder, expected in (
        ("damaged", "lacks the answers to 1 pictures that cannot be read (the first is 0001)"),
        ("both", "holds both vqa and caption texts"),
    ):
        code, _, errors = harness(
            "predict", "t5_run", "--images", folder, "--out", f"{folder}.json"
        )
        assert code == 2
        assert expected in errors
        assert not Path(f"{folder}.json").exists()
        assert answers(f"{folder}.jsonl")


def test_tars_without_an_index_are_asked_one_prompt(here, harness):
    Path("tars").mkdir()
    for number in range(2):
        with tarfile.open(f"tars/{number}.tar", "w") as tar:
            for name, data in ((f"k{number}.png", picture(number)), (f"t{number}.txt", b"words")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    go = ("predict", "t5_run", "--images", "tars", "--prompt", PROMPT, "--out", "t.jsonl")
    assert harness(*go)[0] == 0
    assert answers("t.jsonl").keys() == {("0.tar/k0", None), ("1.tar/k1", None)}
    assert [line["error"] for line in lines("t.jsonl") if "error" in line] == [
        "no picture among .txt"
    ] * 2


@pytest.mark.parametrize(
    "verb",
    [
        ("evaluate", "t5_run", "--data", "asked"),
        ("train", "t5_run/config.yaml", "out=new", "data.train=[{path: asked}]"),
        ("train", "t5_run/config.yaml", "out=new", "data.dev=[{path: asked}]"),
        ("gate", "d.jsonl", "asked"),
        ("gate", "asked", "--donors", "new.jsonl"),
        ("base-lm", "asked", "--config", "t5_run/config.yaml", "--out", "lm"),
        ("shards", "view", "asked", "--config", "t5_run/config.yaml"),
    ],
    ids=lambda verb: " ".join(verb[:3]),
)
def test_nothing_is_learnt_from_unanswered_questions_or_scored_on_them(here, harness, verb):
    write_unanswered("asked", "shards/dev")
    assert Manifest.open("asked").unanswered
    Path("d.jsonl").write_text('{"image": "0100"}\n')
    code, _, errors = harness(*verb)
    assert code == 2
    assert "records are questions without answers" in errors
    assert "`harness predict RUN --images asked --out FILE`" in errors
