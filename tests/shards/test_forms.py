"""Texts in the form that people have: CSV in any state, metadata files, .txt beside pictures, and
JSON of known sets, each built or refused in one sentence.
"""

import json
import re
import shlex
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli.shards import app
from pictures import fill, picture
from shards.build import build
from shards.files import ShardError
from shards.manifest import Manifest
from shards.sources import image_folder


def loaded(tmp_path, text, names=("a.jpg", "b.jpg"), saved_as="utf-8", form="csv", **options):
    """The source of a file of these texts, beside a folder `photos` of these images."""
    photos = fill(tmp_path / "photos", names)
    file = tmp_path / f"texts.{form}"
    if not isinstance(text, str | bytes):
        text = json.dumps(text)
    file.write_bytes(text.encode(saved_as) if isinstance(text, str) else text)
    return image_folder.load(**{"images": photos, form: file, **options})


def texts(source) -> dict[str, list]:
    """(prompt, targets) of every text, by the path of its image."""
    return {
        item.image: [
            (text.prompt, list(text.targets)) if text.prompt else list(text.targets)
            for text in item.record.texts
        ]
        for items in source.splits.values()
        for item in items
    }


def left_out(source) -> list[tuple[str, str, int]]:
    return [(s.kind, s.name, s.texts) for s in source.skipped]


def notes(source) -> dict[str, int]:
    return {note: n for note, n in source.notes.items() if n}


# CSV


def test_the_captions_file_of_flickr8k_on_kaggle_keeps_the_commas_of_its_captions(tmp_path):
    source = loaded(
        tmp_path,
        'image,caption\na.jpg,"A dog , a cat ."\n'
        'a.jpg,A dog, running, and "barking" .\nb.jpg,B .\n',
    )
    assert texts(source) == {
        "a.jpg": [["A dog , a cat .", 'A dog, running, and "barking" .']],
        "b.jpg": [["B ."]],
    }
    assert [n for note, n in notes(source).items() if "separator in their last" in note] == [1]


def test_flickr30ks_results_are_read_and_its_broken_line_is_taken_and_named(tmp_path):
    source = loaded(
        tmp_path,
        'image_name| comment_number| comment\na.jpg| 3| A man in a " Ninja " shirt .\n'
        "a.jpg| 4   A dog runs across the grass .\nb.jpg| 0\n",
    )
    assert texts(source) == {
        "a.jpg": [['A man in a " Ninja " shirt .', "A dog runs across the grass ."]]
    }
    assert (
        notes(source)["lines without the separator behind their number, taken; the first: line 3"]
        == 1
    )
    assert ("unusable text", "line 4", 1) in left_out(source)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ('"[""a dog"", ""a cat""]"', ["a dog", "a cat"]),
        ('"[\'a dog\', ""it\'s""]"', ["a dog", "it's"]),
        ("\"['a dog' 'a cat'\n 'x']\"", ["a dog", "a cat", "x"]),
        ("\"('a',)\"", ["a"]),
        ("[sic] a dog", ["[sic] a dog"]),
        ("[1, 2]", ["[1, 2]"]),
        ("\"[__import__('os')]\"", ["[__import__('os')]"]),
    ],
)
def test_a_cell_that_holds_a_list_is_its_texts(tmp_path, cell, expected):
    assert texts(loaded(tmp_path, f"image,caption\na.jpg,{cell}\n")) == {"a.jpg": [expected]}


def test_a_quote_that_nobody_closed_costs_no_line_behind_it(tmp_path):
    source = loaded(
        tmp_path,
        'image,caption\na.jpg,"A dog\nb.jpg,B\na.jpg,"two\nlines"\na.jpg,"open to the end\nb.jpg,C',
    )
    assert texts(source) == {
        "a.jpg": [['"A dog', "two\nlines", '"open to the end']],
        "b.jpg": [["B", "C"]],
    }
    assert (
        notes(source)[
            "lines with a quote that nothing closes, taken as it stands; the first: line 2"
        ]
        == 2
    )


