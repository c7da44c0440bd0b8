"""One training run from its config to its last checkpoint: set up, loop, close."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from harness import checkpoint as checkpoints
from harness.checkpoint import Checkpoint
from harness.checks import changes, without_dev
from harness.config.schema import Config, DataSetConfig
from harness.machine.signals import stop_requests
from harness.report.terminal import Terminal, part_rows
from harness.tracking.tracker import JournalTracker, Tracker, open_tracker, recorded_run_id
from harness.train.engine import Engine
from harness.train.engines import make_engine
from harness.train.loop import loop
from harness.train.prepare import build_model, calibrate_alike, encoder_of, make_loader
from harness.train.resume import OutFolder, stream_now
from harness.train.saving import Saver
from harness.train.state import Observer, Run, TrainState
from harness.train.together import check_alike, checkpoint_of_rank_0
from shards.manifest import Manifest


def run(
    config: Config,
    resume: str | None = None,
    observers: Sequence[Observer] = (),
    *,
    restart: bool = False,
) -> Path:
    """Trains and returns the last checkpoint's folder.

    `resume`: auto, a run's folder or a checkpoint's. `observers` are told of every step. `restart`:
    an earlier run in the same folder is moved aside. Raises ConfigError, ShardError, OSError or
    GuardError. After SIGTERM or SIGINT: saves, and raises SystemExit with 128 + the signal's
    number.
    """
    engine = make_engine(config.train)
    terminal = Terminal(engine.is_main)
    folder = OutFolder(config, resume, restart, terminal.say)
    try:
        with checkpoint_of_rank_0(folder.begin, engine) as found:
            this = _made(config, resume, observers, engine, terminal, found)
        number = _trained(this, folder)
    finally:
        folder.release()
    last = checkpoints.place(config.out_dir, this.state.step)
    if number:
        name = signal.Signals(number).name
        terminal.say(f"stopped by {name} after step {this.state.step}, which is saved: {last}")
        raise SystemExit(128 + number)
    if not config.data.dev:
        terminal.say(
            "no verdict: nothing was scored, since data.dev is empty; `harness evaluate "
            f"{config.out_dir} --data DIR` scores it on pictures that it has not learnt"
        )
    return last


def _trained(this: Run, folder: OutFolder) -> int:
    """Trains to the end and closes all. Returns the number of the signal that stopped it, or 0."""
    saver = Saver(this, folder.lock, folder.copies)
    status = "FAILED"
    try:
        with stop_requests() as stop_asked:
            number = loop(this, saver, stop_asked)
        status = "KILLED" if number else "FINISHED"
    finally:
        saver.close()
        this.tracker.close(status)
    # when the main process has reported everything: a launcher ends all as soon as one has failed
    this.engine.close()
    return number


def _made(
    config: Config,
    resume: str | None,
    observers: Sequence[Observer],
    engine: Engine,
    terminal: Terminal,
    found: Checkpoint | None,
) -> Run:
    """Returns the run with models, data and tracker, as `found` left it; None: a new one."""
    for sentence in [*(changes(found, config) if found else ()), *without_dev(config)]:
        terminal.say(sentence)
    loader = make_loader(config, engine)
    check_alike(config, loader, engine)
    terminal.say(f"precision: {engine.precision.reason}")
    encoder = encoder_of(loader, config)
    model = build_model(config, encoder, precision=engine.precision, device=engine.device)
    state = TrainState(loader.at(0, 0))
    if found:  # before prepare: an engine may keep copies of the weights of its own
        model.load_trained(found.model)
        state = TrainState.from_json(found.state["train"])
        state.stream = stream_now(found, loader, config, terminal.say)
        terminal.say(f"going on after step {state.step} from {found.path}")
    elif not config.model.init_from:
        calibrate_alike(model, config, engine)
    if state.decays_queries and config.train.weight_decay:
        terminal.say("query tokens and per-token means are decayed, as when this run began")
    wrapped = engine.prepare(model, state.decays_queries)
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
            datasets=[*loader.manifests, *_opened(config.data.dev), *_opened(config.data.test)],
        )
    return Run(config, engine, model, wrapped, loader, state, terminal, tracker, observers)


def _opened(sets: Sequence[DataSetConfig]) -> list[Manifest]:
    return [Manifest.read_index(each.path) for each in sets]


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
