"""Checkpoints: whole or absent, a bounded number, and continuing bit for bit."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import assert_same_weights, metrics_of
from tiny_recipe import tiny_recipe

from dllm_rl.training import checkpoint
from dllm_rl.training.loop import train


def test_resume_continues_bit_for_bit(tmp_path):
    changes = {"warmup_steps": 2, "num_iterations": 2, "beta": 0.01, "save_steps": 2}
    whole = train(tiny_recipe(tmp_path / "whole", num_steps=5, **changes))
    train(tiny_recipe(tmp_path / "parts", num_steps=5, save_total_limit=9, **changes))
    for folder in checkpoint.found(tmp_path / "parts" / "checkpoints"):
        step, path = folder
        again = train(
            tiny_recipe(
                tmp_path / "parts", num_steps=5, save_total_limit=9, resume_from_checkpoint=str(path), **changes
            )
        )
        assert_same_weights(whole, again)
        assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts"), f"resumed at {step}"


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=5, save_steps=1, save_total_limit=2))
    assert [step for step, _ in checkpoint.found(tmp_path / "checkpoints")] == [4, 5]


def test_a_half_written_folder_is_no_checkpoint(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=1))
    (tmp_path / "checkpoints" / ".partial-000009-1").mkdir()
    assert checkpoint.locate("latest", tmp_path / "checkpoints").name == "step-000001"
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        checkpoint.locate(str(tmp_path / "checkpoints" / ".partial-000009-1"), tmp_path / "checkpoints")


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    train(tiny_recipe(tmp_path, num_steps=1))

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_recipe(tmp_path, num_steps=3, lr_schedule_steps=1, resume_from_checkpoint="latest"))
    assert [step for step, _ in checkpoint.found(tmp_path / "checkpoints")] == [0, 1]


PROGRAM = """
import sys
sys.path[:0] = {path!r}
from tiny_recipe import tiny_recipe
from dllm_rl.training import train
train(tiny_recipe({directory!r}, num_steps=40, save_steps=3, warmup_steps=10, resume_from_checkpoint={resume!r}))
"""


def start(directory: Path, *, resume: str | None = None) -> subprocess.Popen:
    tests = Path(__file__).parents[1]
    path = [str(tests / "support"), str(tests.parent)]
    code = PROGRAM.format(path=path, directory=str(directory), resume=resume)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen) -> None:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out


def steps_done(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(tmp_path):
    finished(start(tmp_path / "whole"))
    chance = random.Random()
    for number in range(3):
        process, directory = start(tmp_path / f"run{number}"), tmp_path / f"run{number}"
        # Past the first checkpoint of the loop, so that an optimiser's state is what must come back.
        wanted = chance.randint(4, 36)
        while steps_done(directory) < wanted:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        finished(start(directory, resume="latest"))
        ends = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "whole", directory)]
        assert_same_weights(*ends)
        assert metrics_of(tmp_path / "whole") == metrics_of(directory), f"killed after step {wanted}"


@pytest.mark.slow
def test_interrupt_saves_and_says_how_to_resume(tmp_path):
    process = start(tmp_path / "run")
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume_from_checkpoint latest" in out
    finished(start(tmp_path / "run", resume="latest"))
