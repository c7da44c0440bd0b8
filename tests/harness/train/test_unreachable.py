"""A run whose data stop to answer saves what it learnt, says why and goes on later, bit for bit."""

import os

import pytest
import yaml
from safetensors.torch import load_file

from faulty_server import faulty_server
from forked_ranks import on_ranks
from harness import checkpoint as checkpoints
from harness.config.schema import Config
from harness.train import run as train
from harness.train.__main__ import main
from same_runs import AtStep
from shards.files import UnreachableError
from toy_runs import losses, make_config


def config_of(root, name, **data):
    config = make_config(
        root, root / "clip", root / "t5", name, dev=False, save_every=100, epochs=1
    )
    document = config.model_dump(mode="json")
    document["data"] |= {"read_attempts": 2, "cache_dir": str(root / f"cache-{name}"), **data}
    return Config(**document)


def trained(out, step):
    return load_file(checkpoints.place(out, step) / "model" / "model.safetensors")


def test_a_run_whose_shards_stop_to_answer_saves_ends_with_a_sentence_and_goes_on(root, capsys):
    whole = config_of(root, "whole")
    train.run(whole)
    with faulty_server(root / "train") as server:
        fault = server.fault
        seen = set()

        def after_two_shards(name, is_get):
            if name.endswith(".tar") and len(seen | {name}) > 2:
                return 503
            if name.endswith(".tar"):
                seen.add(name)
            return fault(name, is_get)

        server.fault = after_two_shards
        config = config_of(root, "cut", train=[{"path": server.url}])
        (root / "cut.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        assert main([str(root / "cut.yaml")]) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert "cannot be read, after 2 attempts: ClientResponseError: 503" in told
        assert "the run is saved after step 2: go on with --resume auto" in told
        assert checkpoints.newest(config.out_dir).step == 2
        assert not (config.out_dir / "quarantine.jsonl").exists()
        server.fault = fault
        train.run(config, "auto")
    assert losses(config.out_dir) == losses(whole.out_dir)
    expected = trained(whole.out_dir, 4)
    assert all(value.equal(expected[name]) for name, value in trained(config.out_dir, 4).items())


def test_an_index_that_is_cut_short_in_a_run_ends_it_saved(root):
    config = config_of(root, "shortened")
    sidecar = root / "train" / "samples.bin"
    data = sidecar.read_bytes()
    try:
        with pytest.raises(UnreachableError, match=r"samples\.bin was changed.*after step 1"):
            train.run(config, observers=[AtStep(1, lambda: os.truncate(sidecar, 10))])
    finally:
        sidecar.write_bytes(data)
    assert checkpoints.newest(config.out_dir).step == 1


def test_one_rank_without_data_stops_all_and_they_save(root):
    config_of(root, "ranks")  # makes the shards
    assert on_ranks("unreachable_rank_program", [(2, [root])]) == [[0, 0]]
    for name, step, reason in (
        ("ranks", 3, "the network of rank 1 is down"),
        ("dev-ranks", 3, "the dev set of rank 0 does not answer"),
    ):
        for rank in (0, 1):
            told = (root / f"{name}-{rank}.txt").read_text()
            assert told.startswith(f"{reason}; the run is saved after step {step}")
        assert checkpoints.newest(root / name).step == step
