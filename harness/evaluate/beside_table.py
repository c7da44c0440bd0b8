"""The figures beside a verdict as a short table: what each is, its value, how to read it.

A task's figures as scores.json has them -> Markdown, a table for each set. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from harness.evaluate.told import points
from harness.report.pictures import markdown_table

Figure = Mapping[str, Any]


class Row(NamedTuple):
    """One figure of the table."""

    label: str
    value: Callable[[Figure], str]
    reading: str


def beside_tables(task: str, figures: Figure) -> list[str]:
    """Returns the tables of a task; [] where nothing was measured beside its verdicts."""
    return [
        markdown_table(
            [
                [row.label, _told(row, of_set[name]), row.reading]
                for name, row in ROWS.items()
                if name in of_set
            ],
            [f"{task}, {name_of_set}: beside the verdict (decides nothing)", "points", "read it"],
        )
        for name_of_set, of_set in figures.get("beside", {}).items()
        if of_set
    ]


def _told(row: Row, figure: Figure) -> str:
    if "missing" in figure:
        return f"not measured: {figure['missing']}"
    return row.value(figure)


def _interaction(figure: Figure) -> str:
    return (
        f"{points(figure, 'gap')}: {figure['score']:.1f}, additive part "
        f"{figure['additive_score']:.1f} ({figure['images']} images, {figure['prompts']} questions)"
    )


def _neighbours(figure: Figure) -> str:
    return (
        f"{points(figure, 'advantage')}: theirs score {figure['score']:.1f} "
        f"({figure['training_images']} training images)"
    )


def _paired(figure: Figure) -> str:
    return (
        f"{points(figure, 'group_accuracy')} of {figure['groups']} groups, chance "
        f"{figure['chance']:.1f}"
    )


def _cost(figure: Figure) -> str:
    told = f"{points(figure, 'cost')}: {figure['true_score']:.1f} to {figure['score']:.1f}"
    if "changed" in figure:
        told += f", {figure['changed']:.0f}% of the answers change"
    return f"{told} ({figure['images']} images)"


def _curve(figure: Figure) -> str:
    return ", ".join(
        f"{percent}%: {score['value']:.1f}" for percent, score in figure["scores"].items()
    )


ROWS: Mapping[str, Row] = {
    "interaction": Row(
        "answers less their additive part (EMAP)",
        _interaction,
        "0 is no reproach: additive can be right",
    ),
    "neighbour_floor": Row(
        "answers less those of the nearest training pictures",
        _neighbours,
        "0: copying answers does as well",
    ),
    "paired": Row(
        "groups of opposite answers that are all right",
        _paired,
        "without the picture: none",
    ),
    "shuffled_tiles": Row(
        "cost of shuffled tiles",
        _cost,
        "0: where things stand is not read",
    ),
    "mirror_image": Row(
        "cost of a mirror to questions of left and right",
        _cost,
        "0: the sides are not told apart",
    ),
    "dropped_patches": Row(
        "score with so many of the patches left out",
        _curve,
        "flat: few patches tell all it uses",
    ),
}
