"""`harness shards`: makes sets of shards, indexes those made elsewhere, checks, counts, and runs the encoder over them.

Official files or folders of shards -> folders of shards, and a summary on stdout. Imports nothing heavy before a verb.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from shards.build import Summary

PLAIN = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
app = typer.Typer(help="Makes and checks sets of shards.", **PLAIN)
build_app = typer.Typer(help="Makes shards of a data set's official files.", **PLAIN)
app.add_typer(build_app, name="build")

Out = Annotated[Path, typer.Option(help="The folder to make.")]
ShortSide = Annotated[int | None, typer.Option(min=1, help="Shrink images to this many pixels on the short side.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads that decode. None: one a core.")]
Images = Annotated[Path, typer.Option(help="Folder of images, or a zip, which is not extracted.")]
Sets = Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of shards.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@build_app.command()
def flickr8k(
    images: Images,
    captions: Annotated[Path, typer.Option(help="Flickr8k.token.txt or captions.txt.")],
    out: Out,
    splits: Annotated[Path | None, typer.Option(help="Folder of Flickr_8k.trainImages.txt and the others.")] = None,
    short_side: ShortSide = None,
    workers: Workers = None,
) -> None:
    """Flickr8k: five captions an image."""
    _build("flickr8k", out, short_side, workers, images=images, captions=captions, splits=splits)


@build_app.command()
def vqav2(
    images: Images,
    questions: Annotated[Path, typer.Option(help="v2_OpenEnded_..._questions.json")],
    annotations: Annotated[Path, typer.Option(help="v2_..._annotations.json")],
    split: Annotated[str, typer.Option(help="train or val.")],
    out: Out,
    pairs: Annotated[Path | None, typer.Option(help="v2_..._complementary_pairs.json")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Draw this many images; pairs stay together.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    short_side: ShortSide = None,
    workers: Workers = None,
) -> None:
    """VQAv2: questions with ten answers each."""
    files = {"images": images, "questions": questions, "annotations": annotations, "pairs": pairs}
    _build("vqav2", out, short_side, workers, **files, split=split, limit=limit, seed=seed)


@build_app.command()
def coco_captions(
    images: Images,
    captions: Annotated[Path, typer.Option(help="captions_train2014.json and the like.")],
    split: Annotated[str, typer.Option(help="train or val.")],
    out: Out,
    short_side: ShortSide = None,
    workers: Workers = None,
) -> None:
    """COCO captions."""
    _build("coco-captions", out, short_side, workers, images=images, captions=captions, split=split)


@build_app.command()
def karpathy(
    images: Images,
    captions: Annotated[Path, typer.Option(help="dataset_flickr8k.json, _flickr30k or _coco.")],
    out: Out,
    short_side: ShortSide = None,
    workers: Workers = None,
) -> None:
    """Flickr8k, Flickr30k or COCO in the splits of Karpathy."""
    _build("karpathy", out, short_side, workers, images=images, captions=captions)


@build_app.command()
def easy_vqa(out: Out, short_side: ShortSide = None, workers: Workers = None) -> None:
    """easy-VQA, from the package of that name."""
    _build("easy-vqa", out, short_side, workers)


@build_app.command()
def image_folder(
    images: Images,
    jsonl: Annotated[Path, typer.Option(help="One text a line: image, and caption, or question and answers.")],
    out: Out,
    short_side: ShortSide = None,
    workers: Workers = None,
) -> None:
    """Your own images and texts."""
    _build("image-folder", out, short_side, workers, images=images, jsonl=jsonl)


@app.command()
def index(
    places: Annotated[list[str], typer.Argument(metavar="DIR_OR_URL...", help="Folders of tars, or a-{000..9}.tar.")],
    dataset: Annotated[str | None, typer.Option(help="None: the name of the folder above.")] = None,
    split: Annotated[str | None, typer.Option(help="None: the name of the folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the index goes. None: beside the tars.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Indexes WebDataset shards that were made elsewhere."""
    from shards.index import index_shards
    from shards.manifest import ShardError

    if out and len(places) > 1:
        raise ShardError(f"--out {out} is one folder and {len(places)} sets were given: index them one at a time")
    for place in places:
        where = place.rstrip("/") if "://" in place else os.path.abspath(place)
        above, name = os.path.split(os.path.dirname(where) if where.endswith(".tar") else where)
        with _counted(f"indexing {place}") as count:
            names = (dataset or os.path.basename(above) or "webdataset", split or name)
            made = index_shards(place, *names, out=out, overwrite=overwrite, on_progress=count)
        skipped = f", {made.skipped:,} left out, named in {made.folder}/skipped.jsonl" if made.skipped else ""
        print(f"{made.folder}: {made.samples:,} samples, {made.texts:,} texts{skipped}")


