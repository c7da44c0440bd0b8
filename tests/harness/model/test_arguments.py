"""What transformers' users give to from_pretrained is obeyed or refused, never ignored."""

import pytest
import torch
from transformers import AutoModel

import toy_batch
from harness.errors import ConfigError
from harness.model.arguments import device_of
from harness.model.vlm import VisionLanguageModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_t5_folder):
    folder = tmp_path_factory.mktemp("saved") / "model"
    toy_batch.model(tiny_t5_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"attn_implementation": "sdpa"}, "does not obey attn_implementation: it takes lm, vis"),
        ({"quantization_config": {}, "low_cpu_mem_usage": True}, "low_cpu_mem_usage, quantizat"),
        ({"dtype": torch.float64}, "dtype=float64: expected auto, bfloat16, float16, float32"),
        ({"dtype": "float16"}, "dtype=float16: train.precision is fp16, but .* 'cpu'"),
        ({"device_map": {"lm": 0, "vision": 1}}, "device_map=.*one device, as cpu or cuda:0"),
        ({"device_map": "disk"}, "device_map='disk': expected auto or one device"),
        ({"device": "meta", "device_map": "cpu"}, "device=meta says another"),
    ],
)
def test_what_is_not_obeyed_is_refused_by_its_name(saved, given, expected):
    with pytest.raises(ConfigError, match=expected):
        VisionLanguageModel.from_pretrained(saved, with_vision=False, **given)


def test_positional_arguments_and_a_folder_that_is_not_there_are_refused(saved, tmp_path):
    with pytest.raises(ConfigError, match="does not obey 'more'"):
        VisionLanguageModel.from_pretrained(saved, "more")
    with pytest.raises(ConfigError, match="there is no such folder, and it is no name of the hub"):
        VisionLanguageModel.from_pretrained(tmp_path / "gone")


def test_dtype_and_device_map_decide_what_is_computed_in_and_where(saved):
    given = {"with_vision": False, "revision": None, "device_map": {"": "cpu"}}
    model = AutoModel.from_pretrained(saved, dtype=torch.bfloat16, **given)
    assert model.precision.name == "bf16"
    assert model.precision.reason.startswith("as asked")
    assert VisionLanguageModel.from_pretrained(saved, torch_dtype="auto", **given).device.type == (
        "cpu"
    )
    gpu_or_cpu = "cuda" if torch.cuda.is_available() else "cpu"
    assert device_of(None, "auto").type == gpu_or_cpu
    assert device_of(None, None).type == "cpu"
    assert device_of("cuda:1", None) == device_of(None, {"": "cuda:1"})
