"""CSV as it is met: any separator, quotes that nobody closed, commas in unquoted captions, cells
that hold a list.

Text of a file -> ("line N", {column: text or list of texts}) a record.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import tokenize
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from shards.files import ShardError
from shards.record import RecordError
from shards.sources.rows import Columns
from shards.sources.source import UNUSABLE_TEXT, Source

SEPARATORS = (",", "\t", ";", "|")
_NAMED = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
_EXCEL = re.compile("sep=(.)")  # a first line by which it is told the separator
# Line 20,001 of Flickr30k's results.csv: "2199200615.jpg| 4   A dog runs across the grass ."
_NUMBER_AND_TEXT = re.compile(r"\s*(\d+)\s+(\S.*)", re.DOTALL)
_JOINED = "lines with the separator in their last, unquoted column, which was joined again"
_REPAIRED = "lines without the separator behind their number, taken; the first: "
_UNCLOSED = "lines with a quote that nothing closes, taken as it stands; the first: "


def read_table(
    text: str,
    what: str,
    columns: Columns,
    separator: str | None,
    source: Source,
    is_image: Callable[[str], bool],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows. A line that has not as many cells as the first one is left out and named,
    or put right where only one reading makes sense, and counted.

    `separator`: one character, or None: what the first line suggests. `is_image` tells the name of
    an image of the folder, by which a line is known that an unclosed quote has swallowed. Raises
    ShardError for a first line that names no columns.
    """
    lines = deque(enumerate(text.split("\n"), 1))
    while lines and not lines[0][1].strip():
        lines.popleft()
    if lines and (said := _EXCEL.fullmatch(lines[0][1])):
        separator = separator or said[1]
        lines.popleft()
    if not lines:
        raise ShardError(f"{what} is empty")
    mark = _separator(separator, lines[0][1])
    names = [name.strip() for name in next(_records(lines, mark, lambda cells: False, [])).cells]
    if len(set(names)) < len(names):
        raise ShardError(f"{what} names a column twice: {', '.join(names)}")
    columns.check(names, what)
    column = columns.of("image", names) or "image_id"
    image_at = names.index(column) if column in names else None  # None: of texts alone

    def begins_a_record(cells: list[str]) -> bool:
        if image_at is None or len(cells) < len(names):
            return False
        return is_image(cells[image_at].strip())

    unclosed: list[int] = []
    for record in _records(lines, mark, begins_a_record, unclosed):
        where = f"line {record.line}"
        try:
            cells = _fitted(record, names, mark, columns, source)
        except RecordError as error:
            source.skip(UNUSABLE_TEXT, where, str(error), texts=1)
            continue
        yield where, _with_lists(dict(zip(names, cells, strict=True)), columns, source)
    if unclosed:
        source.notes[f"{_UNCLOSED}line {unclosed[0]}"] += len(unclosed)


class _Record(NamedTuple):
    """The cells of a record and the line where it begins."""

    line: int
    cells: list[str]


def _records(
    lines: deque[tuple[int, str]],
    mark: str,
    begins_a_record: Callable[[list[str]], bool],
    unclosed: list[int],
) -> Iterator[_Record]:
    """Yields the records of these lines, which it takes away; a cell in quotes may hold line ends.

    Where a quote swallows a line that begins a record of its own, the quote is one of the text.
    """
    while lines:
        taken: list[tuple[int, str]] = []

        def fed(taken: list[tuple[int, str]] = taken) -> Iterator[str]:
            while lines:
                taken.append(lines.popleft())
                yield taken[-1][1] + "\n"

        try:
            cells = next(csv.reader(fed(), delimiter=mark), [])
            is_closed = not any(begins_a_record(_plain(line, mark)) for _, line in taken[1:])
        except csv.Error:  # a cell of more than 131,072 characters
            is_closed = False
        number = taken[0][0]
        if not is_closed:
            unclosed.append(number)
            lines.extendleft(reversed(taken[1:]))
            cells = _plain(taken[0][1], mark)
        if any(map(str.strip, cells)):
            yield _Record(number, cells)


def _plain(line: str, mark: str) -> list[str]:
    return next(csv.reader([line], delimiter=mark, quoting=csv.QUOTE_NONE), [])


def _separator(given: str | None, first_line: str) -> str:
    """Returns the character between cells. Raises ShardError for one that cannot be."""
    if given is None:
        return max(SEPARATORS, key=first_line.count)
    mark = _NAMED.get(given, given)
    if len(mark) != 1 or mark in '"\r\n':
        raise ShardError(
            f"--separator is {given!r}: it is one character, such as ',', ';', '|', or tab"
        )
    return mark


def _fitted(
    record: _Record, names: list[str], mark: str, columns: Columns, source: Source
) -> list[str]:
    """Returns as many cells as there are columns, without outer whitespace."""
    cells = record.cells
    last = len(names) - 1
    if len(cells) > len(names) and names[last] == columns.of("caption", names):
        source.notes[_JOINED] += 1
        cells = [*cells[:last], mark.join(cells[last:])]
    if len(cells) == last and last > 1 and (found := _NUMBER_AND_TEXT.fullmatch(cells[-1])):
        so_far = [note for note in source.notes if note.startswith(_REPAIRED)]
        source.notes[so_far[0] if so_far else f"{_REPAIRED}line {record.line}"] += 1
        cells = [*cells[:-1], found[1], found[2]]
    if len(cells) != len(names):
        raise RecordError(
            f"it has {len(cells)} cells, and the first line has {len(names)} columns "
            f"({', '.join(names)})"
        )
    return [cell.strip() for cell in cells]


def _with_lists(fields: dict[str, Any], columns: Columns, source: Source) -> dict[str, Any]:
    for role in ("caption", "answer"):
        column = columns.of(role, fields)
        if column and (found := texts_in(fields[column])):
            source.notes["cells that hold a list, taken as its texts"] += 1
            fields[column] = found
    return fields


def texts_in(cell: str) -> list[str] | None:
    """Returns the texts of a cell that holds a list of them: JSON, Python's list or tuple, numpy's
    print of an array (no commas); None for any other cell.
    """
    if not (cell.startswith(("[", "(")) and cell.endswith(("]", ")"))):
        return None
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        found = _literals(cell)
    is_list = isinstance(found, list) and found and all(isinstance(text, str) for text in found)
    return found if is_list else None


def _literals(cell: str) -> list[str] | None:
    """Returns the string literals of a list; ast would join ['a' 'b'], numpy's, to one."""
    found = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(cell).readline):
            if token.type == tokenize.STRING:
                found.append(ast.literal_eval(token.string))
            elif token.string.strip() and token.string not in "[](),":
                return None
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    return found
