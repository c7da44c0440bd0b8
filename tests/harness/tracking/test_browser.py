"""What `harness ui` shows of a run, in a real browser: one server and one Chromium for all.

The run's folder has a name that URIs do not like.
"""

import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from PIL import Image

from browser import CHROMIUM, DRIVER, MISSING, browser, wait_for
from harness.config.schema import Config
from harness.report.pictures import Shown
from harness.tracking.provenance import COMMAND
from harness.tracking.tracker import open_tracker

pytest.importorskip("selenium")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING),
    pytest.mark.slow,
    pytest.mark.timeout(400),  # MLflow's server takes 20 s to start, on a busy machine a minute
]
STEP = 40
TYPED = "harness train configs/flickr8k_t4.yaml out=runs/mine"
TEAL = (0, 128, 128)
# Calls back with the colour of the first picture, once one is there.
FIRST_PICTURE = """
const done = arguments[0];
const look = () => {
    const picture = [...document.images].find(
        each => each.naturalWidth > 0 && /get-artifact|blob:/.test(each.src));
    if (!picture) return setTimeout(look, 200);
    const brush = document.createElement("canvas").getContext("2d");
    brush.drawImage(picture, 0, 0);
    done([...brush.getImageData(9, 9, 1, 1).data]);
};
look();
"""


class Opened(NamedTuple):
    """The printed links by title, the page, and the process of `harness ui`."""

    links: dict[str, str]
    driver: Any
    process: subprocess.Popen


def tracked_run(out: Path) -> None:
    tracker = open_tracker(Config(name="toy", out=str(out)))
    for step in range(1, STEP + 1):
        tracker.metrics({"train/loss": 3 / step, "dev/accuracy": 99 - 90 / step}, step)
    picture = Image.new("RGB", (64, 48), TEAL)
    tracker.predictions([Shown(picture, "What colour?", ("teal",), "teal", True)], STEP)
    tracker.describe(f"**image used** (vqa; dev, step {STEP}). Exchanging images costs 40 points")
    tracker.close()


@pytest.fixture(scope="module")
def opened(tmp_path_factory, monkeypatch_module):
    folder = tmp_path_factory.mktemp("browser")
    out = folder / "a b?ü#c%20"
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch_module.delenv(name)
    monkeypatch_module.setenv(COMMAND, TYPED)
    tracked_run(out)
    with ExitStack() as stack:
        line = [sys.executable, "-u", "-m", "harness", "ui", str(out)]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        links = {}
        for said in process.stdout or ():
            if found := re.fullmatch(r"(\w+ \w+) +(http://127\.0\.0\.1:\d+/\S+)\n", said):
                links[found[1]] = found[2]
            if said.startswith("Ctrl-C"):
                break
        driver = stack.enter_context(browser(folder / "profile"))
        yield Opened(links, driver, process)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_printed_link_opens_the_training_runs_with_the_whole_command(opened):
    opened.driver.get(opened.links["all runs"])
    said = wait_for(opened.driver, 60, "toy", TYPED)
    assert "1 matching run" in said
    assert "Judges" not in said, "the pages for chats with LLMs"


def test_a_run_opens_with_its_verdict_and_its_reason(opened):
    opened.driver.get(opened.links["this run"])
    wait_for(
        opened.driver,
        60,
        "image used (vqa; dev, step 40). Exchanging images costs 40 points",
        TYPED,
    )


def test_figures_are_drawn_over_the_steps(opened):
    run = opened.links["this run"]
    opened.driver.get(run.replace("?", "/model-metrics?"))
    wait_for(opened.driver, 60, "accuracy", "loss", "Step")
    lines = opened.driver.execute_script(
        "return [...document.querySelectorAll('.scatterlayer path.js-line')].map(l => "
        "l.getAttribute('d').split(/[LC]/).length)"
    )
    assert len(lines) >= 2, "loss and accuracy"
    assert min(lines) > 10, "points of a curve"


def test_answers_stand_in_a_table_with_their_pictures(opened):
    run = opened.links["this run"]
    opened.driver.get(run.replace("?", f"/artifacts/answers/step-{STEP:06d}.json?"))
    wait_for(opened.driver, 60, "What colour?", "prediction", "teal")
    seen = opened.driver.execute_async_script(FIRST_PICTURE)
    assert max(abs(a - b) for a, b in zip(seen, TEAL, strict=False)) < 8


def test_ctrl_c_ends_the_server_cleanly(opened):
    children = psutil.Process(opened.process.pid).children(recursive=True)
    assert children
    opened.process.send_signal(signal.SIGINT)
    assert opened.process.wait(30) == 0
    assert not psutil.wait_procs(children, timeout=10)[1]
