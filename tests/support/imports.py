"""Who imports whom in harness and shards, as the source says: inside functions and for types
too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Returns dotted name -> file of every module of harness and shards."""
    files = [file for room in ("harness", "shards") for file in (ROOT / room).rglob("*.py")]
    return {dotted(file): file for file in files}


def dotted(file: Path) -> str:
    """Returns the module's name, as in `import NAME`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(node: ast.AST, known: Iterable[str]) -> Iterator[str]:
    """Yields the modules of `known` that one import statement names."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import: it hides which room is meant"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        while name and name not in known:  # `from harness.errors import ConfigError` names a class
            name = name.rpartition(".")[0]
        if name:
            yield name


def graph(known: dict[str, Path]) -> Graph:
    """Returns module -> the modules that it imports anywhere."""
    return {
        name: {
            target
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            for target in imported(node, known)
            if target != name
        }
        for name, file in known.items()
    }


def road(imports: Graph, start: str, is_end: Callable[[str], bool]) -> list[str]:
    """Returns the shortest chain of imports from `start` to a module that is an end; [] if none."""
    came_from: dict[str, str | None] = {start: None}
    waiting = [start]
    while waiting:
        here = waiting.pop(0)
        for target in sorted(imports[here]):
            if is_end(target):
                return [*_chain(came_from, here), target]
            if target not in came_from:
                came_from[target] = here
                waiting.append(target)
    return []


def is_in(name: str, rooms: tuple[str, ...]) -> bool:
    """Tells whether a module is one of the rooms or lies in one."""
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def _chain(came_from: dict[str, str | None], end: str) -> list[str]:
    chain = [end]
    while (before := came_from[chain[-1]]) is not None:
        chain.append(before)
    return chain[::-1]
