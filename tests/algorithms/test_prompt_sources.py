"""Which prompts a step learns from: by hand, as shares, and bit for bit after a resume."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import refuses
from run_outputs import assert_same_weights, metrics_of
from safetensors.torch import load_file
from tiny_recipe import OddPuzzles, tiny_recipe

from dllm_rl.algorithms.prompt_sources import (
    FunctionPromptSource,
    MixedRewardPrompts,
    RewardHistory,
    UniformPrompts,
)
from dllm_rl.config import from_command_line
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.records import to_json
from dllm_rl.rng import generator_for
from dllm_rl.step.collect import draw_group_sizes, prompt_indices
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.trainer import train
from dllm_rl.types.groups import equal_groups

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def graded(*groups):
    """The rewards (B, 1) and the groups (B,) of groups of two completions, as a run has them."""
    return torch.tensor(groups).view(-1, 1), equal_groups(len(groups), 2)


def history_by_hand():
    """Ten prompts. Of prompt 1 the last group differed, of 2 and 3 it did not."""
    history = RewardHistory(10)
    history.add(0, torch.tensor([1, 2]), *graded([1.0, 1.0], [0.0, 2.0]))
    history.add(1, torch.tensor([3, 2, 1]), *graded([2.0, 2.0], [3.0, 3.0], [0.0, 1.0]))
    return history


def test_the_last_group_of_each_prompt_counts():
    history = history_by_hand()
    latest = history.latest()
    assert latest.prompt.tolist() == [1, 2, 3] and latest.step.tolist() == [1, 1, 1]
    assert latest.mean.tolist() == [0.5, 3.0, 2.0] and latest.mixed.tolist() == [True, False, False]
    assert history.before(1).prompt.tolist() == [1, 2] and history.before(1).mixed.tolist() == [False, True]
    assert len(history.before(2).step) == 5 and len(RewardHistory(3).latest().prompt) == 0
    # Groups of three, one of them a completion without a reward, and of one.
    rewards = torch.tensor([[1.0], [torch.nan], [2.0], [5.0]])
    history.add(2, torch.tensor([4, 5]), rewards, torch.tensor([0, 0, 0, 1]))
    assert history.mean[-2:].tolist() == [1.5, 5.0] and history.mixed[-2:].tolist() == [True, False]


def test_the_default_is_uniform_and_reads_nothing():
    drawn = UniformPrompts().draw(history_by_hand(), 5, generator_for(0, "train", 3))
    assert torch.equal(drawn, torch.randint(10, (5,), generator=generator_for(0, "train", 3)))
    assert not UniformPrompts().uses_history


@pytest.mark.parametrize("weight", [0.05, 0.5, 1.0])
def test_prompts_of_equal_rewards_are_drawn_as_often_as_their_weight_says(weight):
    source = MixedRewardPrompts(equal_weight=weight)
    count = 40_000
    drawn = source.draw(history_by_hand(), count, generator_for(0))
    assert len(drawn) == count
    expected = torch.ones(10, dtype=torch.double)
    expected[[2, 3]] = weight
    expected *= count / expected.sum()
    found = torch.bincount(drawn, minlength=10)
    assert ((found - expected).abs() < 5 * expected.sqrt()).all(), found
    everything = RewardHistory(2)
    everything.add(0, torch.tensor([0, 1]), *graded([1.0, 1.0], [2.0, 2.0]))  # nothing differs: still drawn
    assert len(source.draw(everything, 50, generator_for(1))) == 50


def test_a_resume_draws_the_same_prompts(tmp_path):
    options = {"task": OddPuzzles(), "num_steps": 2, "save_steps": 1, "save_total_limit": 9, "max_num_gen_batches": 2}
    options |= {"prompt_source": MixedRewardPrompts(equal_weight=0.01), "log_completions_steps": 1, "seed": 3}
    options |= {"num_generations": 2, "eval_task": Sudoku(split="test", size=1)}
    recipe = tiny_recipe(tmp_path / "run", validation_task=Sudoku(split="validation", size=1), **options)
    whole = train(recipe)
    rows, texts = metrics_of(tmp_path / "run"), current_rows(tmp_path / "run" / "completions.jsonl")
    stored = load_file(tmp_path / "run" / "checkpoints" / "step-000001" / "reward_history.safetensors")
    # Four groups, and those that were drawn again.
    assert set(stored["step"].tolist()) == {0} and len(stored["step"]) > 4 and rows[0]["dynamic_sampling/draws"] > 1
    assert any(not mixed for mixed in stored["mixed"].tolist())
    # Those drawn again stand beside their own prompts, too: completions of even ones are all worth 1.
    assert torch.equal(stored["mean"] == 1, stored["prompt"] % 2 == 0)

    copied = replace(recipe, resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "step-000001"))
    assert_same_weights(whole, train(copied))
    assert metrics_of(tmp_path / "run") == rows
    assert current_rows(tmp_path / "run" / "completions.jsonl") == texts
    resumed = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "reward_history.safetensors")
    assert set(resumed["step"].tolist()) == {0, 1}

    settings = json.loads((tmp_path / "run" / "summary.json").read_text())["recipe"]
    assert settings["prompt_source"] == to_json(MixedRewardPrompts(equal_weight=0.01))
    other = replace(copied, prompt_source=UniformPrompts())
    refuses("prompt_source", lambda: train(other))


def in_order(history, count, generator):
    """A source as a function."""
    return (torch.arange(count) + len(history.step)) % history.num_prompts


def test_a_source_of_ones_own_and_what_it_may_not_return():
    recipe = tiny_recipe("x", prompt_source=in_order)
    assert recipe.prompt_source == FunctionPromptSource(function=in_order)
    history = history_by_hand()
    history.num_prompts = len(recipe.task)
    assert prompt_indices(recipe, history, 0).tolist() == [5, 6, 7, 8]
    for wrong in ([0, 1, 2, 3], torch.zeros(3, dtype=torch.long), torch.zeros(4), torch.tensor([0, 0, 0, -1])):
        source = FunctionPromptSource(function=lambda *given, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="prompt_source"):
            prompt_indices(replace(recipe, prompt_source=source), history, 0)
    refuses("prompt_source", lambda: tiny_recipe("x", prompt_source="in_order"))
    refuses("equal_weight", lambda: MixedRewardPrompts(equal_weight=0.0))
    with pytest.raises(ValueError, match=r"late.workers=1.*prompt_source"):
        tiny_recipe("x", prompt_source=MixedRewardPrompts(), rollout_workers=1)


class Sized(UniformPrompts):
    sizes: Any

    def group_sizes(self, history, prompts, num_generations, generator):
        return self.sizes


def test_a_source_sets_the_sizes_of_the_groups():
    recipe, drawn = tiny_recipe("x"), torch.tensor([5, 6, 7, 8])
    assert draw_group_sizes(recipe, None, drawn, 0).tolist() == [recipe.num_generations] * 4
    sizes = torch.tensor([1, 7, 2, 2])
    settings = replace(recipe, prompt_source=Sized(sizes=sizes))
    assert torch.equal(draw_group_sizes(settings, None, drawn, 0), sizes)
    for wrong in ([1, 7, 2, 2], sizes[:3], sizes.float(), torch.tensor([1, 7, 0, 2])):
        settings = replace(recipe, prompt_source=Sized(sizes=wrong))
        with pytest.raises(ValueError, match=r"must return a tensor of 4 whole numbers from 1 on"):
            draw_group_sizes(settings, None, drawn, 0)


def test_the_command_line_names_a_source():
    words = ["--prompt_source", "MixedRewardPrompts", "--prompt_source.equal_weight", "0.5"]
    shown = repr(from_command_line(tiny_recipe("x"), words))
    assert "prompt_source=MixedRewardPrompts(equal_weight=0.5)" in shown
    assert "prompt_source" not in repr(tiny_recipe("x"))
    named = from_command_line(
        tiny_recipe("x"),
        ["--prompt_source", "FunctionPromptSource", "--prompt_source.function", f"{__name__}.in_order"],
    )
    assert named.prompt_source == FunctionPromptSource(function=in_order)
    with pytest.raises(SystemExit):
        from_command_line(tiny_recipe("x"), ["--corrector", f"{__name__}.in_order"])
    assert tiny_recipe("x", prompt_source="MixedRewardPrompts").prompt_source.uses_history
