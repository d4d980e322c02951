"""A run on prompts with blanks: rewards of the whole text, filled in, and log-probs that are the sampler's."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from refusals import refuses
from repetitions import few, slow
from run_outputs import metrics_of
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl.algorithms.correctors import NoCorrection
from dllm_rl.cli.main import main
from dllm_rl.cli.sample import sample_problems
from dllm_rl.decoding.prompts import encode
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.likelihoods.estimators import OneStep, Trajectory
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.records import option
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.supervised.examples import solution_examples
from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.training.dry_run.plan import plan
from dllm_rl.training.prompts import check_prompts
from dllm_rl.training.trainer import train
from recipes.examples.sampler_at_once import AtOnce

pytestmark = pytest.mark.usefixtures("no_rehearsal")

DIGITS = "0123456789"


class Missing:
    """Runs of digits with two or three left out: "1__4" is filled in as "1234"."""

    name, version = "missing", "1"

    def __len__(self):
        return 32

    def __getitem__(self, index):
        whole = DIGITS[index % 6 : index % 6 + 4 + index % 2]
        gaps = {1, 2} if index % 3 else {0, 1, 3}
        prompt = "".join("_" if i in gaps else digit for i, digit in enumerate(whole))
        return Problem(prompt, fields={"whole": whole}, blank="_")

    def reward(self, problem, completion):
        whole = problem.fields["whole"]
        right = sum(a == b for a, b in zip(completion, whole, strict=False)) / len(whole)
        return Reward(right, len(completion) == len(whole), {"solve_rate": float(completion == whole)})


def recipe_of(directory, **changes):
    sampler = Unmask(max_new_tokens=0, temperature=1.0, suppress=(0, 2))
    return tiny_recipe(
        directory,
        model=partial(tiny_masked_lm, **SIZES | {"characters": DIGITS, "num_layers": 2}),
        task=Missing(),
        validation_task=Missing(),
        eval_task=Missing(),
        sampler=sampler,
        eval_sampler=sampler.replace(temperature=0.0),
        **{"likelihood": Trajectory(), "rollout_quantization": None, "corrector": NoCorrection()} | changes,
    )


def test_a_step_learns_from_the_filled_text(tmp_path, capsys):
    """At least one digit is given and stays where it was; log-probs are those recorded, to rounding."""
    recipe = recipe_of(tmp_path / "run", num_steps=2, log_completions_steps=1)
    summary = train(recipe)
    rows = metrics_of(tmp_path / "run")
    assert all(abs(row["rollout_corr/k3_kl"]) < 1e-9 for row in rows)  # unquantized: rounding, squared
    taught = [row["frac_reward_zero_std"] < 1 for row in rows]
    assert [row["grad_norm"] > 0 for row in rows] == taught and taught[0]
    assert all(2 <= row["completions/mean_length"] <= 3 and row["parsed"] == 1 for row in rows)
    assert all(row["reward"] >= 0.25 and row["reward_std"] > 0 for row in rows)
    assert summary["eval_after"]["parsed"] == 1
    assert "__2_ --blank _\n" in capsys.readouterr().out
    main(["sample", summary["checkpoint"], "4__7", "--blank", "_", "--max_new_tokens", "0"])
    said = capsys.readouterr().out.strip()
    assert len(said) == 4 and (said[0], said[3]) == ("4", "7") and "_" not in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    for line in lines:
        prompt, text = line["prompt"], line["completion"]
        assert all(p in ("_", c) for p, c in zip(prompt, text, strict=True)) and "_" not in text


@pytest.mark.slow
def test_rewards_rise(tmp_path):
    train(recipe_of(tmp_path / "run", num_steps=24, train_batch_size=16, num_generations=8, learning_rate=1e-2))
    rewards = [row["reward"] for row in metrics_of(tmp_path / "run")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


OTHERS = [{"likelihood": OneStep()}, {"rollout_batch_size": 4}, {"max_num_gen_batches": 2}]


@pytest.mark.parametrize("changes", few(OTHERS, OTHERS[2:]))
def test_other_ways_of_a_step_take_it(tmp_path, changes):
    train(recipe_of(tmp_path / "run", num_steps=1, **changes))
    assert metrics_of(tmp_path / "run")[0]["grad_norm"] > 0


def test_an_evaluation_grades_and_keeps_the_whole_text(tmp_path):
    policy, stored = tiny_masked_lm(**SIZES | {"characters": DIGITS, "num_layers": 2}), tmp_path / "made.jsonl"
    sampler = Unmask(max_new_tokens=0, suppress=(0, 2))
    first = evaluate(policy, Missing(), sampler, limit=4, completions=stored)
    rows = [json.loads(line) for line in stored.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["__2_", "1__45", "2__5", "__5_7"]
    assert all(len(row["completion"]) == len(row["prompt"]) and row["blank"] == "_" for row in rows)
    assert [row["evaluation"]["tokens"] for row in rows] == [3, 2, 2, 3]
    alone = evaluate(policy, Missing(), sampler, limit=4, batch_size=1)
    assert [answer.reward for answer in first.answers] == [answer.reward for answer in alone.answers]


def test_memory_and_lengths_are_known_before(tmp_path):
    recipe = recipe_of(tmp_path / "run")
    text, rows = plan(recipe), recipe.train_batch_size * recipe.num_generations
    assert f"{rows} rows x (5 longest prompt + 0 new) tokens" in text
    assert f"{3 * rows} sampled, {5 * rows} with the prompts" in text  # the longest of "__2_", "1__45", ...
    policy = recipe.model()
    policy.spec = replace(policy.spec, max_length=4)
    refuses("has 5 tokens and its completion 0", lambda: check_prompts(recipe, policy))


def test_what_cannot_be_infilled_is_refused():
    policy = tiny_masked_lm(**SIZES | {"characters": DIGITS, "num_layers": 2})
    with pytest.raises(ValueError, match="a problem has blanks, and the warm-up appends"):
        solution_examples(policy, [replace(Missing()[0], solution="12")], max_new_tokens=4)
    causal = tiny_llama(causal=True, **SIZES | {"characters": DIGITS, "num_layers": 2})
    refuses("blank='_' is to be filled in, and the model has no mask token", lambda: encode(causal, [Missing()[0]]))
    prompts = encode(policy, [Missing()[0]])
    refuses("cannot fill in", lambda: Autoregress(max_new_tokens=1)(causal, prompts, torch.Generator()))


class AfterThePrompt(AtOnce):
    """Marks `marked` of the blanks as completion, and replaces the masks of `written` of them."""

    marked: int = option(default=0)
    written: int = option(default=0)

    def __call__(self, policy, prompts, generator):
        rollout = super().__call__(policy, prompts, generator)
        places = F.pad(prompts.infill_mask, (0, self.max_new_tokens))
        number = places.flatten().cumsum(0).view(places.shape)
        chosen = rollout.completion_mask | places & (number <= self.marked)
        tokens = rollout.tokens.masked_fill(places & (number <= self.written), policy.tokenizer.encode("7")[0])
        return replace(rollout, tokens=tokens, completion_mask=chosen, unmask_step=chosen.long() - 1)


UNFILLED = r"^sampler=.*AfterThePrompt\(.*\) did not fill {} of {} blanks; write the positions of prompts.infill_mask"


@pytest.mark.parametrize(("marked", "written"), [slow(0, 0), slow(0, 10), slow(10, 0), (9, 10), (10, 9)])
def test_a_sampler_that_leaves_blanks_is_named(tmp_path, marked, written):
    policy, own = tiny_masked_lm(**SIZES | {"characters": DIGITS, "num_layers": 2}), AfterThePrompt(max_new_tokens=1)
    own = own.replace(marked=marked, written=written)  # of the ten blanks of four problems
    refuses(UNFILLED.format(10 - min(marked, written), 10), lambda: evaluate(policy, Missing(), own, limit=4))
    with pytest.raises(ValueError, match=UNFILLED.format(10 - min(marked, written), 10)):
        sample_problems(policy, [Missing()[i] for i in range(4)], own)
    with pytest.raises(ValueError, match=UNFILLED.format(r"\d+", r"\d+")):
        train(replace(recipe_of(tmp_path / "run", num_steps=1, likelihood=OneStep()), sampler=own))


def test_a_sampler_of_ones_own_may_fill_blanks(tmp_path):
    policy = tiny_masked_lm(**SIZES | {"characters": DIGITS, "num_layers": 2})
    own = AfterThePrompt(max_new_tokens=1, marked=1000, written=1000)
    assert {answer.reward.parsed for answer in evaluate(policy, Missing(), own, limit=4).answers} == {False}
    (row,) = sample_problems(policy, [Missing()[1]], own)["rows"]
    assert row["completion"].startswith("17745")
    train(replace(recipe_of(tmp_path / "run", num_steps=1, likelihood=OneStep()), sampler=own))
