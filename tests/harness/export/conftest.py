"""One export of a tiny CLIP + Q-Former + T5 + LoRA run, for all tests of a worker."""

import pytest

from harness.export.export import export
from saved_runs import saved_run


@pytest.fixture(scope="session")
def run(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    """The folder of a run whose answers end before they are cut."""
    root = tmp_path_factory.mktemp("export")
    return saved_run(root, "run", clip=tiny_clip_folder, lm=tiny_t5_folder)


@pytest.fixture(scope="session")
def exported(run):
    """What `export` returned; the folder is `exported.out`."""
    return export(run, run.parent / "out", tell=lambda line: None)
