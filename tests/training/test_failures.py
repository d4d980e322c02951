"""A step that fails leaves what it had made, and runs again to the same numbers; a stuck process is said to be one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_recipe import tiny_recipe

from dllm_rl.cli import main as cli
from dllm_rl.config import described
from dllm_rl.training import heartbeat
from dllm_rl.training.failures import compared, read, replayed
from dllm_rl.training.loop import train

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
FAILING = """
import torch
from dllm_rl import from_command_line, train
from tiny_recipe import tiny_recipe

def explosive(rewards):
    "Advantages that are NaN from some rewards on."
    return torch.where(rewards.sum() == {worst}, torch.nan, rewards - rewards.mean())

recipe = tiny_recipe("unset", advantages=explosive, num_steps=6, save_steps=2, rollout_quantization=None)
if __name__ == "__main__":
    train(from_command_line(recipe))
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """A recipe file whose run fails in its fourth step, and that run's folder."""
    folder = tmp_path_factory.mktemp("failed")
    recipe = tiny_recipe(folder / "trial", advantages=lambda r: r - r.mean(), num_steps=6, rollout_quantization=None)
    sums = []
    train(replace(recipe, advantages=lambda r: (sums.append(r.sum().item()), r - r.mean())[1]))
    sums = sums[-6:]  # of the steps; before them a look at whether anything can be learnt
    assert sums.count(sums[3]) == 1
    file = folder / "failing.py"
    file.write_text(FAILING.format(worst=sums[3]))
    command = [sys.executable, str(file), "--output_dir", str(folder / "run")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode and "FloatingPointError: gradient norm is nan" in done.stderr
    assert "to run step 3 again: dllm-rl replay" in done.stderr
    return file, folder / "run" / "failed-step-000003"


def test_the_dump_says_what_failed_and_holds_what_was_made(failed):
    facts, tensors = read(failed[1], 0)
    assert facts["step"] == 3 and facts["weights_version"] == 3 and facts["checkpoint"].endswith("step-000002")
    assert facts["error"].startswith("FloatingPointError: gradient norm is nan") and facts["recipe"]["seed"] == 0
    assert {"rollout.tokens", "rewards", "noise.masked", "logps.old"} <= set(tensors)
    assert tensors["rewards"].shape == (4, 4) and len(tensors["rollout.tokens"]) == 16


def replay(dump, recipe):
    """In a process of its own, as the run was: sums depend on the number of threads."""
    command = [sys.executable, "-m", "dllm_rl.cli", "replay", str(dump), "--recipe", str(recipe)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def test_a_replay_fails_again_to_the_same_numbers(failed):
    done = replay(failed[1], failed[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "logps.old: equal" in done.stdout and "step 3 fails again: FloatingPointError: gradient norm" in done.stdout
    assert not [line for line in done.stdout.splitlines() if "differs" in line]


def test_a_replay_that_does_not_fail_says_so(failed, tmp_path):
    calm = tmp_path / "failing.py"
    calm.write_text(failed[0].read_text().replace("rewards.sum() ==", "0 * rewards.sum() =="))
    done = replay(failed[1], calm)
    assert done.returncode == 1
    assert "step 3 does not fail again; it had failed with FloatingPointError" in done.stdout


def test_what_cannot_be_replayed_is_refused_in_a_line(failed, tmp_path, capsys):
    dump = failed[1]
    facts, _ = read(dump, 0)
    for arguments, said in (
        (["replay", str(tmp_path)], "holds no process-0.json"),
        (["replay", str(dump)], "--recipe is missing"),
        (["replay", str(dump), "--recipe", str(tmp_path)], "is no Python file"),
        (["replay", str(dump), "--recipe", __file__], "defines no `recipe`"),
    ):
        assert cli.main(arguments) == 2
        assert said in capsys.readouterr().err
    mine = tiny_recipe("x", num_generations=2)
    described_mine = described(mine)
    with pytest.raises(ValueError, match="num_generations=2 differs from the checkpoint's 4"):
        replayed(facts | {"recipe": described_mine | {"num_generations": 4}}, mine, tmp_path)
    with pytest.raises(ValueError, match="of the dump is gone; step 3 cannot be run again"):
        replayed(facts | {"recipe": described_mine, "checkpoint": str(tmp_path / "gone")}, mine, tmp_path)
    (tmp_path / "process-0.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(ValueError, match="format=99 is not 1"):
        read(tmp_path, 0)


def test_differences_are_numbers():
    a = {"x": torch.tensor([1.0, float("nan")]), "y": torch.ones(2), "z": torch.ones(2)}
    b = {"x": torch.tensor([1.0, float("nan")]), "y": torch.ones(3), "z": torch.tensor([1.0, 1.5]), "w": torch.ones(1)}
    assert compared(a, a) == dict.fromkeys("xyz", "equal")
    assert compared(a, b) == {
        "w": "only made by the replay",
        "x": "equal",
        "y": "shapes (2,) and (3,)",
        "z": "differs by up to 0.5",
    }


def test_a_long_stage_gives_signs_of_life(monkeypatch):
    import threading

    monkeypatch.setattr(heartbeat, "FIRST", 0.01)
    twice, said = threading.Event(), []

    def say(line):
        said.append(line)
        if len(said) == 2:
            twice.set()

    with heartbeat.heartbeat("rollout, after 7 steps,", say):
        assert twice.wait(60)
    assert said[:2] == [
        "process 0: rollout, after 7 steps, has taken 0.01 s so far",
        "process 0: rollout, after 7 steps, has taken 0.02 s so far",
    ]


STUCK = """
import os, sys, time
from dataclasses import replace
from tiny_recipe import tiny_recipe
from dllm_rl import train
from dllm_rl.training import heartbeat

heartbeat.FIRST = 1.0
base = tiny_recipe(sys.argv[1], collective_timeout=10.0)

def sampler(policy, prompts, generator):
    if os.environ["RANK"] == "1" and os.path.exists(sys.argv[1] + "/checkpoints/step-000000"):
        time.sleep(1e6)
    return base.sampler(policy, prompts, generator)

train(replace(base, sampler=sampler))
"""


@pytest.mark.slow
def test_a_stuck_process_ends_the_run_with_its_name(tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "recipes/accelerate/cpu_2.yaml")]
    command = [*launcher, str(script), str(tmp_path / "run")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode
    assert "process 0: step 0 waited collective_timeout=10 s for another process" in said
    assert "process 1: rollout, after 0 steps, has taken 1 s so far" in said
    assert "process 0: waiting, after 0 steps, has taken 1 s so far" in said
