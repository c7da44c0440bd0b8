"""Launch files of other people (tests/data/launch): each trains, or is refused in one sentence."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.config.load import dump, load
from harness.config.schema import Config, TrainConfig
from harness.errors import ConfigError
from harness.machine import deepspeed_settings, launch_file, launcher
from harness.machine.deepspeed_settings import of_environment, read_document
from harness.machine.launch_file import read_launch
from harness.train.engines import make_engine
from harness.train.run import run
from launch_files import accelerated
from toy_runs import losses, make_config

DATA = Path(__file__).parents[2] / "data" / "launch"
GPUS = {"type of machine": 4, "How many different": "1"}
ZERO = {**GPUS, "use DeepSpeed": "yes", "How many GPU": "2"}
# What somebody answers to `accelerate config`; the rest is left as it is proposed.
ANSWERS = {
    "stage1_inline": {**ZERO, "ZeRO optimization stage": 1, "gradient clipping?": "yes"},
    "stage2_inline": {
        **{**ZERO, "ZeRO optimization stage": 2, "accumulation steps": "4"},
        **{"gradient clipping?": "yes", "mixed precision": 2},
    },
    "stage3_inline": {
        **{**ZERO, "ZeRO optimization stage": 3, "optimizer states?": 1, "offload parameters?": 1},
        **{"16-bit": "yes", "zero.Init": "yes"},
    },
    "nvme_inline": {
        **{**ZERO, "ZeRO optimization stage": 3, "Nvme Path": "/nvme", "offload parameters?": 2},
    },
    "experts_inline": {**ZERO, "enable Mixture": "yes", "class names": "MixtralSparseMoeBlock"},
    "json": {**ZERO, "specify a json": "yes", "path to the json": "auto_zero2.json"},
    "no": {"type of machine": 0},
    "ddp_dynamo": {**GPUS, "torch dynamo": "yes", "How many GPU": "2"},
    "ddp_bf16": {**GPUS, "How many GPU": "2", "mixed precision": 2},
    "fsdp": {**GPUS, "FullyShardedDataParallel": "yes", "How many GPU": "2"},
    "cpu": {"type of machine": 1, "How many different": "1", "How many processes": "2"},
}
DEEPSPEED = (
    *("stage1_inline", "stage2_inline", "stage3_inline", "json"),
    *("auto_zero2", "auto_zero3", "auto_all"),
)
DEFAULTS = ("global_batch=32", "micro_batch=32", "learning_rate=0.0001")  # of TrainConfig
SCALE = ("scale", *(f"train.{value}" for value in DEFAULTS))
FOUR_STEPS = TrainConfig(global_batch=32, micro_batch=4)  # on two processes


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with all of the files, in which this process stands."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        monkeypatch.delenv(key)
    return tmp_path


def written_by_accelerate(answers: dict, file: Path, monkeypatch) -> str:
    """Returns what `accelerate config` writes for these answers, by the question's words."""
    from accelerate.commands.config import cluster

    def options(text, options=(), convert_value=None, default=0):
        found = next((answer for words, answer in answers.items() if words in text), default)
        return convert_value(found) if convert_value else found

    def field(text, convert_value=None, default=None, error_message=None):
        found = next((answer for words, answer in answers.items() if words in text), None)
        if found is None:
            return default
        return convert_value(found) if convert_value else found

    monkeypatch.setattr(cluster, "_ask_options", options)
    monkeypatch.setattr(cluster, "_ask_field", field)
    monkeypatch.setattr(cluster, "is_deepspeed_available", lambda: True)
    cluster.get_cluster_input().to_yaml_file(file)
    return file.read_text()


@pytest.mark.parametrize("name", ANSWERS)
def test_the_files_are_what_accelerates_questionnaire_writes(name, tmp_path, monkeypatch):
    written = written_by_accelerate(ANSWERS[name], tmp_path / "x.yaml", monkeypatch)
    assert written == (DATA / f"{name}.yaml").read_text()


def test_the_keys_that_we_know_are_accelerates_and_deepspeeds():
    zero = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig.model_fields
    from accelerate.commands.config.config_args import ClusterConfig

    older = {"dynamo_backend", "fp16"}
    assert set(launch_file.KEYS) == ClusterConfig.__dataclass_fields__.keys() | older
    theirs = {name for key, field in zero.items() for name in (key, field.alias)}
    ours = {*deepspeed_settings.NUMBERS, *deepspeed_settings.SWITCHES, *deepspeed_settings.OFFLOADS}
    assert ours <= theirs


