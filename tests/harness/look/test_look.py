"""The report of a run and its maps: every score on it is the evaluation's, a planted place is
found, and the page suits a telephone.
"""

import html
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from harness.evaluate.report import read_predictions
from harness.evaluate.run_on_disk import PAGE, evaluate_run, report_run
from harness.look import maps as maps_room
from harness.look.choice import Chooser
from harness.look.occlusion import (
    LEVELS,
    Likelihood,
    Tokens,
    agreement,
    area,
    look,
)
from harness.look.page import confusion
from toy_runs import picture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


# ---- maps ----------------------------------------------------------------------------------------


class Planted(Likelihood):
    """A likelihood that loses a nat for each hidden unit of weight; it counts its masks."""

    def __init__(self, weight_GG):
        self.weight_GG = weight_GG
        levels = LEVELS if len(weight_GG) == LEVELS[-1] else (len(weight_GG),)
        self.hiding = SimpleNamespace(levels=levels)
        self.masks = 0

    def __call__(self, hidden_MGG):
        self.masks += len(hidden_MGG)
        return 0.1 + (hidden_MGG * self.weight_GG).sum(axis=(1, 2))


def test_the_place_that_an_answer_rests_on_is_found_coarse_to_fine_and_deleted_first():
    weight_GG = np.zeros((16, 16))
    weight_GG[5, 9] = 3.0
    weight_GG[5, 10] = 1.0
    weight_GG[14, 2] = -0.5
    likelihood = Planted(weight_GG)
    seen = look(likelihood)
    assert likelihood.masks < 16 * 16 / 2, "fewer than one mask for each cell"
    assert np.unravel_index(seen.heat_GG.argmax(), (16, 16)) == (5, 9)
    assert seen.heat_GG[5, 9] == pytest.approx(3)
    assert seen.heat_GG[12:, :4].sum() == pytest.approx(-0.5), "what hiding it gains is kept"
    assert seen.heat_GG.sum() == pytest.approx(seen.patch_NN.sum()) == pytest.approx(3.5)
    assert np.unravel_index(seen.patch_NN.argmax(), (4, 4)) == (1, 2)
    assert seen.deleted[0] == pytest.approx(np.exp(-0.1))
    assert seen.deleted[1] == pytest.approx(np.exp(-4.1)), "the first sixteenth is all it needs"
    assert area(seen.deleted) < area(seen.deleted_at_random) - 0.2
    flat = look(Planted(np.zeros((16, 16))))
    assert area(flat.deleted) == pytest.approx(area(flat.deleted_at_random))
    assert agreement(seen, seen) == pytest.approx(1)
    assert agreement(seen, flat) is None


def test_what_is_lost_only_when_all_of_a_thing_is_hidden_is_spread_over_it():
    class Large(Planted):
        """Loses three nats when all of the upper left quarter is hidden, and nothing before."""

        def __call__(self, hidden_MGG):
            return 3.0 * hidden_MGG[:, :8, :8].all(axis=(1, 2))

    seen = look(Large(np.zeros((16, 16))), curve=False)
    np.testing.assert_allclose(seen.heat_GG[:8, :8], 3 / 64)
    assert not seen.heat_GG[8:].any()
    assert not seen.heat_GG[:, 8:].any()
    assert not seen.patch_NN.any()


def test_a_part_keeps_what_it_costs_alone_though_its_quarter_costs_nothing():
    class Cut(Planted):
        """Loses four nats when a sixteenth is hidden, and nothing when more is."""

        def __call__(self, hidden_MGG):
            cut_M = hidden_MGG[:, 4:8, 4:8].all(axis=(1, 2))
            return 4.0 * (cut_M & (hidden_MGG.sum(axis=(1, 2)) == 16))

    seen = look(Cut(np.zeros((16, 16))), curve=False)
    np.testing.assert_allclose(seen.heat_GG[4:8, 4:8], 4 / 16)
    assert seen.heat_GG.sum() == pytest.approx(seen.patch_NN.max()) == pytest.approx(4)


def test_tokens_are_left_out_where_the_picture_is_gone_but_the_first_that_has_no_place():
    tokens = Tokens(torch.arange(17.0)[:, None])
    hidden_MGG = np.zeros((3, 4, 4), bool)
    hidden_MGG[1, 0, 2] = True
    hidden_MGG[2] = True
    kept = [patches_PD[:, 0].tolist() for patches_PD in tokens.patches(hidden_MGG)]
    assert kept == [[*range(17)], [n for n in range(17) if n != 3], [0.0]]
    assert Tokens(torch.zeros(256, 2)).levels == (8, 16)


# ---- the page ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(features_run):
    """A run on features, the report of its evaluation, and that which its training had left."""
    left = (features_run.out_dir / PAGE).read_text()
    report = evaluate_run(features_run.out_dir)
    return SimpleNamespace(
        config=features_run,
        out=features_run.out_dir,
        report=report,
        page=(features_run.out_dir / PAGE).read_text(),
        left=left,
    )


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def test_every_score_on_the_page_is_the_evaluations_and_the_verdict_comes_first(trained):
    scores = json.loads((trained.out / "evaluation/scores.json").read_text())
    page = trained.page
    for task, figures in scores["tasks"].items():
        name = "accuracy" if task == "vqa" else "CIDEr"
        shown = figures[name] if task == "vqa" else 100 * figures[name]
        assert f'<div class="figure">{shown:.2f}</div>' in page
        assert figures["verdict"] in page
        assert html.escape(figures["reason"], quote=False) in html.unescape(page)
        for known in figures.get("per_answer_type_intervals", {}).values():
            assert f"{known['value']:.1f} [{known['low']:.1f}, {known['high']:.1f}]" in page
    places = [
        page.index(part)
        for part in ('class="verdict', "score and floors", ">Curves<", "Scores with intervals")
    ]
    assert places == sorted(places)
    lines = len(read_predictions(trained.out / "evaluation"))
    assert lines == sum(figures["texts"] for figures in scores["tasks"].values())


