"""A step that does not train does not count: `measure.trained`, and the rewards of random weights."""

from dataclasses import dataclass, replace

import pytest
from tiny_recipe import tiny_recipe

from benchmarks import eight_billion, gpu
from benchmarks.measure import Varied, trained
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.tasks.base import grade
from dllm_rl.tasks.datasets import task_from_dataset
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.trainer import train


@dataclass(frozen=True)
class Equal:
    """Sudoku with one reward for all."""

    task: Sudoku
    value: float
    name = "equal"
    version = "1"

    def __len__(self):
        return len(self.task)

    def __getitem__(self, index):
        return self.task[index]

    def reward(self, problem, completion):
        return replace(self.task.reward(problem, completion), value=self.value)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_run_of_equal_rewards_fails(tmp_path, value):
    train(tiny_recipe(tmp_path, task=Equal(Sudoku(size=8), value)))
    with pytest.raises(ValueError, match=r"not every step trained: gradient norms \[0.0, 0.0\], rows .*\[0, 0\]"):
        trained(read_metrics(tmp_path), 16)


def test_a_run_of_unequal_rewards_counts_its_rows(tmp_path):
    train(tiny_recipe(tmp_path, task=gpu.Varied(Sudoku(size=8))))
    found = trained(read_metrics(tmp_path), 16)
    assert found["trained_rows"] == [16, 16] and min(found["grad_norm"]) > 0


def step(norm, equal):
    return {"grad_norm": norm, "frac_reward_zero_std": equal}


def test_some_groups_of_equal_rewards_are_not_counted():
    assert trained([step(0.5, 0.25), step(2.0, 0.0)], 8) == {"grad_norm": [0.5, 2.0], "trained_rows": [6, 8]}


@pytest.mark.parametrize("steps", [[], [step(0.0, 1.0)], [step(1.0, 0.0), step(0.0, 1.0)], [step(0.0, 0.0)]])
def test_a_step_without_a_gradient_fails(steps):
    with pytest.raises(ValueError, match="not every step trained"):
        trained(steps, 8)


def test_random_ids_have_texts_and_rewards_of_their_own():
    tokenizer = eight_billion.tokenizer(1000)
    rows = [[300, 999], [999, 300], [300, 998], [65, 700], [66, 700]]
    texts = tokenizer.batch_decode(rows)
    assert texts[0] == " 300 999" and len(set(texts)) == 5
    rewards = eight_billion.by_tokens(texts)
    assert len(set(rewards)) == 5 and all(0 <= reward < 1 for reward in rewards)
    prompt = eight_billion.ROWS[0]["prompt"]
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt


def test_varied_grades_many_completions_in_one_call_where_its_task_does():
    calls = []

    def length(completions, **columns):
        calls.append(len(completions))
        return [float(len(text)) for text in completions]

    task = Varied(task_from_dataset([{"prompt": "a"}], reward_funcs=length))
    rewards = grade(task, [task[0]] * 3, ["x", "xy", "xyz"])
    assert calls == [3]
    assert [reward.value for reward in rewards] == [0, 1 / 7, 2 / 7]
    assert not hasattr(Varied(Sudoku(size=8)), "rewards")
