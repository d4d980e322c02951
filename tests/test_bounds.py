"""Constants outside their bounds: of every public function that has one, wherever it is bound. Numbers that float32
cannot hold, and the largest and smallest that it can: refused in one line that names the setting, or what is computed
with them is finite."""

import inspect
import math
import re
import types
import typing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import renoise_toys
import torch
from likelihood_toys import TablePolicy
from tiny_recipe import tiny_recipe

from dllm_rl import Recipe
from dllm_rl.algorithms import advantages, correctors, losses
from dllm_rl.algorithms.correctors import Corrector, ais_lambda
from dllm_rl.bounds import Bound, check_bound
from dllm_rl.config import from_command_line
from dllm_rl.likelihoods import estimators
from dllm_rl.likelihoods.estimator import recorded
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers import autoregress, renoise, revise, rules, unmask
from dllm_rl.testing import check_corrector
from dllm_rl.types import Prompts, SamplingParams
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


SMALL = (5e-324, 1e-300, 1e-45, 1e-40, 2.0**-126, 1e-37, 1e-30, 1e-20)
LARGE = (1e10, 1e20, 3e38, 1e39, 1e300, 1.7e308, math.inf)
GENERATOR = torch.Generator()
TOY = TablePolicy(length=3, words=2, seed=0, scale=3.0)


def all_finite(*tensors):
    return all(bool(x.isfinite().all()) for x in tensors)


