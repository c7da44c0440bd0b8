"""The distributions: what they declare, what they hold, and that they work outside the clone."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from harness.config.load import load
from harness.errors import EXTRA_OF, ConfigError
from harness.tracking.tracker import check_tracking
from harness.train.run import run
from imports import modules
from tiny_models import tiny_clip, tiny_t5
from toy_runs import losses, make_config

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", each).group().lower().replace("_", "-") for each in requirements}


def third_party(file: Path) -> set[str]:
    """Returns the packages outside the standard library that a module imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    tops = {name.partition(".")[0] for name in found}
    return tops - set(sys.stdlib_module_names) - {"harness", "shards"}


def test_every_package_that_is_imported_is_declared_where_it_is_asked_for():
    distributions = packages_distributions()
    required = names(PROJECT["dependencies"])
    optional = {extra: names(needed) for extra, needed in EXTRAS.items() if extra != "dev"}
    used = {package for file in modules().values() for package in third_party(file)}
    undeclared = []
    for package in sorted(used):
        # mlflow comes in three distributions; one that is not here is not installed either
        owners = {name.lower().replace("_", "-") for name in distributions.get(package, [package])}
        if package in EXTRA_OF:
            if not owners & optional[EXTRA_OF[package]]:
                undeclared.append(f"{package} in the extra {EXTRA_OF[package]}")
        elif not owners & required:
            undeclared.append(package)
    assert undeclared == []
    assert {"torch", "jinja2", "scipy", "pandas", "sklearn"} <= used  # the walk sees them


def test_the_extras_are_those_that_the_pages_and_errors_name():
    assert set(EXTRAS) == {
        *("demo", "deepspeed", "dev", "efficientnet", "gcs", "hub", "mlflow", "s3", "smollm")
    }
    assert set(EXTRA_OF.values()) == set(EXTRAS) - {"dev"}
    assert names(EXTRAS["mlflow"]) <= names(EXTRAS["demo"])
    assert names(EXTRAS["s3"]) <= names(EXTRAS["dev"])


@pytest.mark.slow
def test_a_run_without_tracking_needs_no_mlflow(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    clip = tiny_clip(tmp_path / "clip")
    config = make_config(tmp_path, clip, tiny_t5(tmp_path / "t5"), max_steps=1)
    run(config)
    assert len(losses(tmp_path / "run")) == 1
    tracked = config.model_copy(update={"tracking": load("demo").tracking})
    with pytest.raises(ConfigError, match=r"kind=none, or pip install .*mlflow"):
        check_tracking(tracked)


# ---- built and installed -------------------------------------------------------------------------


def built(what: str, source: Path, out: Path) -> Path:
    """Builds a wheel or an sdist by the backend, without a network; beside the sources it would
    leave folders of its own, so they are a copy.
    """
    program = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    line = [sys.executable, "-c", program, f"build_{what}", str(out)]
    ran = subprocess.run(line, cwd=source, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return out / ran.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """The wheel of the clone, its sdist, and the wheel of that sdist."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is older or missing")
    folder = tmp_path_factory.mktemp("built")
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for room in ("harness", "shards", "configs", "launch"):
        shutil.copytree(ROOT / room, folder / "clone" / room, ignore=hidden)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "clone")
    outs = {name: folder / name for name in ("wheel", "sdist", "wheel_of_sdist")}
    for out in outs.values():
        out.mkdir()
    wheel = built("wheel", folder / "clone", outs["wheel"])
    sdist = built("sdist", folder / "clone", outs["sdist"])
    with tarfile.open(sdist) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    again = built("wheel", source, outs["wheel_of_sdist"])
    return {"wheel": wheel, "sdist": sdist, "wheel_of_sdist": again}


def members(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_the_wheel_and_that_of_the_sdist_hold_all_files_of_the_rooms(distributions):
    there = set()
    for room in ("harness", "shards", "configs", "launch"):
        for file in (ROOT / room).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                inside = "harness/" if room in ("configs", "launch") else ""
                there.add(inside + str(file.relative_to(ROOT)))
    assert members(distributions["wheel"]) == there
    assert members(distributions["wheel_of_sdist"]) == there


@pytest.fixture(scope="module")
def elsewhere(distributions, tmp_path_factory):
    """Runs programs of an environment that holds the wheel, in a folder outside the clone.

    What it needs comes from this environment, whose own harness (the clone, editable) does not: a
    line of a .pth file adds a folder and not that folder's .pth files.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    line = [sys.executable, "-m", "venv", "--without-pip", folder / "env"]
    subprocess.run(line, check=True)
    python = folder / "env" / "bin" / "python"
    wheel = distributions["wheel"]
    line = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    line += ["--no-index", "--disable-pip-version-check", wheel]
    subprocess.run(line, check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def _run(program: str, *arguments: str) -> str:
        ran = subprocess.run(
            [python.with_name(program), *arguments],
            cwd=folder,
            env=kept,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    _run.site = site
    return _run


@pytest.mark.slow
def test_an_installed_wheel_works_outside_the_clone(elsewhere):
    program = """
import sys
before = set(sys.modules)
import harness
after = set(sys.modules) - before
print(*sorted(name for name in after if "." not in name))
from harness.config.load import load, shipped
from harness.errors import install_command
from harness.machine.launch_file import read_launch
import harness.report, shards
print(harness.__file__, shards.__file__)
print(load("demo").name, read_launch("zero3_offload").zero_stage, shipped("launch"))
print((shipped("launch") / "slurm.sbatch").is_file(), install_command("s3"))
print(*sys.path, sep="|")
"""
    said = elsewhere("python", "-c", program).splitlines()
    # "import harness" takes milliseconds: it brings nothing
    assert set(said[0].split()) <= {"harness", *sys.stdlib_module_names}
    assert len(said[0].split()) < 40
    site = elsewhere.site
    assert said[1].split() == [f"{site}/harness/__init__.py", f"{site}/shards/__init__.py"]
    assert said[2] == f"demo 3 {site}/harness/launch"
    assert said[3] == "True pip install 's3fs>=2024.6'"
    assert str(ROOT) not in said[4].split("|")
    help_of_demo = elsewhere("harness", "demo", "--help")
    assert "harness demo" in help_of_demo
