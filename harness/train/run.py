"""One training run from its config to its last checkpoint: set up, loop, close."""

from __future__ import annotations

import signal
from pathlib import Path

from harness import checkpoint as checkpoints
from harness.checks import changes, check_resume
from harness.config.schema import Config
from harness.machine.signals import stop_requests
from harness.report.terminal import Terminal, part_rows
from harness.tracking.tracker import NoTracker, Tracker, open_tracker, recorded_run_id
from harness.train.engines import make_engine
from harness.train.loop import loop
from harness.train.prepare import build_model, calibrate, encoder_of, make_loader
from harness.train.state import Run, TrainState
from shards.manifest import Manifest
from shards.stream import StreamState


def run(config: Config, resume: str | None = None) -> Path:
    """Trains and returns the last checkpoint's folder. Raises ConfigError, ShardError, OSError or
    GuardError.

    After SIGTERM or SIGINT: saves, and raises SystemExit with 128 + the signal's number.
    """
    check_resume(config, resume)
    engine, out = make_engine(config.train), config.out_dir
    terminal = Terminal(engine.is_main)
    found = checkpoints.find(out, resume, terminal.say)
    for sentence in changes(found, config) if found else ():
        terminal.say(sentence)
    loader = make_loader(config, engine)
    terminal.say(f"precision: {engine.precision.reason}")
    encoder = encoder_of(loader, config)
    model = build_model(config, encoder, precision=engine.precision, device=engine.device)
    state = TrainState(StreamState(0, 0, loader.digest))
    if found:  # before prepare: an engine may keep copies of the weights of its own
        model.load_trained(found.model)
        saved = found.state["train"]
        state = TrainState(**{**saved, "stream": StreamState.from_json(saved["stream"])})
        terminal.say(f"going on after step {state.step} from {found.path}")
    elif not config.model.init_from:
        calibrate(model, config)
    wrapped = engine.prepare(model)
    if found:
        engine.load_optimizer_state(found.optimizer())
        engine.load_scaler_state(found.state["scaler"])
    terminal.parts(part_rows(model.parts))

    tracker: Tracker = NoTracker()
    if engine.is_main:
        # From another folder's checkpoint a new run begins; a job killed before its first one goes
        # on with its own.
        own = found.path.resolve().is_relative_to(out.resolve()) if found else resume == "auto"
        run_id = (found and found.state["run_id"]) or recorded_run_id(config) if own else None
        sets = [*loader.manifests, *(Manifest.open(dev.path) for dev in config.data.dev)]
        tracker = open_tracker(
            config, run_id=run_id, resume_step=state.step, facts=engine.facts(), datasets=sets
        )
    status = "FAILED"
    try:
        with stop_requests() as stop_asked:
            number = loop(
                Run(config, engine, model, wrapped, loader, state, terminal, tracker), stop_asked
            )
        status = "KILLED" if number else "FINISHED"
    finally:
        tracker.close(status)
    # when the main process has reported everything: a launcher ends all as soon as one has failed
    engine.close()
    last = checkpoints.place(out, state.step)
    if number:
        terminal.say(
            f"stopped by {signal.Signals(number).name} after step {state.step}, which is saved: {last}"
        )
        raise SystemExit(128 + number)
    return last
