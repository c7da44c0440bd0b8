"""Every source on official files: real ones cut down to a few lines (tests/data), and whole ones
where they are.
"""

import json
import shutil
import zipfile
from collections import Counter

import pytest

from pictures import FLICKR8K, FLICKR8K_IMAGES, OFFICIAL, fill, picture
from shards.files import ShardError
from shards.sources import coco_captions, easy_vqa, flickr8k, image_folder, karpathy, vqav2
from shards.sources.source import keys_of

QUESTIONS = OFFICIAL / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = OFFICIAL / "vqav2" / "v2_mscoco_val2014_annotations.json"
PAIRS = OFFICIAL / "vqav2" / "v2_mscoco_val2014_complementary_pairs.json"


def coco_name(image_id: int) -> str:
    return f"COCO_val2014_{image_id:012d}.jpg"


def dirt(source) -> list[tuple[str, str]]:
    return sorted((skipped.kind, skipped.name) for skipped in source.skipped)


def keys(source) -> dict[str, list[str]]:
    return {split: [item.record.key for item in items] for split, items in source.splits.items()}


@pytest.fixture
def flickr_images(tmp_path):
    return fill(tmp_path / "Flicker8k_Dataset", FLICKR8K_IMAGES)


@pytest.fixture
def coco_images(tmp_path):
    return fill(tmp_path / "val2014", map(coco_name, (42, 73, 74, 133)))


def edited(tmp_path, path, change):
    """A copy of a JSON file after `change(document)`."""
    document = json.loads(path.read_text())
    change(document)
    copy = tmp_path / path.name
    copy.write_text(json.dumps(document))
    return copy


# Flickr8k


def test_flickr8k_gives_one_record_an_image_with_its_captions_as_targets_of_one_text(flickr_images):
    source = flickr8k.load(flickr_images, FLICKR8K / "Flickr8k.token.txt", FLICKR8K)
    assert keys(source) == {
        "train": ["1000268201_693b08cb0e", "1859726819_9a793b3b44"],
        "dev": ["2090545563_a4e66ec76b"],
        "test": ["3385593926_d3e9c21170"],
    }
    (text,) = source.splits["dev"][0].record.texts
    assert text.id == source.splits["dev"][0].record.image_id == "2090545563_a4e66ec76b"
    assert (text.task, text.prompt, len(text.targets)) == ("caption", None, 5)
    assert text.targets[2] == "Two people play on a long skateboard ."


def test_flickr8k_names_captions_without_image_and_images_in_no_split(flickr_images):
    fill(flickr_images, ["stranger.jpg"])
    source = flickr8k.load(flickr_images, FLICKR8K / "Flickr8k.token.txt", FLICKR8K)
    assert dirt(source) == [
        ("image without text", "stranger.jpg"),
        ("in no split", "1155138244_859fd6e079.jpg"),
        ("in no split", "2428275562_4bde2bc5ea.jpg"),
        ("text without image", "2258277193_586949ec62.jpg"),
        ("text without image", "2258277193_586949ec62.jpg.1"),
    ]
    assert [s.texts for s in source.skipped if s.kind == "text without image"] == [1, 4]


def test_the_captions_csv_with_quotes_and_commas_says_the_same_as_the_token_file(flickr_images):
    tokens = flickr8k.load(flickr_images, FLICKR8K / "Flickr8k.token.txt", FLICKR8K)
    csv = flickr8k.load(flickr_images, FLICKR8K / "captions.txt", FLICKR8K)
    assert csv.splits == tokens.splits
    (text,) = csv.splits["train"][1].record.texts
    assert text.targets[3].endswith('with a neon sign saying , " Red Light . "')


def test_a_file_saved_on_windows_says_the_same(tmp_path, flickr_images):
    windows = tmp_path / "token.txt"
    windows.write_bytes(
        b"\xef\xbb\xbf" + (FLICKR8K / "Flickr8k.token.txt").read_bytes().replace(b"\n", b"\r\n")
    )
    official = flickr8k.load(flickr_images, FLICKR8K / "Flickr8k.token.txt")
    assert flickr8k.load(flickr_images, windows).splits == official.splits


