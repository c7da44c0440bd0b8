"""Images of a source -> what shards hold of them, decoded in processes of their own.

Item -> its file's bytes, or these encoded anew, with the statistics of the picture, or why not.
A process is sent files on its stdin and answers on its stdout, so that it ends with whoever started
it, however that ends: a line of JSON, then the bytes that it tells of. multiprocessing would import
the caller's script again, which not every script stands, and its workers outlive a killed parent.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from shards.files import ShardError
from shards.images import on_white, upright
from shards.record import RecordError
from shards.sources.source import ImageFiles, Item, Source
from shards.statistics import COLUMNS, picture_statistics, statistics_of, unknown

MAX_PIXELS = 89_478_485  # Pillow's own bound, above which it warns of a decompression bomb
JPEG_QUALITY = 95

# What shards hold byte by byte; the other formats (and what plain decoding would not show) become
# JPEG or PNG.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

_CHUNK = 8  # images that go to a process at once
_AHEAD = 2  # chunks for each process: one it works on, one that waits
# Below so many images a process takes longer to start than it saves.
_WORTH_PROCESSES = 200
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from shards.prepare import serve; serve()"

# payload, extension, what was changed, statistics
Prepared = tuple[bytes, str, str, np.ndarray]


class Fault(NamedTuple):
    """Why an item cannot be used."""

    is_of_text: bool
    reason: str


Outcome = Prepared | Fault
NO_PICTURE: Prepared = (b"", "", "", unknown(1)[0])  # of a record of texts alone


@contextmanager
def preparing(
    source: Source, workers: int, short_side: int | None, max_pixels: int
) -> Iterator[Callable[[Sequence[Item]], Iterator[tuple[Item, Outcome]]]]:
    """Gives a function that yields items with what became of them, in their order, a bounded number
    of images ahead; `workers` processes decode, or this one, where they would not pay.
    """

    def here(items: Sequence[Item]) -> Iterator[tuple[Item, Outcome]]:
        for item in items:
            data = _file_of(source.images, item)
            if not isinstance(data, bytes):
                yield item, data
            else:
                yield item, _decoded(data, short_side, max_pixels)

    if workers == 1 or sum(map(len, source.splits.values())) < _WORTH_PROCESSES:
        yield here
        return
    options = {"short_side": short_side, "max_pixels": max_pixels}
    pool = _Pool(workers, source.images, options)
    try:
        yield pool.prepare
    finally:
        pool.close()


class _Pool:
    """Processes, each with a thread that reads files for it and talks to it."""

    def __init__(self, workers: int, files: ImageFiles, options: dict[str, Any]):
        self._workers = workers
        self._files = files
        self._options = options
        self._threads = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []

    def prepare(self, items: Sequence[Item]) -> Iterator[tuple[Item, Outcome]]:
        chunks = deque(items[n : n + _CHUNK] for n in range(0, len(items), _CHUNK))
        waiting: deque[tuple[Sequence[Item], Future[list[Outcome]]]] = deque()
        while chunks or waiting:
            while chunks and len(waiting) < max(_AHEAD * self._workers, 64 // _CHUNK):
                chunk = chunks.popleft()
                waiting.append((chunk, self._threads.submit(self._ask, chunk)))
            chunk, future = waiting.popleft()
            yield from zip(chunk, future.result(), strict=True)

    def _ask(self, chunk: Sequence[Item]) -> list[Outcome]:
        """Runs in a thread, which has a process to itself."""
        if not hasattr(self._own, "process"):
            self._own.process = self._start()
        process = self._own.process
        found = [_file_of(self._files, item) for item in chunk]
        files = [data for data in found if isinstance(data, bytes)]
        try:
            _send(process.stdin, self._options | {"sizes": list(map(len, files))}, files)
            answers = iter(_answers(process.stdout, files))
        except (OSError, EOFError) as error:
            process.communicate()
            raise ShardError(
                f"a process that decodes images ended with {process.returncode} (-9 mostly means "
                "too little memory): use fewer --workers"
            ) from error
        return [next(answers) if isinstance(data, bytes) else data for data in found]

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()


def serve() -> None:
    """Answers on stdout what is asked on stdin, until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: whoever asks ends this
    asked = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints is no answer
    try:
        while True:
            _answer(asked, answers)
    except EOFError:
        return