def test_what_excel_and_windows_make_of_a_table_is_read(tmp_path):
    text = "sep=;\r\nBild;Frage;Antwort;Teil\r\n"
    text += "C:\\x\\Photos\\A.JPG;Was?;['Hund','Hündin'];dev\r\n\r\n;;;\r\n"
    options = {"image": "Bild", "question": "Frage", "answer": "Antwort", "split": "Teil"}
    options = {f"{role}_column": name for role, name in options.items()}
    expected = {"a.jpg": [("Was?", ["Hund", "Hündin"])]}
    for encoding in ("utf-8-sig", "cp1252", "utf-16"):
        named = {} if encoding == "utf-8-sig" else {"encoding": encoding}
        if named:
            with pytest.raises(ShardError, match="name its encoding with --encoding"):
                loaded(tmp_path, text, saved_as=encoding, **options)
        # the folder's own name stands in the path, in another case
        source = loaded(tmp_path, text, saved_as=encoding, **options, **named)
        assert texts(source) == expected
        assert list(source.splits) == ["dev"]


def test_dirt_in_a_table_is_left_out_and_named(tmp_path):
    source = loaded(
        tmp_path,
        "image,caption,question,answer,width\n"
        "a.jpg,A,,,3\n"  # a caption alone
        "A.JPG,,What?,x,3\n"  # a question alone, of the same image
        ",B,,,\n"
        "b.jpg,,,,\n"
        "c.jpg,C,,,\n"
        "https://x.org/d.jpg,D,,,\n"
        "e.jpg,E,,,\n",
        names=("a.jpg", "b.jpg", "sub/e.jpg"),
    )
    assert texts(source) == {"a.jpg": [["A"], ("What?", ["x"])]}
    assert left_out(source) == [
        ("unusable text", "line 4", 1),
        ("empty text", "b.jpg", 1),
        ("image without text", "b.jpg", 0),
        ("text without image", "c.jpg", 1),
        ("text without image", "https://x.org/d.jpg", 1),
        ("text without image", "e.jpg", 1),
        ("image without text", "sub/e.jpg", 0),
    ]
    reasons = {s.name: s.reason for s in source.skipped}
    assert "web address: download the pictures" in reasons["https://x.org/d.jpg"]
    assert "sub/e.jpg has its file name" in reasons["e.jpg"]
    assert notes(source)["field 'width' ignored"] == 6


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        (
            "a.jpg,A dog\n",
            {},
            r"no column of images .* line is 'a.jpg, A dog'.*--image-c",
        ),
        ("image,titel\n", {}, "no column of captions .*--caption-column"),
        ("image,question\n", {}, "no column of answers"),
        ("image,caption,text\n", {}, "'caption' and 'text' as caption: name it with --caption-c"),
        ("image,caption\n", {"caption_column": "x"}, "has no column 'x'; it has image, caption"),
        ("image,caption,caption\n", {}, "names a column twice"),
        ("image,caption\n", {"separator": "<>"}, "--separator is '<>': it is one character"),
        ("", {}, "is empty"),
        ("image,caption\n", {"json": "x.json"}, "--csv and --json both say where"),
        ("image,caption\n", {"questions": "q.json"}, "--questions goes with --json"),
        ("image,caption\n", {"encoding": "klingon"}, "cannot be read as --encoding says"),
        ("image,caption\n", {"dev_share": 0.6, "test_share": 0.4}, "leave some for training"),
        ("image,caption\na.jpg,A\n", {"dev_share": 0.1}, "1 images are too few"),
        ("image,caption,split\na.jpg,A,x\nb.jpg,B,y\n", {"dev_share": 0.5}, "splits of their own"),
        ("image,caption\n", {"images": "photos/{id.x}.jpg"}, "a pattern of names is one such as"),
    ],
)
def test_a_table_or_options_that_cannot_be_meant_are_refused_in_a_sentence(
    tmp_path, text, options, says
):
    with pytest.raises(ShardError, match=says):
        loaded(tmp_path, text, **options)


