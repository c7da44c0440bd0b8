r"""What may be written and shown: texts without secrets and without control characters.

`masked` knows the forms that secrets take in URIs, headers, settings and messages; whatever goes
to disk passes through it (`masked_document` for a config). `clean` is for sentences: it also takes
out the values that this process knows to be secret, and escapes what a terminal would obey.
`say` and `show` are the only ways to stdout and stderr. Imports nothing of harness and of shards.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any, TextIO
from urllib.parse import quote, unquote

MASK = "***"
SECRETS = "HARNESS_SECRETS"  # for children: JSON, masked text -> the real one
SHORTEST = 6  # characters of a value that is looked for wherever it stands: less is in every word

_KEY = (
    r"(?:password|passwd|passphrase|pwd|secret|token|jwt|signature|credentials?|"
    r"(?:api|access|secret|account|private|shared)[-_]?key(?:[-_]?id)?|access[-_]?id|"
    r"(?<![a-z])(?:sig|sas|auth))"
)
_NO_PORT = r"(?!\d{1,5}(?:[/?#\s'\")\],]|$))"
_WITH_COLON = rf"[^\s/:@?#\[]*:{_NO_PORT}\S{{0,1000}}"
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|(?:(?!%26|%3B)[^\s&'\"#;<>)])+)"
# The group is what is masked. Repetitions are bounded: a long text takes no longer than its length.
_FORMS = [
    re.compile(form)
    for form in (
        # https://user:p@ss@host, https://TOKEN@host; elsewhere a user alone is no secret
        rf"(?i)https?://(?P<secret>{_WITH_COLON}|[^\s/?#]{{1,1000}})@",
        rf"[\w+.-]{{2,40}}://[^\s/:@?#\[]*:(?P<secret>{_NO_PORT}\S{{0,1000}})@",
        r"(?i)\b(?!abfss?:|wasbs?:)[\w+.-]{2,40}://(?P<secret>[\w.~%+=-]{20,1000})@",
        r"(?<![\w/:@.+-])[A-Za-z][\w.+-]{0,100}:(?!//)(?P<secret>[^\s/'\"]{1,1000})@(?=[\w\[])",
        r"(?i)%3A%2F%2F(?P<secret>\S{1,1000}?)%40",
        # headers, also as an error message or the repr of a dictionary has them
        r"(?i)authorization[\"']?\s*[:=]\s*(?:b(?=[\"']))?[\"']?"
        r"(?P<secret>(?:(?:bearer|basic|digest|token|negotiate)\s+)?[^\s\"',;}]+)",
        r"(?i)\bbearer\s+(?P<secret>[\w.~+/=%-]{6,})",
        r"\b[Bb]asic\s+(?P<secret>(?=\S{0,1000}[A-Z0-9=])[\w+/=-]{8,})",
        r"(?i)\b(?:set-)?cookie[\"']?\s*[:=]\s*[\"']?(?P<secret>[^\r\n\"'}]+)",
        rf"(?i)\b(?:x|private)-[\w-]{{0,40}}{_KEY}\s*:\s*(?P<secret>\S+)",
        # settings, query strings, JSON
        r"\b[A-Z][A-Z0-9_]{0,40}(?:PASSWORD|PASSWD|TOKEN|SECRET|KEY)=(?P<secret>[^\s'\"]+)",
        rf"(?i)(?<![a-z0-9])[\w.-]{{0,40}}{_KEY}\s*(?:=|%3D)\s*(?P<secret>{_VALUE})",
        rf"(?i)[?&](?:key|code)=(?P<secret>{_VALUE})",
        rf"(?i)[\"'][\w.-]{{0,40}}{_KEY}[\"']\s*:\s*(?P<secret>\"[^\"]*\"|'[^']*')",
        r"(?i)\b(?:password|passwd|passphrase|pwd)\s*:\s*(?P<secret>[^\s,]+)",
        # tokens that are known by their look
        r"\b(?P<secret>(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_\w{20,}|github_pat_\w{20,}|"
        r"glpat-[\w-]{16,}|hf_[A-Za-z0-9]{20,}|dapi[0-9a-f]{32}|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}|"
        r"AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*)",
    )
]
_SECRET_VARIABLE = re.compile(r"(?i)(?:^|_)(?:password|passwd|token|secret|api_?key|access_key)$")
# Escape sequences, C1 controls, bidirectional overrides, separators, half characters, tags.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# Of the configs that were loaded: masked text -> the real one, and what must never be told.
_hidden: dict[str, str] = {}
_known: set[str] = set()


def masked(text: str) -> str:
    """Returns the text with *** in place of every secret that can be told by its form."""
    for form in _FORMS:
        text = form.sub(_without_secret, text)
    return text


def _without_secret(found: re.Match[str]) -> str:
    start = found.start("secret") - found.start()
    stop = found.end("secret") - found.start()
    secret = found["secret"]
    quotes = secret[0] if secret[:1] in ("'", '"') else ""
    return f"{found[0][:start]}{quotes}{MASK}{quotes}{found[0][stop:]}"


def masked_document(document: Any) -> Any:
    """Returns a document of mappings, lists and texts in which every text is masked."""
    if isinstance(document, dict):
        return {key: masked_document(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [masked_document(value) for value in document]
    return masked(document) if isinstance(document, str) else document


def texts(document: Any) -> Iterator[str]:
    """Yields every text in a document, keys aside."""
    if isinstance(document, dict):
        document = list(document.values())
    if isinstance(document, list | tuple):
        for part in document:
            yield from texts(part)
    elif isinstance(document, str):
        yield document


def remember(document: Any) -> None:
    """Keeps the secrets of a config in mind: for `revealed`, for children, and for `clean`, which
    takes them out however they are told.
    """
    for text in texts(document):
        if (hidden := masked(text)) != text:
            _hidden[hidden] = text
            for form in _FORMS:
                for found in form.finditer(text):
                    _known.update(_values(found["secret"].strip("'\"")))


def _values(secret: str) -> set[str]:
    """Returns what else than the secret itself would tell it: USER:PASSWORD in its parts."""
    parts = secret.partition(":")
    user = parts[0]
    password = parts[2]
    pair = f"{unquote(user)}:{unquote(password)}".encode()
    return {secret, password or user, unquote(password or user), base64.b64encode(pair).decode()}


def revealed(document: Any) -> Any:
    """Returns a document with real texts in place of those masked ones that this process or its
    parent was given in full.
    """
    known = json.loads(os.environ.get(SECRETS, "{}")) | _hidden
    if isinstance(document, dict):
        return {key: revealed(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [revealed(value) for value in document]
    return known.get(document, document) if isinstance(document, str) else document


def for_children() -> dict[str, str]:
    """Returns the variable that tells a child what the files that it reads hold masked."""
    return {SECRETS: json.dumps(_hidden)} if _hidden else {}


def clean(text: str) -> str:
    """Returns a sentence as it may be shown: no secrets, whatever their form, and no control
    characters.
    """
    values = set(_known)
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name):
            values.add(value)
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= SHORTEST and MASK not in value:
            text = text.replace(value, MASK).replace(quote(value, safe=""), MASK)
    return printable(masked(text))


def printable(text: str) -> str:
    r"""Returns the text with what a terminal would obey written out, as \u001b (and so in JSON)."""
    return _UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], text)


def say(text: object, file: TextIO | None = None) -> None:
    """Prints a sentence on stdout or `file`, cleaned."""
    print(clean(str(text)), file=file)


def show(text: object, end: str = "\n") -> None:
    """Prints data on stdout (answers, tables, JSON), as they are but for control characters."""
    print(printable(str(text)), end=end)


def guard_output() -> None:
    """Cleans what goes around `say`: the records of every logger, and the tracebacks of bugs."""
    make = logging.LogRecord

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        try:
            made.msg = clean(made.getMessage())
        except (TypeError, ValueError):  # arguments that do not fit: the handler would say so
            made.msg = clean(f"{made.msg} {made.args}")
        made.args = ()
        if made.exc_info and made.exc_info[0]:
            made.exc_text = clean("".join(traceback.format_exception(*made.exc_info))).rstrip()
        return made

    def tell(kind: Any, error: Any, trace: Any) -> None:
        say("".join(traceback.format_exception(kind, error, trace)).rstrip(), sys.stderr)

    logging.setLogRecordFactory(record)
    logging.captureWarnings(True)
    sys.excepthook = tell
