"""Two processes with half the batch each give, to fp32 rounding, what one process gives."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import PartialState
from run_outputs import metrics_of
from simulated_cuda import SimulatedCuda
from tiny_recipe import tiny_recipe

from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.monitoring.json_lines import current_rows

ROOT = Path(__file__).parents[2]
SETTINGS = {"num_steps": 3, "warmup.steps": 8, "warmup.eval_steps": 4, "train_batch_size": 8}
SETTINGS |= {"eval_task.size": 20, "validation_task.size": 20, "bf16": "false"}
STABLE = ["--loss", "recipes.studies.likelihoods.surrogates.StableDRL"]
STABLE += ["--beta", "0.1", "--kl", "K3", "--kl.bias_correction", "true"]
REDRAWN = ["--max_num_gen_batches", "3", "--prompt_source", "MixedRewardPrompts"]
SMALL = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def launch(directory, *launcher, recipe="sudoku_unique", more=()):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launcher,
        str(ROOT / "recipes" / f"{recipe}.py"),
        *SMALL,
        *more,
    ]
    done = subprocess.run([*command, "--output_dir", str(directory)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics_of(directory)


FEW_ROWS = ["--sampler.temperature", "0.2", "--num_generations", "2", "--num_mismatch_groups", "1"]
COUPLED = ["--likelihood", "Coupled", "--num_iterations", "2", *STABLE]
LATE = ["--late.workers", "2", "--late.max_staleness", "1"]
REPLAY = ["--replay", "Replay", "--replay.min_reward", "1", "--replay.batch_size", "10", "--replay.num_updates", "2"]
TEACHER = ["--teacher.model", "reference", "--teacher.substeps", "4", "--teacher.coeff", "0.5"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        pytest.param("sudoku_unique", [], marks=pytest.mark.nightly),
        pytest.param("sudoku_unique", ["--layout", "autoregressive"], marks=pytest.mark.nightly),
        pytest.param("sudoku_unique", FEW_ROWS, marks=pytest.mark.nightly),
        pytest.param(
            "sudoku_unique", ["--likelihood", "Coupled", "--num_iterations", "2", *STABLE], marks=pytest.mark.nightly
        ),
        pytest.param("sudoku_unique", TEACHER, marks=pytest.mark.nightly),
        ("sudoku_unique", [*REDRAWN, "--num_generations", "2", "--entropy_coeff", "0.01"]),
        ("sudoku_unique", LATE),
        ("sudoku_unique", REPLAY),
        pytest.param("sudoku_unique", [*LATE, "--likelihood", "Coupled"], marks=pytest.mark.nightly),
    ],
)
def test_two_processes_equal_one(tmp_path, recipe, more):
    one = launch(tmp_path / "one", "--cpu", recipe=recipe, more=more)
    two = launch(tmp_path / "two", "--config_file", "recipes/accelerate/cpu_2.yaml", recipe=recipe, more=more)
    assert len(one) == 3
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5)
    assert one[0]["grad_norm"] > 0
    written = [current_rows(tmp_path / name / "completions.jsonl") for name in ("one", "two")]
    assert [[row[name] for name in ("step", "prompt")] for row in written[0]] == [
        [row[name] for name in ("step", "prompt")] for row in written[1]
    ], "the main process alone writes"
    if "--num_mismatch_groups" in more:  # some groups are left out, the same ones
        assert any(0 < row["trained/rows"] < row["rollout_corr/rows"] < 16 for row in one)
        for alone, main in zip(*written, strict=True):  # of the rows that it sampled, whichever process scored them
            moved = ("reward", "advantage", "mismatch")
            numbers = [[math.nan if row[name] is None else row[name] for name in moved] for row in (main, alone)]
            assert numbers[0] == pytest.approx(numbers[1], rel=2e-3, abs=1e-4, nan_ok=True)
    if "--replay" in more:
        assert [row["replay/updates"] for row in one] == [2, 2, 2]
    if "--max_num_gen_batches" in more:
        assert one[0]["dynamic_sampling/draws"] > 1


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "dllm_rl.distributed.collectives.Accelerator", lambda **kw: type("One", (), {"num_processes": 1})()
    )
    with pytest.raises(ValueError, match="2 processes were launched, but Accelerate joined 1"):
        make_accelerator()


def test_a_launch_that_asks_for_the_cpu_gets_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with SimulatedCuda():
        assert make_accelerator().device.type == "cpu"


def test_a_device_that_another_accelerator_settled_is_refused():
    """Accelerate keeps the first device of a process: a run must not go on on the CPU beside an idle GPU."""
    with SimulatedCuda():
        Accelerator(cpu=True)
        with pytest.raises(ValueError, match="device=cuda was requested, but Accelerate is on cpu"):
            make_accelerator()
    with SimulatedCuda():
        assert make_accelerator().device.type == "cuda"


def test_an_evaluation_leaves_no_state_behind(tmp_path):
    with SimulatedCuda():
        recipe = tiny_recipe(tmp_path)
        evaluate(recipe.model(), recipe.eval_task, recipe.eval_sampler, completions=tmp_path / "c.jsonl")
        assert PartialState._shared_state == {}
        assert make_accelerator().device.type == "cuda"
