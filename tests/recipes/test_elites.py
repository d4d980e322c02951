"""Infilling as mutation: prompts are crossed and masked elites, and a resume goes on with the same ones."""

import json
import re

import pytest
import torch
from run_outputs import metrics_of

from dllm_rl import Oracle, Recipe, Trajectory, Unmask, grpo_recipe, tiny_masked_lm, train
from dllm_rl.callbacks import RunControl
from recipes.elites import Elites, mutations


def test_mutations_keep_what_their_parents_have():
    generator = torch.Generator().manual_seed(0)
    found = mutations(["AAAAAA", "CCCCCC"], 400, 2, generator)
    assert all(text.count("_") == 2 for text in found)
    # The beginning of one parent, the end of another: at most one change of letters.
    assert all(re.fullmatch("[A_]*[C_]*|[C_]*[A_]*", text) for text in found)
    crossed = sum("A" in text and "C" in text for text in found) / 400
    assert 0.1 < crossed < 0.3  # of 1/2 with two parents, 5 of 12 cuts are inside; blanks hide some
    assert mutations(["ACD"], 3, 0, generator) == ["ACD"] * 3
    assert mutations(["ACD"], 1, 3, generator) == ["___"]


def test_the_best_calls_of_the_run_become_the_prompts(tmp_path):
    """The failed measurement and all but the two best are no parents; of equal ones the older is."""
    rewards = {"AAAA": 0.5, "CCCC": 0.9, "DDDD": None, "EEEE": 0.1, "FFFF": 0.5}
    oracle = Oracle(lambda completions: [rewards[text] for text in completions])
    elites = Elites(oracle, str, length=4, size=50, elites=2, masked=1)
    assert {elites[i].prompt for i in range(50)} == {"____"}
    run = RunControl(tmp_path, 1, 10)
    oracle.on_start(run)
    elites.on_step(run, {})
    assert elites[0].prompt == "____"  # nothing is measured yet
    assert [each.value for each in elites.rewards([elites[0]] * 5, [*rewards])] == [*rewards.values()]
    elites.on_step(run, {})
    prompts = {elites[i].prompt for i in range(50)}
    assert {*"".join(prompts)} == {*"AC_"} and all(prompt.count("_") == 1 for prompt in prompts)
    again = Elites(oracle, str, length=4, size=50, elites=2, masked=1)
    again.load_state(json.loads(json.dumps(elites.state())))
    assert [again[i] for i in range(50)] == [elites[i] for i in range(50)]


class Stops(BaseException):
    pass


def run(folder, calls, *, stop_at=None, **settings):
    def share_of_a(completions):
        if len(calls) == stop_at:
            raise Stops  # in the middle of a step's calls, as a kill
        calls.extend(completions)
        return [text.count("A") / 6 for text in completions]

    oracle = Oracle(share_of_a, budget=90)
    sampler = Unmask(max_new_tokens=0, diffusion_steps=2, temperature=1.0, suppress=("<pad>", "<eos>", "<mask>"))
    elites = Elites(oracle, str, length=6, size=8, elites=4, masked=2)
    recipe = Recipe(
        name="elites",
        model=tiny_masked_lm(characters="ACDE", hidden_size=32, num_layers=1),
        task=elites,
        validation_task=Elites(oracle.without_calls(), str, length=6, size=1),
        eval_task=Elites(oracle.without_calls(), str, length=6, size=1),
        callbacks=[oracle, elites],
        sampler=sampler,
        eval_sampler=sampler,
        likelihood=Trajectory(),
        train_batch_size=2,
        num_generations=8,
        num_steps=12,
        eval_steps=0,
        save_steps=1,
        reward_timeout=None,
        report_to=None,
        output_dir=str(folder),
    )
    return train(recipe.replace(**settings))


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [20, 41])
def test_a_resume_mutates_the_same_elites_and_pays_for_no_call_twice(tmp_path, stop_at):
    whole, stopped = [], []
    run(tmp_path / "whole", whole)
    with pytest.raises(Stops):
        run(tmp_path / "stopped", stopped, stop_at=stop_at)
    assert len(stopped) == stop_at
    changed = "task,validation_task,eval_task"  # the score that no longer stops
    run(tmp_path / "stopped", stopped, resume_from_checkpoint="latest", allow_changed=changed)
    assert stopped == whole and len({*whole}) == len(whole)
    rewards = [[row["reward"] for row in metrics_of(tmp_path / name)] for name in ("whole", "stopped")]
    assert rewards[0] == rewards[1] and len(rewards[0]) > 4
    assert rewards[0][-1] > rewards[0][0] + 0.15  # parents are better than what the model writes at first


@pytest.mark.slow
def test_a_recipe_of_ones_own_model_takes_elites_as_task_and_callback(tmp_path):
    """As docs/protein-dna.md says: the score gets texts, and its best become prompts."""
    oracle = Oracle(lambda completions: [text.count("A") / 6 for text in completions], budget=90)
    elites = Elites(oracle, str, length=6, size=8, elites=4, masked=2)
    model = tiny_masked_lm(characters="ACDE", hidden_size=32, num_layers=1)
    options = {"suppress": ["<pad>", "<eos>", "<mask>"], "diffusion_steps": 2}
    sizes = {"train_batch_size": 2, "num_steps": 12, "report_to": None, "output_dir": str(tmp_path)}
    recipe = grpo_recipe(model, [{"prompt": "_" * 6}], oracle, blank="_", sampler_options=options, **sizes)
    train(recipe.replace(task=elites, callbacks=[oracle, elites]))
    rewards = [row["reward"] for row in metrics_of(tmp_path)]
    assert oracle.calls == 90 and rewards[-1] > rewards[0] + 0.15
    assert all(len(prompt) == 6 and prompt.count("_") == 2 for prompt in elites.masked_texts)