@app.command()
def verify(sets: Sets) -> None:
    """Re-reads and re-hashes everything, and decodes every image."""
    from shards.verify import verify

    failed = False
    for place in sets:
        with _counted(f"verifying {place}") as count:
            problems = verify(place, on_progress=count)
        for problem in problems:
            print(f"harness: {problem}", file=sys.stderr)
        failed = failed or bool(problems)
        if not problems:
            print(f"{place}: everything is as its index says")
    if failed:
        raise typer.Exit(2)


@app.command()
def stats(sets: Sets) -> None:
    """Counts, lengths and sizes, as JSON."""
    from shards.verify import stats

    found = {place: stats(place) for place in sets}
    print(json.dumps(found if len(sets) > 1 else found[sets[0]], indent=2, ensure_ascii=False))


@app.command()
def features(
    shards: Annotated[str, typer.Argument(metavar="DIR", help="A folder of image shards.")],
    config: Annotated[str, typer.Option(help="Its model.vision names the encoder.")],
    out: Out,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Runs the frozen encoder once over a set, and writes what it saw as feature shards."""
    from harness.config import load
    from harness.doctor import check_vision

    loaded = load(config, overrides or ())
    check_vision(loaded)
    from harness.features import encode_set

    options = {"precision": loaded.train.precision, "max_image_pixels": loaded.data.max_image_pixels}
    with bar() as progress:
        task = progress.add_task("encoding", total=None)
        made = encode_set(
            shards,
            out,
            loaded.model.vision,
            progress=lambda done, images: progress.update(task, completed=done, total=images),
            workers=loaded.data.workers,
            overwrite=overwrite,
            **options,
        )
    print(f"{made.folder}: {made.samples:,} samples, {made.bytes / 1e6:,.1f} MB, made by {made.encoder['id']}")


def _build(source: str, out: Path, short_side: int | None, workers: int | None, **options: object) -> None:
    from shards.build import build

    with bar() as progress:
        tasks: dict[str, int] = {}

        def show(split: str, done: int, images: int) -> None:
            if split not in tasks:
                tasks[split] = progress.add_task(f"{source} {split}", total=images)
            progress.update(tasks[split], completed=done)

        summary = build(source, out, short_side=short_side, workers=workers, progress=show, **options)
    print(_summary(summary))


def _summary(summary: Summary) -> str:
    lines = [
        f"{summary.out}/{split}: {n['records']:,} records, {n['texts']:,} texts, {n['targets']:,} targets, "
        f"{n['bytes'] / 1e6:,.1f} MB"
        for split, n in summary.splits.items()
    ]
    counts = ("images_without_text", "texts_without_image", "undecodable_images", "images_in_no_split", "empty_texts")
    left_out = ", ".join(f"{getattr(summary, name):,} {name.replace('_', ' ')}" for name in counts)
    lines.append(f"left out: {left_out}; each is named in {summary.skipped}")
    lines.append(f"re-encoded images: {summary.reencoded_images:,}")
    return "\n".join(lines + [f"note: {n:,} {what}" for what, n in summary.notes.items()])


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def _counted(title: str):
    """A bar without an end that is known, advanced by the number of samples done since the last call."""
    with bar() as progress:
        task = progress.add_task(title, total=None)
        yield lambda samples: progress.advance(task, samples)
