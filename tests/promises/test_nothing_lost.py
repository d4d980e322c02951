"""What a resumed run must not lose or mix up: gradients, metrics, old checkpoints, the schedule, the folder itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from refusals import refuses
from run_outputs import TIMES, assert_same_weights, metrics_of
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import files, manifest, tiny_masked_lm
from dllm_rl.algorithms.optimizers import LinearDecay
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.run_folder import REHEARSAL
from dllm_rl.distributed.stop import SIGNALS, Stop
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.monitoring.log import RunLog
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def small(directory, **changes):
    sizes = SIZES | {"hidden_size": 16, "num_layers": 1, "intermediate_size": 16}
    settings = {"model": partial(tiny_masked_lm, **sizes), "save_steps": 1, "learning_rate": 5e-3}
    settings |= {"eval_task": Sudoku(split="test", size=1)}
    return tiny_recipe(directory, **settings | changes)


class TestLoraAfterAWarmUp:
    def test_the_gradients_of_the_base_are_freed(self):
        policy = tiny_masked_lm(**SIZES)
        for parameter in policy.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        add_lora(policy, Lora(r=2))
        assert all(parameter.grad is None for parameter in policy.module.parameters())

    @pytest.mark.slow
    def test_grad_norm_is_of_what_is_trained_and_a_resumed_run_is_the_same(self, tmp_path):
        changes = {"lora": Lora(r=2), "sft_warmup_steps": 2, "num_steps": 2, "save_total_limit": 9}
        whole = train(small(tmp_path / "a", **changes))
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        start = str(tmp_path / "b" / "checkpoints" / "step-000000")
        again = train(small(tmp_path / "b", **changes, resume_from_checkpoint=start))
        assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
        assert_same_weights(whole, again)
        # What the warm-up left would be as large as its clip, 1.
        assert all(0 < row["grad_norm"] < 0.5 for row in metrics_of(tmp_path / "a"))


class TestSchedule:
    @pytest.mark.slow
    def test_more_steps_would_change_what_was_done_and_fewer_are_less(self, tmp_path):
        train(small(tmp_path, num_steps=2))
        said = "num_steps=4 would change the learning rates of a schedule that began with 2 steps; add lr_schedule_st"
        refuses(said, lambda: train(small(tmp_path, num_steps=4, resume_from_checkpoint="latest")))
        with pytest.raises(ValueError, match="num_steps=1 is less than the checkpoint's step 2"):
            train(small(tmp_path, num_steps=1, resume_from_checkpoint="latest"))
        train(small(tmp_path, num_steps=3, lr_schedule_steps=2, resume_from_checkpoint="latest"))
        assert [row["step"] for row in metrics_of(tmp_path)] == [0, 1, 2]
        with pytest.raises(ValueError, match="lr_schedule_steps=5 would change the learning rates"):
            train(small(tmp_path, num_steps=5, lr_schedule_steps=5, resume_from_checkpoint="latest"))

    @pytest.mark.slow
    def test_with_a_horizon_of_its_own_two_parts_are_the_whole(self, tmp_path):
        whole = train(small(tmp_path / "whole", num_steps=2, lr_schedule_steps=6))
        train(small(tmp_path / "parts", num_steps=1, lr_schedule_steps=6))
        parts = train(small(tmp_path / "parts", num_steps=2, lr_schedule_steps=6, resume_from_checkpoint="latest"))
        assert_same_weights(whole, parts)

    @pytest.mark.slow
    def test_a_schedule_that_ignores_it_may_go_on(self, tmp_path):
        train(small(tmp_path, num_steps=1, lr_schedule=constant))
        train(small(tmp_path, num_steps=2, lr_schedule=constant, resume_from_checkpoint="latest"))

    def test_after_its_horizon_the_rate_stays(self):
        assert LinearDecay()(9, 10) > LinearDecay()(10, 10) == LinearDecay()(25, 10) == pytest.approx(0.1)


def constant(step, num_steps):
    return 1.0


class TestMetrics:
    def test_nothing_is_rewritten_and_what_was_run_again_counts_once(self, tmp_path):
        train(small(tmp_path, num_steps=2, save_total_limit=9))
        before = (tmp_path / "metrics.jsonl").read_bytes()
        rows = read_metrics(tmp_path)
        start = str(tmp_path / "checkpoints" / "step-000001")
        train(small(tmp_path, num_steps=2, resume_from_checkpoint=start))
        after = (tmp_path / "metrics.jsonl").read_bytes()
        assert after.startswith(before + b'{"resume_from": 1}\n')
        assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
        assert metrics_of(tmp_path) == [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]

    def test_rows_and_a_whole_reference_are_on_disk_before_the_checkpoint(self, tmp_path, rehearsal, monkeypatch):
        order, seen, saved = [], [], checkpoint.save
        monkeypatch.setattr(RunLog, "flush", lambda self: order.append("rows"))

        def watched(directory, content, **options):
            order.append(directory.name)
            if directory.name != REHEARSAL:
                seen.append((content.state.step, manifest.verify(tmp_path / "reference")["step"]))
            return saved(directory, content, **options)

        monkeypatch.setattr(checkpoint, "save", watched)
        train(small(tmp_path, beta=0.1, num_steps=1))
        assert order == [REHEARSAL, *["rows", "checkpoints"] * 2]
        assert seen == [(0, None), (1, None)]


class TestFullDisk:
    def usage(self, free):
        return lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free)

    def test_it_is_seen_before_anything_is_written(self, tmp_path, rehearsal, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", self.usage(1_000_000))
        with pytest.raises(OSError, match=r"the disk is full; it takes 1\.1 MB, 1\.0 MB are free"):
            train(small(tmp_path, num_steps=1))
        assert not tmp_path.exists() or not any(tmp_path.iterdir())

    def test_a_write_that_fails_stops_the_run_and_leaves_nothing_behind(self, tmp_path, rehearsal, monkeypatch):
        def full(*arguments):
            arguments[1].write_bytes(b"half")
            raise RuntimeError("unexpected pos 679680 vs 679574")

        monkeypatch.setattr(checkpoint.torch, "save", full)
        with pytest.raises(OSError, match=r"was not saved: .*unexpected pos.* MB are free, which is enough"):
            train(small(tmp_path, num_steps=1))
        assert not tmp_path.exists() or not any(tmp_path.iterdir())


class TestReplacing:
    def folder(self, path, text):
        path.mkdir(parents=True)
        (path / "file").write_text(text)

    @pytest.mark.parametrize("killed_at", ["old", "new"])
    def test_a_kill_between_the_renames_leaves_the_old_or_the_new(self, tmp_path, killed_at):
        path = tmp_path / "step-000001"
        self.folder(tmp_path / ".step-000001.old", "old")
        if killed_at == "old":
            self.folder(tmp_path / ".step-000001.partial", "new")
        else:
            self.folder(path, "new")
        checkpoint.recover_all(tmp_path)
        assert (path / "file").read_text() == killed_at and [p.name for p in tmp_path.iterdir()] == ["step-000001"]

    def test_the_old_one_is_there_until_the_new_one_is(self, tmp_path, monkeypatch):
        path, seen = tmp_path / "x", []
        self.folder(path, "old")
        replace = Path.replace
        monkeypatch.setattr(
            Path, "replace", lambda a, b: [seen.append((tmp_path / ".x.old" / "file").read_text()), replace(a, b)][1]
        )
        with files.replacing(path) as partial_:
            self.folder(partial_, "new")
        assert seen == ["old"] and (path / "file").read_text() == "new" and list(tmp_path.iterdir()) == [path]

    def test_a_surplus_checkpoint_is_never_half_there(self, tmp_path, monkeypatch):
        self.folder(tmp_path / "x", "a")
        seen = []
        monkeypatch.setattr(shutil, "rmtree", lambda path: seen.append((path.name, (tmp_path / "x").exists())))
        files.remove_whole(tmp_path / "x")
        assert seen == [(".x.partial", False)]


class TestLock:
    HOLD = """
