"""The verbs of `harness`: each checks what it was given and calls the module that does the work.

Arguments -> exit code. Imports no torch before a verb needs it, so `harness --help` and every refusal are fast. A
user's mistake is one sentence on stderr and exit code 2; HARNESS_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

_PLAIN = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
app = typer.Typer(
    help="Trains small vision-language models and proves that their answers come from the image.", **_PLAIN
)
shards_app = typer.Typer(help="Makes and checks sets of shards.", **_PLAIN)
build_app = typer.Typer(help="Makes shards of a data set's official files.", **_PLAIN)
app.add_typer(shards_app, name="shards")
shards_app.add_typer(build_app, name="build")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="For instance train.epochs=2.")]
Out = Annotated[Path, typer.Option(help="The folder to make.")]
ShortSide = Annotated[int | None, typer.Option(min=1, help="Re-encode images to this many pixels on the short side.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that check and re-encode images.")]
ImagePlace = Annotated[Path, typer.Option(help="Folder of images, or a zip, which is not extracted.")]
Sets = Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of shards.")]


def _version(asked: bool) -> None:
    if asked:
        from harness import __version__

        print(f"harness {__version__}")
        raise typer.Exit


@app.callback()
def harness(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
def demo(out: Out = Path("runs/demo"), seed: Annotated[int, typer.Option(min=0)] = 0) -> None:
    """The whole path on real data, from shards to the proof that the answers come from the image."""
    from harness import demo

    demo.run(out, seed)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped one.")],
    overrides: Overrides = None,
    processes: Annotated[int | None, typer.Option(min=1, help="None: one for each GPU, or one.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="auto|PATH", help="Go on from a checkpoint.")] = None,
) -> None:
    """Trains as `accelerate launch -m harness.train CONFIG key=value` does, after checking what can be checked."""
    from harness.config import load
    from harness.doctor import check_before_launch
    from harness.launcher import launch

    check_before_launch(load(config, overrides or ()))
    raise typer.Exit(launch([config, *(overrides or ()), *(["--resume", resume] if resume else [])], processes))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or one checkpoint.")],
    data: Annotated[list[str] | None, typer.Option(help="Shards to score in place of the config's data.test.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Scores a run beside its floors, and says whether its answers come from the images."""
    from harness.evaluate.run import evaluate_run

    report = evaluate_run(run, data)
    print(json.dumps(report, indent=2) if as_json else report)


@app.command()
def ask(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or one checkpoint.")],
    image: Annotated[Path, typer.Option(help="The picture.")],
    prompt: Annotated[str | None, typer.Option(help="A question; without it the picture is described.")] = None,
) -> None:
    """Asks a trained model about one picture."""
    from harness.evaluate.run import ask

    print(ask(run, image, prompt))


def _build(source: str, out: Path, short_side: int | None, workers: int, **files: object) -> None:
    from shards.build import build

    build(
        importlib.import_module(f"shards.sources.{source}").load(**files), out, short_side=short_side, workers=workers
    )


@build_app.command()
def flickr8k(
    images: ImagePlace,
    captions: Annotated[Path, typer.Option(help="Flickr8k.token.txt or captions.txt.")],
    out: Out,
    splits: Annotated[Path | None, typer.Option(help="Folder of Flickr_8k.trainImages.txt and the others.")] = None,
    short_side: ShortSide = None,
    workers: Workers = 1,
) -> None:
    """Flickr8k: five captions an image."""
    _build("flickr8k", out, short_side, workers, images=images, captions=captions, splits=splits)


@build_app.command()
def vqav2(
    images: ImagePlace,
    questions: Annotated[Path, typer.Option(help="v2_OpenEnded_..._questions.json")],
    annotations: Annotated[Path, typer.Option(help="v2_..._annotations.json")],
    split: Annotated[str, typer.Option(help="train or val.")],
    out: Out,
    pairs: Annotated[Path | None, typer.Option(help="v2_..._complementary_pairs.json")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Draw this many images; pairs stay together.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    short_side: ShortSide = None,
    workers: Workers = 1,
) -> None:
    """VQAv2: questions with ten answers each."""
    files = {"images": images, "questions": questions, "annotations": annotations, "pairs": pairs}
    _build("vqav2", out, short_side, workers, **files, split=split, limit=limit, seed=seed)


@build_app.command()
def coco_captions(
    images: ImagePlace,
    captions: Annotated[Path, typer.Option(help="captions_train2014.json and the like.")],
    split: Annotated[str, typer.Option(help="train or val.")],
    out: Out,
    short_side: ShortSide = None,
    workers: Workers = 1,
) -> None:
    """COCO captions."""
    _build("coco_captions", out, short_side, workers, images=images, captions=captions, split=split)


@build_app.command()
def karpathy(
    images: ImagePlace,
    captions: Annotated[Path, typer.Option(help="dataset_flickr8k.json, _flickr30k or _coco.")],
    out: Out,
    short_side: ShortSide = None,
    workers: Workers = 1,
) -> None:
    """Flickr8k, Flickr30k or COCO in the splits of Karpathy."""
    _build("karpathy", out, short_side, workers, images=images, captions=captions)


@build_app.command()
def easy_vqa(out: Out, short_side: ShortSide = None, workers: Workers = 1) -> None:
    """easy-VQA, from the package of that name."""
    _build("easy_vqa", out, short_side, workers)


@build_app.command()
def image_folder(
    images: ImagePlace,
    jsonl: Annotated[Path, typer.Option(help="One line a text: image, and caption, or question and answers.")],
    out: Out,
    short_side: ShortSide = None,
    workers: Workers = 1,
) -> None:
    """Your own images and texts."""
    _build("image_folder", out, short_side, workers, images=images, jsonl=jsonl)


@shards_app.command()
def index(sets: Annotated[list[str], typer.Argument(metavar="DIR_OR_URL...")]) -> None:
    """Indexes WebDataset shards that were made elsewhere."""
    from shards.index import index

    for place in sets:
        print(index(place))


@shards_app.command()
def verify(sets: Sets) -> None:
    """Re-reads and re-hashes everything, and decodes every image."""
    from shards.verify import verify

    problems = [problem for place in sets for problem in verify(place)]
    for problem in problems:
        print(f"harness: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(2)


@shards_app.command()
def stats(sets: Sets) -> None:
    """Counts, lengths and sizes."""
    from shards.verify import stats

    for place in sets:
        print(stats(place))


@shards_app.command()
def features(
    shards: Annotated[str, typer.Argument(metavar="DIR")],
    config: Annotated[str, typer.Option(help="Its model.vision names the encoder.")],
    out: Out,
    overrides: Overrides = None,
) -> None:
    """Runs the frozen encoder once over a set, and writes what it saw as feature shards."""
    from harness.config import load
    from harness.doctor import check_models

    loaded = load(config, overrides or ())
    check_models(loaded)
    from harness.features import encode_set

    encode_set(shards, out, loaded.model.vision)


def main() -> None:
    """The entry point."""
    try:
        app(prog_name="harness")
    except Exception as error:
        from harness.doctor import explain

        sentence = None if os.environ.get("HARNESS_DEBUG") == "1" else explain(error)
        if sentence is None:
            raise
        print(f"harness: {sentence}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