@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_deepspeed_file_means_the_same_to_us_to_accelerate_and_to_deepspeed(
    name, here, monkeypatch
):
    config = pytest.importorskip("deepspeed.runtime.config")
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    launch = read_launch(f"{name}.yaml")
    train = FOUR_STEPS if name == "stage2_inline" else TrainConfig()
    train = train if name != "stage3_inline" else TrainConfig(clip_norm=None)
    launcher.undecided(launch, train, None)
    line, _ = launcher.command([], launch=launch)
    given = line[line.index("--config_file") + 2 : line.index("-m", 3)]
    for flags in (given, []):  # by `harness train`, and by `accelerate launch` alone
        started, args = accelerated(launch.file, *flags)
        found = of_environment(started)
        assert found.settings == launch.deepspeed.settings
        assert found.agreed(train, 2) or name in ("stage1_inline", "stage3_inline")
        assert args.num_processes == 2
    assert "auto" not in json.dumps(launch.deepspeed.settings)
    settings = {**launch.deepspeed.settings, "train_micro_batch_size_per_gpu": 1}
    read = config.DeepSpeedConfig(settings, mpu=TwoProcesses())
    assert read.zero_config.stage == launch.zero_stage
    offload = read.zero_config.offload_optimizer
    assert launch.offload_optimizer == (offload is not None and offload.device == "cpu")
    assert launch.offload_parameters == (read.zero_config.offload_param is not None)
    assert read.zero_config.reduce_bucket_size == 50_000_000  # ours, in place of "auto"


class TwoProcesses:
    def get_data_parallel_world_size(self):
        return 2


