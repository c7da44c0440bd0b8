"""The tiny models are the same to the byte whenever they are made, so that no test passes or fails
by their luck.
"""

import hashlib

from tiny_models import tiny_clip, tiny_t5


def hashes(folder):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


def test_two_tiny_models_of_a_kind_are_equal_files(tiny_t5_folder, tiny_clip_folder, tmp_path):
    for make, before in ((tiny_t5, tiny_t5_folder), (tiny_clip, tiny_clip_folder)):
        made = hashes(make(tmp_path / before.name))
        assert {"config.json", "model.safetensors"} <= made.keys()
        assert made == hashes(before)
