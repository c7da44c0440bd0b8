"""The readers of fuzz.py under atheris, which looks for inputs that reach new code.

    pip install atheris; OMP_NUM_THREADS=1 python benchmarks/fuzz_atheris.py --minutes 10

Prints one table: reader, inputs tried, crashes. atheris ends the process it runs in, so each reader
has one. Ends with 1 where there was a crash; its input lies in the folder that is named.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris
from rich.console import Console
from rich.table import Table

OURS = ["shards", "harness.config", "harness.evaluate.vqa", "harness.evaluate.captions", "tarfile"]

with atheris.instrument_imports(include=OURS):
    import fuzz


def run_alone(name: str, seconds: int, folder: Path) -> None:
    """Fuzzes a reader in this process and ends it."""
    target = fuzz.targets()[name]
    (folder / "corpus").mkdir()
    for number, sound in enumerate(target.sound):
        (folder / "corpus" / f"sound-{number}").write_bytes(sound)
    options = [f"-max_total_time={seconds}", "-max_len=20000", f"-artifact_prefix={folder}/"]
    given = [sys.argv[0], *options, str(folder / "corpus")]
    atheris.Setup(given, lambda data: fuzz.try_input(target, data))
    atheris.Fuzz()


def main() -> int:
    """Fuzzes each reader in a process of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="of all readers together")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        run_alone(given.alone[0], int(given.alone[1]), Path(given.alone[2]))
    names = [name for name, target in fuzz.targets().items() if target.sound]
    table = Table("reader", "inputs tried", "crashes", title=f"atheris, {given.minutes:g} minutes")
    crashed = False
    for name in names:
        folder = tempfile.mkdtemp(prefix="fuzz-")
        seconds = str(max(1, round(60 * given.minutes / len(names))))
        line = [sys.executable, __file__, "--alone", name, seconds, folder]
        ran = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
        tried = re.findall(r"^#(\d+)", ran.stderr, re.MULTILINE) or ["0"]
        table.add_row(name, f"{int(tried[-1]):,}", str(int(ran.returncode != 0)))
        if ran.returncode:
            crashed = True
            print(f"{name}, the input in {folder}:\n{ran.stderr[-3000:]}", file=sys.stderr)
    Console().print(table)
    return int(crashed)


if __name__ == "__main__":
    sys.exit(main())
