"""`harness shards view`: a page of records with their texts, to be looked at before anything is
trained on them.

Arguments -> an HTML file, and its path on stdout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.progress import told
from harness.redact import say

Place = Annotated[str, typer.Argument(metavar="DIR", help="A set, or a folder of all splits.")]
Keys = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Of the config.")]


def view(
    place: Place,
    overrides: Keys = None,
    out: Annotated[Path, typer.Option(metavar="FILE.html")] = Path("view.html"),
    count: Annotated[int, typer.Option(min=1, help="Records of each set.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Which: other records.")] = 0,
    config: Annotated[
        str | None, typer.Option(help="Show them as a run of this config gets them, too.")
    ] = None,
) -> None:
    """A page of records with their texts: look before you train.

    With --config as the model gets them: the picture after crop and resize, the
    prompt after its template, the target's tokens with their weights in the loss.
    """
    from harness.errors import ConfigError
    from shards.manifest import INDEX, splits_in

    if overrides and config is None:
        raise ConfigError(f"{overrides[0]}: keys belong to a config, give it with --config")
    splits = sorted(splits_in(place), key=lambda split: split != "train")
    is_set = not splits or Path(place, INDEX).exists()
    loaded = None
    if config is not None:
        from harness.checks import check_models
        from harness.config.load import load

        loaded = load(config, overrides or ())
        check_models(loaded, with_vision=False)
    from harness.own_data.view import write_sheets

    with told("drawing") as progress:
        sheets = write_sheets(
            [place] if is_set else [str(Path(place, split)) for split in splits],
            out,
            count=count,
            seed=seed,
            config=loaded,
            progress=progress,
        )
    shown = sum(len(sheet.cards) for sheet in sheets)
    odd = sum(bool(card.problem) for sheet in sheets for card in sheet.cards)
    problems = f", {odd} of them with a problem" if odd else ""
    say(f"{out}: {shown} records of {', '.join(sheet.title for sheet in sheets)}{problems}")
