"""A run that was killed, stopped or moved to other processes goes on as if nothing had happened,
bit for bit.
"""

import itertools
import json
import os
import re
import shutil
import signal

import psutil
import pytest

from forked_ranks import on_ranks
from harness import checkpoint as checkpoints
from harness.config import schema as configs
from harness.errors import ConfigError
from harness.machine.signals import stop_requests
from harness.tracking import mlflow as mlflow_tracker
from harness.train import between_steps
from harness.train import run as train
from harness.train.state import Observer
from rank_program import NotFinite, SamplesRead, with_scaler
from same_runs import AtStep, final, forked, same_bits, same_run
from toy_runs import losses, make_config, make_shards


def config_of(root, name, **settings):
    return make_config(root, root / "clip", root / "t5", name, **settings)


@pytest.fixture(scope="module")
def whole(root):
    """Trains the run that nothing interrupts: 8 steps, two epochs, evaluations, checkpoints."""
    train.run(config_of(root, "whole"))
    return root / "whole"


def killed_at(step, config):
    kill = AtStep(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert forked(lambda: train.run(config, observers=[kill])) == -signal.SIGKILL


def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_bit_for_bit(root, whole):
    config = config_of(root, "killed-alone")
    killed_at(7, config)  # mid second epoch; the newest checkpoint is that of step 6
    assert checkpoints.newest(config.out_dir).step == 6
    train.run(config, "auto")
    same_run(config.out_dir, whole)


def test_a_data_worker_that_is_killed_is_started_again_and_the_run_keeps_its_bits(root, whole):
    config = config_of(root, "worker-killed", dev=False)
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": 2})})
    kill = AtStep(1, lambda: psutil.Process().children()[0].kill())
    train.run(config, observers=[kill])
    same_run(config.out_dir, whole)


def test_evaluation_in_between_does_not_disturb_training(root, whole):
    train.run(config_of(root, "unobserved", dev=False))
    same_run(root / "unobserved", whole)


def test_looks_at_a_few_images_between_evaluations_are_logged_and_do_not_disturb_training(
    root, whole
):
    train.run(config_of(root, "looked", image_use_every=1))
    same_run(root / "looked", whole)
    rows = [
        json.loads(line) for line in (root / "looked" / "metrics.jsonl").read_text().splitlines()
    ]
    looks = {
        row["step"]: row["values"] for row in rows if "gate/vqa/loss_gap_nats" in row["values"]
    }
    assert list(looks) == [
        1,
        2,
        5,
        7,
    ]  # evaluations come after steps 3 and 6 and at the ends of the epochs
    assert looks[1]["gate/vqa/loss_gap_nats"] != looks[7]["gate/vqa/loss_gap_nats"]
    assert all(0.02 < look["gate/vqa/image_share"] <= 1 for look in looks.values())


class Collapse(Observer):
    """Makes the bridge say the same of every picture, as one does that learns too fast."""

    def step_taken(self, run, step):
        if run.state.step == 2:
            run.model.bridge.projection.linear.weight.data.zero_()


def test_a_bridge_that_collapses_is_told_at_the_next_look(root, capsys):
    train.run(config_of(root, "collapses", image_use_every=1), observers=[Collapse()])
    said = " ".join("".join(capsys.readouterr()).split())
    told = re.findall(r"step (\d+): the bridge has collapsed: .* lower train.bridge_learn", said)
    assert "1" not in told
    assert told[:1] == ["2"], said


def test_dropout_is_drawn_by_the_step_whatever_happened_before_it(root):
    def config(name, **settings):
        plain = config_of(root, name, **settings)
        parts = plain.model_dump(mode="json")
        parts["model"]["bridge"]["dropout"] = parts["model"]["lm"]["lora"]["dropout"] = 0.2
        return configs.Config(**parts)

    train.run(config("dropped"))
    train.run(config("dropped-cut", dev=False, max_steps=5))
    train.run(config("dropped-cut", dev=False), "auto")
    same_run(root / "dropped-cut", root / "dropped")


def test_a_job_killed_before_its_first_checkpoint_goes_on_in_the_same_mlflow_run(
    root, whole, monkeypatch
):
    from mlflow import MlflowClient

    monkeypatch.setattr(mlflow_tracker, "PERIOD", 0.02)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = config_of(root, "tracked", dev=False, save_every=4)
    test = (configs.DataSetConfig(path=str(root / "dev")),)
    config = config.model_copy(
        update={
            "tracking": config.tracking.model_copy(update={"kind": "mlflow"}),
            "data": config.data.model_copy(update={"test": test}),
        }
    )
    killed_at(2, config)
    train.run(config, "auto")
    same_bits(final(config.out_dir), final(whole))
    client = MlflowClient(f"sqlite:///{config.out_dir}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("harness").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {m.step: m.value for m in history} == losses(whole)
    assert len(history) == 8
    assert checkpoints.newest(config.out_dir).state["run_id"] == run.info.run_id
    assert run.info.status == "FINISHED"
    sets = [given.dataset.name for given in run.inputs.dataset_inputs]
    assert sorted(sets) == ["toy/dev", "toy/train"], "the test set is one of the inputs"


def test_a_signal_saves_the_step_it_came_in_and_the_run_is_not_called_finished(
    root, whole, monkeypatch
):
    closed = []
    config = config_of(root, "terminated", dev=False)
    with monkeypatch.context() as patch:
        # When the flags of step 1 are known.
        terminate = AtStep(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(train.JournalTracker, "close", lambda self, status: closed.append(status))
        with pytest.raises(SystemExit) as left:
            train.run(config, observers=[terminate])
    assert (left.value.code, closed) == (143, ["KILLED"])
    assert checkpoints.newest(config.out_dir).step == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train.run(config, "auto")
    same_run(config.out_dir, whole)


def test_a_signal_in_an_evaluation_ends_it_at_the_next_batch_and_nothing_is_lost(
    root, whole, monkeypatch
):
    config = config_of(root, "evaluated", evaluate_every=3)
    evaluation = config.evaluation.model_copy(update={"batch_images": 1})
    config = config.model_copy(update={"evaluation": evaluation})
    evaluate_model = between_steps.evaluate_model
    batches = []

    def signalled(*given, progress, **named):
        def seen(*done):
            batches.append(done)
            os.kill(os.getpid(), signal.SIGTERM)
            progress(*done)

        return evaluate_model(*given, progress=seen, **named)

    with monkeypatch.context() as patch:
        patch.setattr(between_steps, "evaluate_model", signalled)
        with pytest.raises(SystemExit) as left:
            train.run(config)
    assert left.value.code == 143
    assert len(batches) == 1
    assert checkpoints.newest(config.out_dir).step == 3  # where no checkpoint was due
    page = config.out_dir / "answers" / "step-000003.html"
    assert not page.exists()
    train.run(config, "auto")
    assert page.exists()  # made up for
    same_run(config.out_dir, whole)


def test_the_third_signal_ends_the_process_at_once():
    def interrupted():
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a suite started with & has it ignored
        with stop_requests() as asked:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            assert asked() == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)

    assert forked(interrupted) == -signal.SIGINT


def test_an_ignored_hangup_or_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked() == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_at_its_end_says_so_and_catches_up_with_an_evaluation_that_was_cut_off(
    root, whole, capfd
):
    page = whole / "answers" / "step-000008.html"
    config = config_of(root, "whole")
    assert train.run(config, "auto") == checkpoints.place(whole, 8)
    said = capfd.readouterr().err
    assert "nothing is left to do" in said
    assert "answers to the same images" not in said
    page.unlink()
    train.run(config, "auto")
    assert page.exists()


def test_a_later_epoch_can_be_added_and_another_batch_size_ends_where_the_data_end(
    root, whole, capfd
):
    config = config_of(root, "changed", dev=False, max_steps=3)
    train.run(config)
    longer = config_of(root, "changed", dev=False, global_batch=7, epochs=3)
    last = train.run(longer, "auto")
    # 2 of 14 images are left in epoch 1 after three steps of 4; then two steps of 7 in each of two
    # epochs.
    assert last.name == "step-000008"
    said = capfd.readouterr().err
    assert "from here on train.global_batch is 7, it was 4" in said
    assert "from here on train.epochs is 3, it was 2" in said


def test_another_model_or_another_order_is_refused_by_the_keys_name(root, whole, capfd):
    config = config_of(root, "whole")
    bridge = config.model.bridge.model_copy(update={"layers": 2})
    other = config.model_copy(update={"model": config.model.model_copy(update={"bridge": bridge})})
    with pytest.raises(
        ConfigError, match=r"model.bridge.layers was 1 in .*step-000008 and is 2 now"
    ):
        train.run(other, "auto")
    with pytest.raises(ValueError, match="the same sets, weights, seed"):
        train.run(config.model_copy(update={"seed": 4}), "auto")
    assert "from here on seed is 4, it was 3" in capfd.readouterr().err


def test_going_on_from_an_older_checkpoint_replaces_the_later_ones(root, whole):
    out = root / "again"
    shutil.copytree(whole, out)
    config = config_of(root, "again", dev=False, max_steps=7)
    train.run(config, str(checkpoints.place(out, 6)))
    assert [path.name for path in sorted(out.glob("checkpoints/step-*"))] == [
        "step-000006",
        "step-000007",
    ]
    assert len(list(out.glob("checkpoints/earlier-future-*/step-000008"))) == 1
    train.run(config_of(root, "again", dev=False), "auto")
    same_bits(final(out), final(whole))


# ---- several processes, judged by the files they leave -------------------------------------------


UNREADABLE = (3, 6, 9)


@pytest.fixture(scope="module")
def launched(root, whole):
    """Runs the stages of rank_program.py: two on two processes, one on three."""
    for name in ("begun-by-one", "three"):
        train.run(config_of(root, name, dev=False, max_steps=3))
    make_shards(root / "torn-set", 12, unreadable=UNREADABLE)
    stages = (("first", 2), ("second", 2), ("three", 3))
    codes = on_ranks("rank_program", [(count, [root, stage]) for stage, count in stages])
    assert codes[0][1] == -signal.SIGKILL
    assert codes[1:] == [[0, 0], [0, 0, 0]]


def results(root, stage):
    return [json.loads((root / f"{stage}-{rank}.json").read_text()) for rank in (0, 1)]


def close_to(out, whole):
    found, expected = losses(out), losses(whole)
    assert list(found) == list(range(1, 9))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5, nan_ok=True)


@pytest.mark.usefixtures("launched")
def test_two_processes_killed_and_resumed_equal_two_that_were_not(root):
    same_run(root / "killed", root / "two")
    first, second = results(root, "first"), results(root, "second")
    assert first[0]["two"] == first[1]["two"] == second[0]["killed"] == second[1]["killed"]


@pytest.mark.usefixtures("launched")
def test_a_rank_that_does_not_see_the_output_folder_reads_and_writes_through_rank_0(root):
    same_run(root / "killed", root / "two")  # rank 1 went on with rank 0's checkpoint
    assert not (root / "elsewhere").exists()
    named = (root / "torn" / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in named) == list(UNREADABLE)


@pytest.mark.usefixtures("launched")
def test_ranks_with_another_config_are_refused_by_the_keys_name_on_all_of_them(root):
    said = [result["differs"][1] for result in results(root, "second")]
    assert said[0] == said[1]
    assert "train.clip_norm is 1.0 on rank 0 and 2.0 on rank 1" in said[0][0]
    assert "there is no such folder" in said[0][1]  # what rank 0 alone can tell
    assert not (root / "differs").exists()


@pytest.mark.usefixtures("launched")
def test_losses_are_equal_on_one_and_two_processes(root, whole):
    close_to(root / "two", whole)


@pytest.mark.usefixtures("launched")
def test_a_run_goes_on_with_another_number_of_processes_also_where_one_has_nothing_left(
    root, whole
):
    """Three ranks do not divide 4 images; of an epoch's last 2 the first rank gets none."""
    for name, processes in (("begun-by-one", 2), ("three", 3)):
        close_to(root / name, whole)
        assert checkpoints.newest(root / name).state["world_size"] == processes


def read_by(config, resume=None):
    """Trains and returns what each step of this process has read."""
    read = SamplesRead()
    train.run(config, resume, [read])
    return read.steps


@pytest.mark.usefixtures("launched")
def test_a_run_begun_by_one_or_by_two_goes_on_by_others_on_the_same_samples(root, whole):
    uncut = read_by(config_of(root, "read", dev=False))
    alone = read_by(config_of(root, "begun-by-two", dev=False), "auto")
    close_to(root / "begun-by-two", whole)
    assert alone == uncut[3:]
    ranks = [json.loads((root / f"three-{rank}.json").read_text())["three"][1] for rank in range(3)]
    together = [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == [sorted(step) for step in uncut[3:]]


@pytest.mark.usefixtures("launched")
def test_the_loss_scaler_sees_what_overflows_on_another_rank(root, monkeypatch):
    """As DDP with fp16 does it: both ranks skip, and halve their scale alike."""
    with_scaler(monkeypatch.setattr)
    train.run(config_of(root, "scaled-alone", dev=False), observers=[NotFinite({2, 5})])
    close_to(root / "scaled", root / "scaled-alone")
    saved, expected = (checkpoints.newest(root / name).state for name in ("scaled", "scaled-alone"))
    assert saved["scaler"] == expected["scaler"]
    assert saved["scaler"]["scale"] < 2.0**16
    assert saved["train"]["skipped"] == 2


@pytest.mark.usefixtures("launched")
def test_a_loss_not_finite_on_one_rank_is_skipped_on_all_and_leaves_nothing_behind(root):
    first = results(root, "first")
    assert first[0]["skipped"] == first[1]["skipped"]
    assert checkpoints.newest(root / "skipped").state["train"]["skipped"] == 2
    train.run(config_of(root, "skipped-alone", dev=False), observers=[NotFinite({2, 5})])
    close_to(root / "skipped", root / "skipped-alone")
    assert [step for step, loss in losses(root / "skipped").items() if loss != loss] == [3, 6]


@pytest.mark.usefixtures("launched")
def test_a_signal_to_one_rank_stops_all_after_the_same_step(root):
    second = results(root, "second")
    assert [result["stopped"][1] for result in second] == [143, 143]
    assert second[0]["stopped"][0] == second[1]["stopped"][0]
    assert checkpoints.newest(root / "stopped").step == 3