def test_the_page_needs_nothing_beside_it_and_tells_what_its_pictures_are(trained):
    for page in (trained.page, trained.left):
        assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
        assert not re.findall(r"https?://|url\(|@import|<script", page)
        images = re.findall(r"<img\b[^>]*>", page)
        assert len(images) > 4
        assert all(re.search(r'alt="[^"]+"', image) for image in images)
        assert all("aria-label" in svg for svg in re.findall(r"<svg\b[^>]*>", page))
        assert "prefers-color-scheme: dark" in page
    assert "exchange noticed" in trained.left or "not enough evidence" in trained.left


def test_maps_are_made_of_the_pictures_or_of_tokens_where_these_are_gone(
    trained, look_root, tmp_path
):
    page = report_run(trained.out, file=tmp_path / "a.html", maps=2).read_text()
    assert page.count('alt="map of picture') == 4, "two of each task"
    assert "random weights" in page
    assert "patch tokens are left out" not in page
    shutil.move(look_root / "dev", look_root / "away")
    try:
        page = report_run(trained.out, file=tmp_path / "b.html", maps=1).read_text()
    finally:
        shutil.move(look_root / "away", look_root / "dev")
    assert "of 1 pictures patch tokens are left out" in page
    assert 'alt="map of picture 1' in page


def test_a_random_bridge_is_another_and_the_models_own_comes_back(trained, look_root, monkeypatch):
    from harness import load
    from shards.manifest import Manifest

    model = load(trained.out)
    own = model.bridge
    rows = [row for row in read_predictions(trained.out / "evaluation") if row["task"] == "vqa"]
    manifests = [Manifest.open(look_root / "features/dev")]
    chosen = Chooser(model, trained.config, manifests, rows).random()
    assert 0 < chosen[0].confidence < 1
    made = maps_room.Mapper(model, trained.config).maps(chosen[:2])
    assert model.bridge is own
    assert not np.allclose(made.mapped[0].look.patch_NN, made.mapped[0].random.patch_NN)
    again = maps_room.Mapper(model, trained.config).maps(chosen[:2])
    np.testing.assert_array_equal(made.mapped[1].random.heat_GG, again.mapped[1].random.heat_GG)
    late = maps_room.Mapper(model, trained.config).maps(chosen[:2], seconds=-1)
    assert late.mapped == []
    assert late.told == [
        "0 of 2 pictures: the others would have taken more than -1 s (harness report --maps 2 "
        "makes them all)"
    ]


def test_what_is_confused_is_counted_and_what_is_left_out_is_told():
    rows = [{"truth": t, "answer": a} for t, a in [("red", "red"), ("red", ""), ("blue", "red")]]
    table = confusion(rows)
    assert table["columns"] == ["red", "blue", "(empty)"]
    assert table["rows"][0] == ("red", [(1, 0.5, True), (0, 0, False), (1, 0.5, False)])
    assert table["left"] == 0
    many = [{"truth": str(n), "answer": "x"} for n in range(20)]
    assert confusion(many)["left"] == 8


def test_a_picture_is_asked_about_and_the_map_is_drawn(trained, harness, tmp_path):
    file = tmp_path / "red square.png"
    file.write_bytes(picture(0))
    out = tmp_path / "seen.png"
    asked = ("look", trained.out, "--image", file, "--prompt", "what colour is it?", "--out", out)
    code, said, errors = harness(*asked)
    assert code == 0, errors
    assert said.splitlines()[-1] == str(out)
    with Image.open(out) as drawn:
        assert drawn.width > drawn.height > 448
    code, _, errors = harness(*asked[:-1], tmp_path / "seen.jpg")
    assert code == 2
    assert "give a name that ends in .png" in errors


def test_a_report_of_what_was_not_evaluated_is_refused_in_a_sentence(trained, harness, look_root):
    code, _, errors = harness("report", trained.out, "--data", look_root / "train")
    assert code == 2
    assert "holds no scores.json: harness evaluate" in errors
    scores = trained.out / "evaluation/scores.json"
    kept = scores.read_text()
    try:
        scores.write_text(json.dumps(json.loads(kept) | {"step": 1}))
        code, _, errors = harness("report", trained.out)
    finally:
        scores.write_text(kept)
    assert code == 2
    assert "is of step 1" in errors


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: the page's width needs a browser")
def test_the_page_has_no_horizontal_scroll_on_a_telephone(trained, tmp_path):
    page = tmp_path / "page.html"
    tells = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
    page.write_text(trained.page.replace("</body>", tells))
    telephone = tmp_path / "telephone.html"  # a window is never narrower than 500 pixels
    telephone.write_text(
        "<title></title><script>onmessage = said => { document.title = said.data }</script>"
        f'<iframe width="390" height="844" style="border: 0" src="{page.as_uri()}"></iframe>'
    )
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000")
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-sync")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    found = subprocess.run(
        [CHROMIUM, *options, *quiet, profile, "--dump-dom", telephone.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    width = int(re.search(r"<title>(\d+)</title>", found)[1])
    assert width <= 390