def test_the_official_zip_is_read_in_place_past_its_resource_forks(tmp_path, flickr_images):
    archive = tmp_path / "Flickr8k_Dataset.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in flickr_images.iterdir():
            file.write(path, f"Flicker8k_Dataset/{path.name}")
            file.writestr(f"__MACOSX/Flicker8k_Dataset/._{path.name}", b"resource fork")
    source = flickr8k.load(archive, FLICKR8K / "Flickr8k.token.txt", FLICKR8K)
    folder = flickr8k.load(flickr_images, FLICKR8K / "Flickr8k.token.txt", FLICKR8K)
    assert [i.record for i in source.splits["train"]] == [i.record for i in folder.splits["train"]]
    assert dirt(source) == dirt(folder)
    item = source.splits["train"][0]
    assert source.images.read(item.image) == picture("1000268201_693b08cb0e.jpg")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "Flicker8k_Dataset",
        "Flickr8k_Dataset.zip",
    ]


def test_without_split_files_everything_is_train_and_that_is_said(flickr_images):
    source = flickr8k.load(flickr_images, FLICKR8K / "captions.txt")
    assert len(source.splits["train"]) == 6
    assert source.notes["images put into 'train', since no --splits was given"] == 6
    assert source.notes["captions of one word, kept"] == 1


def test_empty_captions_are_left_out_and_named(tmp_path, flickr_images):
    captions = tmp_path / "token.txt"
    captions.write_text(
        "1000268201_693b08cb0e.jpg#0\t \n1000268201_693b08cb0e.jpg#1\tA child "
        ".\n1155138244_859fd6e079.jpg#0\t\n"
    )
    source = flickr8k.load(flickr_images, captions)
    assert [item.record.texts[0].targets for item in source.splits["train"]] == [("A child .",)]
    empty = [s for s in source.skipped if s.kind == "empty text"]
    assert [(s.name, s.texts) for s in empty] == [
        ("1000268201_693b08cb0e.jpg", 1),
        ("1155138244_859fd6e079.jpg", 1),
    ]
    assert ("image without text", "1155138244_859fd6e079.jpg") in dirt(source)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a.jpg#0 no tab\n", r"line 1 is 'a.jpg#0 no tab'"),
        ("a.jpg#0\tone\na.jpg#0\ttwo\n", r"the caption a.jpg#0 occurs 2 times"),
        ("image,caption\na.jpg,one,two\n", r"line 2: 3 columns"),
        ('image,caption\na.jpg,"one\n', r"line 2: unexpected end of data"),
        ("", r"holds no caption"),
        (b"a.jpg#0\t\xff\n", r"is not UTF-8 text"),
    ],
)
def test_a_captions_file_of_another_format_is_refused_by_line(
    tmp_path, flickr_images, content, says
):
    path = tmp_path / "captions"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ShardError, match=says):
        flickr8k.load(flickr_images, path)


def test_an_image_in_two_splits_is_refused(tmp_path, flickr_images):
    shutil.copytree(FLICKR8K, tmp_path / "splits")
    with open(tmp_path / "splits" / "Flickr_8k.testImages.txt", "a") as file:
        file.write("2090545563_a4e66ec76b.jpg\n")
    with pytest.raises(
        ShardError, match=r"2090545563_a4e66ec76b.jpg is in the split dev and in test"
    ):
        flickr8k.load(flickr_images, FLICKR8K / "Flickr8k.token.txt", tmp_path / "splits")


def test_two_images_of_one_name_are_refused_rather_than_guessed(flickr_images):
    fill(flickr_images, ["original_size/1000268201_693b08cb0e.jpg"])
    with pytest.raises(ShardError, match=r"holds two images called 1000268201_693b08cb0e\.jpg"):
        flickr8k.load(flickr_images, FLICKR8K / "Flickr8k.token.txt")


def test_missing_places_are_named_with_their_option(tmp_path, flickr_images):
    token = FLICKR8K / "Flickr8k.token.txt"
    with pytest.raises(ShardError, match=r"no folder or zip of images at .*nowhere"):
        flickr8k.load(tmp_path / "nowhere", token)
    with pytest.raises(ShardError, match=r"--captions .*nowhere cannot be read: No such file"):
        flickr8k.load(flickr_images, tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"--splits .*nowhere is no folder"):
        flickr8k.load(flickr_images, token, tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"--splits .* holds no split file"):
        flickr8k.load(flickr_images, token, flickr_images)
    with pytest.raises(ShardError, match="neither a folder of images nor a whole zip"):
        flickr8k.load(token, token)