def test_shares_are_drawn_by_image_and_equal_images_stay_together(tmp_path):
    names = [f"{n}.jpg" for n in range(20)]
    rows = "".join(f"{name},one\n{name},two\n" for name in names)
    options = {"dev_share": 0.1, "test_share": 0.2}

    def splits(seed):
        photos = fill(tmp_path / "photos", names)
        (photos / "twin.jpg").write_bytes(picture("7.jpg"))
        (tmp_path / "t.csv").write_text(f"image,caption\n{rows}twin.jpg,one")
        given = options | {"images": photos, "csv": tmp_path / "t.csv", "seed": seed}
        return {
            split: [item.image for item in items]
            for split, items in image_folder.load(**given).splits.items()
        }

    drawn = [splits(seed) for seed in range(5)]
    assert drawn[0] == splits(0) != drawn[1]
    for found in drawn:
        assert sorted(chain(*found.values())) == sorted([*names, "twin.jpg"])
        assert len(found["dev"]) in (2, 3)
        assert len(found["test"]) in (4, 5)
        assert sum({"7.jpg", "twin.jpg"} <= set(images) for images in found.values()) == 1


# Metadata, .txt


def test_metadata_of_hugging_face_is_read_where_it_lies(tmp_path):
    photos = fill(tmp_path / "photos", ["train/a.jpg", "train/x/b.jpg", "test/a.jpg"])
    (photos / "train" / "metadata.csv").write_text("file_name,text\na.jpg,A\nx/b.jpg,B\n")
    (photos / "test" / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": "C"}\n{"file_name": "b.jpg", "text": "C"}'
    )
    source = image_folder.load(photos, metadata=True)
    assert texts(source) == {
        "train/a.jpg": [["A"]],
        "train/x/b.jpg": [["B"]],
        "test/a.jpg": [["C"]],
    }
    assert {split: len(items) for split, items in source.splits.items()} == {"test": 1, "train": 2}
    assert left_out(source) == [("text without image", "test/b.jpg", 1)]
    with pytest.raises(ShardError, match=r"holds no metadata\.csv or metadata\.jsonl"):
        image_folder.load(photos / "train" / "x", metadata=True)


def test_txt_beside_pictures_needs_no_option(tmp_path):
    photos = fill(tmp_path / "photos", ["a.jpg", "x/b.jpg", "c.jpg", "d.jpg"])
    (photos / "a.txt").write_text("one\n\ntwo\r\n")
    (photos / "x" / "b.TXT").write_bytes(b"\xef\xbb\xbfb")
    (photos / "c.txt").write_bytes(b"caf\xe9")
    (photos / "readme.txt").write_text("no picture")
    source = image_folder.load(photos)
    assert texts(source) == {"a.jpg": [["one", "two"]], "x/b.jpg": [["b"]]}
    assert Counter(left_out(source)) == Counter(
        [
            ("unusable text", "c.txt", 1),
            ("text without image", "readme.txt", 1),
            ("image without text", "c.jpg", 0),
            ("image without text", "d.jpg", 0),
        ]
    )
    assert "café" in str(texts(image_folder.load(photos, encoding="cp1252")))
    with pytest.raises(ShardError, match=r"no image has a NAME.txt .*--jsonl, --csv, --json or"):
        image_folder.load(fill(tmp_path / "bare", ["a.jpg"]))


# JSON of known sets


def coco(*numbers):
    return [f"COCO_val2014_{n:012d}.jpg" for n in numbers]


