"""Prompts that do not fit the model: found before a run begins, or replaced and counted."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from refusals import refuses
from run_outputs import assert_same_weights, metrics_of
from tiny_recipe import ONE_PUZZLE, SIZES, tiny_recipe

from dllm_rl import grpo
from dllm_rl.algorithms.prompt_sources import UniformPrompts
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.collect import fitting_indices
from dllm_rl.tasks.base import Problem
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training import prompts
from dllm_rl.training.prompts import check_prompts
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

LONG = 60  # with 16 tokens to come, more than the model's 64


class SomeLong:
    """Sudoku, every third prompt of which is too long."""

    name, version = "some long", "1"

    def __init__(self, size=9, every=3):
        self.task, self.every = Sudoku(split="train", size=size), every

    def __len__(self):
        return len(self.task)

    def __getitem__(self, index):
        problem = self.task[index]
        return replace(problem, prompt=problem.prompt.ljust(LONG, "=")) if index % self.every == 0 else problem

    def reward(self, problem, completion):
        return self.task.reward(problem, completion)


class Listed(SomeLong):
    """These problems."""

    def __init__(self, *problems):
        self.task = problems

    def __getitem__(self, index):
        return self.task[index]


def test_the_longest_prompt_is_one_of_the_training_task(tmp_path):
    """The evaluation's are longer, and in other places."""
    others = Listed(Problem("1234"), Problem("1"))
    recipe = tiny_recipe(tmp_path, task=Listed(Problem("1"), Problem("12")), validation_task=others, eval_task=others)
    assert check_prompts(recipe, tiny_masked_lm(**SIZES)) == 1


@pytest.mark.parametrize("length", [1, 16, 63, 64])
def test_a_completion_may_take_the_positions_that_the_prompt_leaves(tmp_path, length):
    """All of them after an empty prompt; one token more is refused, and what the message advises is not."""
    policy = tiny_masked_lm(**SIZES)
    recipe = partial(
        tiny_recipe,
        tmp_path,
        sampler=tiny_recipe(tmp_path).sampler.replace(max_new_tokens=length, diffusion_steps=None),
    )

    def check(text):
        task = Listed(Problem(text))
        sampler = recipe().sampler
        return check_prompts(recipe(task=task, validation_task=task, eval_task=task, eval_sampler=sampler), policy)

    assert check("1" * (64 - length)) == 0
    said = f"validation_task: problem 0: the prompt has {65 - length} tokens .* lower max_new_tokens, or shorten it$"
    refuses(said, lambda: check("1" * (65 - length)))


@pytest.mark.parametrize("field", ["task", "validation_task", "eval_task"])
def test_steps_are_counted_before_the_run_for_prompts_without_blanks(field, tmp_path):
    """The last of three prompts has none."""
    policy, sampler = tiny_masked_lm(**SIZES), Unmask(max_new_tokens=2, diffusion_steps=4)
    blanks = Listed(*[Problem("1__", blank="_")] * 3)
    recipe = tiny_recipe(
        tmp_path, task=blanks, validation_task=blanks, eval_task=blanks, sampler=sampler, eval_sampler=sampler
    )
    check_prompts(recipe, policy)
    mixed = replace(recipe, **{field: Listed(*[Problem("1__", blank="_")] * 2, Problem("1"))})
    refuses(f"^{field}: problem 2: diffusion_steps=4 is more than the 2 tokens", lambda: check_prompts(mixed, policy))
    sampler = Unmask(max_new_tokens=0)
    with pytest.raises(ValueError, match=f"^{field}: problem 2: max_new_tokens=0, and the prompt has no blank"):
        check_prompts(replace(mixed, sampler=sampler, eval_sampler=sampler), policy)


@pytest.mark.parametrize("attention", ["block_causal", "full"])
def test_blocks_are_counted_before_the_run_for_each_prompt(attention, tmp_path):
    """Of a block-causal model: 8 tokens after 4 take two blocks of 4, and after 5 three."""
    policy, sampler = tiny_masked_lm(**SIZES), Unmask(max_new_tokens=8, diffusion_steps=2)
    policy.spec = replace(policy.spec, attention=attention, block_size=4)
    recipe = tiny_recipe(tmp_path, sampler=sampler, eval_sampler=sampler)
    tasks = [Listed(Problem("1234"), Problem(text)) for text in ("1234" * 2, "12341")]
    aligned, begun = (replace(recipe, task=task, validation_task=task, eval_task=task) for task in tasks)
    check_prompts(aligned, policy)
    if attention == "full":
        check_prompts(begun, policy)
        sampler = sampler.replace(block_size=2)
        aligned = replace(aligned, sampler=sampler, eval_sampler=sampler)
        with pytest.raises(ValueError, match="validation_task: problem 0: diffusion_steps=2 is fewer than the 4 b"):
            check_prompts(aligned, policy)
    else:
        with pytest.raises(ValueError, match="validation_task: problem 1: diffusion_steps=2 is fewer than the 3 b"):
            check_prompts(begun, policy)


