"""The official files of Flickr8k and of a VQAv2 subset, read whole; skipped where they are
absent.
"""

from shards.sources import flickr8k, vqav2


def test_the_real_flickr8k_has_the_dirt_that_is_known(shared_data):
    folder = shared_data / "flickr8k"
    source = flickr8k.load(folder / "images", folder / "Flickr8k.token.txt", folder)
    assert {split: len(items) for split, items in source.splits.items()} == {
        "train": 6000,
        "dev": 1000,
        "test": 1000,
    }
    assert all(
        len(i.record.texts[0].targets) == 5 for items in source.splits.values() for i in items
    )
    missing = {s.name: s.texts for s in source.skipped if s.kind == "text without image"}
    assert missing == {"2258277193_586949ec62.jpg": 4, "2258277193_586949ec62.jpg.1": 1}
    assert sum(s.kind == "in no split" for s in source.skipped) == 91
    assert len(source.skipped) == 93


def test_the_real_vqav2_subset_is_read_whole(shared_data):
    folder = shared_data / "vqav2"
    counts = {}
    for split in ("train", "val"):
        source = vqav2.load(
            folder / "images",
            folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json",
            split,
            folder / f"v2_mscoco_{split}2014_annotations.json",
        )
        records = [item.record for item in source.splits[split]]
        assert not source.skipped
        assert all(len(text.targets) == 10 for record in records for text in record.texts)
        counts[split] = (len(records), sum(len(record.texts) for record in records))
    assert counts == {"train": (2447, 3680), "val": (135, 732)}
