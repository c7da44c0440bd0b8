"""What a check of `harness doctor` answers, and how the answers are shown.

A name and a function -> its Findings; a function that raises costs the others nothing and is an
error line itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["OK", "warning", "error"]
COLOURS = {"OK": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, what was found, and what to do about it."""

    name: str
    state: State
    found: str
    fix: str = ""


Check = Callable[[], Finding | Iterable[Finding] | None]


def run(name: str, check: Check) -> list[Finding]:
    """What the check says, `name` where it says nothing of its own; whatever it raises becomes an
    error line.
    """
    from harness.errors import explain

    found: list[Finding] = []
    try:
        said = check()
        found += [said] if isinstance(said, Finding) else said or ()
    except Exception as error:
        sentence = explain(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [*found, Finding(name, "error", sentence)]
    return found


def failed(findings: Sequence[Finding]) -> bool:
    return any(finding.state == "error" for finding in findings)


def show(findings: Sequence[Finding]) -> None:
    """As a table on stdout, with a last line that counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(emoji=False, highlight=False)
    table = Table("check", "", "found", "fix")
    for finding in findings:
        state = Text(finding.state, COLOURS[finding.state])
        table.add_row(Text(finding.name), state, Text(finding.found), Text(finding.fix))
    console.print(table)
    counts = {state: sum(finding.state == state for finding in findings) for state in COLOURS}
    console.print(f"{counts['error']} errors, {counts['warning']} warnings, {counts['OK']} OK")