def test_the_steps_of_ones_own_sampler_are_its_own(tmp_path):
    class Twice(Unmask):
        def __call__(self, policy, prompts, generator, *, on_step=None):
            raise AssertionError("not called")

    sampler = Twice(max_new_tokens=2, diffusion_steps=4)
    recipe = tiny_recipe(tmp_path, task=Listed(Problem("1")), sampler=sampler)
    check_prompts(recipe, tiny_masked_lm(**SIZES))


def test_a_blank_counts_as_the_one_token_that_it_is(tmp_path):
    """Its text is of five characters, none of which the model knows."""
    problem = Problem("1<gap>", blank="<gap>")
    recipe = tiny_recipe(tmp_path, task=Listed(problem), max_prompt_length=2)
    assert fitting_indices(recipe, tiny_masked_lm(**SIZES), torch.tensor([0])).tolist() == [0]


@pytest.mark.parametrize("field", ["task", "validation_task", "eval_task"])
def test_a_long_prompt_is_found_before_the_run_begins(field, tmp_path):
    recipe = tiny_recipe(tmp_path, **{field: SomeLong(every=8)})
    refuses(rf"{field}: problem 0: the prompt has 60 tokens .* the model's 64 pos", lambda: train(recipe))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("field", ["task", "validation_task", "eval_task"])
