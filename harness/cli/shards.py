"""`harness shards`: makes sets of shards, indexes those made elsewhere, checks, counts, and runs
the encoder over them.

Official files or folders of shards -> folders of shards, and a summary on stdout. Imports nothing
heavy before a verb.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperGroup

from harness.cli.progress import HELP, bar, counted, told
from harness.cli.view import view
from harness.redact import masked, say, show

if TYPE_CHECKING:
    from shards.build import Summary
    from shards.manifest import Manifest

app = typer.Typer(help="Makes and checks sets of shards.", **HELP)

Out = Annotated[Path, typer.Option(help="The folder to make.")]
Sets = Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of shards.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Several = Annotated[
    int, typer.Option(min=1, help="That share the work; a launcher's (torchrun, srun) do so too.")
]


def _common(
    out: Out,
    short_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink images to it on their short side.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that decode. Without: one a core.")
    ] = None,
) -> None:
    """Takes what every `harness shards build SOURCE` takes beside the options of its `load`."""


class _Sources(TyperGroup):
    """A verb for each source, with the options of its `load`."""

    def list_commands(self, context: Any) -> list[str]:
        from shards.sources import SOURCES

        return list(SOURCES)

    def get_command(self, context: Any, name: str) -> Any:
        from shards.sources import SOURCES

        if name not in SOURCES:
            return None

        def verb(**given: Any) -> None:
            _build(name, **given)

        own = inspect.signature(SOURCES[name], eval_str=True).parameters.values()
        options = [p.replace(kind=p.KEYWORD_ONLY, annotation=_option(p)) for p in own]
        common = [
            p.replace(kind=p.KEYWORD_ONLY)
            for p in inspect.signature(_common, eval_str=True).parameters.values()
        ]
        about = sys.modules[SOURCES[name].__module__].__doc__ or ""
        verb.__signature__ = inspect.Signature(options + common)  # type: ignore[attr-defined]  # for typer
        verb.__doc__ = about.partition("\n")[0]
        one = typer.Typer(**HELP, add_completion=False)
        one.command(name)(verb)
        return typer.main.get_command(one)


def _option(parameter: inspect.Parameter) -> object:
    """`Annotated[Path, "help"]` of a source, as typer takes it; a switch without its --no-."""
    annotation = parameter.annotation
    parts = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    names = ["--" + parameter.name.replace("_", "-")] if parts[0] is bool else []
    return Annotated[parts[0], typer.Option(*names, help=" ".join(parts[1:]) or None)]


app.add_typer(
    typer.Typer(
        cls=_Sources,
        help="Makes shards of a data set's official files.",
        **HELP,
        callback=lambda: None,
    ),
    name="build",
)


@app.command(epilog="Example: harness shards index data/theirs --split train")
def index(
    places: Annotated[
        list[str],
        typer.Argument(metavar="DIR_OR_URL...", help="Folders of tars, or a-{000..9}.tar."),
    ],
    dataset: Annotated[
        str | None, typer.Option(help="Without: the name of the folder above.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Without: the name of the folder.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the index goes. Without: beside the tars.")
    ] = None,
    overwrite: Overwrite = False,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="Rewrite the index of these sets in today's format.")
    ] = False,
    image_member: Annotated[
        list[str] | None,
        typer.Option(metavar="END", help="A picture's file, as input.jpg in 000.input.jpg."),
    ] = None,
    text_member: Annotated[
        str | None, typer.Option(metavar="END", help="Its text's file, as outputs.txt.")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="The field of its JSON with the text(s).")
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A name a line, for the numbers of .cls.")
    ] = None,
    processes: Several = 1,
) -> None:
    """Indexes WebDataset shards that were made elsewhere; killed and typed again, it goes on.

    A picture with a .txt, or a "caption" in .json, is found as it is.
    """
    from shards.files import ShardError
    from shards.layout import Layout

    layout = Layout.of(image_member or (), text_member, text_field, class_names)
    if upgrade:
        if dataset or split or out or overwrite or layout:
            raise ShardError("--upgrade takes sets alone: it keeps what their index says")
        return _upgrade(places)
    if out and len(places) > 1:
        raise ShardError(
            f"--out {out} is one folder and {len(places)} sets were given: index them one at a time"
        )
    _as_several(processes)
    for place in places:
        _index(place, dataset, split, layout=layout, out=out, overwrite=overwrite)


def _as_several(processes: int) -> None:
    """Runs what was typed as so many processes, and ends with their exit code."""
    from harness.machine.several import as_typed, run_as_several

    if processes > 1:
        raise typer.Exit(run_as_several(as_typed(), processes))


def _upgrade(places: list[str]) -> None:
    from shards.index import upgrade_index

    for place in places:
        with counted(f"indexing {place}") as count:
            made = upgrade_index(place, on_progress=count)
        say(f"{made.folder}: its index has format {made.format}")


def _index(place: str, dataset: str | None, split: str | None, **options: Any) -> None:
    """Indexes one folder of tars, and says what was found and how it is read."""
    from harness.machine.several import share_of_this
    from shards.index import Job, how_read

    _check_no_secret(place)
    where = place.rstrip("/") if "://" in place else os.path.abspath(place)
    folder = os.path.dirname(where) if where.endswith(".tar") else where
    above = os.path.basename(os.path.dirname(folder))
    names = (dataset or above or "webdataset", split or os.path.basename(folder))
    share = share_of_this()
    if share.rank:
        return Job(place, *names, share=share, **options).index_own()
    with counted(f"indexing {place}") as count:
        made = Job(place, *names, share=share, on_progress=count, **options).write()
    left_out = f", {made.skipped:,} left out, named in {made.folder}/skipped.jsonl"
    counts = f"{made.samples:,} samples, {made.texts:,} texts{left_out if made.skipped else ''}"
    say(f"{made.folder}: {counts}\n{made.folder}: {how_read(made)}")


def _check_no_secret(place: str) -> None:
    from shards.files import ShardError

    if "://" in place and masked(place) != place:
        raise ShardError(
            f"{masked(place)}: the index names the place of its shards, its secret would be "
            "written down: give it by the environment (for s3 AWS_SECRET_ACCESS_KEY)"
        )


app.command(epilog="Example: harness shards view data/mine --config mine.yaml")(view)


@app.command(epilog="Example: harness shards verify data/mine/train")
def verify(sets: Sets) -> None:
    """Re-reads and re-hashes everything, and decodes every image."""
    from shards.verify import verify

    failed = False
    for place in sets:
        with counted(f"verifying {place}") as count:
            problems = verify(place, on_progress=count)
        for problem in problems:
            say(f"harness: {problem}", sys.stderr)
        failed = failed or bool(problems)
        if not problems:
            say(f"{place}: everything is as its index says")
    if failed:
        raise typer.Exit(2)


@app.command(epilog="Example: harness shards stats data/mine/train")
def stats(sets: Sets) -> None:
    """Counts, lengths and sizes, as JSON."""
    from shards.verify import stats

    found = [stats(place) for place in sets]
    by_place = dict(zip(map(masked, sets), found, strict=True))
    show(json.dumps(by_place if len(sets) > 1 else found[0], indent=2, ensure_ascii=False))


@app.command(
    epilog="Example: harness shards features data/mine --config flickr8k_t4 --out data/features"
)
def features(
    shards: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of image shards, or one of all splits.")
    ],
    config: Annotated[str, typer.Option(help="Its model.vision names the encoder.")],
    out: Out,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    overwrite: Overwrite = False,
    processes: Several = 1,
) -> None:
    """Runs the frozen encoder once over a set, and writes what it saw as feature shards.

    Each of several processes has the encoder, and a GPU where there are enough. Killed and typed
    again, it goes on.
    """
    from harness.checks import check_vision
    from harness.config.load import load

    loaded = load(config, overrides or ())
    check_vision(loaded)
    _as_several(processes)
    from harness.data.encode import SetEncoding
    from harness.machine.several import card_of_this, share_of_this
    from shards.manifest import splits_in

    share = share_of_this()
    lines = []
    with told("encoding") if share.rank == 0 else nullcontext() as progress:
        for split in splits_in(shards) or [""]:
            encoding = SetEncoding(
                f"{shards}/{split}" if split else shards,
                out / split,
                loaded.model.vision,
                device=card_of_this(),
                precision=loaded.train.precision,
                max_image_pixels=loaded.data.max_image_pixels,
                workers=loaded.data.workers,
                share=share,
                progress=progress,
            )
            if share.rank:
                encoding.make_own(overwrite)
            else:
                lines.append(_features_told(encoding.write(overwrite)))
    if lines:
        say("\n".join(lines))


def _features_told(made: Manifest) -> str:
    from harness.data.features import skipped

    left_out = f"{len(skipped(made)):,} images that could not be read left out"
    size = f"{made.samples:,} samples, {made.bytes / 1e6:,.1f} MB"
    return f"{made.folder}: {size}, made by {(made.encoder or {}).get('id')}; {left_out}"


def _build(
    source: str, out: Path, short_side: int | None, workers: int | None, **options: Any
) -> None:
    from shards.build import build

    with bar() as progress:
        # One line for all splits: a notebook cannot go back up.
        task = progress.add_task(source, total=None)

        def show(split: str, done: int, images: int) -> None:
            progress.update(task, description=f"{source} {split}", completed=done, total=images)

        summary = build(
            source, out, short_side=short_side, workers=workers, progress=show, **options
        )
    say(_summary(summary))


def _summary(summary: Summary) -> str:
    lines = [
        f"{summary.out}/{split}: {n['records']:,} records, {n['texts']:,} texts, "
        f"{n['targets']:,} targets, "
        f"{n['bytes'] / 1e6:,.1f} MB"
        for split, n in summary.splits.items()
    ]
    counts = (
        "images_without_text",
        "texts_without_image",
        "undecodable_images",
        "images_in_no_split",
        "empty_texts",
        "unusable_texts",
    )
    rare = [name for name in ("rejected_captions", "further_turns") if getattr(summary, name)]
    left_out = ", ".join(
        f"{getattr(summary, name):,} {name.replace('_', ' ')}" for name in [*counts, *rare]
    )
    lines.append(f"left out: {left_out}; each is named in {summary.skipped}")
    lines.append(f"re-encoded images: {summary.reencoded_images:,}")
    return "\n".join(lines + [f"note: {n:,} {what}" for what, n in summary.notes.items()])
