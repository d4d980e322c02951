"""Constants outside their bounds: of every public function that has one, wherever it is bound."""

import inspect
import math
import re
import types
import typing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny_recipe import tiny_recipe

from dllm_rl.algorithms import advantages, correctors, losses
from dllm_rl.bounds import Bound, check_bound
from dllm_rl.config import from_command_line
from dllm_rl.likelihoods import estimators
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers import autoregress, renoise, revise, rules, unmask
from dllm_rl.types import Prompts
from recipes.studies import surrogates as published

MODULES = (correctors, losses, advantages, estimators, rules, revise, published)
RECORDS = (correctors.Corrector, estimators.LikelihoodEstimator)
NUMBERS = {int, float}
GIVEN = {"num_tokens", "num_sequences", "group_size", "beta", "entropy"}  # by the learner, to functions of losses
# Where 0 says something: no token is left out of a band or a mask, no bound on the entropy, nothing added.
ZERO = {"bound", "min_ratio", "threshold", "prompt_mask", "mix", "gamma", "eta", "rate", "tau_edit", "eps"}


def kinds_of(annotation):
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return set(typing.get_args(annotation)) if union else {annotation}


def public(module):
    """Functions that a recipe takes: of estimators, those that make one."""
    for name, function in vars(module).items():
        if not inspect.isfunction(function) or function.__module__ != module.__name__ or name.startswith("_"):
            continue
        made = inspect.signature(function).return_annotation
        if module is not estimators or made in RECORDS:
            yield name, function


def constants():
    """(function, keyword) of every number that a user may bind."""
    for module in MODULES:
        for name, function in public(module):
            for parameter in inspect.signature(function).parameters.values():
                number = parameter.kind is parameter.KEYWORD_ONLY and kinds_of(parameter.annotation) & NUMBERS
                if number and not (module is losses and parameter.name in GIVEN):
                    yield pytest.param(function, parameter.name, id=f"{name}-{parameter.name}")


def bind(function, keyword, value):
    """The function with the constant, as a recipe holds it: called where it makes a record, else a partial."""
    bound = {"block_size": 4, "eta": 0.1, "tau": 0.9} | {keyword: value}
    wanted = inspect.signature(function).parameters
    made = partial(function, **{name: number for name, number in bound.items() if name in wanted})
    return made() if inspect.signature(function).return_annotation in RECORDS else check_bound(made)


def test_a_constant_is_a_number():
    with pytest.raises(ValueError, match="cap='3' must be a number"):
        Bound(at_least=1).check("cap", "3")


@pytest.mark.parametrize(("function", "keyword"), [*constants()])
def test_no_constant_is_negative_or_zero_or_not_finite(function, keyword):
    number = float if float in kinds_of(inspect.signature(function).parameters[keyword].annotation) else lambda x: x
    for value in map(number, (-1, -3.0, 0, math.inf, -math.inf, math.nan)):
        if value == 0 and keyword in ZERO:
            bind(function, keyword, value)
            continue
        with pytest.raises(ValueError, match=rf"^{keyword}={value} must [^\n]*$"):
            bind(function, keyword, value)


def test_the_list_has_all_kinds():
    found = {param.id for param in constants()}
    assert {"tis-cap", "vespo-lam_neg", "sandwich-mix", "remask-eta", "fixed_length_mean-length", "gdsd-psi"} <= found
    assert len(found) > 60


@pytest.mark.parametrize(
    ("function", "keyword", "value", "message"),
    [
        (correctors.tis, "cap", 0.5, "cap=0.5 must be at least 1"),
        (correctors.mis, "min_ratio", 1.5, "min_ratio=1.5 must lie in [0, 1]"),
        (correctors.mis, "max_ratio", 0.9, "max_ratio=0.9 must be at least 1"),
        (rules.threshold, "tau", 1.1, "tau=1.1 must lie in (0, 1]"),
        (estimators.one_step, "prompt_mask", 1.0, "prompt_mask=1.0 must lie in [0, 1)"),
        (correctors.tis, "cap", math.inf, "cap=inf must be at least 1, and be finite"),
        (losses.ppo_clip, "delta", 0.5, "delta=0.5 must be at least 1"),
    ],
)
def test_the_line_names_the_constant_and_its_range(function, keyword, value, message):
    with pytest.raises(ValueError) as caught:
        bind(function, keyword, value)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [4.0, 2.5, "3", np.float64(2)])
@pytest.mark.parametrize(
    ("function", "keyword"),
    [
        (autoregress, "max_new_tokens"),
        (autoregress, "top_k"),
        (unmask, "max_new_tokens"),
        (unmask, "diffusion_steps"),
        (unmask, "block_size"),
        (unmask, "top_k"),
        (unmask, "confidence_radius"),
        (renoise, "max_new_tokens"),
        (renoise, "diffusion_steps"),
        (renoise, "stability_threshold"),
        (estimators.elbo, "num_samples"),
        (estimators.trajectory, "block_size"),
    ],
)
def test_a_number_of_things_is_an_integer(function, keyword, value):
    with pytest.raises(ValueError, match=rf"^{keyword}={re.escape(repr(value))} must be (an integer|a number)$"):
        bind(function, keyword, value)


@pytest.mark.parametrize("function", [autoregress, unmask, renoise])
def test_integers_of_numpy_are_integers(function):
    bind(function, "max_new_tokens", np.int64(4))


@pytest.mark.parametrize("value", [0, -1])
def test_a_causal_model_writes_a_token_at_least(value):
    prompts = Prompts.from_ids([[3, 4]], pad_id=0)
    with pytest.raises(ValueError, match=f"^max_new_tokens={value} must be at least 1$"):
        autoregress(tiny_llama(characters="ab", causal=True), prompts, torch.Generator(), max_new_tokens=value)


def test_edges_and_none_are_inside():
    closed = Bound(at_least=0, at_most=1)
    for value in (0, 1, 0.5, None):
        closed.check("x", value)
    for value in (0, 1):
        with pytest.raises(ValueError, match=r"x=. must lie in \(0, 1\)"):
            Bound(above=0, below=1).check("x", value)


def test_a_call_checks_too():
    with pytest.raises(ValueError, match="max_ratio=-1 must be at least 1"):
        losses.cispo(None, None, None, max_ratio=-1)


def test_a_recipe_checks_what_it_holds(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path)
    sampler = partial(recipe.sampler, commit=partial(rules.threshold, tau=7.0))
    with pytest.raises(ValueError, match=r"tau=7.0 must lie in \(0, 1\]"):
        replace(recipe, sampler=sampler)
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        replace(recipe, loss_reduction=partial(losses.fixed_length_mean, length=0))
    two = (partial(correctors.truncated_weights, cap=2.0), partial(correctors.truncated_weights, cap=-2.0))
    with pytest.raises(ValueError, match=r"cap=-2\.0 must be at least 1"):
        correctors.Corrector(partial(correctors.combine_weights, weight_fns=two))
    for words in (["--corrector.cap", "-3"], ["--loss.epsilon", "0", "--loss", "ppo_clip"]):
        with pytest.raises(SystemExit) as stop:
            from_command_line(recipe, ["--corrector", "tis", *words])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert f"{words[0].rpartition('.')[2]}={float(words[1])} must" in error