import pathlib, sys
from dllm_rl import files
files.lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""

    def test_one_writer_a_folder_and_none_is_overwritten(self, tmp_path):
        train(small(tmp_path, num_steps=1))
        command = [sys.executable, "-c", self.HOLD, str(tmp_path / ".lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "held\n"
            for changes in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
                with pytest.raises(ValueError, match=rf"held by process {other.pid} on \S+; stop it"):
                    train(small(tmp_path, num_steps=1, **changes))
            assert (tmp_path / "summary.json").exists()
            other.send_signal(signal.SIGKILL)
        assert files.lock(tmp_path / ".lock")
        files.unlock(tmp_path / ".lock")

    @pytest.mark.repeated(every=3)
    @pytest.mark.parametrize(
        ("held", "now", "taken"),
        [
            ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
            (
                {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
                {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "12"},
                True,
            ),
            ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, False),
            ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, False),  # two runs of one job
            ({"SLURM_JOB_ID": "7"}, {}, False),
            ({}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        ],
    )
    def test_a_job_queued_again_takes_the_lock_that_its_failed_node_left(self, tmp_path, monkeypatch, held, now, taken):
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
            monkeypatch.delenv(name, raising=False)
        path, environment = tmp_path / ".lock", os.environ | held
        for name, value in now.items():
            monkeypatch.setenv(name, value)
        command = [sys.executable, "-c", self.HOLD, str(path)]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **streams) as node:  # the file server still has its lock
            assert node.stdout.readline() == "held\n"
            if taken:
                assert files.lock(path)
                files.unlock(path)
            else:
                refuses(f"held by process {node.pid} on ", lambda: files.lock(path), BlockingIOError)
                assert node.pid == int(path.read_text().split()[1])
            node.kill()


def test_after_a_run_the_signals_are_as_before_and_a_hangup_that_nohup_ignores_stays_ignored(tmp_path):
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGHUP
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before = [signal.getsignal(number) for number in numbers]
        train(small(tmp_path, num_steps=1, advantages=hang_up))
        refuses("already contains a run", lambda: train(small(tmp_path, num_steps=1)))
        assert [signal.getsignal(number) for number in numbers] == before
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert json.loads((tmp_path / "summary.json").read_text())["checkpoint"].endswith("step-000001")


def hang_up(rewards, group):
    os.kill(os.getpid(), signal.SIGHUP)
    return rewards - rewards.mean()


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this system has no SIGALRM")
def test_the_alarm_is_the_graders_until_a_signal_has_come():
    def of_the_grader(number, frame):
        pass

    numbers = [*SIGNALS, signal.SIGALRM]
    before = {number: signal.signal(number, of_the_grader) for number in numbers}
    try:
        stop = Stop(seconds=1000.0, main=False)
        assert signal.getsignal(signal.SIGALRM) is of_the_grader
        stop._hear(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGALRM) is not of_the_grader and signal.getitimer(signal.ITIMER_REAL)[0] > 0
    finally:
        stop.disarm()
        for number, handler in before.items():
            signal.signal(number, handler)
