"""Launch files and how processes are started by them: what accelerate, DeepSpeed and the shell make
of each.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.config.load import shipped
from harness.errors import ConfigError
from harness.machine import launcher
from harness.machine.accelerated import cause
from harness.machine.deepspeed_settings import deepspeed_file
from harness.machine.heartbeat import HUNG
from harness.machine.launch_file import Launch, read_launch
from launch_files import accelerated


def test_without_a_gpu_several_processes_are_started_the_one_way_that_starts_them():
    line, environment = launcher.command(
        ["x.yaml"], 2, environment={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""}
    )
    assert line[line.index("--config_file") + 1].endswith("cpu.yaml")
    assert "--cpu" not in line
    assert environment["ACCELERATE_USE_CPU"] == "true"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    line, environment = launcher.command(["x.yaml"], None, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert line[line.index("--config_file") + 1].endswith("t4.yaml")
    assert line[-3:] == ["-m", "harness.train", "x.yaml"]


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    lines = [f"echo '{index}, GPU-{index}, Tesla T4, 15360, 7.5, 550.54'" for index in range(2)]
    program.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_counted_and_all_of_them_used_unless_told_otherwise():
    assert launcher.gpus({}) == 2
    assert launcher.gpus({"CUDA_VISIBLE_DEVICES": "1"}) == 1
    assert launcher.gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    line, environment = launcher.command([], None, environment={})
    assert line[line.index("--num_processes") + 1] == "2"
    assert "ACCELERATE_USE_CPU" not in environment
    with pytest.raises(
        ConfigError, match="--processes 3: this machine has 2 GPUs; expected 1 to 2"
    ):
        launcher.command([], 3, environment={})


def test_two_processes_really_start_and_the_exit_code_comes_back(tmp_path, monkeypatch):
    (tmp_path / "probe.py").write_text(
        "import os, sys, pathlib\n"
        "names = ['WORLD_SIZE', 'ACCELERATE_USE_CPU', 'OMP_WAIT_POLICY']\n"
        "path = pathlib.Path(sys.argv[1], 'rank' + os.environ['RANK'])\n"
        "path.write_text(' '.join(os.environ[n] for n in names))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launcher.launch([str(tmp_path)], 2, module="probe") == 0
    assert {f.name: f.read_text() for f in tmp_path.glob("rank*")} == {
        "rank0": "2 true PASSIVE",
        "rank1": "2 true PASSIVE",
    }


def test_a_failed_run_gives_back_its_own_words_and_no_traceback_of_the_launcher(
    tmp_path, monkeypatch, capfd
):
    (tmp_path / "probe.py").write_text(
        "import sys\nprint('harness: no', file=sys.stderr)\nsys.exit(2)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launcher.launch([], 1, module="probe") == 2
    assert capfd.readouterr().err == "harness: no\n"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_the_system_kills_is_one_sentence(tmp_path, monkeypatch, capfd, processes):
    (tmp_path / "probe.py").write_text(
        "import os, signal, time\n"
        "if os.environ.get('RANK', '1') == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launcher.launch([], processes, module="probe") == 128 + signal.SIGKILL
    who = "the run" if processes == 1 else "rank 1"
    said = capfd.readouterr().err
    assert said.startswith(f"harness: {who} was ended by SIGKILL, as the system does when")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("codes", "rank"),
    [
        ({0: 1, 1: -9}, 1),  # the system killed one; the other lost its connection
        ({0: -15, 1: 2}, 1),  # torchrun stopped the first
        ({0: HUNG, 1: -9}, 0),  # the second hung, and torchrun killed it in the end
        ({0: 143, 1: -9}, 0),  # the same, after a SIGTERM
    ],
)
def test_of_several_that_failed_the_cause_is_told(codes, rank):
    assert cause(codes) == rank


@pytest.mark.parametrize("way", ["terminated", "killed"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_launch_that_is_terminated_or_killed_lets_the_run_save(tmp_path, processes, way):
    (tmp_path / "probe.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "rank = os.environ.get('RANK', '0')\n"
        "def stop(*_):\n    time.sleep(0.5)\n    pathlib.Path(sys.argv[1], 'saved' + "
        "rank).touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "from harness.machine.parent import watch_parent\n"
        "watch_parent()\n"
        "own = pathlib.Path(sys.argv[1], 'own' + rank)\n"
        "own.write_text(str(os.getpid()))\n"
        "own.rename(own.with_name('started' + rank))\n"  # whole, or not there
        "time.sleep(60)\n"
    )
    program = (
        "import sys\nfrom harness.machine.launcher import launch\n"
        "sys.exit(launch([sys.argv[1]], COUNT, module='probe'))"
    )
    program = program.replace("COUNT", str(processes))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{os.getcwd()}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    line = [sys.executable, "-c", program, str(tmp_path)]
    started = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("started*"))) < processes and time.monotonic() < deadline:
        time.sleep(0.05)
    run = [psutil.Process(int(file.read_text())) for file in tmp_path.glob("started*")]
    if way == "terminated":
        started.terminate()
    else:
        started.kill()
    said = started.communicate(timeout=30)[1]  # at the end of all that write to it
    assert said == "", "no screen of torchrun's"
    assert started.returncode == (143 if way == "terminated" else -signal.SIGKILL)
    assert len(list(tmp_path.glob("saved*"))) == len(run) == processes
    psutil.wait_procs(run, timeout=10)
    assert not any(process.is_running() for process in run)


def test_a_run_whose_launcher_alone_is_killed_saves_and_ends(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    program = (
        "import os, signal, time\n"
        "from harness.machine.parent import watch_parent\n"
        f"os.environ['HARNESS_PARENT'] = '{run.pid}'\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(143))\n"
        "watch_parent()\n"
        "time.sleep(60)\n"
    )
    # Its parent is not the process that it is told of: that one has ended before it could look.
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    orphan = subprocess.Popen([sys.executable, "-c", program], env=environment)
    run.kill()
    run.wait()
    assert orphan.wait(30) == 143


# ---- the files, read by us, by accelerate and by DeepSpeed ---------------------------------------

FILES = sorted((shipped("launch") / "accelerate").glob("*.yaml"))
ZERO = ("zero2", "zero2_offload", "zero3_offload")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_accelerate_takes_every_launch_file_as_we_do(file, monkeypatch):
    for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        monkeypatch.delenv(key)
    launch, flags = read_launch(file.stem), []
    if launch.machines > 1:
        flags = ["--num_processes", "16", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    environment, args = accelerated(file, *flags)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.get("ACCELERATE_DYNAMO_BACKEND", "NO") == "NO"
    assert (
        environment.get("ACCELERATE_USE_CPU", "False") == "False"
    )  # beside DeepSpeed it would give plain DDP
    assert (args.multi_gpu or args.use_deepspeed) is not launch.single
    assert ("ACCELERATE_USE_DEEPSPEED" in environment) == (file.stem in ZERO)
    assert args.num_processes == (16 if flags else launch.processes or "gpu")
    if file.stem in ZERO:
        assert (
            environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == f"launch/deepspeed/{file.stem}.json"
        )
        assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
    if file.stem == "cpu":
        assert set(environment["CUDA_VISIBLE_DEVICES"].split(",")) == {"-1"}


@pytest.mark.parametrize(
    ("name", "with_zero"),
    [("multi_node", False), ("multi_node", True), *((n, False) for n in ZERO)],
)
def test_several_machines_run_torchrun_on_each_with_ddp_and_with_deepspeed(name, with_zero):
    flags = [
        "--num_machines",
        "4",
        "--machine_rank",
        "3",
        "--main_process_ip",
        "10.0.0.1",
        "--num_processes",
        "32",
    ]
    flags += ["--main_process_port", "29511"]
    if with_zero:
        flags += ["--use_deepspeed", "--deepspeed_config_file", "launch/deepspeed/zero2.json"]
    environment, args = accelerated(read_launch(name).file, *flags)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("4", "8", 3)
    assert args.rdzv_endpoint == "10.0.0.1:29511"
    assert ("ACCELERATE_USE_DEEPSPEED" in environment) == (with_zero or name in ZERO)


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_takes_every_json_with_the_stage_that_was_asked_for(name, monkeypatch):
    pytest.importorskip("deepspeed")
    from accelerate import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig

    class TwoProcesses:
        def get_data_parallel_world_size(self):
            return 2

    monkeypatch.setattr(
        "deepspeed.comm.get_rank", lambda: 0
    )  # it looks for the world size after that alone
    for stage in (None, 3) if name == "zero3_offload" else (None, 1, 2, 3):
        launch = read_launch(name, stage)
        environment, _ = accelerated(launch.file, *(["--zero_stage", str(stage)] if stage else []))
        for key, value in environment.items():
            if key.startswith("ACCELERATE_DEEPSPEED") or key == "ACCELERATE_CONFIG_DS_FIELDS":
                monkeypatch.setenv(key, value)
        plugin = DeepSpeedPlugin(hf_ds_config=str(deepspeed_file(f"launch/deepspeed/{name}.json")))
        assert (
            not {"fp16", "bf16", "torch_autocast"} & plugin.deepspeed_config.keys()
        )  # they would cast `wo`
        assert plugin.zero3_init_flag is False
        config = {
            **plugin.deepspeed_config,
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 100,
        }
        read = DeepSpeedConfig(config, mpu=TwoProcesses())
        assert (read.train_batch_size, read.zero_config.stage) == (2, launch.zero_stage)
        for ours, theirs in (
            (launch.offload_optimizer, read.zero_config.offload_optimizer),
            (launch.offload_parameters, read.zero_config.offload_param),
        ):
            assert ours == (theirs is not None and theirs.device == "cpu")
        assert (
            read.zero_config.reduce_bucket_size == 50_000_000
        )  # nothing is spelled wrong: DeepSpeed refuses others


def test_a_launch_file_is_found_by_name_and_by_path_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zero2 = read_launch("launch/accelerate/zero2.yaml")
    assert zero2 == read_launch("zero2") == read_launch(str(zero2.file))
    assert (zero2.zero_stage, zero2.offload_optimizer, zero2.offload_parameters) == (
        2,
        False,
        False,
    )
    assert read_launch("zero2", 1).zero_stage == 1
    offload = read_launch("zero3_offload")
    assert (offload.zero_stage, offload.offload_optimizer, offload.offload_parameters) == (
        3,
        True,
        True,
    )
    assert read_launch(None) == Launch()

    (tmp_path / "mine.yaml").write_text(  # as `accelerate config` writes it
        "distributed_type: DEEPSPEED\nnum_processes: 4\n"
        "deepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu, offload_param_device: "
        "none}\n"
    )
    mine = read_launch("mine.yaml")
    assert (mine.processes, mine.zero_stage, mine.offload_optimizer, mine.offload_parameters) == (
        4,
        3,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("name", "stage", "said"),
    [
        ("zero_2", None, "did you mean zero2?"),
        ("elsewhere/zero2.yaml", None, "no such launch file"),
        (None, 2, "--zero-stage 2 needs DeepSpeed: give --launch zero2 too"),
        ("multi_gpu", 2, "is without DeepSpeed"),
        ("zero3_offload", 2, "fixes stage 3"),
        ("list.yaml", None, "expected a mapping"),
        ("broken.yaml", None, "cannot be read"),
        ("fsdp.yaml", None, "distributed_type is 'FSDP': weights are divided by"),
        ("gone.yaml", None, "there is no file no/where.json"),
        ("many.yaml", None, "ZeRO has the stages 0 to 3, found 7"),
    ],
)
def test_a_launch_file_that_cannot_be_used_is_one_sentence(
    tmp_path, monkeypatch, name, stage, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\n")
    zero = "distributed_type: DEEPSPEED\ndeepspeed_config: "
    (tmp_path / "gone.yaml").write_text(zero + "{deepspeed_config_file: no/where.json}\n")
    (tmp_path / "many.yaml").write_text(zero + "{zero_stage: 7}\n")
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        read_launch(name, stage)
    assert "\n" not in str(refused.value)


# ---- the command line that harness train starts --------------------------------------------------


@pytest.mark.parametrize("name", [None, "cpu", "t4", "multi_gpu", *ZERO])
def test_deepspeed_and_accelerates_cpu_flag_are_never_set_together(name, monkeypatch):
    pytest.importorskip("deepspeed")
    launch = read_launch(name)
    given = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    given["ACCELERATE_USE_DEEPSPEED"] = "true"
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # some platforms export them
    processes = 1 if launch.single else 2
    line, environment = launcher.command([], processes, launch=launch, environment=given)
    started, args = accelerated(
        Path(line[line.index("--config_file") + 1]), *line[5 : line.index("-m", 3)]
    )
    assert ("ACCELERATE_USE_CPU" in environment) is (launch.zero_stage is None)
    assert "ACCELERATE_USE_DEEPSPEED" not in environment  # accelerate sets it
    assert not {"MASTER_ADDR", "MASTER_PORT"} & environment.keys()
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert args.use_deepspeed is (launch.zero_stage is not None)
    assert args.num_processes == processes
    if launch.zero_stage:
        assert started["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(launch.zero_stage)


@pytest.mark.usefixtures("two_gpus")
def test_what_this_machine_cannot_start_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="this machine has 2 GPUs; expected 1 to 2"):
        launcher.command([], 4, launch=read_launch("multi_gpu"), environment={})
    with pytest.raises(ConfigError, match="starts one; multi_gpu is the launch file for more"):
        launcher.command([], 2, launch=read_launch("t4"), environment={})
    with pytest.raises(ConfigError, match=r"is for 2 machines .* use launch/slurm\.sbatch"):
        launcher.command([], 2, launch=read_launch("multi_node"), environment={})
    _, environment = launcher.command(
        [], 4, launch=read_launch("cpu"), environment={}
    )  # hides the GPUs
    assert environment["ACCELERATE_USE_CPU"] == "true"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"--launch zero2 needs DeepSpeed: pip install -e '\.\[deepspeed\]'"
    ):
        launcher.command([], 2, launch=read_launch("zero2"), environment={})