VIZWIZ = [
    {
        "image": "VizWiz_val_00000001.jpg",
        "question": "Can you tell me what this medicine is please?",
        "answers": [
            {"answer": "no", "answer_confidence": "yes"},
            {"answer": "night time", "answer_confidence": "maybe"},
        ],
        "answer_type": "other",
        "answerable": 1,
    }
]
VIZWIZ_CAPTIONS = {
    "info": {},
    "images": [{"file_name": "VizWiz_train_00000000.jpg", "id": 0, "text_detected": True}],
    "annotations": [
        {"caption": "a jar", "image_id": 0, "id": 1, "is_precanned": False, "is_rejected": False},
        {"caption": "bad", "image_id": 0, "id": 2, "is_precanned": False, "is_rejected": True},
        {"caption": "Quality", "image_id": 0, "id": 3, "is_precanned": True, "is_rejected": True},
        {"caption": "of none", "image_id": 9, "id": 4, "is_precanned": False, "is_rejected": False},
    ],
}
TEXTVQA = {
    "dataset_type": "val",
    "data": [
        {
            "question": "what is the brand?",
            "image_id": "003a8ae2ef43b901",
            "flickr_300k_url": "https://x.org/y.jpg",
            "answers": ["nokia", "nokia", "samsung"],
            "question_id": 34602,
            "set_name": "val",
        }
    ],
}
OKVQA = {
    "data_subtype": "val2014",
    "annotations": [
        {
            "image_id": 42,
            "question_id": 421,
            "answer_type": "other",
            "question_type": "four",
            "answers": [
                {"answer": "race", "raw_answer": "racing", "answer_confidence": "yes"},
                {"answer": "race", "raw_answer": "race", "answer_confidence": "yes"},
            ],
        },
        {"image_id": 42, "question_id": 422, "answers": [{"answer": "x", "raw_answer": "x"}]},
    ],
}
OKVQA_QUESTIONS = {"questions": [{"image_id": 42, "question": "What sport?", "question_id": 421}]}
AOKVQA = [
    {
        "split": "val",
        "image_id": 461751,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is in his mouth?",
        "choices": ["stick", "food", "popsicle stick", "cigarette"],
        "correct_choice_idx": 3,
        "direct_answers": ["cigarette", "cigarette", "smoke"],
        "difficult_direct_answer": False,
        "rationales": ["He smokes."],
    },
    {
        "split": "val",
        "image_id": 42,
        "question": "Why?",
        "choices": ["a", "b"],
        "correct_choice_idx": 1,
        "question_id": "q2",
    },
]
LLAVA = [
    {
        "id": "1",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors?"},
            {"from": "gpt", "value": "White and red."},
            {"from": "human", "value": "What is it?"},
            {"from": "gpt", "value": "A bus."},
        ],
    },
    {
        "id": "1",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "A bus on a street."},
        ],
    },
    {"id": "2", "conversations": [{"from": "human", "value": "Hello"}]},
    {"id": "3", "image": "a.jpg", "conversations": [{"from": "gpt", "value": "Hello"}]},
]
LAVIS = [
    {"image": "val2014/" + coco(42)[0], "caption": ["One.", "Two."], "image_id": "coco_42"},
    {"image": "val2014/" + coco(42)[0], "caption": "Three.", "image_id": "coco_42"},
]
LAVIS_QUESTIONS = [
    {
        "question_id": 7,
        "question": "Where?",
        "answer": ["net", "net"],
        "dataset": "vqa",
        "image": "val2014/" + coco(42)[0],
    },
]


