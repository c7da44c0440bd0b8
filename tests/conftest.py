"""What holds for the whole suite: threads, which tests are slow, the real data where it is."""

import os
from pathlib import Path

# Two OpenMP threads on a busy machine spin against each other and are 100 times slower; set before
# torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Whole runs and plans, servers, fuzzing, several processes: left out by `launch/test.sh --fast`.
SLOW = (
    "test_ablate",
    "test_base_lm",
    "test_card_and_hub",
    "test_colab",
    "test_configs_run",
    "test_copies",
    "test_demo",
    "test_doctor_machine",
    "test_exact_resume",
    "test_export",
    "test_faults",
    "test_formats",
    "test_fp16",
    "test_fuzz",
    "test_launcher",
    "test_loop",
    "test_overfit",
    "test_plan",
    "test_process_faults",
    "test_published",
    "test_quantise",
    "test_remote",
    "test_resume",
    "test_s3",
    "test_saving",
    "test_secrets",
    "test_sync",
    "test_unreachable",
    "test_unreadable",
    "test_verdicts",
    "test_zero",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    # Files that hold any of them first, so that no worker is left alone with one at the end; in a
    # fixed order, as xdist wants.
    first = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(autouse=True)
def _no_store_is_left_to_the_next_run():
    """mlflow's setters write their store into the environment, from where a later run takes it."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    after = os.environ.get("MLFLOW_TRACKING_URI")
    if after != before:  # not the fault of the tests that follow
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
    assert after == before


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with Flickr8k and the VQAv2 subset; a test that asks for it is skipped where it is
    absent.
    """
    folder = Path(os.environ.get("HARNESS_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "flickr8k").is_dir():
        pytest.skip(
            f"real Flickr8k and VQAv2 are not at {folder}; set HARNESS_TEST_DATA to their folder"
        )
    return folder
