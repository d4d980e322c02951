"""Overrides by name: good ones, unknown fields, bad values; recipes as text."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_recipe import tiny_recipe

from dllm_rl.algorithms import correctors
from dllm_rl.algorithms.losses import constant, ppo_clip, sequence, token
from dllm_rl.config import describe, described, from_command_line, override, paths
from dllm_rl.likelihoods import estimators as likelihoods
from dllm_rl.models.lora import Lora
from dllm_rl.quantization.schemes import int8_weight_only
from dllm_rl.training.run import settings_of
from recipes.sudoku_tiny import recipe as main_job


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


def test_scalars_at_every_depth(recipe):
    new = from_command_line(
        recipe,
        [
            *[
                "--num_steps",
                "7",
                "--learning_rate=1e-4",
                "--bf16",
                "--sampler.temperature",
                "0.5",
                "--task.clues",
                "8,9",
            ],
            *["--corrector.weigh.cap", "3", "--corrector.surrogate.epsilon", "0.1", "--micro_batch_size", "8"],
            *["--output_dir", "x"],
        ],
    )
    assert (new.num_steps, new.learning_rate, new.bf16, new.micro_batch_size, new.output_dir) == (7, 1e-4, True, 8, "x")
    assert new.sampler.keywords == {**recipe.sampler.keywords, "temperature": 0.5}
    assert new.task.clues == (8, 9) and recipe.task.clues == (10, 12)
    assert new.corrector.weigh.keywords["cap"] == 3 and new.corrector.surrogate.keywords["epsilon"] == 0.1


def test_the_order_of_overrides_does_not_matter(recipe):
    words = ["--zero_mismatch", "--rollout_quantization", "none"]
    for arguments in (words, words[1:] + words[:1]):
        assert from_command_line(recipe, arguments).zero_mismatch


def test_what_functions_take_by_default_has_a_name_too(recipe):
    """A plain function's keywords, and those of one that was just picked."""
    changed = from_command_line(
        recipe,
        ["--advantages.scale_rewards", "none", "--lr_schedule.final", "0.5", "--lora", "lora_r16", "--lora.r", "4"],
    )
    assert changed.advantages(torch.tensor([[0.0, 4.0]])).tolist() == [[-2.0, 2.0]]
    assert changed.lr_schedule(10, 10) == pytest.approx(0.5) and changed.lora() == Lora(r=4)
    assert describe(changed.advantages) == "group_relative(scale_rewards='none', eps=0.0001)"
    assert changed.update_settings(0)["learning_rate"] == pytest.approx(recipe.learning_rate * 0.2)


def test_any_recipe_takes_a_checkpoint_for_its_model(recipe):
    assert from_command_line(recipe, ["--model", "runs/x/checkpoints/step-000180"]).model.endswith("step-000180")
    assert from_command_line(recipe, ["--model.hidden_size", "8"]).model.keywords["hidden_size"] == 8


def test_an_estimators_parts_are_not_changed_one_by_one(recipe):
    # trajectory() says of itself that it replays the sampler; with fewer segments it would not.
    assert not [path for path in paths(recipe) if path.startswith("likelihood.")]


def test_functions_by_name(recipe):
    new = from_command_line(
        recipe,
        [
            *["--corrector", "none", "--likelihood", "one_step", "--aggregate", "sequence", "--kl", "kl_k2"],
            *["--rollout_quantization", "int8_weight_only", "--advantages", "leave_one_out"],
            *["--sampler.rank", "max_prob"],
        ],
    )
    assert new.corrector == correctors.none() and new.likelihood.name == "one_step"
    assert new.aggregate is sequence and new.rollout_quantization is int8_weight_only
    assert new.sampler.keywords["rank"].__name__ == "max_prob"
    assert override(recipe, "rollout_quantization", "none").rollout_quantization is None
    assert override(recipe, "micro_batch_size", "none").micro_batch_size is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "the nearest is --learning_rate"),
        (["--sampler.temprature", "1"], "the nearest is --sampler.temperature"),
        (["--num_steps", "many"], "--num_steps 'many' is not a valid int"),
        (["--num_steps", "1.5"], "--num_steps '1.5' is not a valid int"),
        (["--learning_rate", "nan"], "--learning_rate 'nan' is not a valid float"),
        (["--learning_rate", "-1"], "learning_rate=-1.0 must be positive and finite"),
        (["--beta", "inf"], "--beta 'inf' is not a valid float"),
        (["--corrector", "tiss"], "the nearest is 'tis'"),
        (["--corrector", "Corrector"], "is not known"),
        (["--rollout_quantization", "quantized_copy"], "is not known"),
        (["--bf16", "yes"], "--bf16 'yes' is not a valid bool"),
        (["--task.split", "tset"], "split"),
        (["num_steps", "1"], "options are written --name value"),
    ],
)
def test_what_is_refused_in_one_line(recipe, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        from_command_line(recipe, arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_functions_that_need_a_further_keyword_are_offered_only_where_it_is_bound(recipe):
    assert "constant" not in paths(recipe)["aggregate"].read.args[1]
    bound = paths(replace(recipe, aggregate=partial(constant, length=20)))["aggregate"].read.args[1]
    assert {"constant", "token", "sequence"} <= bound.keys()


def test_the_models_seed_is_the_runs(recipe):
    assert "seed" in paths(recipe) and "seed" in paths(recipe.model) and "model.seed" not in paths(recipe)


def test_help_lists_every_path(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        from_command_line(recipe, ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for path in paths(recipe):
        assert f"--{path} " in out


def test_the_aggregation_is_the_one_given_else_the_correctors_papers_else_token(recipe):
    taken = lambda *words: from_command_line(recipe, list(words)).aggregation  # noqa: E731
    assert taken() is token and taken("--corrector", "ais") is token
    assert taken("--corrector", "tbpo") is sequence and taken("--corrector", "qarl") is sequence
    assert taken("--corrector", "tbpo", "--aggregate", "token") is token
    assert taken("--corrector", "none", "--aggregate", "sequence") is sequence
    assert replace(recipe, corrector=correctors.tbpo()).loss.keywords["aggregate"] is sequence


def test_a_run_is_said_to_aggregate_as_it_does(recipe):
    # Nothing else changes in the text, so that checkpoints of earlier versions can be resumed.
    assert settings_of(recipe)["aggregate"] == "token"
    assert settings_of(replace(recipe, corrector=correctors.qarl()))["aggregate"] == "sequence"
    assert describe(correctors.none()).endswith(", align_forward=False)")
    assert describe(correctors.tbpo()).endswith(", align_forward=False, aggregate=sequence)")


def test_describe_fills_in_defaults():
    assert describe(partial(ppo_clip, epsilon=0.1)) == "ppo_clip(epsilon=0.1, epsilon_high=None, delta=None)"
    assert describe(token) == "token"
    text = described(main_job)
    assert text["corrector"].startswith("Corrector(weigh=") and "0x" not in str(text)
    assert "temperature=1.0" in text["sampler"] and "max_new_tokens=16" in text["sampler"]


@pytest.mark.parametrize("make", [likelihoods.coupled, likelihoods.one_step])
def test_different_estimators_are_described_differently(make):
    assert describe(make()) != describe(likelihoods.trajectory())