@pytest.mark.parametrize(
    ("document", "image", "form", "expected"),
    [
        (
            VIZWIZ,
            "val/VizWiz_val_00000001.jpg",
            "VizWiz questions",
            [("Can you tell me what this medicine is please?", ["no", "night time"])],
        ),
        (VIZWIZ_CAPTIONS, "train/VizWiz_train_00000000.jpg", "VizWiz captions", [["a jar"]]),
        (
            TEXTVQA,
            "train_images/003a8ae2ef43b901.jpg",
            "TextVQA",
            [("what is the brand?", ["nokia", "nokia", "samsung"])],
        ),
        (
            AOKVQA,
            "val2017/000000461751.jpg",
            "A-OKVQA annotations",
            [("What is in his mouth?", ["cigarette", "cigarette", "smoke"])],
        ),
        (
            LLAVA,
            "coco/train2017/000000033471.jpg",
            "LLaVA conversations",
            [["A bus on a street."], ("What are the colors?", ["White and red."])],
        ),
        (
            LAVIS,
            "val2014/" + coco(42)[0],
            "a list of captions (as LAVIS has it)",
            [["One.", "Two.", "Three."]],
        ),
        (
            LAVIS_QUESTIONS,
            "val2014/" + coco(42)[0],
            "a list of questions (as LAVIS has it)",
            [("Where?", ["net", "net"])],
        ),
        (
            {"a.jpg": ["A", "B"], "b.jpg": "C"},
            "a.jpg",
            "a mapping of images to captions",
            [["A", "B"]],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_a_known_form_is_read_and_its_form_is_said(
    tmp_path, document, image, form, expected
):
    source = loaded(tmp_path, document, names=[image], form="json")
    assert texts(source) == {image: expected}
    assert [note for note in notes(source) if note.startswith("rows read as")] == [
        f"rows read as {form}"
    ]


def test_what_known_sets_say_beside_the_answers_is_kept_and_what_is_left_out_is_counted(tmp_path):
    names = ["000000461751.jpg", "42.jpg"]
    source = loaded(tmp_path, AOKVQA, names=names, form="json")
    first, second = [item.record for item in source.splits["val"]]
    assert first.texts[0].id == "22MexNkBPpdZGX6sxbxVBH"
    assert first.texts[0].meta["correct_choice"] == "cigarette"
    assert second.texts[0].targets == ("b",)  # the right choice, where no answer was given freely
    assert first.dataset == "aokvqa"

    (tmp_path / "v").mkdir()
    source = loaded(tmp_path / "v", VIZWIZ_CAPTIONS, ["VizWiz_train_00000000.jpg"], form="json")
    assert left_out(source) == [
        ("rejected caption", "VizWiz_train_00000000.jpg", 1),
        ("rejected caption", "VizWiz_train_00000000.jpg", 1),
        ("text without image", "9", 1),
    ]
    (tmp_path / "l").mkdir()
    images = ["coco/train2017/000000033471.jpg", "a.jpg"]
    fill(tmp_path / "l" / "photos", images)
    (tmp_path / "l" / "x.json").write_text(json.dumps(LLAVA))
    out = tmp_path / "l" / "out"
    summary = build("image-folder", out, images=tmp_path / "l/photos", json=tmp_path / "l/x.json")
    assert (summary.further_turns, summary.unusable_texts, summary.texts_without_image) == (1, 1, 1)


def test_okvqa_needs_its_questions_and_finds_the_images_of_coco(tmp_path):
    photos = fill(tmp_path / "photos", ["x/" + coco(42)[0]])
    files = {}
    for name, document in (("annotations", OKVQA), ("questions", OKVQA_QUESTIONS)):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(document))
    with pytest.raises(ShardError, match="annotations without questions: give with --questions"):
        image_folder.load(photos, json=files["annotations"])
    with pytest.raises(ShardError, match="questions without answers: give it with --questions"):
        image_folder.load(photos, json=files["questions"])
    for place in (photos, photos / "COCO_val2014_{id:012d}.jpg"):
        source = image_folder.load(place, json=files["annotations"], questions=files["questions"])
        (item,) = source.splits["val"]
        assert item.record.texts[0].prompt == "What sport?"
        assert item.record.texts[0].targets == ("race", "race")
        assert item.record.texts[0].id == "421"
        assert item.record.texts[0].meta == {"answer_type": "other", "question_type": "four"}
        assert left_out(source)[0][0] == "unusable text"  # no question of it
    with pytest.raises(ShardError, match=r"nothing to build .*1 x text without image"):
        build(
            "image-folder",
            tmp_path / "out",
            images=photos / "COCO_train2014_{id:012d}.jpg",
            json=files["annotations"],
            questions=files["questions"],
        )


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (
            [{"bild": "a.jpg", "satz": "x"}],
            "the keys bild, satz: known are VizWiz,.*--image-col",
        ),
        (
            [{"image": "a.jpg", "caption": "x", "conversations": []}],
            "with the keys .* it could be LLaVA conversations or a list of captions",
        ),
        ({"images": [{"sentences": []}]}, "harness shards build karpathy"),
        (
            {"annotations": [{"bbox": []}], "images": [{"id": 1}]},
            "annotations has elements w",
        ),
        (["a.jpg"], "is no list of mappings"),
        (5, "neither a list nor a mapping"),
        ([], "no list of mappings"),
    ],
)
def test_a_json_of_no_known_form_is_refused_with_the_keys_that_were_found(tmp_path, document, says):
    with pytest.raises(ShardError, match=says):
        loaded(tmp_path, document, form="json")


