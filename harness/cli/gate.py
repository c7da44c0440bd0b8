"""`harness gate`: the verdict on a model that was trained elsewhere, or on a file of its answers.

Arguments -> the table of `harness evaluate` on stdout, or a file of texts and pictures to answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.parts import AsJSON, Base, Encoder
from harness.cli.progress import told
from harness.redact import say, show

Data = Annotated[list[str] | None, typer.Argument(metavar="DATA...", help="Sets of pictures.")]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="So many images of each set. Without: 2000 for answers, or all."),
]


def gate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE",
            help="A model of the hub (id or folder), a run, a file of answers; none with --donors.",
        ),
    ],
    data: Data = None,
    donors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write which picture to show with each text of DATA, for a model elsewhere.",
        ),
    ] = None,
    limit: Limit = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out texts that lack answers.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A folder for the report.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For instance generate.vqa.max_new_tokens=5."),
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="The model of the hub, NF4.")
    ] = False,
    lm: Base = None,
    vision: Encoder = None,
    as_json: AsJSON = False,
) -> None:
    """Whether a model trained elsewhere uses its images.

    A model of the hub is asked here. For any other --donors FILE DATA writes
    which picture to show with each text; your code adds an "answer" to each;
    harness gate FILE DATA judges them.
    """
    sets = data or []
    asked: dict[str, Any] = {"limit": limit, "overrides": override or ()}
    if donors:
        _write_donors(donors, [model, *sets], asked)
        return
    with told("judging") as progress:
        asked |= {"out": out, "progress": progress}
        parts = {"lm": lm, "vision": vision}
        report = _judged(model, sets, partial, load_in_4bit, asked, parts)
    from harness.evaluate.report import table

    show(json.dumps(report, indent=2) if as_json else table(report))


def _write_donors(donors: Path, data: list[str], asked: dict[str, Any]) -> None:
    from harness.evaluate.elsewhere import image_sets, write_donors

    with told("reading") as progress:
        lines = write_donors(donors, image_sets(data), **asked, progress=progress)
    again = f" --limit {asked['limit']}" if asked["limit"] else ""  # the same donors need it
    say(
        f"{donors}: {lines:,} lines to answer. Show each line's image (key `image` of set\n"
        "`image_set`), ask its prompt (null: a caption), add its `answer`. Then:\n"
        f"harness gate {donors} {' '.join(data)}{again}"
    )


def _judged(
    name: str,
    data: list[str],
    partial: bool,
    load_in_4bit: bool,
    asked: dict[str, Any],
    parts: dict[str, Any],
) -> dict[str, Any]:
    """Returns the report on a file of answers, a run, or else a model of the hub."""
    from harness.checks import is_run
    from harness.errors import ConfigError

    path = Path(name)
    if is_run(path):
        from harness.evaluate.run_on_disk import evaluate_run

        return evaluate_run(path, data or None, **asked, **parts)
    if any(parts.values()):
        raise ConfigError(f"--lm and --vision tell where the parts of a run are; {name} is none")
    if not data:
        raise ConfigError(f"give the sets to judge {name} on: harness gate {name} DATA")
    if path.is_file():
        from harness.evaluate.elsewhere import image_sets, judge_answers

        return judge_answers(path, image_sets(data), partial=partial, **asked)
    if path.suffix in (".json", ".jsonl"):
        raise ConfigError(f"{name}: there is no such file of answers")
    from harness.evaluate.elsewhere import image_sets
    from harness.evaluate.published import evaluate_published

    return evaluate_published(name, image_sets(data), load_in_4bit=load_in_4bit, **asked)