def test_a_task_without_problems_is_refused_before_a_model_is_made(field, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    recipe = tiny_recipe(tmp_path / "run", **{field: Sudoku(path=tmp_path / "empty.jsonl"), "model": "nowhere"})
    refuses(rf"^{field}: 'sudoku' has no problems in '.*empty\.jsonl'; give a file", lambda: train(recipe))
    if field == "task":
        with pytest.raises(ValueError, match=r"^task: 'sudoku' has no problems"):
            train(replace(recipe, model=tiny_masked_lm(**SIZES), dry_run=True))


def test_a_prompt_that_cannot_be_read_is_named_with_its_problem(tmp_path):
    recipe = tiny_recipe(tmp_path, task=Listed(Problem("1"), Problem([{"content": "2"}])))
    said = r"^task: problem 1: prompt=\[\{'content': '2'\}\] is neither text nor chat messages, each with role"
    refuses(said, lambda: check_prompts(recipe, tiny_masked_lm(**SIZES)))


@pytest.mark.parametrize("field", ["task", "validation_task", "eval_task"])
@pytest.mark.parametrize("unknown", ["the model's positions", "the completion's length", "which prompt is drawn"])
def test_a_prompt_is_read_also_if_its_length_does_not_matter(tmp_path, field, unknown):
    policy = tiny_masked_lm(**SIZES)
    recipe = tiny_recipe(tmp_path, **{field: Listed(Problem("1"), Problem("1" * 200), Problem("1é"))})
    if unknown == "the model's positions":
        policy.spec = replace(policy.spec, max_length=None)
    elif unknown == "the completion's length":
        policy.spec = replace(policy.spec, max_length=500)
        sampler = FunctionSampler(function=lambda *_: None, max_new_tokens=1)
        recipe = replace(recipe, sampler=sampler, eval_sampler=sampler)
    else:
        policy.spec = replace(policy.spec, max_length=None if field != "task" else 64)
        recipe = replace(recipe, max_prompt_length=20)
    refuses(f"^{field}: problem 2: text '1é' cannot be tokenized", lambda: check_prompts(recipe, policy))


def test_of_a_large_task_the_prompts_that_are_drawn_are_looked_at(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, task=SomeLong(size=1000, every=4))
    monkeypatch.setattr(prompts, "MAX_CHECKED_PROMPTS", 7)
    refuses(r"task: problem \d+: the prompt has 60 .*max_prompt_length=48 replaces", lambda: train(recipe))


def test_long_prompts_are_replaced_and_counted(tmp_path):
    recipe = tiny_recipe(tmp_path / "a", task=SomeLong(), max_prompt_length=48, sft_warmup_steps=1, **ONE_PUZZLE)
    train(recipe)
    shares = [row["frac_prompts_too_long"] for row in metrics_of(tmp_path / "a")]
    assert any(shares) and all(share in (0, 0.25, 0.5, 0.75, 1) for share in shares)


def test_the_next_prompt_that_fits_takes_the_place():
    recipe = tiny_recipe("x", task=SomeLong(), max_prompt_length=48)
    assert fitting_indices(recipe, recipe.model(), torch.tensor([0, 1, 3, 8])).tolist() == [1, 1, 4, 8]
    with pytest.raises(ValueError, match="max_prompt_length=3: every prompt of task 'some long' is longer; raise it"):
        fitting_indices(replace(recipe, max_prompt_length=3), recipe.model(), torch.tensor([0]))


ROWS = [{"prompt": text, "worth": worth} for worth, text in enumerate(("11111111=", "2=", "33333333=", "4=", "5="))]


class Recorded(UniformPrompts):
    """Draws these prompts, and looks at what it is given."""

    drawn: tuple[int, ...]
    histories: Any = None
    sized: Any = None
    uses_history = True

    def draw(self, history, count, generator):
        self.histories.append(dict(zip(history.prompt.tolist(), history.mean.tolist(), strict=True)))
        return torch.tensor(self.drawn)

    def group_sizes(self, history, prompts, num_generations, generator):
        self.sized.append(prompts.tolist())
        return torch.full_like(prompts, num_generations)


@pytest.mark.parametrize(("drawn", "graded"), [((0, 2), {1, 3}), ((2, 0), {3, 1}), ((4, 2), {4, 3})])
@pytest.mark.parametrize("draws", [1, 3])
def test_a_curriculum_is_told_of_the_prompts_that_were_graded(tmp_path, drawn, graded, draws):
    """In place of a prompt that is too long the next one is graded; with dynamic sampling, also of a later draw."""
    source = Recorded(drawn=drawn, histories=[], sized=[])
    grpo(
        tiny_masked_lm(characters="12345=", hidden_size=16, num_layers=1), ROWS, lambda worth, **_: worth,
        eval_dataset=ROWS[1:2], max_new_tokens=1, train_batch_size=2, num_generations=2, eval_steps=0, num_steps=2,
        max_prompt_length=4, max_num_gen_batches=draws, prompt_source=source, output_dir=str(tmp_path),
    )  # fmt: skip
    assert source.histories[-1] == {index: float(index) for index in graded}
    assert {*map(frozenset, source.sized)} == {frozenset(graded)}


@pytest.mark.slow
def test_a_limit_that_no_prompt_reaches_changes_nothing(tmp_path):
    a, b = (train(tiny_recipe(tmp_path / str(n), num_steps=1, max_prompt_length=n)) for n in (None, 48))
    assert_same_weights(a, b)
    assert [row["frac_prompts_too_long"] for row in metrics_of(tmp_path / "48")] == [0]


def test_a_limit_beyond_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_prompt_length=49 and max_new_tokens=16 exceed the model's 64"):
        train(tiny_recipe(tmp_path, max_prompt_length=49))
    refuses("max_prompt_length=0 must be at least 1", lambda: tiny_recipe(tmp_path, max_prompt_length=0))


@pytest.mark.slow
def test_a_run_that_met_a_long_prompt_resumes_with_a_limit(tmp_path, monkeypatch):
    class Later(SomeLong):
        """Problem 5 is too long; the check, of one prompt, does not see it."""

        def __getitem__(self, index):
            problem = self.task[index]
            return Problem("=" * LONG, problem.fields, problem.solution) if index == 5 else problem

    changes = {"task": Later(size=6), "num_steps": 20, "save_steps": 1, "train_batch_size": 1}
    changes |= {"model": partial(tiny_masked_lm, **SIZES), "rollout_quantization": None}
    monkeypatch.setattr(prompts, "MAX_CHECKED_PROMPTS", 1)
    refuses("a recipe's max_prompt_length", lambda: train(tiny_recipe(tmp_path, **changes)))
    resumed = {"resume_from_checkpoint": "latest", "max_prompt_length": 48}
    assert train(tiny_recipe(tmp_path, **changes, **resumed))["seed"] == 0
