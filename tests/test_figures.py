"""Every score that a page publishes stands in a committed report, and says how it was made.

A table of scores follows a comment that names the reports which hold its figures, from the root:
`<!-- figures: docs/reports/demo.json -->`. A report is what a command left: JSON, or the page of an
ablation, of which the tables count.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCORES = re.compile(r"accuracy|right answers|right, %|CIDEr|BLEU|ROUGE|verdict|what color", re.I)
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?![\w]|[.,]\d)")
VERDICT = re.compile(
    "image used|image ignored|EOS collapse|endless captions|set only|global statistics only|"
    "not above global statistics|retrieval is as good|not enough evidence"
)
LINK = re.compile(r"<!-- figures: (.+) -->")
# Tables whose reports were not kept, by page and first column: why.
NO_REPORT = {
    ("docs/results.md", "seed"): "measured by benchmarks/demo_seeds.py, output not kept",
    ("docs/results.md", "1,000 test images"): "harness evaluate runs/flickr8k_offline, not kept",
    ("docs/why-is-my-caption-empty.md", "changed"): "harness ablate eos_collapse, output not kept",
    ("docs/log.md", "changed"): "runs of a search on 2026-11-21, not kept",
}
# What the section of a table must name, and how it may say so.
NAMED = {
    "the command": r"harness \w+|launch/demo\.sh|python benchmarks/",
    "the seeds": r"\bseeds?\b",
    "the interval": r"95%|\[-?\d[\d.]*, -?\d[\d.]*\]|\binterval",
    "the floor": r"\bfloor|words alone|chance",
}


@dataclass(frozen=True)
class Table:
    page: Path
    section: str  # from the heading before it to the next
    reports: tuple[Path, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> tuple[str, str]:
        return str(self.page.relative_to(ROOT)), self.rows[0][0]

    @property
    def has_scores(self) -> bool:
        texts = [*self.rows[0], *(row[0] for row in self.rows[2:] if len(row) < 6)]
        return any(map(SCORES.search, texts)) and any(map(NUMBER.search, self.figures))

    @property
    def figures(self) -> list[str]:
        """What the reports must hold of each row: all but what it is called."""
        return [" | ".join(cell for cell in row[1:] if "`" not in cell) for row in self.rows[2:]]


def tables(page: Path) -> Iterator[Table]:
    for section in re.split(r"^(?=## )", page.read_text(encoding="utf-8"), flags=re.M):
        for found in re.finditer(r"(?:^(<!--.*-->)\n\n?)?((?:^\|.*\|\n)+)", section, re.M):
            linked = LINK.fullmatch(found[1] or "")
            paths = linked[1].split() if linked else []
            rows = [
                tuple(cell.strip(" *") for cell in line.strip("|").split("|"))
                for line in found[2].splitlines()
            ]
            yield Table(page, section, tuple(ROOT / path for path in paths), tuple(rows))


def groups(report: Path) -> list[tuple[list[float], str]]:
    """Returns numbers and text of each row of a page's tables; a JSON document is one group. There
    a share or CIDEr counts as 100 times that too, as pages print it.
    """
    text = report.read_text(encoding="utf-8")
    if report.suffix != ".json":
        rows = [" ".join(re.findall(r"<td.*?</td>", row, re.S)) for row in text.split("<tr>")]
        rows = [re.sub(r"<[^>]*>", " ", row) for row in rows]
        return [([valued(n) for n in NUMBER.findall(row)], row) for row in rows]
    held: list[float] = []
    waiting = [json.loads(text)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            held += [abs(value), 100 * abs(value)]
    return [(held, text)]


def valued(figure: str) -> float:
    return float(figure.replace(",", ""))


def missing(row: str, held: list[float], text: str) -> list[str]:
    """Returns the figures of a row that no number is when it is rounded as they are, each figure
    another number, and the verdicts that the text does not hold.
    """
    absent = [verdict for verdict in VERDICT.findall(row) if verdict not in text]
    left = list(held)
    for figure in NUMBER.findall(row):
        half = 0.5 * 10.0 ** -len(figure.partition(".")[2]) + 1e-9
        # A count is no score: 32 layers are not 32.0 points.
        known = [n for n in left if isinstance(n, float) or "." not in figure]
        found = next((n for n in known if abs(n - valued(figure)) <= half), None)
        if found is None:
            absent.append(figure)
        else:
            left.remove(found)
    return absent


def not_held(table: Table) -> list[list[str]]:
    """Returns what each row lacks in that group of the table's reports which has most of it."""
    held = [group for report in table.reports for group in groups(report)]
    lacking = [min((missing(row, *group) for group in held), key=len) for row in table.figures]
    return [row for row in lacking if row]


PUBLISHED = [table for page in PAGES for table in tables(page) if table.has_scores]


@pytest.mark.parametrize("table", PUBLISHED, ids=lambda table: ", ".join(table.name))
def test_every_score_of_a_table_stands_in_a_committed_report(table):
    if table.name in NO_REPORT:
        assert not table.reports, "it is linked to a report: take it off the list"
        return
    assert table.reports, "no comment `<!-- figures: ... -->` before it names its reports"
    assert not_held(table) == []


def test_a_changed_digit_of_the_demo_or_another_verdict_is_noticed():
    (demo,) = (t for t in PUBLISHED if t.name == ("docs/results.md", "easy-VQA"))
    ((held, text),) = groups(*demo.reports)
    for row in (row for row in demo.figures if "." in row):  # counts may be near some score
        for place, digit in enumerate(row):
            if digit.isdigit():
                wrong = f"{row[:place]}{(int(digit) + 1) % 10}{row[place + 1 :]}"
                assert missing(wrong, held, text), f"{wrong} in place of {row}"
    assert missing("image ignored", held, text) == ["image ignored"]


@pytest.mark.parametrize("table", PUBLISHED, ids=lambda table: ", ".join(table.name))
def test_the_section_of_a_table_names_command_seed_interval_and_floor(table):
    if table.page.name != "log.md":  # what was tried on the way, as it was written down then
        assert [what for what, how in NAMED.items() if not re.search(how, table.section)] == []


def test_what_has_no_report_is_a_table_that_is_published():
    assert set(NO_REPORT) <= {table.name for table in PUBLISHED}
    assert len(NO_REPORT) <= 4  # new figures bring their report