# VQAv2


def test_vqav2_gives_one_record_an_image_with_ten_answers_in_order(coco_images):
    source = vqav2.load(coco_images, QUESTIONS, "val", ANNOTATIONS, pairs=PAIRS)
    assert keys(source) == {"val": ["000000000042", "000000000073", "000000000074", "000000000133"]}
    record = source.splits["val"][0].record
    assert record.image_id == "42"
    first, second = record.texts
    assert (first.id, first.task, first.prompt) == ("42000", "vqa", "What color are the gym shoes?")
    assert first.targets == ("white",) * 4 + ("white and black",) + ("white",) * 5
    assert first.meta == {
        "answer_type": "other",
        "question_type": "what color are the",
        "pair_id": "73000",
    }
    assert source.splits["val"][1].record.texts[0].meta["pair_id"] == "42000"
    assert second.meta["pair_id"] is None, "its partner is not in the questions"
    assert source.notes["questions whose complementary question is not in --questions"] == 1


def test_vqav2_images_that_are_not_on_disk_are_named(coco_images):
    (coco_images / coco_name(73)).unlink()
    source = vqav2.load(coco_images, QUESTIONS, "val", ANNOTATIONS)
    assert len(source.splits["val"]) == 3
    (skipped,) = source.skipped
    assert (skipped.kind, skipped.name, skipped.texts) == ("text without image", coco_name(73), 2)


def test_one_folder_may_hold_the_images_of_both_splits(tmp_path, coco_images):
    fill(
        coco_images.parent,
        ["train2014/COCO_train2014_000000000042.jpg", "val2014/" + coco_name(999)],
    )
    source = vqav2.load(coco_images.parent, QUESTIONS, "val", ANNOTATIONS)
    assert len(source.splits["val"]) == 4
    assert dirt(source) == [("image without text", f"val2014/{coco_name(999)}")]


def test_limit_draws_images_by_seed_and_keeps_complementary_pairs_together(coco_images):
    drawn = {}
    for limit in (1, 2, 3):
        for seed in range(8):
            source = vqav2.load(
                coco_images, QUESTIONS, "val", ANNOTATIONS, pairs=PAIRS, limit=limit, seed=seed
            )
            chosen = {item.record.image_id for item in source.splits["val"]}
            assert ("42" in chosen) == ("73" in chosen), (
                "question 42000 and 73000 are a complementary pair"
            )
            assert len(chosen) <= limit
            assert source.notes["images not drawn by --limit"] == 4 - len(chosen)
            drawn[limit, seed] = chosen
    assert len({frozenset(drawn[2, seed]) for seed in range(8)}) > 1
    again = vqav2.load(coco_images, QUESTIONS, "val", ANNOTATIONS, pairs=PAIRS, limit=2, seed=3)
    assert {item.record.image_id for item in again.splits["val"]} == drawn[2, 3]


def test_limit_does_not_stall_where_all_images_hang_together():
    """In the whole of VQAv2 complementary pairs join nearly all images: no group of them would fit
    a limit.
    """
    chain = [(n, n + 1) for n in range(999)]
    drawn = vqav2._draw(set(range(1000)), chain, limit=300, seed=0)
    assert 297 <= len(drawn) <= 300
    cut = sum((a in drawn) != (b in drawn) for a, b in chain)
    assert cut < 200, "an image comes with the partners of its own questions"


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (
            ANNOTATIONS,
            lambda d: d["annotations"].pop(0),
            r"question 42000 has no annotation .*\(1 such\)",
        ),
        (
            QUESTIONS,
            lambda d: d["questions"].pop(),
            r"annotation 133001 has no question .*\(1 such\)",
        ),
        (
            QUESTIONS,
            lambda d: d["questions"].append(d["questions"][2]),
            r"question_id 73000 occurs 2 times",
        ),
        (
            ANNOTATIONS,
            lambda d: d["annotations"].append(d["annotations"][2]),
            r"question_id 73000 occurs 2 times",
        ),
        (
            ANNOTATIONS,
            lambda d: d["annotations"][0].update(image_id=7),
            r"question 42000 is about image 42 .* image 7",
        ),
        (
            QUESTIONS,
            lambda d: d["questions"][1].pop("question"),
            r"questions\[1\] has no field 'question'",
        ),
        (QUESTIONS, lambda d: d.pop("questions"), r"has no list 'questions'"),
        (
            QUESTIONS,
            lambda d: d["questions"][0].update(image_id="42"),
            r"image_id '42' is not a whole number",
        ),
        (
            QUESTIONS,
            lambda d: d.update(data_subtype="train2014"),
            r"are of train2014, but --split is val",
        ),
    ],
)
def test_vqav2_files_that_do_not_belong_together_are_refused(
    tmp_path, coco_images, file, change, says
):
    copy = edited(tmp_path, file, change)
    files = {QUESTIONS: QUESTIONS, ANNOTATIONS: ANNOTATIONS, file: copy}
    with pytest.raises(ShardError, match=says):
        vqav2.load(coco_images, files[QUESTIONS], "val", files[ANNOTATIONS])


