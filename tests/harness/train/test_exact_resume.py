"""The strictest proof of a resume: the two runs are compared before the first update after it.

Equal results could hide two errors; equal batches, weights, moments, rates and scalers on every
rank, before anything is computed of them, cannot.
"""

import json

import pytest

import exact_program
from forked_ranks import on_ranks

WORLDS = (1, 2, 3)


@pytest.fixture(scope="module")
def seen(root):
    """Runs the program on one, two and three processes: (kind, world) -> for each rank the two."""
    exact_program.make_sets(root)
    codes = on_ranks("exact_program", [(world, [root]) for world in WORLDS])
    assert codes == [[0], [0, 0], [0, 0, 0]]
    return {
        (kind, world): [
            json.loads((root / f"exact-{world}-{rank}.json").read_text())[kind]
            for rank in range(world)
        ]
        for kind in exact_program.KINDS
        for world in WORLDS
    }


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", exact_program.KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_before_its_first_update(seen, kind, world):
    for rank, (whole, resumed) in enumerate(seen[kind, world]):
        first = str(exact_program.CUT)
        assert list(whole) == list(resumed) == ["5", "6", "7"]
        for part in whole[first]:
            assert whole[first][part] == resumed[first][part], f"{part} of rank {rank}"
        assert whole[first]["moments there"] > 100
        if world < 3:  # of three addends gloo's order of adding is another in a group's first step
            assert whole == resumed
        assert len({whole[step]["weights"] for step in whole}) == len(whole)  # they do move


@pytest.mark.parametrize("world", WORLDS)
def test_the_mixture_has_met_samples_that_cannot_be_read(seen, world):
    before = seen["mixture", world][0][1]["5"]["counted"][1]
    after = [step["keys"] for _, resumed in seen["mixture", world] for step in resumed.values()]
    assert sum(before) > 0
    assert any("cannot be decoded" in key for keys in after for key in keys)


def test_all_ranks_hold_the_same_weights_and_share_the_images(seen):
    for kind in exact_program.KINDS:
        ranks = [resumed["5"] for _, resumed in seen[kind, 3]]
        assert len({rank["weights"] for rank in ranks}) == 1
        together = sorted(key for rank in ranks for key in rank["keys"])
        assert together == sorted(seen[kind, 1][0][1]["5"]["keys"])
