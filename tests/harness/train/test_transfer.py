"""Micro-batches are copied beside the computing, on streams that stand for those of a GPU."""

from contextlib import contextmanager

import pytest
import torch

from harness.train.transfer import Transfer


class Stream:
    def __init__(self, name, told):
        self.name = name
        self.told = told

    def wait_stream(self, other):
        self.told.append(f"{self.name} waits for {other.name}")


class Numbers:
    """A batch, or its copy, that tells what is done with it."""

    def __init__(self, name, told):
        self.name = name
        self.told = told

    def to(self, device):
        self.told.append(f"{self.name} is sent on {self.told.stream}")
        return Numbers(f"{self.name}'", self.told)

    def mapped(self, change):
        self.told.append(f"{self.name} is kept")


class Told(list):
    stream = "computing"


@pytest.fixture
def told(monkeypatch):
    told = Told()

    @contextmanager
    def on(stream):
        told.stream = stream.name
        yield
        told.stream = "computing"

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying", told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing", told))
    monkeypatch.setattr(torch.cuda, "stream", on)
    return told


def test_each_is_copied_while_the_one_before_it_is_computed_and_waited_for_by_the_device(told):
    transfer = Transfer(torch.device("cuda"))
    first, second = Numbers("first", told), Numbers("second", told)
    transfer.send_ahead([first, second])  # in the step before
    assert told == ["first is sent on copying"]
    for batch in transfer.arriving([first, second]):
        told.append(f"{batch.name} is computed")
    assert told[1:] == [
        "computing waits for copying",
        "first' is kept",
        "second is sent on copying",
        "first' is computed",
        "computing waits for copying",
        "second' is kept",
        "second' is computed",
    ]


def test_what_was_sent_ahead_is_not_taken_for_another(told):
    transfer = Transfer(torch.device("cuda"))
    transfer.send_ahead([Numbers("of a step that never came", told)])
    (arrived,) = transfer.arriving([Numbers("this", told)])
    assert arrived.name == "this'"
    transfer.send_ahead([])
    (arrived,) = transfer.arriving([Numbers("next", told)])
    assert arrived.name == "next'"


def test_on_a_cpu_nothing_is_sent_before_it_is_used(told):
    transfer = Transfer(torch.device("cpu"))
    for batch in transfer.arriving([Numbers("first", told), Numbers("second", told)]):
        told.append(f"{batch.name} is computed")
    assert told == [
        "first is sent on computing",
        "first' is computed",
        "second is sent on computing",
        "second' is computed",
    ]