def test_vqav2_needs_annotations_but_for_the_splits_whose_answers_are_withheld(coco_images):
    with pytest.raises(
        ShardError, match="--split val needs --annotations: only those of test and test-dev"
    ):
        vqav2.load(coco_images, QUESTIONS, "val")
    with pytest.raises(ShardError, match="are of val2014, but --split is test"):
        vqav2.load(coco_images, QUESTIONS, "test")


def test_questions_without_words_or_answers_are_left_out_and_named(tmp_path, coco_images):
    questions = edited(tmp_path, QUESTIONS, lambda d: d["questions"][0].update(question=" "))
    blank = [{"answer": "", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    annotations = edited(tmp_path, ANNOTATIONS, lambda d: d["annotations"][2].update(answers=blank))
    source = vqav2.load(coco_images, questions, "val", annotations)
    assert dirt(source) == [("empty text", "42000"), ("empty text", "73000")]
    assert [len(item.record.texts) for item in source.splits["val"]] == [1, 1, 2, 2]


# COCO captions and Karpathy's files


def test_coco_captions_are_joined_by_image_and_trimmed(coco_images):
    source = coco_captions.load(
        coco_images, OFFICIAL / "coco_captions" / "captions_val2014.json", "val"
    )
    assert keys(source) == {"val": ["000000000042", "000000000073", "000000000133"]}
    assert source.splits["val"][0].record.texts[0].targets == (
        "A dog lies on a row of shoes.",
        "This wire metal rack holds several pairs of shoes and sandals",
    )
    assert source.notes["captions with outer whitespace, trimmed"] == 1
    assert dirt(source) == [
        ("empty text", coco_name(73)),
        ("image without text", coco_name(74)),
        ("text without image", "777"),
    ]


def test_coco_caption_ids_must_be_unique(tmp_path, coco_images):
    file = OFFICIAL / "coco_captions" / "captions_val2014.json"
    copy = edited(tmp_path, file, lambda d: d["annotations"][1].update(id=1))
    with pytest.raises(ShardError, match="the caption id 1 occurs 2 times"):
        coco_captions.load(coco_images, copy, "val")


def test_karpathy_files_keep_their_splits_and_restval_is_train(flickr_images, coco_images):
    flickr = karpathy.load(flickr_images, OFFICIAL / "karpathy" / "dataset_flickr8k.json")
    assert flickr.dataset == "flickr8k"
    assert {split: len(items) for split, items in flickr.splits.items()} == {
        "train": 1,
        "val": 1,
        "test": 1,
    }
    coco = karpathy.load(coco_images, OFFICIAL / "karpathy" / "dataset_coco.json")
    assert keys(coco) == {"train": ["000000000042"], "test": ["000000000073"]}
    assert coco.splits["train"][0].record.image_id == "42"
    assert coco.notes["images of 'restval', put into 'train'"] == 1


def test_a_karpathy_file_with_an_unknown_split_is_refused(tmp_path, flickr_images):
    file = OFFICIAL / "karpathy" / "dataset_flickr8k.json"
    copy = edited(tmp_path, file, lambda d: d["images"][0].update(split="trian"))
    with pytest.raises(
        ShardError, match="in the split 'trian', expected one of train, restval, val, test"
    ):
        karpathy.load(flickr_images, copy)


# easy-VQA


def test_easy_vqa_has_a_fixed_dev_split_taken_from_training_images_alone():
    pytest.importorskip("easy_vqa", reason="the package easy-vqa is not installed")
    source = easy_vqa.load()
    images = {
        split: {item.record.image_id for item in items} for split, items in source.splits.items()
    }
    texts = {
        split: sum(len(item.record.texts) for item in items)
        for split, items in source.splits.items()
    }
    assert {split: len(ids) for split, ids in images.items()} == {
        "train": 3600,
        "dev": 400,
        "test": 1000,
    }
    assert (texts["train"] + texts["dev"], texts["test"]) == (38_575, 9_673)
    assert not images["train"] & images["dev"]
    assert sorted(images["dev"])[:3] == ["train-0011", "train-0013", "train-0050"], (
        "drawn anew, no figure compares"
    )
    every = [t for items in source.splits.values() for item in items for t in item.record.texts]
    assert len({t.id for t in every}) == len(every)
    assert Counter(t.meta["answer_type"] for t in every)["yes/no"] == sum(
        t.targets[0] in ("yes", "no") for t in every
    )
    assert {t.meta["question_type"] for t in every} == {
        "presence",
        "absence",
        "what color",
        "what shape",
    }
    assert not source.skipped


def test_a_limit_takes_the_first_images_of_each_split_of_easy_vqa():
    pytest.importorskip("easy_vqa", reason="the package easy-vqa is not installed")
    source, few = easy_vqa.load(), easy_vqa.load(limit=7)
    assert few.splits == {split: items[:7] for split, items in source.splits.items()}
    assert few.notes["images not taken, by --limit"] == 5000 - 3 * 7
    with pytest.raises(ShardError, match="--limit is 0"):
        easy_vqa.load(limit=0)


# Own images


def test_image_folder_joins_the_lines_of_an_image_into_one_record(tmp_path):
    images = fill(tmp_path, ["cats/1.jpg", "dogs/1.jpg", "dogs/2.jpg", "dogs/4.jpg", "dogs/5.png"])
    source = image_folder.load(images, OFFICIAL / "image_folder" / "texts.jsonl")
    (cat,) = source.splits["train"]
    caption, question = cat.record.texts
    assert caption.targets == ("A cat on a chair.", "A grey cat, asleep.")
    assert (question.id, question.prompt, question.targets) == (
        "q-cat",
        "What animal is it?",
        ("cat", "cat", "kitten"),
    )
    dogs = [item.record for item in source.splits["val"]]
    assert [dog.texts[0].task for dog in dogs] == ["caption", "vqa"]
    assert dogs[1].texts[0].targets == ("yes",)
    assert source.notes["field 'width' ignored"] == 1
    assert dirt(source) == [
        ("empty text", "dogs/4.jpg"),
        ("image without text", "dogs/4.jpg"),
        ("image without text", "dogs/5.png"),
        ("text without image", "dogs/3.jpg"),
    ]
    for record in [cat.record, *dogs]:
        record.check()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ['{"image": "a.jpg", "text": "x"}', '{"image": "a.jpg", "text": "y", "split": "val"}'],
            "line 2: a.jpg is in the split 'val', and in 'train' in line 1",
        ),
        (
            [
                '{"image": "a.jpg", "text": "x", "id": 1}',
                '{"image": "b.jpg", "text": "y", "id": "1"}',
            ],
            "the id '1' occurs",
        ),
    ],
)
def test_lines_that_contradict_each_other_are_refused_by_number(tmp_path, lines, says):
    images = fill(tmp_path / "images", ["a.jpg", "b.jpg"])
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    with pytest.raises(ShardError, match=says):
        image_folder.load(images, tmp_path / "texts.jsonl")


def test_keys_are_stems_where_these_are_clean_and_unique():
    keys = keys_of(
        ["a/1.jpg", "b/1.jpg", "b/two.jpg", "b/th ree.v2.jpg", "b/" + "x" * 200 + ".jpg"]
    )
    assert keys["b/two.jpg"] == "two"
    assert keys["a/1.jpg"].startswith("a_1-")
    assert keys["a/1.jpg"][4:] != keys["b/1.jpg"][4:]
    assert keys["b/th ree.v2.jpg"].startswith("b_th_ree_v2-")
    assert max(map(len, keys.values())) <= 90


# The real files
