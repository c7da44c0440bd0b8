"""One training run from its config to its last checkpoint: set up, loop, close."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from harness import checkpoint as checkpoints
from harness.checkpoint import Checkpoint
from harness.checks import changes, check_resume
from harness.config.schema import Config
from harness.machine.signals import stop_requests
from harness.report.terminal import Terminal, part_rows
from harness.tracking.tracker import JournalTracker, Tracker, open_tracker, recorded_run_id
from harness.train.engine import Engine
from harness.train.engines import make_engine
from harness.train.loop import loop
from harness.train.prepare import build_model, calibrate, encoder_of, make_loader
from harness.train.state import Observer, Run, TrainState
from harness.train.together import check_alike, checkpoint_of_rank_0
from shards.manifest import Manifest
from shards.stream import StreamState


def run(config: Config, resume: str | None = None, observers: Sequence[Observer] = ()) -> Path:
    """Trains and returns the last checkpoint's folder.

    `resume`: auto, a run's folder or a checkpoint's. `observers` are told of every step.
    Raises ConfigError, ShardError, OSError or GuardError. After SIGTERM or SIGINT: saves, and
    raises SystemExit with 128 + the signal's number.
    """
    this = _set_up(config, resume, observers)
    status = "FAILED"
    try:
        with stop_requests() as stop_asked:
            number = loop(this, stop_asked)
        status = "KILLED" if number else "FINISHED"
    finally:
        this.tracker.close(status)
    # when the main process has reported everything: a launcher ends all as soon as one has failed
    this.engine.close()
    last = checkpoints.place(config.out_dir, this.state.step)
    if number:
        name = signal.Signals(number).name
        this.terminal.say(f"stopped by {name} after step {this.state.step}, which is saved: {last}")
        raise SystemExit(128 + number)
    return last


def _set_up(config: Config, resume: str | None, observers: Sequence[Observer]) -> Run:
    """Returns the run as it stands before its next step."""
    engine = make_engine(config.train)
    terminal = Terminal(engine.is_main)

    def find() -> Checkpoint | None:
        check_resume(config, resume)
        return checkpoints.find(config.out_dir, resume, terminal.say)

    with checkpoint_of_rank_0(find, engine) as found:
        return _made(config, resume, observers, engine, terminal, found)


def _made(
    config: Config,
    resume: str | None,
    observers: Sequence[Observer],
    engine: Engine,
    terminal: Terminal,
    found: Checkpoint | None,
) -> Run:
    """Returns the run with models, data and tracker, as `found` left it; None: a new one."""
    for sentence in changes(found, config) if found else ():
        terminal.say(sentence)
    loader = make_loader(config, engine)
    check_alike(config, loader, engine)
    terminal.say(f"precision: {engine.precision.reason}")
    encoder = encoder_of(loader, config)
    model = build_model(config, encoder, precision=engine.precision, device=engine.device)
    state = TrainState(StreamState(0, 0, loader.digest))
    if found:  # before prepare: an engine may keep copies of the weights of its own
        model.load_trained(found.model)
        state = TrainState.from_json(found.state["train"])
        terminal.say(f"going on after step {state.step} from {found.path}")
    elif not config.model.init_from:
        calibrate(model, config)
    wrapped = engine.prepare(model)
    if found:
        engine.load_optimizer_state(found.optimizer())
        engine.load_scaler_state(found.state["scaler"])
    terminal.parts(part_rows(model.parts))
    tracker: Tracker = JournalTracker()
    if engine.is_main:
        tracker = open_tracker(
            config,
            run_id=_run_id(config, resume, found),
            resume_step=state.step,
            facts=engine.facts(),
            datasets=[*loader.manifests, *(Manifest.open(dev.path) for dev in config.data.dev)],
        )
    return Run(config, engine, model, wrapped, loader, state, terminal, tracker, observers)


def _run_id(config: Config, resume: str | None, found: Checkpoint | None) -> str | None:
    """Returns the tracker's run to go on with; None: a new one begins.

    So it does from another folder's checkpoint. A job killed before its first checkpoint goes on
    with its own.
    """
    if found is None:
        return recorded_run_id(config) if resume == "auto" else None
    if not found.path.resolve().is_relative_to(config.out_dir.resolve()):
        return None
    return found.state["run_id"] or recorded_run_id(config)