def test_any_list_and_lines_of_it_are_read_once_their_fields_are_named(tmp_path):
    rows = [{"bild": "a.jpg", "satz": "x"}, {"bild": "b.jpg", "satz": ["y", "z"]}]
    named = {"image_column": "bild", "caption_column": "satz"}
    expected = {"a.jpg": [["x"]], "b.jpg": [["y", "z"]]}
    assert texts(loaded(tmp_path, rows, form="json", **named)) == expected
    lines = "\n".join(map(json.dumps, rows))
    assert texts(loaded(tmp_path, lines, form="jsonl", **named)) == expected
    with pytest.raises(ShardError, match="is one JSON list, not an object a line"):
        loaded(tmp_path, rows, form="jsonl")


PAGE = Path(__file__).parents[2] / "docs" / "data-forms.md"
COMMANDS = re.findall(r"\| `harness shards build (image-folder [^`]*)` \|", PAGE.read_text())


def write_what_the_page_names(folder):
    names = ["a.jpg", "coco/train2017/000000033471.jpg", "val2014/" + coco(42)[0]]
    names += ["VizWiz_val_00000001.jpg", "VizWiz_train_00000000.jpg", "003a8ae2ef43b901.jpg"]
    names += ["000000461751.jpg", *(f"{n}.jpg" for n in range(12))]
    for place in ("photos", "folder"):
        fill(folder / place, names)
    captions = "".join(f"{n}.jpg,a dog\n" for n in range(12))
    for name, text in {
        "photos/a.txt": "a dog",
        "mine.csv": "Image,Caption\na.jpg,a dog\n",
        "some.csv": "image,caption\na.jpg,a dog\n,a text\n",
        "words.jsonl": '{"question": "one and one?", "answers": ["two"]}',
        "texts.jsonl": '{"image": "a.jpg", "captions": ["a dog"]}',
        "folder/metadata.csv": "file_name,text\na.jpg,a dog\n",
        "captions.txt": f"image,caption\n{captions}",
        "results.csv": "image_name| comment_number| comment\na.jpg| 0| a dog\n",
    }.items():
        (folder / name).write_text(text)
    (folder / "bilder.csv").write_bytes("Bild;Frage;Antwort\na.jpg;Was?;Hündin\n".encode("cp1252"))
    for name, document in {
        "vizwiz": VIZWIZ,
        "vizwiz_captions": VIZWIZ_CAPTIONS,
        "TextVQA_0.5.1_train": TEXTVQA,
        "okvqa": OKVQA,
        "okvqa_questions": OKVQA_QUESTIONS,
        "aokvqa_v1p0_train": AOKVQA,
        "lavis": LAVIS,
        "llava": LLAVA,
        "bilder": [{"Bild": "a.jpg", "Satz": "ein Hund"}],
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(document))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-50:])
def test_each_command_of_the_page_builds_shards(tmp_path, monkeypatch, command):
    write_what_the_page_names(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["build", *shlex.split(command)])
    assert result.exit_code == 0, result.output
    made = [path.parent for path in Path("data/mine").glob("*/index.json")]
    assert sum(Manifest.open(path).samples for path in made) in (
        (1, 2) if "--text-only" in command else (1, 12)
    )
    assert len(made) == (3 if "--dev-share" in command else 1)


def test_the_page_has_a_command_for_every_form():
    assert len(COMMANDS) == 17
