"""The main job: its arms are those of the study of quantized rollouts, and they train side by side."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from forked import SERVER
from tiny_recipe import with_changes

from dllm_rl import tiny_masked_lm
from dllm_rl.checkpoints.run_folder import default_folder
from dllm_rl.cli import arms
from recipes import quantized_sudoku as job
from recipes.studies.quantized.orders_trained import STUDY

STUDIED = {
    "unquantized": "random: unquantized",
    "uncorrected": "random: nvfp4",
    "corrected": "random: nvfp4, tis",
}
NO_MATTER = {"name", "evaluation", "saves", "log"}  # for the numbers of a run
SMALL = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZES = {"num_steps": 2, "evaluation.steps": 1, "train_batch_size": 4, "num_generations": 4, "warmup.steps": 2}
SIZES |= {"eval_task.size": 8, "validation_task.size": 8, "log.report_to": "none"}
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def test_the_arms_are_those_of_the_study():
    made = job.arms_of(job.recipe)
    assert made.keys() == STUDIED.keys() and job.recipe.num_steps == STUDY.num_steps
    for name, arm in made.items():
        ours = arm.settings()
        theirs = with_changes(STUDY.base, **STUDY.arms[STUDIED[name]], num_steps=STUDY.num_steps).settings()
        assert {field for field in ours if ours[field] != theirs[field]} <= NO_MATTER


@pytest.fixture
def forked(monkeypatch):
    """Arms are forked from a server that has imported the library."""
    monkeypatch.setattr(arms, "PROCESSES", SERVER)


def run_job(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["quantized_sudoku.py", *TINY, *options])
    job.main(replace(job.recipe, model=partial(tiny_masked_lm, characters="1234.=", **SMALL)))


@pytest.mark.slow
def test_a_job_prints_its_arms_and_where_its_picture_is(tmp_path, monkeypatch, capsys, forked):
    monkeypatch.chdir(tmp_path)
    run_job(monkeypatch)
    printed = capsys.readouterr().out
    folder = tmp_path / "runs" / "quantized-sudoku-seed0"
    picture = Path(printed.partition("Picture: ")[2].splitlines()[0])
    assert picture == folder / "arms.png" and picture.stat().st_size > 10_000
    numbers = json.loads((folder / "arms.json").read_text())
    assert list(numbers["arms"]) == list(STUDIED) and all(
        sentence in printed for sentence in numbers["sentences"][0].split()
    )
    found = [(each["rollout_corr/ess"], each["rollout_corr/abs_log_ratio_mean"]) for each in numbers["arms"].values()]
    assert found[2][0] < found[0][0] == 1 and found[0][1] < 1e-5 < found[2][1]
    starts = {json.loads((folder / arm / "summary.json").read_text())["recipe"]["model"] for arm in STUDIED}
    assert starts == {str(folder / "checkpoints" / "step-000000")}
    assert default_folder(job.recipe) == Path("runs/quantized-sudoku-seed0-2"), "where the same command writes next"
    for name in ("arms.json", "arms.png"):  # a finished job writes them again when it is resumed
        (folder / name).unlink()
    run_job(monkeypatch, "--resume_from_checkpoint", "latest")
    again = json.loads((folder / "arms.json").read_text())
    assert (folder / "arms.png").exists()
    for row in (*numbers["arms"].values(), *again["arms"].values()):
        row.pop("step_time", None)
    assert again == numbers


def test_an_arm_that_fails_ends_the_job(tmp_path, forked):
    failing = {
        name: with_changes(arm, model=str(tmp_path / "none"), sft_warmup_steps=0, output_dir=str(tmp_path / name))
        for name, arm in job.arms_of(job.recipe).items()
    }
    with pytest.raises(ChildProcessError, match=r"the arm \w+ ended with status [12]: error: .*/none.*log.txt"):
        arms.train_side_by_side(failing)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rollout_quantization", "none"], "rollout_quantization=None leaves nothing to compare"),
        (["--corrector", "NoCorrection"], "corrector=NoCorrection leaves nothing to compare"),
        (
            ["--resume_from_checkpoint", "some/where"],
            "resume_from_checkpoint='some/where' belongs to one run, and these",
        ),
        (["--sed", "1"], "--sed is not a setting of Recipe"),
    ],
)
def test_options_that_compare_nothing_are_refused(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_job(monkeypatch, *options)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"error: {said}") and not any(tmp_path.iterdir())


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run_job(monkeypatch)
    assert "recipes/accelerate/cpu.yaml" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_arms_of_a_job_that_was_ended_save_and_it_goes_on(number, tmp_path):
    """Killed, the job can say nothing any more, and its arms notice."""
    words = [sys.executable, "-u", job.__file__, *TINY, "--lr_schedule_steps", "100000", "--output_dir", str(tmp_path)]
    words.append("--num_steps")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    with subprocess.Popen([*words, "100000"], **options) as process:
        lines = iter(process.stdout.readline, "")
        begun = {next(line.partition(":")[0] for line in lines if " 1 of 100000 steps" in line) for _ in range(3)}
        assert begun == set(STUDIED)
        process.send_signal(number)
        rest = process.stdout.read()  # until all processes that print have ended
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"continue with --resume_from_checkpoint latest --output_dir {tmp_path}" in rest
    steps = []
    for arm in STUDIED:
        stopped = json.loads((tmp_path / arm / "summary.json").read_text())["stopped"]
        assert stopped["reason"] == "SIGTERM"
        steps.append(stopped["step"])
    asked = [*words, str(max(steps) + 1), "--resume_from_checkpoint", "latest", "--allow_changed", "num_steps"]
    subprocess.run(asked, check=True, env=environment)
    assert len(json.loads((tmp_path / "arms.json").read_text())["arms"]) == 3
