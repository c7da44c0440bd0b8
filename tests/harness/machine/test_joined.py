"""The launcher's processes of an evaluation, as their signs of life tell of them."""

from contextlib import nullcontext

import pytest
from torch import distributed

from harness.machine import joined as module


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_says_that_it_evaluates(monkeypatch, rank):
    noted: list[str] = []

    class Signs:
        def __init__(self, *given, **named):
            noted.append("sets up")

        def doing(self, what):
            noted.append(what)

        def waiting(self):
            return nullcontext()

        def stop(self):
            noted.append("ended")

    store = distributed.HashStore()
    other = distributed.PrefixStore("dealt", store)
    for key in ("closing", "closing/1"):
        other.set(key, b"0 true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module, "settle", lambda environment: None)
    monkeypatch.setattr(module, "rendezvous", lambda *given, **named: iter([(store, rank, 2)]))
    monkeypatch.setattr(module, "Heartbeat", Signs)
    with module.joined(60, 120) as dealer:
        assert (dealer.rank, dealer.world_size) == (rank, 2)
        assert noted == ["sets up", "evaluates"]
    assert noted[-1] == "ended"