def _answer(asked: IO[bytes], answers: IO[bytes]) -> None:
    """Tells of each file what became of it: a reason, or extension, changes and bytes of the
    payload (null: it is the file), behind which come the statistics and the payload.
    """
    asked_of = _told(asked)
    told: list[Any] = []
    parts: list[bytes] = []
    for data in [_exactly(asked, size) for size in asked_of["sizes"]]:
        outcome = _decoded(data, asked_of["short_side"], asked_of["max_pixels"])
        if isinstance(outcome, Fault):
            told.append(outcome.reason)
            continue
        payload, extension, changed, row_K = outcome
        is_file = payload is data
        told.append([extension, changed, None if is_file else len(payload)])
        parts += [row_K.tobytes(), b"" if is_file else payload]
    _send(answers, told, parts)


def _answers(pipe: IO[bytes], files: Sequence[bytes]) -> list[Outcome]:
    """Reads what `_answer` tells of these files. Raises EOFError where it ends before that."""
    outcomes: list[Outcome] = []
    for data, told in zip(files, _told(pipe), strict=True):
        if isinstance(told, str):
            outcomes.append(Fault(False, told))
            continue
        extension, changed, size = told
        row_K = np.frombuffer(_exactly(pipe, 4 * len(COLUMNS)), np.float32)
        payload = data if size is None else _exactly(pipe, size)
        outcomes.append((payload, extension, changed, row_K))
    return outcomes


def _send(pipe: IO[bytes], told: Any, parts: Iterable[bytes]) -> None:
    pipe.write(json.dumps(told).encode() + b"\n")
    pipe.writelines(parts)
    pipe.flush()


def _told(pipe: IO[bytes]) -> Any:
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _file_of(files: ImageFiles, item: Item) -> bytes | Outcome:
    """Returns the bytes to decode, or what became of an item that has none."""
    try:
        item.record.check()
        item.record.to_json()  # a text that cannot be written costs its sample
        return NO_PICTURE if item.image is None else files.read(item.image)
    except Exception as error:  # of a damaged zip, of a server
        return _fault(error)


def _decoded(data: bytes, short_side: int | None, max_pixels: int) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
        # Pillow's plugins raise nearly anything on damaged bytes; the reason is kept.
        try:
            return prepare_image(data, short_side, max_pixels)
        except Exception as error:
            return _fault(error)


def _fault(error: Exception) -> Fault:
    reason = f"{type(error).__name__}: {error}"
    reason = reason.split(" <_io")[0]  # an address in memory, another in every build
    return Fault(isinstance(error, RecordError), reason)


def prepare_image(
    data: bytes, short_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> Prepared:
    """Returns an image file as (payload, extension, what was changed or "", its statistics (K,)).

    Raises ValueError for too many pixels, and what Pillow raises for damage (mostly OSError). The
    bytes stay as they are when plain decoding to RGB shows the picture people
    see. Else it is encoded anew, JPEG and AVIF as JPEG (quality 95), the others as PNG: EXIF
    rotation applied, transparency laid on white, CMYK to RGB, grey of more than 8 bits to 8, the
    first frame of an animation, formats other than JPEG, PNG and WebP. A short side above
    `short_side` is brought down to it (Lanczos, JPEG).
    """

    def check_size(width: int, height: int) -> None:
        if width * height > max_pixels:
            raise ValueError(f"{width}x{height} pixels, more than {max_pixels}")

    image, form, changed = upright(data, check_size)
    _note_colours(image, changed)
    if form not in _EXTENSIONS:
        changed.append(form)
    shrink = short_side is not None and min(image.size) > short_side
    if not shrink and not changed:
        return data, _EXTENSIONS[form], "", picture_statistics(on_white(image), len(data))
    image = on_white(image)
    if short_side is not None and shrink:
        scale = short_side / min(image.size)
        sides = [max(short_side, round(side * scale)) for side in image.size]
        image = image.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)
        changed.append("shrunk")
    image.info.clear()  # a CMYK profile or a transparent colour must not travel on
    encoded = io.BytesIO()
    if shrink or form in ("JPEG", "MPO", "AVIF"):
        extension = "jpg"
        image.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        extension = "png"
        image.save(encoded, "PNG")
    payload = encoded.getvalue()
    return payload, extension, ", ".join(changed), statistics_of(payload)


def _note_colours(image: Image.Image, changed: list[str]) -> None:
    """Adds to `changed` what plain decoding to RGB would not show."""
    if image.mode == "CMYK":
        changed.append("CMYK")
    elif image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A").tobytes()
        if alpha.strip(b"\xff"):  # somewhere it is not opaque
            changed.append("transparency")
