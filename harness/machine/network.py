"""Whether the hub of models can be reached: asked once a process, for seconds at most.

Imports no torch.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from http import HTTPStatus
from threading import Thread

from huggingface_hub import constants, get_session

HUB_ANSWERS_WITHIN = 5.0  # seconds


@cache
def _hub_answers() -> bool:
    # A thread: looking up the host's name knows no time-out.
    answers: list[bool] = []

    def ask() -> None:
        with suppress(Exception):  # of any HTTP library, and of the proxies between
            found = get_session().head(constants.ENDPOINT, timeout=HUB_ANSWERS_WITHIN)
            # A refusal is an answer: the root of a mirror may be closed, and its files open. What
            # is out of order its libraries would ask again and again.
            answers.append(found.status_code < HTTPStatus.INTERNAL_SERVER_ERROR)

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_ANSWERS_WITHIN)
    return answers == [True]


def why_no_hub() -> str | None:
    """Returns why the hub is not asked, in words; None where it answers.

    Where it does not, its libraries look into the local cache alone from then on: by themselves
    they try each file six times, half a minute a file.
    """
    if not constants.HF_HUB_OFFLINE and not _hub_answers():
        constants.HF_HUB_OFFLINE = True
    if not constants.HF_HUB_OFFLINE:
        return None
    was_asked = _hub_answers.cache_info().currsize
    return "the hub cannot be reached" if was_asked else "HF_HUB_OFFLINE is set"


def hub_answers() -> bool:
    """Returns whether the hub can be reached, as `why_no_hub` finds."""
    return why_no_hub() is None
