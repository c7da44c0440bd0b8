"""`harness export`: a run's model as a folder that stands alone, proven and then put in place.

    RUN -> OUT: config.json, model.safetensors, adapter/, tokenizer and processor, lm/ and vision/
    where these were local, README.md (the model card), vl_harness.py

Written beside OUT, loaded again in a fresh process and compared with the run; only what answers as
the run is renamed to OUT, and only that is pushed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import checkpoint
from harness.checkpoint import Checkpoint
from harness.config.schema import Config
from harness.errors import ConfigError
from harness.evaluate.moved import Move
from harness.evaluate.run_on_disk import load_model
from harness.export.contexts import PICTURES, dev_contexts
from harness.export.parts import write_parts
from harness.export.proof import Proof, UnprovenError, measure, prove
from harness.hub.remote import NAME
from harness.model.vlm import WEIGHTS
from harness.redact import say
from shards.write import folder_beside

MERGE_PICTURES = 64  # on which a merged model's answers and score are compared with the run's
CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """What was written and what was proven of it."""

    out: Path
    checkpoint: Checkpoint
    proof: Proof
    url: str | None  # of the repository that it was pushed to


def export(
    run: Path | str,
    out: Path | str,
    *,
    merge: bool = False,
    which: str | None = None,
    tell: Callable[[object], None] = say,
) -> Exported:
    """Writes a run's newest model (`which`: newest, best or a step), or that of a checkpoint, to
    the new folder `out`.

    `merge`: LoRA is folded into the base, a 4-bit one into its full-precision weights. Raises
    ConfigError, ShardError, OSError, and UnprovenError where the export does not answer as the
    run: then `out` is not written.
    """
    out = Path(out)
    found = checkpoint.at(run, which)
    config = Config(**Move.of(found).config(found.state["config"]))
    check_out(out)
    check_merge(config, merge)
    model = load_model(found, config, with_vision=True)
    four_bits = config.model.lm.tuning == "qlora"
    pictures = MERGE_PICTURES if merge and four_bits else PICTURES
    own = measure(model, config, dev_contexts(config, model.tokenizer, pictures))
    with folder_beside(out) as beside:
        write_parts(model, config, beside, merge=merge)
        proof = prove(beside, own, config, merged=merge)
        for line in proof.lines():
            tell(line)
        if not proof.holds:
            raise UnprovenError(f"the export does not answer as {run}: {out} is not written")
        put_in_place(beside, out)
    return Exported(out, found, proof, None)


def check_out(out: Path) -> None:
    """Raises ConfigError for a place where something else lies than an export of ours."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not is_export(out)):
        raise ConfigError(
            f"{out} is there already and is no export of harness: remove it, or choose another "
            "folder"
        )


def is_export(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (f"{NAME}.py", WEIGHTS, CARD))


def check_merge(config: Config, merge: bool) -> None:
    """Raises ConfigError where there is nothing to merge."""
    tuning = config.model.lm.tuning
    if merge and tuning not in ("lora", "qlora"):
        raise ConfigError(
            f"--merge: this run has no LoRA to fold into its base (model.lm.tuning={tuning}); "
            "export it without"
        )


def put_in_place(beside: Path, out: Path) -> None:
    """Renames the finished folder to `out`; an export that lies there is moved aside first, and
    removed when the new one is in its place.
    """
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(beside, out)
    shutil.rmtree(old, ignore_errors=True)
