"""The end of a run: its summary, and the command that tries the trained model."""

import shlex
from dataclasses import replace

import pytest
from made_run import make_run
from tiny_recipe import SIZES, Wrapped, tiny_recipe

from dllm_rl import Callback, tiny_masked_lm
from dllm_rl.tasks.base import Problem
from dllm_rl.tasks.datasets import task_from_dataset
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.finish import _next_command
from dllm_rl.training.summary import Summary
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def test_a_dry_run_has_no_policy(tmp_path, monkeypatch):
    monkeypatch.setattr("dllm_rl.training.trainer.plan", lambda recipe: "the plan")
    with pytest.raises(ValueError, match="dry_run=True trains no policy"):
        train(tiny_recipe(tmp_path, dry_run=True)).policy  # noqa: B018


def test_a_summary_compares_as_its_numbers():
    policy = tiny_masked_lm(**SIZES)
    assert Summary({"seed": 3}, policy) == {"seed": 3} and Summary({"seed": 3}, policy).policy is policy


class AtEnd(Callback):
    def __init__(self):
        self.ended = []

    def on_end(self, run, summary):
        self.ended.append(summary["checkpoint"])


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("no font"), ImportError("matplotlib")])
@pytest.mark.repeated(first_only=True)
def test_a_picture_that_cannot_be_drawn_costs_only_the_picture(tmp_path, monkeypatch, capsys, error):
    def fail(directory):
        raise error

    monkeypatch.setattr("dllm_rl.monitoring.plots.plot", fail)
    last = AtEnd()
    small = {"num_steps": 1, "train_batch_size": 1, "num_generations": 2, "rollout_quantization": None}
    summary = train(tiny_recipe(tmp_path, callbacks=[last], **small))
    out = capsys.readouterr().out
    assert summary.policy.weights_version == 1 and last.ended == [summary["checkpoint"]]
    assert "training.png could not be drawn: " in out and "Picture:" not in out and "Numbers:" in out


class Told(Wrapped):
    """Its first prompt is a chat, with a gap."""

    def reward(self, problem, completion):
        raise AssertionError("no completion is graded here")

    def __getitem__(self, index):
        said = {"system": "Fill in.", "user": "1+_='2'", "assistant": "So:"}
        return Problem([{"role": role, "content": text} for role, text in said.items()], blank="_")


def command_of(recipe, folder):
    return _next_command(make_run(recipe=recipe, checkpoint=str(folder)))


def test_the_next_command_is_the_runs_own_and_quotes_the_prompt_for_a_shell(tmp_path):
    recipe = tiny_recipe(tmp_path)
    first = recipe.eval_task[0].prompt
    command = f"Sample:     dllm-rl sample {tmp_path}"
    assert command_of(recipe, tmp_path) == f"{command} {first} --make_model MODULE:FUNCTION"
    (tmp_path / "config.json").write_text('{"architectures": ["OwnPretrained"]}')
    assert command_of(recipe, tmp_path) == f"{command} {first} --make_model MODULE:FUNCTION"
    (tmp_path / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    assert command_of(recipe, tmp_path) == f"{command} {first}"
    line = command_of(replace(recipe, eval_task=Told(Sudoku(split="test", size=2))), tmp_path)
    assert shlex.split(line)[4:] == ["1+_='2'", "--chat", "--blank", "_"]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "1 + 2"}]}], "1 + 2"),
        ([{"role": "assistant", "content": "1+2="}], ""),
    ],
)
def test_the_next_command_of_a_chat_without_plain_text(tmp_path, messages, text):
    recipe = tiny_recipe(
        tmp_path, eval_task=task_from_dataset([{"prompt": messages}], reward_funcs=lambda completions: completions)
    )
    assert shlex.split(command_of(recipe, tmp_path))[3:6] == [str(tmp_path), text, "--chat"]
