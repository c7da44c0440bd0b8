"""Where a run comes from, in MLflow's words: the command, the code, the versions, the data."""

from __future__ import annotations

import getpass
import importlib.metadata
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.manifest import Manifest

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "webdataset",
    "mlflow",
    "numpy",
)
COMMAND = "HARNESS_COMMAND"  # what the user typed, for the processes that come of it
MAX_DIGEST = 36  # characters, mlflow 3.17; the whole one is a tag of the input


def dataset_inputs(manifests: Sequence[Manifest]) -> list[dict[str, dict[str, str]]]:
    """Returns what makes an `mlflow.entities.DatasetInput` of each set: its place, size and
    digest.
    """
    inputs = []
    for manifest in manifests:
        size = {
            "samples": manifest.samples,
            "texts": manifest.texts,
            "shards": len(manifest.shards),
        }
        size["bytes"] = sum(shard.bytes for shard in manifest.shards)
        dataset = {
            "name": f"{manifest.dataset}/{manifest.split}",
            "digest": manifest.digest[:MAX_DIGEST],
            "source_type": "local",
            "source": json.dumps({"uri": manifest.folder}),
            "profile": json.dumps(size),
        }
        tags = {"mlflow.data.context": manifest.split, "sha256": manifest.digest}
        inputs.append({"dataset": dataset, "tags": tags})
    return inputs


def source_tags() -> dict[str, str]:
    typed = shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    tags = {
        "mlflow.source.name": os.environ.get(COMMAND) or typed,
        # Of a LOCAL source mlflow's pages show what stands behind the last slash: "demo.yaml".
        "mlflow.source.type": "JOB",
    }
    try:
        return {**tags, "mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container whose user has no name
        return tags


def version_tags() -> dict[str, str]:
    tags = {"version.python": sys.version.split()[0]}
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    return tags


def git_tags() -> dict[str, str]:
    """Returns the revision of this code, where it runs from its own repository (an installed one
    has only its version).
    """
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        if Path(git("rev-parse", "--show-toplevel") or "/") != root:
            return {}
        dirty = git("status", "--porcelain", "--untracked-files=no") != ""
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(dirty).lower(),
        }
    except (
        OSError,
        subprocess.TimeoutExpired,
    ):  # git is not installed, or the disk is slow: the run matters more
        return {}
