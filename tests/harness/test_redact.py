"""Secrets are masked in whatever form, texts are not mangled, no terminal gets anything raw."""

import ast
import io
import json
import logging
import subprocess
import sys
import time

import pytest
from rich.console import Console

from harness import redact
from harness.config.load import dump, load
from harness.config.schema import Config
from harness.errors import ConfigError, explain
from harness.redact import clean, masked, printable
from harness.report.pictures import Shown
from harness.report.terminal import Terminal
from imports import modules
from secret_forms import FORMS, SECRET


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_is_masked_in_every_form_and_a_second_time_changes_nothing(form):
    once = masked(form)
    assert SECRET not in once
    assert masked(once) == once
    inside = masked(f"cannot open '{form}' (attempt 2): {form}, see {{'x': '{form}'}}")
    assert SECRET not in inside
    assert inside.startswith("cannot open '")


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/runs/a@b",
        "http://[::1]:5000/a@b",
        "sqlite:////home/me/runs/mlflow.db",
        "postgresql://me@db.example.org/mlflow",
        "s3://bucket/model@v1/train",
        "hf://datasets/me/set@main/train",
        "abfs://container@account.dfs.core.windows.net/x",
        "override 'x': expected key=value, for instance train.epochs=2",
        "model.bridge.query_tokens=32 max_new_tokens=3 nats per token 1.25",
        "sample 3, key 000123, token: expected a text",
        "Question: {prompt} Short answer:",
        "basic information about the signature of a design=3",
    ],
)
def test_what_is_no_secret_stays_as_it_is(text):
    assert masked(text) == text


def test_a_long_text_is_masked_in_little_time():
    begun = time.monotonic()
    for text in ("a" * 200_000, "://a:" * 40_000, "token" * 40_000, "a:b" * 60_000):
        masked(text)
    assert time.monotonic() - begun < 20


def test_a_config_is_written_masked_and_read_back_whole_where_the_secret_is_known(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(redact, "_hidden", {})
    monkeypatch.setattr(redact, "_known", set())
    real = f"https://me:{SECRET}@store.example.org/train"
    (tmp_path / "given.yaml").write_text(
        f"name: a\ndata: {{train: [{{path: '{real}'}}]}}\nmodel: {{lm: {{id: me/x}}}}\n"
    )
    config = load(tmp_path / "given.yaml")
    (tmp_path / "written.yaml").write_text(dump(config))
    assert SECRET not in (tmp_path / "written.yaml").read_text()
    assert load(tmp_path / "written.yaml") == config, "this process was given it in full"
    variables = redact.for_children()
    monkeypatch.setattr(redact, "_hidden", {})
    assert load(tmp_path / "written.yaml").data.train[0].path == masked(real)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert load(tmp_path / "written.yaml") == config, "its parent was"


def test_what_a_server_echoes_is_masked_by_its_value(monkeypatch):
    monkeypatch.setattr(redact, "_known", set())
    redact.remember([f"http://me:{SECRET}%40x@host"])
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "dapi-and-more")
    echoed = clean(f"no user with {SECRET}@x or {SECRET}%40x or dapi-and-more")
    assert echoed == "no user with *** or *** or ***"


HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b1m\u202egnp\x08\r\u2066\ud800\U000e0041 [bold]b[/bold]"
SHOWN_SAFELY = (
    "a\\u001b[31mred\\u001b]0;title\\u0007\\u009b1m\\u202egnp\\b\\r\\u2066\\ud800\\udb40\\udc41"
    " [bold]b[/bold]"
)


def test_what_a_terminal_would_obey_is_written_out():
    assert printable(HOSTILE) == SHOWN_SAFELY
    assert printable("Bäume\n\t日本語 👩‍👩‍👧 עברית") == "Bäume\n\t日本語 👩‍👩‍👧 עברית"
    assert json.loads(printable(json.dumps([HOSTILE], ensure_ascii=False))) == [HOSTILE]
    assert explain(ConfigError(HOSTILE)) == SHOWN_SAFELY.replace("\\r", " ")


def test_the_terminal_of_a_run_shows_prompts_captions_and_answers_literally():
    terminal = Terminal(True)
    terminal.console = Console(file=io.StringIO(), width=400, emoji=False)
    terminal.answers([Shown(None, HOSTILE, (HOSTILE,), HOSTILE)])
    terminal.say(HOSTILE)
    said = terminal.console.file.getvalue()
    assert said.count(SHOWN_SAFELY) == 4
    assert not [c for c in said if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0]


def test_log_records_warnings_and_tracebacks_are_cleaned_too():
    program = f"""
import logging, warnings
from harness.redact import guard_output
guard_output()
logging.getLogger("of.another.library").warning("to %s", "https://me:{SECRET}@host/\\x1b[31m")
warnings.warn("password={SECRET}")
try:
    raise OSError("token={SECRET}\\x1b[31m")
except OSError:
    logging.exception("failed")
raise RuntimeError("https://me:{SECRET}@host/\\x1b[31m")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert SECRET not in said.replace("raise ", "").replace(program, "")
    assert "\x1b" not in said
    assert "RuntimeError: https://***@host/\\u001b[31m" in said
    assert "OSError: token=***" in said
    assert "to https://***@host/" in said


def calls_of(tree: ast.Module, name: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_no_module_prints_past_the_one_that_cleans():
    past = {
        name: lines
        for name, file in modules().items()
        if name != "harness.redact" and (lines := calls_of(ast.parse(file.read_text()), "print"))
    }
    assert not past


# They name it among what a user's Auto class or pipeline hands on, and take it out.
DROPS_IT = ("harness.hub.modeling", "harness.model.arguments")


def test_no_code_of_ours_trusts_code_of_others():
    allowed = [
        f"{name}:{node.lineno}"
        for name, file in modules().items()
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.keyword) and node.arg == "trust_remote_code")
        or (
            isinstance(node, ast.Constant)
            and node.value == "trust_remote_code"
            and name not in DROPS_IT
        )
        or (isinstance(node, ast.Name | ast.Attribute) and "trust_remote_code" in ast.dump(node))
    ]
    assert not allowed, "not even as False: it is false unless somebody says otherwise"


def test_the_mask_is_logged_by_name_alone(caplog):
    config = Config(name="x", tracking={"uri": f"http://me:{SECRET}@h"})
    logging.getLogger("harness").warning("%s", dump(config))
    assert SECRET not in caplog.text