def with_gradient(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return all_finite(y, gradient)


def surrogate(made):
    """Ratios up to those at which `exp_ratio` is cut; one row each with a positive, a negative and no advantage."""
    log_ratio = torch.tensor([[0.0, 1e-4, -1e-4, 30.0], [0.5, -0.5, 20.0, -20.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.ones(3, 4, dtype=torch.bool)
    return all(
        with_gradient(lambda x, a=a: made(x, torch.tensor(a), mask), log_ratio) for a in ([1.0, -1, 0], [-1.0, 1, 1])
    )


def estimate(made):
    """Contributions and gradients with respect to the logits, at advantages of both signs."""
    change = torch.tensor([[0.0, 0.5, -0.25, 0.125]] * 4)
    rollout = TOY.rollout([[0, 1, 0]] * 4, confidence_change=change)
    views = made.with_advantages(made.draw_views(rollout, torch.Generator()), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    scores = torch.stack([view.logprobs(TOY, rollout) for view in each_view(views)])
    return with_gradient(lambda x: made.combine(x, views), scores)


def sampled(policy=TOY, **settings):
    """A rollout of `unmask` whose tokens are words, whose log-probs are finite, and what `trajectory()` gives."""
    options = {"max_new_tokens": 3, "diffusion_steps": 3, "temperature": 1.0, "suppress": (2, 3, 4)} | settings
    rollout = unmask(policy, Prompts.from_ids([[3]], pad_id=4, group_size=16, seeds=range(16)), GENERATOR, **options)
    assert rollout.tokens[:, 1:].max() < 2
    if rollout.events is None:
        views = estimators.trajectory().draw_views(rollout, GENERATOR)
        torch.testing.assert_close(estimators.trajectory().logprobs(policy, rollout, views), recorded(rollout, views))
    return all_finite(rollout.logprobs, *(x for x in [rollout.order.logprobs] if x is not None))


def rule(made):
    if made.func is rules.plackett_luce:
        return all(sampled(rank=partial(made, base_rank=b)) for b in (rules.max_prob, rules.margin, rules.entropy))
    rank = {rules.entropy_bound: rules.entropy, revise.remask: rules.random, revise.edit: rules.confidence}
    return sampled(rank=rank.get(made.func, rules.max_prob), commit=made)


def advantage(made):
    for rewards in (torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(2, 3), torch.tensor([[1e30, 0.0, -1e30]])):
        more = {} if made.func is not advantages.decoupled else {"parts": rewards[None], "weights": torch.ones(1)}
        if not all_finite(made(rewards, **more)):
            return False
    return True


def corrects(made):
    check_corrector(made)
    return True


def lambdas(made):
    inputs = ((1.0, 0.0, 0.0), (0.5, 1e-6, 1.0), (1e-3, 20.0, 30.0))
    return all(0 <= made(*values) <= 1 for values in inputs)


def is_finite(function, made):
    if isinstance(made, estimators.LikelihoodEstimator):
        return estimate(made)
    if isinstance(made, Corrector):
        return corrects(made)
    if function is ais_lambda:
        return lambdas(made)
    if function.__module__ == correctors.__name__:
        return corrects(Corrector(weight_fn=made))
    if function is losses.fixed_length_mean:
        return all_finite(made(torch.ones(2, 3, dtype=torch.bool), num_tokens=6, num_sequences=2))
    by_module = {losses.__name__: surrogate, advantages.__name__: advantage}
    return by_module.get(function.__module__, rule)(made)


LIBRARY = [case for case in constants() if case.values[0].__module__.startswith("dllm_rl.")]
FLOATS = [
    case
    for case in LIBRARY
    if float in kinds_of(inspect.signature(case.values[0]).parameters[case.values[1]].annotation)
]


@pytest.mark.parametrize(("function", "keyword"), FLOATS)
def test_an_extreme_constant_is_refused_or_computes_finite_numbers(function, keyword):
    refused = 0
    for value in (*SMALL, *LARGE):
        bound = {"block_size": 3, "eta": 0.1, "tau": 0.9, "temperature": 0.5} | {keyword: value}
        wanted = inspect.signature(function).parameters
        made = partial(function, **{name: number for name, number in bound.items() if name in wanted})
        try:
            check_bound(made)  # as a recipe does
            made = made() if wanted and inspect.signature(function).return_annotation in RECORDS else made
        except ValueError as error:
            assert f"{keyword}={value}" in str(error) and "\n" not in str(error)
            refused += 1
            continue
        assert is_finite(function, made), f"{keyword}={value}"
    assert refused >= 5  # the numbers that float32 cannot hold


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**19, 10**400])
def test_an_integer_has_64_bits(value):
    for bound in (Bound(at_least=1), Bound(above=0), Bound(at_least=-(10**500))):
        with pytest.raises(ValueError, match=rf"^steps={value} must "):
            bound.check("steps", value)
    Bound(at_least=1).check("steps", 2**63 - 1)
    with pytest.raises(ValueError, match=r"^max_new_tokens="):
        check_bound(partial(unmask, max_new_tokens=value))


def autoregressed(**settings):
    policy = tiny_llama(causal=True, characters="0123456789+=", hidden_size=32, num_layers=1, head_std=0.3)
    prompts = Prompts.from_ids([[3, 4, 5]], pad_id=policy.pad_id, group_size=4, seeds=range(4))
    rollout = autoregress(policy, prompts, GENERATOR, **{"max_new_tokens": 3, "suppress": (0, 2), **settings})
    assert not (rollout.tokens[:, 3:] == 2).any()
    return rollout


def renoised(**settings):
    prompts = Prompts.from_ids([[0, 1]], pad_id=0, group_size=4, seeds=range(4))
    options = {"max_new_tokens": 3, "diffusion_steps": 4, "answer": "drawn", **settings}
    return renoise(renoise_toys.toy(), prompts, GENERATOR, **options)


@pytest.mark.parametrize("sample", [sampled, autoregressed])
@pytest.mark.parametrize("keyword", ["temperature", "top_p"])
def test_an_extreme_temperature_or_top_p_is_refused_or_samples(sample, keyword):
    """Where it is refused, it is refused when a recipe is made, and by `SamplingParams`."""
    sampler = unmask if sample is sampled else autoregress
    refused = []
    for value in (*SMALL, *LARGE, math.nan, -1e-300):
        try:
            check_bound(partial(sampler, max_new_tokens=3, **{keyword: value}))
        except ValueError as error:
            refused.append(value)
            assert f"{keyword}={value}" in str(error) and "\n" not in str(error)
            for call in (sample, SamplingParams):
                with pytest.raises(ValueError, match=f"^{keyword}="):
                    call(**{keyword: value})
            continue
        rollout = sample(**{keyword: value})
        assert rollout is True or all_finite(rollout.logprobs)
    assert {5e-324, 1e-300, 1e-40, 1e39, math.inf} <= {*refused} and 1e-30 not in refused
    assert (1e-37 in refused) == (keyword == "temperature")


@pytest.mark.parametrize("sample", [sampled, autoregressed])
def test_towards_zero_the_draws_are_the_likeliest_tokens(sample):
    if sample is autoregressed:
        greedy = sample(temperature=0.0).tokens
        for settings in (
            {"temperature": 1e-30},
            {"temperature": 1e-20, "top_k": 2},
            {"top_p": 1e-30},
            {"top_p": 2.0**-126},
        ):
            assert torch.equal(sample(**settings).tokens, greedy)
    else:
        for settings in ({"temperature": 1e-30}, {"temperature": 1e-20, "top_k": 2}, {"top_p": 1e-30}):
            prompts = Prompts.from_ids([[3]], pad_id=4, group_size=16, seeds=range(16))
            options = {"max_new_tokens": 3, "suppress": (2, 3, 4)}
            ours = unmask(TOY, prompts, GENERATOR, **options | {"temperature": 1.0} | settings)
            assert torch.equal(ours.tokens, unmask(TOY, prompts, GENERATOR, **options, temperature=0.0).tokens)


@pytest.mark.parametrize("keyword", ["t_max", "t_min", "entropy_bound", "confidence_threshold"])
def test_an_extreme_number_of_renoise_is_refused_or_samples(keyword):
    for value in (*SMALL, *LARGE, math.nan):
        both = {"t_max": value, "t_min": value} if keyword in ("t_max", "t_min") else {keyword: value}
        try:
            rollout = renoised(**both)
        except ValueError as error:
            assert f"{keyword}={value}" in str(error) or f"t_max={value}" in str(error)
            continue
        assert keyword not in ("t_max", "t_min") or 1e-30 <= value <= 3.5e38
        assert all_finite(rollout.logprobs)


def test_a_radius_beyond_the_completion_is_the_completion():
    prompts = Prompts.from_ids([[3]], pad_id=4, group_size=8, seeds=range(8))
    options = {"max_new_tokens": 3, "temperature": 1.0, "suppress": (2, 3, 4)}
    changes = [unmask(TOY, prompts, GENERATOR, confidence_radius=r, **options).confidence_change for r in (3, 10**12)]
    assert torch.equal(*changes) and changes[0].any()


@pytest.mark.parametrize("value", [1e-300, 1e-40, 1e39, 1e300])
def test_a_recipe_refuses_what_float32_cannot_hold(value):
    for name in ("learning_rate", "beta", "weight_decay"):
        (field,) = (f for f in Recipe.__dataclass_fields__.values() if f.name == name)
        with pytest.raises(ValueError, match=rf"^{name}={value:g}".replace("+", r"\+")):
            field.metadata["bound"].check(name, value)
        field.metadata["bound"].check(name, 1e-30)
