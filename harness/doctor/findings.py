"""What a check of `harness doctor` answers, and how the answers are shown.

A name and a function -> its Findings; a function that raises costs the others nothing and is an
error line itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.errors import explain
from harness.redact import clean

State = Literal["OK", "warning", "error"]
COLOURS: dict[State, str] = {"OK": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, what was found, and what to do about it."""

    name: str
    state: State
    found: str
    fix: str = ""


Check = Callable[[], Finding | Iterable[Finding] | None]


def ok(name: str, found: str, fix: str = "") -> Finding:
    """Returns the line of what is as it should be."""
    return Finding(name, "OK", found, fix)


def warning(name: str, found: str, fix: str) -> Finding:
    """Returns the line of what may cost the user something."""
    return Finding(name, "warning", found, fix)


def error(name: str, found: str, fix: str) -> Finding:
    """Returns the line of what keeps a run from working."""
    return Finding(name, "error", found, fix)


def run(name: str, check: Check) -> list[Finding]:
    """Returns what the check says; whatever it raises becomes an error line called `name`."""
    found: list[Finding] = []
    try:
        answer = check()
        found += [answer] if isinstance(answer, Finding) else answer or ()
    except Exception as problem:
        sentence = explain(problem)
        if sentence is None:
            sentence = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        found.append(error(name, sentence, ""))
    return found


def failed(findings: Sequence[Finding]) -> bool:
    """Tells whether one of them is an error."""
    return any(finding.state == "error" for finding in findings)


def show(findings: Sequence[Finding]) -> None:
    """Prints them as a table on stdout, with a last line that counts."""
    console = Console(emoji=False, highlight=False)
    table = Table("check", "", "found", "fix")
    for finding in findings:
        state = Text(finding.state, COLOURS[finding.state])
        found = Text(clean(finding.found))
        table.add_row(Text(finding.name), state, found, Text(clean(finding.fix)))
    console.print(table)
    counts = {state: sum(finding.state == state for finding in findings) for state in COLOURS}
    console.print(f"{counts['error']} errors, {counts['warning']} warnings, {counts['OK']} OK")
