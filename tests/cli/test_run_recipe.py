"""A recipe as a program and at a prompt: one line where it cannot run, and a session that goes on."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import Lora, Recipe, load_policy, main, tiny_masked_lm, train
from dllm_rl.checkpoints.run_folder import in_own_folder
from dllm_rl.config import from_command_line

pytestmark = pytest.mark.usefixtures("no_rehearsal")

ROOT = Path(__file__).parents[2]
SMALL = SIZES | {"hidden_size": 16, "num_layers": 1, "intermediate_size": 16}


def small(directory, **changes) -> Recipe:
    return tiny_recipe(directory, **{"model": partial(tiny_masked_lm, **SMALL)} | changes)


@pytest.fixture
def at_a_prompt(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1234.json"])


def test_a_bad_setting_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--sampler.max_new_tokens", "900"])
    with pytest.raises(SystemExit) as stopped:
        main(small(tmp_path / "run"))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: max_new_tokens=900 is more than the model's 64 positions; lower")
    assert not any(tmp_path.iterdir()), "a refused run leaves nothing: the corrected command starts"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        main(small(tmp_path / "run"))
    assert capsys.readouterr().err == "", "one process says it for all"
    monkeypatch.setenv("DLLM_RL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="max_new_tokens=900"):
        main(small(tmp_path / "run"))


def test_a_refused_run_deletes_nothing(tmp_path, rehearsal):
    train(small(tmp_path / "run", num_steps=0))
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    bad = {"overwrite_output_dir": True, "sft_warmup_steps": 2, "sft_warmup_metric": "solved"}
    with pytest.raises(
        ValueError,
        match=r"warmup\.metric='solved' is not a metric of the evaluations: cell_accuracy, .*solve_rate",
    ):
        train(small(tmp_path / "run", **bad))
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before
    assert train(small(tmp_path / "run", num_steps=0, overwrite_output_dir=True))["checkpoint"]


def test_a_file_that_cannot_be_written_is_one_line_and_status_1(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stopped:
        main(small(tmp_path / "taken" / "run"))
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: process 3: ") and "taken" in line


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_one_process_names_the_run_for_all(tmp_path, monkeypatch, capsys, rank, lines):
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("dllm_rl.training.trainer.train", lambda recipe, features: None)
    main(small(tmp_path / "run"))
    assert len(capsys.readouterr().out.splitlines()) == lines


def test_the_first_line_names_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--num_steps", "1", "--warmup.steps", "2"])
    monkeypatch.setattr("dllm_rl.training.trainer.train", lambda recipe, features: None)
    main(small(tmp_path / "run"))
    (first,) = capsys.readouterr().out.splitlines()
    plan = f"tiny, seed 0: up to 2 warm-up steps, then 1 steps, into {tmp_path / 'run'}"
    assert first.startswith(f"{plan}; rollouts in Float8WeightOnly, corrector AIS; the time left")


def test_without_output_dir_only_the_folder_that_the_run_takes_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    monkeypatch.setattr("dllm_rl.training.trainer.train", in_own_folder(lambda recipe, features: None))
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "runs" / "tiny-seed0"
    earlier.mkdir(parents=True)
    (earlier / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n')
    main(small(tmp_path, output_dir=None))
    assert set(re.findall(r"runs/tiny[-\w]*", capsys.readouterr().out)) == {"runs/tiny-seed0-2"}


@pytest.mark.slow
def test_a_mistyped_option_is_refused_before_torchao_and_the_models_are_imported():
    program = """if True:
        import runpy, sys
        del sys.argv[0]  # -c
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            print({"torchao", "accelerate", "torch._dynamo", "dllm_rl.training"} & sys.modules.keys())
    """
    words = ["recipes/sudoku_unique.py", "--mistyped", "1"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "set()\n"
    assert done.stderr == "error: --mistyped is not a setting of Recipe; the nearest is --dtype (--help lists all)\n"


def test_a_ctrl_c_after_the_imports_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(recipe):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("dllm_rl.cli.run_recipe.from_command_line", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            main(small(tmp_path))
        assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
        with pytest.raises(KeyboardInterrupt):
            main(small(tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["recipes/sudoku_unique.py", "recipes/llada_8b.py"])
def test_a_recipes_script_says_one_line(script, tmp_path):
    command = [sys.executable, script, "--model", str(tmp_path / "nothing")]
    command += ["--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_the_kernels_arguments_are_not_the_recipes(tmp_path, at_a_prompt):
    recipe = small(tmp_path)
    assert from_command_line(recipe) is recipe
    assert from_command_line(recipe, ["--seed", "3"]).seed == 3


class Interrupting:
    """A task; who takes its `at`-th problem gets a Ctrl-C."""

    name, version = "interrupting", "1"

    def __init__(self, task, at: int) -> None:
        self.task, self.at, self.taken = task, at, 0

    def __repr__(self) -> str:
        return "Interrupting"

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        self.taken += 1
        if self.taken == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.task[index]

    def reward(self, problem, completion):
        return self.task.reward(problem, completion)


def test_a_ctrl_c_at_a_prompt_returns_the_policy_so_far_and_the_next_one_is_heard(tmp_path, at_a_prompt):
    recipe = small(tmp_path, num_steps=2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        summary = train(replace(recipe, task=Interrupting(recipe.task, 4 + 1 + 2)))
        assert summary["stopped"] == {"step": 1, "reason": "SIGINT"} and summary.policy.weights_version == 1
        assert summary["checkpoint"] == str(tmp_path / "checkpoints" / "step-000001")
        assert json.loads((tmp_path / "summary.json").read_text()) == summary
        assert (tmp_path / "training.png").exists()
        assert all(parameter.grad is None for parameter in summary.policy.module.parameters())
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 5)  # the handler runs before the next instruction
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("changes", [{}, {"lora": Lora(), "rollout_quantization": None}], ids=["all", "adapters"])
@pytest.mark.repeated(first_only=True)
def test_a_program_returns_the_runs_summary_and_the_policy_that_it_trained(tmp_path, monkeypatch, capsys, changes):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--num_steps", "1"])
    summary = main(small(tmp_path, **changes))
    assert capsys.readouterr().out.startswith(f"tiny, seed 0: 1 steps, into {tmp_path};")
    assert summary == json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    saved = load_policy(summary["checkpoint"])
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        logits = summary.policy.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
        torch.testing.assert_close(saved.logits(tokens, torch.ones_like(tokens, dtype=torch.bool)), logits)
    assert all(p.grad is None for p in summary.policy.module.parameters())
    assert "policy" not in summary


def test_a_recipe_says_what_was_chosen():
    recipe = small("runs/x", seed=3)
    lines = repr(recipe).splitlines()
    assert lines[0] == "Recipe(" and lines[-1] == ")" and "    seed=3," in lines
    assert any(line.startswith("    sampler=Unmask(max_new_tokens=16, diffusion_steps=3") for line in lines)
    assert not any(line.startswith("    learning_rate=") for line in lines), "at its default"
    assert " at 0x" not in repr(recipe)
