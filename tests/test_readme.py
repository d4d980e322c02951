"""What README promises: its test command is CI's, its examples run."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from readme import README, example
from safetensors.torch import load_file

import dllm_rl

FILES = README.parent / "docs" / "runs.md"


def test_ci_runs_the_readmes_test_command():
    lines = Path(__file__).parents[1].joinpath(".ci", "run").read_text().splitlines()
    (command,) = [line for line in lines if line.endswith("-m pytest")]
    assert f"    {command}\n" in README.read_text()


def test_the_first_example_trains(tmp_path, monkeypatch):
    (tmp_path / "first.py").write_text(example("Train on your own reward").replace("num_steps=100", "num_steps=1"))
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path("first.py")["summary"]["eval_problems"] == 6


@pytest.mark.slow
def test_every_example_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(blocks):
        path = tmp_path / f"block_{number}.py"
        path.write_text(re.sub(r"\b100\b", "2", block))
        names |= runpy.run_path(str(path), names)
    assert names["summary"]["recipe"]["num_steps"] == 2 and len(blocks) == 3


@pytest.mark.slow
def test_the_module_of_ones_own_is_trained_and_opened_again(tmp_path, monkeypatch):
    text = (README.parent / "recipes/examples/own_module.py").read_text()
    (tmp_path / "own.py").write_text(text.replace("num_steps=60", "num_steps=2, warmup=base.warmup.replace(steps=2)"))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        made = runpy.run_path(str(tmp_path / "own.py"), run_name="__main__")
    saved = load_file(f"{made['summary']['checkpoint']}/model.safetensors")
    now = made["policy"].module.state_dict()
    assert saved.keys() == now.keys() and all(torch.equal(saved[name], now[name]) for name in saved)


@pytest.mark.slow
def test_trls_users_call_grpo_as_its_page_does(tmp_path, monkeypatch):
    """Rows, reward functions, of which one is async, and TRL's names."""
    page = README.with_name("docs").joinpath("trl.md").read_text()
    (call,) = [line.strip() for line in page.splitlines() if line.startswith("    grpo(")]

    def accuracy(completions, answer, **columns):
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    async def length(completions, **columns):
        return [float(len(text)) for text in completions]

    rows = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "12345678" for b in "12345678"]
    names = {"grpo": dllm_rl.grpo, "model": dllm_rl.tiny_masked_lm(characters="12345678=")}
    names |= {"rows": rows, "accuracy": accuracy, "length": length}
    (tmp_path / "call.py").write_text("summary = " + call.replace("=256", "=2").replace("=100", "=2"))
    monkeypatch.chdir(tmp_path)
    summary = runpy.run_path("call.py", names)["summary"]
    assert summary["eval_problems"] == 6 and summary["eval_after"].keys() >= {"reward", "accuracy", "length"}


def test_the_exit_statuses_of_a_run_are_those_of_the_code():
    import re
    import signal

    from dllm_rl.distributed import peers
    from dllm_rl.distributed.stop import SIGNALS
    from dllm_rl.tasks.base import TIMEOUT_STATUS

    rows = dict(re.findall(r"^\| ([\d, ]+) \| (.*)", FILES.read_text().partition("## Exit statuses")[2], re.MULTILINE))
    assert rows.pop("137").startswith("The run was killed")  # SIGKILL, which no code answers
    codes = next(row for row in rows if "," in row)
    named = [getattr(signal, name) for name in re.findall(r"SIG[A-Z0-9]+", rows.pop(codes))]
    assert [int(code) for code in codes.split(", ")] == [128 + number for number in named]
    assert set(named) == set(SIGNALS) and set(map(int, rows)) == {0, 1, 2, peers.EXIT_STATUS, TIMEOUT_STATUS}
    assert "--limits.reward_timeout" in rows[str(TIMEOUT_STATUS)]


@pytest.mark.slow
def test_the_infilling_example_trains(tmp_path, monkeypatch):
    arguments = "--num_steps 2 --train_batch_size 4 --num_generations 4 --output_dir run"
    monkeypatch.setattr("sys.argv", ["missing.py", *arguments.split()])
    monkeypatch.chdir(tmp_path)
    recipe = runpy.run_path(str(README.parent / "recipes/examples/infill_digits.py"), run_name="__main__")["recipe"]
    assert recipe.task[8].prompt == "8__1" and recipe.task.reward(recipe.task[8], "8911").value == 0.75
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_after"]["parsed"] == 1 and summary["eval_after"]["reward"] >= 0.5