def test_what_the_config_decides_is_said(here):
    launch = read_launch("auto_zero2.yaml")
    (said,) = launch.deepspeed.agreed(TrainConfig(), 2)
    assert said.startswith("auto_zero2.json: the config decides, not this file, on bf16, fp16, ")
    assert "optimizer, scheduler" in said
    for name, precision in (("stage2_inline", "bf16"), ("ddp_bf16", "bf16")):
        (said,) = read_launch(f"{name}.yaml").said
        wanted = f"{name}.yaml: mixed_precision is {precision}, which decides nothing: "
        assert said == wanted + "train.precision does"
    (said,) = launch_file.check_accelerates_environment({"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert said == (
        "accelerate launch: mixed_precision is fp16, which decides nothing: train.precision does"
    )


def test_no_without_quotes_is_one_process_for_us_and_for_accelerate(here):
    for name in ("unquoted_no", "no"):
        launch = read_launch(f"{name}.yaml")
        assert (launch.single, launch.zero_stage, launch.said) == (True, None, ())
        line, _ = launcher.command([], launch=launch)
        started, args = accelerated(launch.file, *line[5 : line.index("-m", 3)])
        assert (args.multi_gpu, args.use_deepspeed, args.num_processes) == (False, False, 1)
        assert started["ACCELERATE_DYNAMO_BACKEND"] == "NO"


def changed(file: Path, **changes) -> None:
    """Writes a file with some of its keys changed: `a__b` is b in a; ... takes a key out."""
    document = read_document(file)
    for key, value in changes.items():
        *above, last = key.split("__")
        at = document
        for part in above:
            at = at.setdefault(part, {})
        if value is ...:
            del at[last]
        else:
            at[last] = value
    write = json.dumps if file.suffix == ".json" else yaml.safe_dump
    file.write_text(write(document))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("fsdp.yaml", {}, "distributed_type is 'FSDP': weights are divided by DeepSpeed alone"),
        ("cpu.yaml", {}, "'MULTI_CPU': accelerate starts a single process for it, take --launch"),
        ("ddp_dynamo.yaml", {}, "dynamo_backend is INDUCTOR: harness compiles nothing"),
        ("unquoted_no.yaml", {"dynamo_backend": "EAGER"}, "dynamo_backend is EAGER"),
        ("nvme_inline.yaml", {}, "offload_param to 'nvme': expected none or cpu"),
        ("experts_inline.yaml", {}, "deepspeed_moe_layer_cls_names: no model here has experts"),
        ("no.yaml", {"num_process": 1}, "know the key num_process; did you mean num_processes?"),
        ("no.yaml", {"num_processes": "2"}, "num_processes is '2', expected a number from 1"),
        ("no.yaml", {"distributed_type": "XLA"}, "'XLA': expected 'NO', MULTI_GPU or DEEPSPEED"),
        ("no.yaml", {"compute_environment": "AMAZON_SAGEMAKER"}, "expected LOCAL_MACHINE"),
        ("ddp_bf16.yaml", {"parallelism_config": {"parallelism_config_dp": 2}}, "no such thing"),
        ("stage2_inline.yaml", {"use_cpu": True}, "use_cpu: accelerate does not obey it with"),
        (
            "stage2_inline.yaml",
            {"deepspeed_config__zero_stages": 2},
            "stage2_inline.yaml: deepspeed_config: harness does not know the key zero_stages; did",
        ),
        (
            "stage2_inline.yaml",
            {"deepspeed_config__offload_param_device": "cpu"},
            "offload_param needs stage 3, found 2",
        ),
        (
            "stage1_inline.yaml",
            {"deepspeed_config__gradient_clipping": 0.5},
            "gradient_clipping is 0.5, but train.clip_norm is 1.0: take it out of the file",
        ),
        (
            "stage1_inline.yaml",
            {"deepspeed_config__gradient_accumulation_steps": 3},
            "is 3, but train.global_batch and train.micro_batch on 2 processes make it 1",
        ),
        (
            "json.yaml",
            {"deepspeed_config__zero_stage": 2},
            "zero_stage stands beside deepspeed_config_file, and accelerate takes one of them",
        ),
    ],
)
def test_a_launch_file_that_cannot_be_obeyed_is_one_sentence(harness, here, file, changes, said):
    changed(here / file, **changes)
    code, out, err = harness("train", *SCALE, "--launch", file)
    assert (code, out) == (2, "")
    assert err.startswith(f"harness: {file}: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64, but train.global_batch is 32"),
        ({"train_micro_batch_size_per_gpu": 8}, "is 8, but train.micro_batch is 32"),
        ({"optimizer__type": "Lamb"}, "optimizer.type is 'Lamb', but harness' optimizer is 'Adam"),
        ({"optimizer__params__lr": 3e-5}, "params.lr is 3e-05, but train.learning_rate is 0.0001"),
        ({"optimizer__params__betas": [0.9, 0.999]}, "is [0.9, 0.999], but train.betas is [0.9"),
        ({"scheduler__type": "WarmupLR"}, "'WarmupLR', but train.schedule is 'cosine'"),
        ({"scheduler__params__warmup_max_lr": 1}, "is 1, but train.learning_rate is 0.0001"),
        ({"fp16__enabled": True}, "fp16 casts the whole model, T5's `wo` with it"),
        ({"bf16": {"enabled": True}}, "bf16 casts the whole model"),
        ({"amp": {"enabled": True}}, "amp casts the whole model"),
        ({"zero_optimisation": {}}, "the key zero_optimisation; did you mean zero_optimization?"),
        ({"curriculum_learning": {}}, "harness does not know the key curriculum_learning; known"),
        ({"zero_optimization__stage": 4}, "ZeRO has the stages 0 to 3, found 4"),
        ({"zero_optimization__reduce_bucket": 1}, "key reduce_bucket; did you mean reduce_bucket_"),
        ({"zero_optimization__reduce_bucket_size": "big"}, "is 'big', expected a number"),
        ({"zero_optimization__overlap_comm": 1}, "is 1, expected true or false"),
        ({"zero_optimization__offload_optimizer": "cpu"}, "is 'cpu', expected a mapping"),
        ({"zero_optimization": ...}, "zero_optimization is None, expected a mapping"),
    ],
)
def test_a_deepspeed_json_that_contradicts_is_refused_by_both_roads(
    harness, here, monkeypatch, changes, said
):
    changed(here / "auto_all.json", **changes)
    code, out, err = harness("train", *SCALE, "--launch", "auto_all.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("harness: auto_all.json: ")
    assert said in err
    assert err.count("\n") == 1
    started, _ = accelerated(here / "auto_all.yaml")
    for key in [key for key in started if key.startswith("ACCELERATE_")]:
        monkeypatch.setenv(key, started[key])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_engine(TrainConfig())


@pytest.mark.parametrize(
    ("file", "said"), [("fsdp", "told to use FSDP"), ("ddp_dynamo", "compiles")]
)
def test_what_accelerate_starts_and_harness_does_not_do_is_refused(here, monkeypatch, file, said):
    started, _ = accelerated(here / f"{file}.yaml")
    for key in [key for key in started if key.startswith("ACCELERATE_")]:
        monkeypatch.setenv(key, started[key])
    with pytest.raises(ConfigError, match=said):
        make_engine(TrainConfig())


@pytest.mark.slow
def test_two_processes_train_by_stage_2_inline_and_by_a_json_of_auto(root, monkeypatch, capfd):
    """Inline as by `harness train`, the JSON by `accelerate launch` alone; both as one process.

    From images, by an encoder whose weights are not laid out as DeepSpeed's broadcast wants them.
    """
    pytest.importorskip("deepspeed")
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `demo` is not installed")
    shutil.copytree(DATA, root, dirs_exist_ok=True)
    monkeypatch.chdir(root)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    steps = {"max_steps": 2, "dev": False, "global_batch": 8, "micro_batch": 1}
    configs = {}
    for name in ("alone", "stage2_inline", "auto_zero2"):
        parts = make_config(root, root / "clip", root / "t5", name, **steps).model_dump(mode="json")
        parts["model"]["vision"] = {"kind": "efficientnet_lite0", "id": "lite0", "image_size": 32}
        config = Config(**parts)
        configs[name] = root / f"{name}-config.yaml"
        configs[name].write_text(dump(config))
    run(load(configs["alone"]))
    inline = read_launch("stage2_inline.yaml")
    assert launcher.launch([str(configs["stage2_inline"])], launch_file=inline) == 0
    wanted = "config decides, not this file, on gradient_accumulation_steps, gradient_clipping\n"
    assert capfd.readouterr().err.count(wanted) == 1
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    by_accelerate = subprocess.run(
        [*accelerate, "auto_zero2.yaml", "-m", "harness.train", configs["auto_zero2"]],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        check=False,
    )
    assert by_accelerate.returncode == 0, by_accelerate.stderr
    assert by_accelerate.stderr.count("auto_zero2.json: the config decides, not this file") == 1
    for name in ("stage2_inline", "auto_zero2"):
        assert losses(root / name) == pytest.approx(losses(root / "alone"), rel=1e-4)
