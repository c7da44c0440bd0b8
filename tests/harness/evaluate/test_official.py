"""What is no text is never scored: its file, its place and its field are named, in one sentence."""

import gzip
import json

import pytest

from harness.evaluate.captions import read_caption_results, read_references
from harness.evaluate.compare import evaluation_of
from harness.evaluate.vqa import ScoreError, VQATruth, read_results, read_truths, score
from shards.files import ShardError
from shards.sources import coco_captions, image_folder, vqav2

NO_TEXTS = ["null", "3", "1.5", "NaN", "true", '["a"]', '{"a": 1}']
ASKED = '{"questions": [{"question_id": 7}]}'
SENTENCE = 240  # characters


def file(folder, text, name="file.json"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


@pytest.mark.parametrize("value", NO_TEXTS)
@pytest.mark.parametrize(
    ("text", "read", "place"),
    [
        (
            '[{"question_id": 1, "answer": "a"}, {"question_id": 7, "answer": VALUE}]',
            read_results,
            r'entry 2 \(question_id 7\) has .* as "answer", expected a text',
        ),
        (
            '[{"image_id": 7, "caption": VALUE}]',
            read_caption_results,
            r'entry 1 \(image_id 7\) has .* as "caption", expected a text',
        ),
        (
            '{"images": [{"id": 7}], "annotations": [{"image_id": 7, "caption": VALUE}]}',
            read_references,
            r'entry 1 of annotations \(image_id 7\) has .* as "caption", expected a text',
        ),
        (
            '{"annotations": [{"question_id": 7, "image_id": 1, "answers": [{"answer": "a"}, '
            '{"answer": VALUE}]}]}',
            lambda path: read_truths(file(path.parent, ASKED, "asked.json"), path),
            r'entry 1 \(question_id 7\), answers: entry 2 has .* as "answer", expected a text',
        ),
    ],
    ids=["answer", "caption", "reference caption", "true answer"],
)
def test_a_value_that_is_no_text_is_refused_with_its_place(tmp_path, text, read, place, value):
    path = file(tmp_path, text.replace("VALUE", value))
    with pytest.raises(ScoreError, match=rf"file\.json is not .*{place}"):
        read(path)
    file(tmp_path, text.replace("VALUE", '"none"'))
    assert read(path)


@pytest.mark.parametrize("value", ["null", "NaN", "true", "[]"])
def test_an_id_that_is_neither_a_number_nor_a_text_is_refused_with_its_place(tmp_path, value):
    path = file(tmp_path, f'[{{"question_id": {value}, "answer": "a"}}]')
    with pytest.raises(ScoreError, match=r'entry 1 has .* as "question_id", expected a whole'):
        read_results(path)


def test_a_null_is_not_the_answer_none_which_is_the_official_zero(tmp_path):
    truths = [VQATruth("7", ("0",) * 10)]
    none = read_results(file(tmp_path, '[{"question_id": 7, "answer": "none"}]'))
    assert score(none, [VQATruth("7", ("0",) * 9 + ("1",))]).overall == 100.0
    with pytest.raises(ScoreError, match="has null"):
        score(read_results(file(tmp_path, '[{"question_id": 7, "answer": null}]')), truths)


def test_answers_that_are_no_list_and_questions_without_an_answer_are_named(tmp_path):
    asked = file(tmp_path, ASKED, "asked.json")
    row = '{"annotations": [{"question_id": 7, "image_id": 1, "answers": VALUE}]}'
    with pytest.raises(ScoreError, match=r"\(question_id 7\), answers: found null, expected a li"):
        read_truths(asked, file(tmp_path, row.replace("VALUE", "null")))
    with pytest.raises(ScoreError, match=r"file\.json has no answer to question id 7,"):
        read_truths(asked, file(tmp_path, row.replace("VALUE", "[]")))


LARGE = [{"question_id": n, "answer": "größer", "image_id": n, "caption": "é"} for n in range(9999)]
AS_JSON = json.dumps(LARGE, ensure_ascii=False)
WRONG = {
    "UTF-16": AS_JSON.encode("utf-16"),
    "UTF-16 or UTF-32": AS_JSON.encode("utf-16-le"),  # without a mark
    "UTF-32": AS_JSON.encode("utf-32"),
    r"Latin-1 or Windows-1252 \(.* at byte 33\)": AS_JSON.encode("latin-1"),
    "a gzip file": gzip.compress(AS_JSON.encode()),
    "no text at all": b"[\x01\xff" * 9999,
}


def of_shards(read):
    """A reader of shards, as one of `harness evaluate`: its error is told likewise."""

    def read_it(path):
        try:
            read(path)
        except ShardError as error:
            raise ScoreError(str(error)) from error

    return read_it


READERS = {
    "results": read_results,
    "captions": read_caption_results,
    "references": read_references,
    "truths": lambda path: read_truths(path, path),
    "coco-captions": of_shards(lambda path: coco_captions.load(path.parent, path, "val")),
    "vqav2": of_shards(lambda path: vqav2.load(path.parent, path, "val", path)),
}


@pytest.mark.parametrize("looks_like", WRONG)
@pytest.mark.parametrize("reader", READERS)
def test_wrong_bytes_are_one_short_sentence_that_says_what_they_look_like(
    tmp_path, reader, looks_like
):
    path = file(tmp_path, WRONG[looks_like])
    with pytest.raises(
        ScoreError, match=rf"file\.json is not UTF-8 text: it looks like {looks_like}"
    ) as told:
        READERS[reader](path)
    assert len(str(told.value)) - len(str(path)) < SENTENCE


def test_wrong_bytes_in_an_evaluation_and_in_lines_of_texts_are_one_short_sentence(tmp_path):
    file(tmp_path, WRONG["UTF-16"], "scores.json")
    with pytest.raises(ValueError, match="it looks like UTF-16") as told:
        evaluation_of(tmp_path)
    assert len(str(told.value)) - 2 * len(str(tmp_path)) < SENTENCE
    (tmp_path / "images").mkdir()
    file(tmp_path / "images", b"", "a.jpg")
    lines = file(tmp_path, '{"image": "a.jpg", "text": "a dog"}\n'.encode("utf-16"), "a.jsonl")
    with pytest.raises(ShardError, match=r"a\.jsonl is not UTF-8 text: it looks like UTF-16;"):
        image_folder.load(tmp_path / "images", lines)


def test_a_byte_order_mark_is_read_everywhere(tmp_path):
    def marked(text, name="file.json"):
        return file(tmp_path, b"\xef\xbb\xbf" + text.encode(), name)

    assert read_results(marked('[{"question_id": 7, "answer": "é"}]')) == {"7": "é"}
    assert read_caption_results(marked('[{"image_id": 7, "caption": "é"}]')) == {"7": "é"}
    captions = '{"images": [{"id": 7}], "annotations": [{"image_id": 7, "caption": "é"}]}'
    assert read_references(marked(captions)) == {"7": ["é"]}
    row = '{"question_id": 7, "image_id": 1, "answers": [{"answer": "é"}]}'
    truths = marked(f'{{"annotations": [{row}]}}')
    assert read_truths(marked(ASKED, "asked.json"), truths)[0].answers == ("é",)
    marked('{"tasks": {}, "data": ["here"]}', "scores.json")
    assert evaluation_of(tmp_path)[1] == ["here"]
