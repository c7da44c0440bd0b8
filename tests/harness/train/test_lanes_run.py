"""A run whose data are read in lanes: where the bridge begins, how it goes on, how long its steps
are where some lanes end early.
"""

import pytest
import torch

from faulty_server import faulty_server
from harness.checks import check_before_launch
from harness.config.schema import Config
from harness.doctor import examine, overfit
from harness.errors import ConfigError
from harness.train import prepare
from harness.train import run as train
from harness.train.state import Observer
from plan_cases import changed
from shards.files import ShardError
from shards.read import Reader
from toy_runs import make_config, make_shards

LOOKED_AT = {"OK", "warning"}


@pytest.fixture
def config_of(tmp_path, tiny_clip_folder, tiny_t5_folder):
    def make(lanes, **settings):
        plain = make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, dev=False, **settings)
        document = plain.model_dump(mode="json")
        document["data"]["lanes"] = lanes
        return Config(**document)

    return make


def test_the_bridge_begins_from_the_first_lane_whatever_rank_reads_it(config_of, monkeypatch):
    read = []
    before = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, n: read.append(n) or before(self, n))
    config = config_of(4)
    model = prepare.build_model(config)
    prepare.calibrate_alike(model, config, type("One", (), {"world_size": 1}))
    lanes = prepare.make_loader(config, None)._reading.order.lanes
    shards = set(lanes[0].orders[0].pieces.shards.tolist())
    assert {n // 4 for n in read} == shards
    assert len(shards) == 1
    fresh = prepare.build_model(config)
    changed = {
        name
        for (name, new), old in zip(
            model.bridge.named_parameters(), fresh.bridge.parameters(), strict=True
        )
        if not torch.equal(new, old)
    }
    assert changed == set(model.bridge.START_VALUES)


def test_a_node_needs_cache_for_its_own_lanes_alone_also_where_the_bridge_begins(
    config_of, tmp_path, monkeypatch
):
    """On four machines of one process each; and for a look at the run by the doctor on one."""
    make_shards(tmp_path / "train", 64)
    largest = max(path.stat().st_size for path in (tmp_path / "train").glob("*.tar"))
    with faulty_server(tmp_path / "train") as server:
        remote = {
            "train": [{"path": server.url}],
            "cache_dir": str(tmp_path / "cache"),
            "window_shards": 4,
            "cache_gb": (2 * largest + 20_000) / 1e9,
        }
        config = changed(config_of(4, max_steps=1), data=remote)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        one = type("Engine", (), {"rank": 0, "world_size": 4, "is_main": True})
        prepare.make_loader(config, one)
        prepare.calibrate(prepare.build_model(config), config)
        assert {finding.state for finding in examine.world(config, 4, machines=4)} <= LOOKED_AT
        assert {finding.state for finding in examine.texts(config)} <= LOOKED_AT
        assert {finding.state for finding in examine.model(config, "cpu")} <= LOOKED_AT
        assert overfit.overfit(config, 4, steps=1)
        with pytest.raises(ShardError, match="larger cache, or smaller windows"):
            list(examine.world(config, 4))


def test_the_bridge_begins_where_the_set_is_smaller_than_the_batch_it_would_like(config_of):
    config = changed(config_of(4), data={"last_batch": "drop"})
    prepare.calibrate(prepare.build_model(config), config)


def test_a_set_too_small_for_the_lanes_is_named_before_anything_is_launched(config_of):
    with pytest.raises(ShardError, match=r"data\.train\.0\.path: .*14 samples, too few for 16"):
        check_before_launch(config_of(16, global_batch=16))
    check_before_launch(config_of(14, global_batch=14))


class Counted(Observer):
    """The samples and micro-batches of each step."""

    def __init__(self):
        self.steps = []

    def batches_made(self, run, samples, batches):
        self.steps.append((len(samples), len(batches)))


def test_a_run_in_lanes_goes_on_in_as_many_and_in_no_others(config_of):
    config = config_of(2, max_steps=2)
    train.run(config)
    with pytest.raises(ConfigError, match=r"data\.lanes was 2, it is 1.*resume_data=changed"):
        train.run(config_of(1, max_steps=3), "auto")
    counted = Counted()
    train.run(config_of(2), "auto", [counted])
    assert [samples for samples, _ in counted.steps] == [4, 2, 4, 4, 4, 2]


def test_every_rank_takes_as_many_micro_batches_as_the_one_with_most_images(
    config_of, tmp_path, monkeypatch
):
    """Of four lanes one has two shards: its rank reads the rest of the epoch, the other none."""
    make_shards(tmp_path / "train", 20)
    make = train.make_loader
    seen = []
    for rank in (0, 1):
        share = {"rank": rank, "world_size": 2}
        monkeypatch.setattr(train, "make_loader", lambda *given, of=share: make(*given, **of))
        counted = Counted()
        train.run(config_of(4, name=f"rank-{rank}", epochs=1, micro_batch=1), None, [counted])
        seen.append(counted.steps)
    assert sorted(samples[-1][0] for samples in seen) == [0, 4]
    for steps in seen:
        assert [batches for _, batches in steps] == [2, 2, 2, 2, 4]
