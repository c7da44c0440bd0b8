"""A frozen part is where its hash is: below the model, where it was, beside the run, on the hub."""

from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.model.places import Found, Part, find

RIGHT = "a" * 64


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """The folder of a model in a run; the working folder is another one."""
    folder = tmp_path / "runs" / "mine" / "checkpoints" / "step-000002" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def put(folder: Path, said: str = RIGHT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hash").write_text(said)
    return folder


def look(place: str) -> Found:
    file = Path(place) / "hash"
    if not file.is_file():
        raise ConfigError("it holds no weights")
    return Found(place, file.read_text(), None)


def found(model: Path, name: str, given: str | None = None) -> Path:
    part = Part("base language model", "lm", name, RIGHT)
    return Path(find(part, model, given, look).place).resolve()


def test_each_place_is_looked_at_in_its_turn_and_one_with_another_hash_is_passed_over(model):
    root = model.parents[4]
    places = [
        model / "lms" / "base",
        root / "work" / "lms" / "base",
        model.parents[2] / "base",
        root / "runs" / "base",
        root / "lms" / "base",
        root / "base",
    ]
    for last in range(1, len(places) + 1):
        for place in places[:last]:
            put(place, "b" * 64)
        right = put(places[last - 1])
        assert found(model, "lms/base") == right


def test_an_absolute_path_is_looked_for_by_its_last_name_alone(model):
    put(model / "gone" / "base", "b" * 64)
    right = put(model.parents[2] / "base")
    assert found(model, "/gone/base") == right


def test_what_is_given_is_taken_or_refused_whatever_lies_elsewhere(model, tmp_path):
    put(model / "base")
    assert found(model, "base", str(put(tmp_path / "other"))) == tmp_path / "other"
    put(tmp_path / "other", "c" * 64)
    with pytest.raises(ConfigError, match=r"other \(has hash cccccccccccc\): give .* --lm PATH"):
        found(model, "base", str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="it holds no weights"):
        found(model, "base", "nowhere")


def test_a_name_of_the_hub_is_asked_for_last_and_a_path_never(model):
    asked = []

    def nothing(place: str) -> Found:
        asked.append(place)
        raise ConfigError("x") from OSError("the hub is away. It is")

    put(model / "flan-t5-base")
    for name, expected in (("google/flan-t5-base", 2), ("runs/flan-t5-base", 1), ("~/a/b", 0)):
        asked.clear()
        part = Part("base language model", "lm", name, RIGHT)
        with pytest.raises(ConfigError, match="is not found; looked at") as error:
            find(part, model, None, nothing)
        assert len(asked) == expected
        assert (name in asked) == (expected == 2)
        assert str(error.value).count("(the hub is away)") == expected
    assert str(model) in str(error.value)


def test_all_places_are_named_with_what_is_wrong_with_them(model):
    put(model / "base", "b" * 64)
    model.parents[2].joinpath("base").mkdir()
    with pytest.raises(ConfigError) as error:
        found(model, "/gone/base")
    sentence = str(error.value)
    assert "base (has hash bbbbbbbbbbbb)" in sentence
    assert f"{model.parents[2] / 'base'} (it holds no weights)" in sentence
    assert f"for a folder base in {model} and up to {model.parents[4]}" in sentence
    assert "--lm PATH (in Python lm=PATH)" in sentence
