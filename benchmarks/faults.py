"""Injects faults into real runs at toy size: what was promised, and what was seen.

    python benchmarks/faults.py [--json] [--only WORD ...] [--seed 0]

Each fault has a fresh folder with sets and a run of its own, in a process of its own; "bit-equal"
means that weights and moments at the end have the sha256 of those of a run that nothing
interrupted. Another fault is another function under FAULTS: a Toy in, (as promised?, what was seen)
out. Exit code 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from faulty_server import faulty_server
from harness import checkpoint as checkpoints
from harness.report.pictures import markdown_table
from harness.tracking.tracker import sync
from mlflow_server import MlflowServer
from shards.record import Record, Text
from shards.write import write_shards
from toy_process import Process, Toy, make_shared
from toy_runs import make_shards, picture

Seen = tuple[bool, str]  # as promised?, in words


@dataclass(frozen=True)
class Fault:
    """What is done to a run, and what is promised."""

    name: str
    promise: str
    inject: Callable[[Toy, random.Random], Seen]


@dataclass(frozen=True)
class Row:
    """A fault that was injected."""

    fault: str
    promise: str
    seen: str
    kept: bool
    seconds: float


FAULTS: list[Fault] = []


def fault(name: str, promise: str) -> Callable[[Callable[[Toy, random.Random], Seen]], None]:
    """Registers the function under it."""
    return lambda inject: FAULTS.append(Fault(name, promise, inject))


def resumed(toy: Toy, before: str = "", needs: str = "") -> Seen:
    """Goes on with a run and says how it ended; `needs`: words that it must say on the way."""
    code, process = toy.resume()
    equal = toy.is_bit_equal()
    told = needs in process.said
    seen = f"{before}resumed: {'bit-equal' if equal else 'other weights'}, code {code}"
    return equal and told and not code, seen + (f", told: {needs}" if needs and told else "")


def ended(code: int, process: Process) -> str:
    words = process.last_words.replace(f"{process.log.parent}/", "")
    return f"code {code}" + (f": {words}" if code else "")


def newest(toy: Toy) -> Path:
    found = checkpoints.newest(toy.out)
    assert found, "the run saved nothing"
    return found.path


# ---- processes -----------------------------------------------------------------------------------


@fault("SIGKILL at a random moment", "resumed bit-equal")
def _(toy: Toy, draw: random.Random) -> Seen:
    process = toy.start()
    toy.wait_for(process, step := draw.randint(1, 7))
    time.sleep(draw.random() / 20)
    os.kill(process.pid, signal.SIGKILL)
    return resumed(toy, f"killed about step {step} ({process.wait()}), ")


@fault("SIGKILL while a checkpoint is written", "the older one is whole, resumed bit-equal")
def _(toy: Toy, draw: random.Random) -> Seen:
    process = toy.start()
    toy.wait_for(process, 3)
    while not list(toy.out.glob("checkpoints/.writing-*")):
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return resumed(toy, f"left {newest(toy).name}, ")


@fault("SIGTERM", "saves the step, code 143, resumed bit-equal")
def _(toy: Toy, draw: random.Random) -> Seen:
    code, _process = toy.run(fault="SIGTERM", step=(step := draw.randint(1, 6)))
    saved = newest(toy).name
    kept, seen = resumed(toy, f"code {code}, saved {saved}, ")
    return kept and code == 143 and int(saved[5:]) in (step, step + 1), seen


for kind in ("segfault", "exit", "abort", "exception"):

    @fault(f"{kind} in a step", "resumed bit-equal")
    def _(toy: Toy, draw: random.Random, kind: str = kind) -> Seen:
        code, _process = toy.run(fault=kind, step=draw.randint(1, 7))
        kept, seen = resumed(toy, f"ended with {code}, ")
        return kept and code != 0, seen


# ---- checkpoints ---------------------------------------------------------------------------------


@fault("the newest checkpoint is torn", "named, passed over, resumed bit-equal from the one before")
def _(toy: Toy, draw: random.Random) -> Seen:
    toy.run(fault="SIGKILL", step=5)
    file = newest(toy) / "model" / "model.safetensors"
    os.truncate(file, draw.randrange(file.stat().st_size))
    return resumed(toy, needs="model.safetensors is damaged")


@fault("a bit of the newest checkpoint flips", "named, passed over, resumed bit-equal")
def _(toy: Toy, draw: random.Random) -> Seen:
    toy.run(fault="SIGKILL", step=5)
    flip(newest(toy) / checkpoints.OPTIMIZER, draw)
    return resumed(toy, needs=f"{checkpoints.OPTIMIZER} is damaged")


def flip(file: Path, draw: random.Random) -> None:
    """Flips one bit."""
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


@fault("files.json is [1], 5, null, {} or deep", "named, passed over, resumed bit-equal")
def _(toy: Toy, draw: random.Random) -> Seen:
    toy.run(fault="SIGKILL", step=7)
    nonsense = draw.choice(("[1]", "5", "null", "{}", "[" * 100_000))
    (newest(toy) / checkpoints.FILES).write_text(nonsense)
    return resumed(toy, f"{nonsense[:6]}: ", needs=f"{checkpoints.FILES} is damaged")


@fault("all checkpoints are damaged", "--resume auto refuses, nothing is removed; --restart")
def _(toy: Toy, draw: random.Random) -> Seen:
    toy.run(fault="SIGKILL", step=7)
    for folder in toy.out.glob("checkpoints/step-*"):
        (folder / checkpoints.STATE).write_text("{}")
    before = len(list(toy.out.glob("checkpoints/step-*")))
    code, process = toy.resume()
    kept = len(list(toy.out.glob("checkpoints/step-*"))) == before
    again, _ = toy.run("--restart")
    aside = len(list(toy.out.glob("before-*/checkpoints/step-*")))
    seen = f"{ended(code, process)}; restarted with {again}, {aside} moved aside"
    refused = code == 2 and "--restart" in process.said
    return refused and kept and again == 0 and aside == before and toy.is_bit_equal(), seen


@fault("keep_checkpoints: 3, the newest damaged, resumed, stopped", "the whole ones stay")
def _(toy: Toy, draw: random.Random) -> Seen:
    toy.run(fault="SIGKILL", step=7, train__keep_checkpoints=3)
    os.truncate(newest(toy) / checkpoints.OPTIMIZER, 0)
    toy.resume(fault="SIGTERM", step=5, train__keep_checkpoints=3)
    steps = sorted(int(path.name[5:]) for path in toy.out.glob("checkpoints/step-*"))
    kept, seen = resumed(toy, f"steps {steps}, ")
    return kept and steps[:2] == [2, 4] and len(steps) == 3, seen


@fault("a full disk (EFBIG) from step 3 on", "told, the older one stays, resumed bit-equal")
def _(toy: Toy, draw: random.Random) -> Seen:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    toy.run(train__max_steps=2)
    code, process = toy.resume(before=limit)
    stays = newest(toy).name
    kept, seen = resumed(toy, f"{ended(code, process)}; {stays} stays, ")
    told = "could not be written" in process.said and "Traceback" not in process.said
    return kept and code == 2 and told and stays == "step-000002", seen


@fault("the output folder is removed in a run", "an error at the next save")
def _(toy: Toy, draw: random.Random) -> Seen:
    process = toy.start()
    toy.wait_for(process, 1)
    shutil.rmtree(toy.out)
    code = process.wait()
    return code == 2 and "was removed while" in process.said, ended(code, process)


@fault("two runs in one folder", "the second is refused by name")
def _(toy: Toy, draw: random.Random) -> Seen:
    first = toy.start()
    toy.wait_for(first, 1)
    code, process = toy.resume()
    ends = first.wait()
    refused = code == 2 and f"process {first.pid} on" in process.said
    return refused and ends == 0 and toy.is_bit_equal(), ended(code, process)


@fault("the machine is lost, train.copy_to holds copies", "an empty one goes on, bit-equal")
def _(toy: Toy, draw: random.Random) -> Seen:
    away = str(toy.folder / "away")
    toy.run(fault="SIGTERM", step=5, train__copy_to=away)
    shutil.rmtree(toy.out)
    code, process = toy.resume(train__copy_to=away)
    told = next((line for line in process.said.splitlines() if line.startswith("fetched")), "")
    return code == 0 and toy.is_bit_equal(), f"{told}; bit-equal: {toy.is_bit_equal()}"


@fault("the shards are others when a run is resumed", "refused by the set's name and difference")
def _(toy: Toy, draw: random.Random) -> Seen:
    toy.run(fault="SIGKILL", step=5)
    shutil.rmtree(toy.folder / "sets" / "train")
    make_shards(toy.folder / "sets" / "train", 18)
    code, process = toy.resume()
    return code == 2 and "had 14 images, now 18" in process.said, ended(code, process)


# ---- data ----------------------------------------------------------------------------------------


@fault("a shard is cut off", "named in one sentence or in quarantine.jsonl, no traceback")
def _(toy: Toy, draw: random.Random) -> Seen:
    shard = draw.choice(sorted((toy.folder / "sets" / "train").glob("*.tar")))
    os.truncate(shard, shard.stat().st_size // 2)
    code, process = toy.run()
    named = shard.name in process.said + quarantined(toy)
    return named and "Traceback" not in process.said, ended(code, process)


@fault("bytes of an image are damaged", "costs that sample, which is named")
def _(toy: Toy, draw: random.Random) -> Seen:
    shard = sorted((toy.folder / "sets" / "train").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"XXXX", 1))
    code, process = toy.run()
    lines = {json.loads(line)["index"] for line in quarantined(toy).splitlines()}
    return code == 0 and len(lines) == 1, f"{ended(code, process)}, {len(lines)} sample named"


def quarantined(toy: Toy) -> str:
    file = toy.out / "quarantine.jsonl"
    return file.read_text() if file.exists() else ""


@fault("escape sequences in captions and questions", "none reaches the terminal or a log raw")
def _(toy: Toy, draw: random.Random) -> Seen:
    hostile = "\x1b]0;owned\x07\x1b[31mred\x9b1m\u202e"
    records = []
    for name in "0123":
        text = Text(name, "vqa", (hostile,) * 10, f"what {hostile}?")
        records.append((Record(name, "toy", "dev", name, (text,)), picture(int(name)), "png"))
    dev = toy.folder / "sets" / "hostile"
    write_shards(records, dev, dataset="toy", split="dev")
    code, process = toy.run(data__dev=[{"path": str(dev)}])
    raw = [each for each in "\x1b\x07\x9b\u202e" if each in process.said]
    written_out = "\\u001b" in process.said
    seen = f"{ended(code, process)}, raw: {raw or 'none'}, written out: {written_out}"
    return code == 0 and not raw and written_out, seen


@fault("a third of the images cannot be read", "saves, then stops with a summary; =1 goes on")
def _(toy: Toy, draw: random.Random) -> Seen:
    train = toy.folder / "sets" / "torn"
    make_shards(train, 60, unreadable=range(0, 60, 2))
    code, process = toy.run(data__train=[{"path": str(train)}])
    saved = newest(toy).name
    again, _ = toy.resume(data__train=[{"path": str(train)}], data__max_unreadable=1)
    told = "too many images cannot be read" in process.said
    return code == 2 and told and again == 0, f"{ended(code, process)[:160]} ({saved}); =1: {again}"


@fault("a remote set answers 503 twice a file", "nothing is lost, bit-equal")
def _(toy: Toy, draw: random.Random) -> Seen:
    with faulty_server(toy.folder / "sets" / "train") as server:
        for file in (toy.folder / "sets" / "train").iterdir():
            server.next[file.name] = [503, 503]
        data = {"data__train": [{"path": server.url}], "data__cache_dir": str(toy.folder / "cache")}
        code, process = toy.run(**data)
    equal = toy.is_bit_equal()
    return code == 0 and equal and not quarantined(toy), f"{ended(code, process)}, {equal=}"


@fault("a remote set answers 503 for ever", "the run stops, and says which file")
def _(toy: Toy, draw: random.Random) -> Seen:
    with faulty_server(toy.folder / "sets" / "train") as server:
        for file in (toy.folder / "sets" / "train").glob("*.tar"):
            server.always[file.name] = 503
        data = {"data__train": [{"path": server.url}], "data__cache_dir": str(toy.folder / "cache")}
        code, process = toy.run(data__read_attempts=2, **data)
    return code == 2 and "503" in process.said and not quarantined(toy), ended(code, process)[:200]


@fault("the cache folder holds a thesis", "it is not touched")
def _(toy: Toy, draw: random.Random) -> Seen:
    cache = toy.folder / "cache"
    cache.mkdir()
    (cache / "thesis.tex").write_text("years")
    with faulty_server(toy.folder / "sets" / "train") as server:
        data = {"data__train": [{"path": server.url}], "data__cache_dir": str(cache)}
        code, process = toy.run(**data)
    there = sorted(path.name for path in cache.iterdir())
    return code == 0 and there == [
        "harness-shards",
        "thesis.tex",
    ], f"{ended(code, process)}, {there}"


@fault("a data worker is killed", "started again once, bit-equal")
def _(toy: Toy, draw: random.Random) -> Seen:
    process = toy.start(data__workers=1)
    toy.wait_for(process, 1)
    for child in psutil.Process(process.pid).children():
        child.kill()
    code = process.wait()
    told = "started again" in process.said
    return code == 0 and toy.is_bit_equal(), f"{ended(code, process)}, told: {told}"


# ---- tracking ------------------------------------------------------------------------------------


def tracked(uri: str, **more: object) -> dict[str, object]:
    return {"kind": "mlflow", "uri": uri, "last_wait": 2, **more}


@fault("the tracking server is not there", "the run is as without one, and says what was not sent")
def _(toy: Toy, draw: random.Random) -> Seen:
    code, process = toy.run(tracking=tracked("http://127.0.0.1:9"))
    told = "was not sent" in process.said and "`harness sync" in process.said
    equal = toy.is_bit_equal()
    return equal and told, f"{ended(code, process)}, bit-equal: {equal}, told: {told}"


@fault("the tracking server hangs", "the end waits tracking.last_wait; sync sends each step once")
def _(toy: Toy, draw: random.Random) -> Seen:
    server = MlflowServer(toy.folder)
    server.delay = 60.0
    begun = time.monotonic()
    code, process = toy.run(tracking=tracked(server.uri))
    seconds = time.monotonic() - begun
    server.delay = 0.0
    sync(toy.out)
    sync(toy.out)
    (made,) = server.runs()
    steps = server.steps(made.info.run_id, "train/loss")
    server.close()
    once = steps == list(range(1, 9))
    seen = f"{seconds:.0f} s, not sent: {'was not sent' in process.said}, steps later: {steps}"
    return code == 0 and once and seconds < 60, seen


@fault("a password in tracking.uri", "stands in no file, no log and not in the database")
def _(toy: Toy, draw: random.Random) -> Seen:
    server = MlflowServer(toy.folder)
    uri = server.uri.replace("//", "//me:PLANTEDs3cr3t@")
    code, process = toy.run(environment={"MLFLOW_TRACKING_URI": uri}, tracking=tracked(None))
    server.close()
    files = [path for path in toy.folder.rglob("*") if path.is_file()]
    found = [path.name for path in files if b"PLANTED" in path.read_bytes()]
    seen = f"{ended(code, process)}, {len(files)} files searched, in: {found or 'none'}"
    return code == 0 and not found, seen


# ---- the table -----------------------------------------------------------------------------------


def injected(each: Fault, shared: Path, folder: Path, draw: random.Random) -> Row:
    """Injects one fault; whatever goes wrong on the way is seen too."""
    begun = time.monotonic()
    try:
        kept, seen = each.inject(Toy(shared, folder), draw)
    except Exception as error:
        kept = False
        seen = f"{type(error).__name__}: {error}"
    return Row(each.name, each.promise, seen, kept, round(time.monotonic() - begun, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="faults with one in their names")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        root = Path(place)
        shared = make_shared(root)
        for number, each in enumerate(FAULTS):
            if not given.only or any(word in each.name for word in given.only):
                print(f"{each.name} ...", file=sys.stderr)
                rows.append(injected(each, shared, root / f"{number:02d}", draw))
    broken = sum(not row.kept for row in rows)
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        cells = [
            [row.fault, row.promise, row.seen, "kept" if row.kept else "BROKEN", row.seconds]
            for row in rows
        ]
        print(markdown_table(cells, ["fault", "promise", "seen", "", "s"]))
        print(
            f"{len(rows)} faults, {broken} promises broken; {os.cpu_count()} cores, "
            f"{platform.machine()}, Python {platform.python_version()}"
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
