"""The repository of an export on the hub: private unless asked otherwise, checked before the work
and written after the proof.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from harness.errors import ConfigError, reason_of
from harness.hub.remote import NAME

OPTION = "--push-to-hub"


def check_repository(repository: str, public: bool) -> None:
    """Raises ConfigError for a repository that could not be written, or must not: one that holds
    something else than an export, or is public though that was not asked.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"{OPTION} {repository}: expected OWNER/NAME, as on the hub")
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # no token, no network, offline mode: the remedy is told with it
        raise ConfigError(
            f"{OPTION} {repository}: the hub does not know who you are ({reason_of(error)}): log "
            "in with `hf auth login`, where there is a network"
        ) from error
    try:
        there = api.model_info(repository)
    except RepositoryNotFoundError:
        return
    names = {file.rfilename for file in there.siblings or []} - {".gitattributes"}
    if names and f"{NAME}.py" not in names:
        raise ConfigError(
            f"{OPTION} {repository}: it is there already and no export of harness: choose another "
            "name"
        )
    if not there.private and not public:
        raise ConfigError(
            f"{OPTION} {repository}: it is there already and public: give --public, or another name"
        )


def push(folder: Path, repository: str, public: bool) -> str:
    """Writes the folder's files into the repository, in place of those there, and returns its URL.

    Raises ConfigError.
    """
    api = HfApi()
    try:
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="harness export",
            delete_patterns="*",  # what an earlier export had and this one has not
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"{folder} is written, and {OPTION} {repository} failed: {reason_of(error)}"
        ) from error
    return str(made)
