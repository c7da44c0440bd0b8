"""`harness score` and `harness compare`: official result files -> figures with intervals, as a
table or as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.progress import HELP
from harness.redact import say, show

if TYPE_CHECKING:
    from harness.evaluate.bootstrap import Interval
    from harness.evaluate.compare import Compared

app = typer.Typer(
    help="Scores result files as the official programs do, with 95% intervals over images.", **HELP
)

AsJSON = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Predictions = Annotated[
    Path, typer.Option(help="Results in the official format, one entry for each text.")
]
Questions = Annotated[Path | None, typer.Option(help="v2_OpenEnded_..._questions.json.")]
Annotations = Annotated[Path | None, typer.Option(help="v2_mscoco_..._annotations.json.")]
References = Annotated[Path | None, typer.Option(help="COCO caption annotations.")]


@app.command(
    "vqa",
    epilog="Example: harness score vqa --predictions r.json --questions q.json "
    "--annotations a.json",
)
def score_vqa(
    predictions: Predictions,
    questions: Annotated[Path, typer.Option(help="v2_OpenEnded_..._questions.json.")],
    annotations: Annotated[Path, typer.Option(help="v2_mscoco_..._annotations.json.")],
    as_json: AsJSON = False,
) -> None:
    """VQA accuracy: overall, by answer type and by question type."""
    from harness.evaluate import vqa

    grades = vqa.graded(vqa.read_results(predictions), vqa.read_truths(questions, annotations))
    found = vqa.intervals(grades)
    if as_json:
        groups = {
            k: {n: i.to_dict() for n, i in v.items()} for k, v in found.items() if k != "overall"
        }
        show(json.dumps({"overall": found["overall"].to_dict(), **groups}, indent=2))
        return
    rows = {"overall": found["overall"]}
    for kind in ("answer type", "question type"):
        rows |= {
            f"{kind} {name}": i
            for name, i in sorted(found[f"per_{kind.replace(' ', '_')}"].items())
        }
    show(_table(rows, f"VQA accuracy %, {len(grades):,} questions"), end="")


@app.command(
    "captions",
    epilog="Example: harness score captions --predictions r.json --references captions.json",
)
def score_captions(
    predictions: Predictions,
    references: Annotated[Path, typer.Option(help="COCO caption annotations.")],
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Score the images that have a caption and references alone, as the official "
            "example does.",
        ),
    ] = False,
    stripped: Annotated[
        bool,
        typer.Option("--stripped", help="With --json: the stripped figures too, under that name."),
    ] = False,
    as_json: AsJSON = False,
) -> None:
    """BLEU, ROUGE-L and CIDEr-D, as pycocoevalcap gives them, without Java.

    Below them, by name, the same of captions and references stripped of punctuation, digits and
    one-letter words: what some projects publish, and nothing that compares with official figures.
    """
    from harness.evaluate import captions

    said = captions.read_caption_results(predictions)
    wanted = captions.read_references(references, partial)
    if partial:
        bare = dict.fromkeys(image for image, texts in wanted.items() if not texts)
        said = {image: text for image, text in said.items() if image not in bare}
        wanted = _described(said, wanted, list(bare), references)
    found = captions.score(said, wanted).with_intervals()
    without = {}
    if stripped or not as_json:
        without = captions.stripped_scores(said, wanted).with_intervals()
    if as_json:
        figures: dict[str, Any] = {name: interval.to_dict() for name, interval in found.items()}
        if without:
            figures["stripped"] = {name: interval.to_dict() for name, interval in without.items()}
        show(json.dumps(figures, indent=2))
        return
    show(_table(found, f"captions, {len(wanted):,} images"))
    title = "stripped: no punctuation, digits, one-letter words; not the official figures"
    show(_table(without, title), end="")


def _described(
    said: dict[str, str], wanted: dict[str, list[str]], bare: list[str], references: Path
) -> dict[str, list[str]]:
    """Returns the references of the images that have both, and tells what is left out: `bare` has
    no reference.
    """
    from harness.evaluate.official import named

    if bare:
        why = f"have no caption in {references} and are left out"
        say(f"harness: {len(bare):,} of {len(wanted):,} images {why}: {named(bare)}", sys.stderr)
    captioned = {image: texts for image, texts in wanted.items() if texts}
    described = {image: texts for image, texts in captioned.items() if image in said}
    if left := len(captioned) - len(described):
        left_out = f"{left:,} of {len(captioned):,} images are not described and left out"
        say(f"harness: {left_out}", sys.stderr)
    return described


def compare(
    a: Annotated[
        Path,
        typer.Argument(metavar="RUN_A", help="The folder of an evaluated run, or a result file."),
    ],
    b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The same.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Test sets of the runs, if they were moved.")
    ] = None,
    references: References = None,
    questions: Questions = None,
    annotations: Annotations = None,
    as_json: AsJSON = False,
) -> None:
    """By how much run A is better than B, and how sure that is.

    A paired bootstrap over the images that both answered.
    """
    from harness.errors import ConfigError
    from harness.evaluate import captions, vqa
    from harness.evaluate import compare as pairs

    if a.is_file() and b.is_file():
        if references:
            described = [captions.read_caption_results(file) for file in (a, b)]
            wanted = captions.read_references(references)
            found = {"caption": pairs.descriptions(described[0], described[1], wanted)}
        elif questions and annotations:
            said = [vqa.read_results(file) for file in (a, b)]
            truths = vqa.read_truths(questions, annotations)
            found = {"vqa": pairs.answers(said[0], said[1], truths)}
        else:
            raise ConfigError(
                f"{a} and {b} are result files: give --references, or --questions and --annotations"
            )
    else:
        found = pairs.runs(a, b, data)
    if as_json:
        show(
            json.dumps(
                {task: {k: c.to_dict() for k, c in of.items()} for task, of in found.items()},
                indent=2,
            )
        )
        return
    show("\n".join(_compared(task, of) for task, of in found.items()), end="")


def _table(figures: dict[str, Interval], title: str) -> str:
    from harness.report.pictures import markdown_table

    rows = [[name, *interval.to_dict(4).values()] for name, interval in figures.items()]
    return markdown_table(
        [["-" if cell is None else cell for cell in row] for row in rows],
        [title, "", "low", "high"],
    )


def _compared(task: str, found: dict[str, Compared]) -> str:
    from harness.report.pictures import markdown_table

    one = next(iter(found.values()))
    rows: list[list[Any]] = [
        [
            name,
            c.a,
            c.b,
            c.difference.value,
            f"{c.difference.low:.4g} to {c.difference.high:.4g}",
            f"{c.a_better:.1%}",
        ]
        for name, c in found.items()
    ]
    title = f"{task}, {one.texts:,} texts that both answered" + (
        f", {one.left_out:,} not" if one.left_out else ""
    )
    return markdown_table(rows, [title, "A", "B", "A - B", "95%", "resamples with A > B"])
