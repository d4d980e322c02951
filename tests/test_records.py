"""Numbers outside their bounds: of every record that has one. Numbers that float32
cannot hold, and the largest and smallest that it can: refused in one line that names the setting, or what is computed
with them is finite."""

import functools
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import renoise_toys
import torch
from likelihood_toys import TablePolicy
from refusals import refuses
from tiny_recipe import tiny_recipe

from dllm_rl import Lora, Recipe
from dllm_rl.algorithms import advantages, correctors, losses
from dllm_rl.algorithms.correctors import Corrector, ais_lambda
from dllm_rl.algorithms.optimizers import AdamW, LRSchedule
from dllm_rl.likelihoods import estimators
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.records import (
    Bound,
    Record,
    annotations_of,
    fit,
    from_json,
    required_settings,
    subclasses,
    to_json,
    union_members,
)
from dllm_rl.samplers import Autoregress, Renoise, Unmask, revise, rules
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.testing import check_corrector
from dllm_rl.types.groups import equal_groups
from dllm_rl.types.rollouts import Prompts, SamplingParams
from recipes.studies.likelihoods import surrogates as published

MODULES = (correctors, losses, advantages, estimators, rules, revise, published)
NUMBERS = {int, float}
# Where 0 says something: no token is left out of a band or a mask, no bound on the entropy, nothing added.
ZERO = {"bound", "min_ratio", "threshold", "prompt_mask", "mix", "gamma", "eta", "rate", "tau_edit", "eps", "gate"}
REQUIRED = {"block_size": 3, "eta": 0.1, "tau": 0.9, "temperature": 0.5, "f": 1.0, "gamma": 1.0, "rate": 0.1}
REQUIRED |= {"length": 16, "max_new_tokens": 4}


def constants():
    """(record, setting) of every number with a bound that a user may set."""
    for module in MODULES:
        for name, record in vars(module).items():
            is_record = isinstance(record, type) and issubclass(record, Record) and record.__module__ == module.__name__
            if not is_record or name.startswith("_"):
                continue
            for setting, annotation in annotations_of(record).items():
                if set(union_members(annotation)) & NUMBERS:
                    yield pytest.param(record, setting, id=f"{name}-{setting}")


def bind(record, setting, value):
    """The record with the setting, and with values of those that it needs."""
    needed = {name: number for name, number in REQUIRED.items() if name in required_settings(record)}
    return record(**needed | {setting: value})


def test_a_constant_is_a_number():
    refuses("cap='3' must be a number", lambda: Bound(at_least=1).check("cap", "3"))


@pytest.mark.parametrize(("function", "keyword"), [*constants()])
def test_no_constant_is_negative_or_zero_or_not_finite(function, keyword):
    number = float if float in union_members(annotations_of(function)[keyword]) else lambda x: x
    for value in map(number, (-1, -3.0, 0, math.inf, -math.inf, math.nan)):
        if value == 0 and keyword in ZERO:
            bind(function, keyword, value)
            continue
        with pytest.raises(ValueError, match=rf"^{keyword}={value} (must [^\n]*|is of type float; give int)$"):
            bind(function, keyword, value)


def test_the_list_has_all_kinds():
    found = {param.id for param in constants()}
    assert {"TIS-cap", "VESPO-lam_neg", "Remask-eta", "FixedLengthMean-length", "GDSD-psi"} <= found
    assert len(found) > 60


@pytest.mark.parametrize(
    ("function", "keyword", "value", "message"),
    [
        (correctors.TIS, "cap", 0.5, "cap=0.5 must be at least 1"),
        (correctors.MIS, "min_ratio", 1.5, "min_ratio=1.5 must lie in [0, 1]"),
        (correctors.MIS, "max_ratio", 0.9, "max_ratio=0.9 must be at least 1"),
        (rules.Threshold, "tau", 1.1, "tau=1.1 must lie in (0, 1]"),
        (estimators.OneStep, "prompt_mask", 1.0, "prompt_mask=1.0 must lie in [0, 1)"),
        (correctors.TIS, "cap", math.inf, "cap=inf must be at least 1, and be finite"),
        (losses.PPOClip, "delta", 0.5, "delta=0.5 must be at least 1"),
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
        (Autoregress, "max_new_tokens"),
        (Autoregress, "top_k"),
        (Unmask, "max_new_tokens"),
        (Unmask, "diffusion_steps"),
        (Unmask, "block_size"),
        (Unmask, "top_k"),
        (Renoise, "max_new_tokens"),
        (Renoise, "diffusion_steps"),
        (Renoise, "stability_threshold"),
        (estimators.ELBO, "num_samples"),
        (estimators.Trajectory, "block_size"),
    ],
)
def test_a_number_of_things_is_an_integer(function, keyword, value):
    refuses(rf"^{keyword}={re.escape(repr(value))} is of type \w+; give int$", lambda: bind(function, keyword, value))


@pytest.mark.parametrize("function", [Autoregress, Unmask, Renoise])
def test_integers_of_numpy_are_integers(function):
    bind(function, "max_new_tokens", np.int64(4))


def test_numbers_of_numpy_are_stored_as_pythons():
    recipe = tiny_recipe("x", seed=np.int64(3), learning_rate=np.float32(0.5), max_grad_norm=Fraction(1, 4))
    numbers = recipe.seed, recipe.learning_rate, recipe.max_grad_norm
    assert list(map(repr, numbers)) == ["3", "0.5", "0.25"]
    settings = {"max_new_tokens": np.int64(4), "temperature": np.float32(0.5), "top_p": np.float64(0.25)}
    sampler = Unmask(**settings, suppress=[np.uint8(7), "a"], commit=rules.Threshold(tau=np.float16(0.5)))
    stored = json.loads(json.dumps(to_json(sampler)))
    assert from_json(Sampler, stored, "sampler") == sampler and "np." not in repr(sampler)
    found = stored["init_args"]
    assert found | settings == found and found["suppress"] == [7, "a"]


@pytest.mark.parametrize("value", [0, -1])
def test_a_causal_model_writes_a_token_at_least(value):
    prompts = Prompts.from_ids([[3, 4]], pad_id=0)
    with pytest.raises(ValueError, match=f"^max_new_tokens={value} must be at least 1$"):
        Autoregress(max_new_tokens=value)(tiny_llama(characters="ab", causal=True), prompts, torch.Generator())


def test_edges_and_none_are_inside():
    closed = Bound(at_least=0, at_most=1)
    for value in (0, 1, 0.5, None):
        closed.check("x", value)
    for value in (0, 1):
        with pytest.raises(ValueError, match=r"x=. must lie in \(0, 1\)"):
            Bound(above=0, below=1).check("x", value)


def test_records_within_records_are_checked_when_they_are_made():
    refuses(r"tau=7.0 must lie in \(0, 1\]", lambda: Unmask(max_new_tokens=4, commit=rules.Threshold(tau=7.0)))
    stored = {"class_path": "Threshold", "init_args": {"tau": 7.0}}
    refuses(r"tau=7.0 must lie in \(0, 1\]", lambda: Unmask(max_new_tokens=4, commit=stored))


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
    inputs = {"log_mismatch": torch.zeros_like(log_ratio)} if "log_mismatch" in made.inputs else {}
    return all(
        with_gradient(lambda x, a=a: made(x, torch.tensor(a), mask, **inputs), log_ratio)
        for a in ([1.0, -1, 0], [-1.0, 1, 1])
    )


def estimate(made):
    """Contributions and gradients with respect to the logits, at advantages of both signs."""
    rollout = TOY.rollout([[0, 1, 0]] * 4)
    views = made.with_advantages(made.draw_views(rollout, torch.Generator()), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    scores = torch.stack([view.logprobs(TOY, rollout) for view in each_view(views)])
    return with_gradient(lambda x: made.combine(x, views), scores)


def sampled(policy=TOY, **settings):
    """A rollout of `unmask` whose tokens are words, whose log-probs are finite, and what `trajectory()` gives."""
    options = {"max_new_tokens": 3, "diffusion_steps": 3, "temperature": 1.0, "suppress": (2, 3, 4)} | settings
    rollout = Unmask(**options)(
        policy, Prompts.from_ids([[3]], pad_id=4, num_generations=16, seeds=range(16)), GENERATOR
    )
    assert rollout.tokens[:, 1:].max() < 2
    if rollout.events is None:
        views = estimators.Trajectory().draw_views(rollout, GENERATOR)
        torch.testing.assert_close(estimators.Trajectory().logprobs(policy, rollout, views), recorded(rollout, views))
    return all_finite(rollout.logprobs, *(x for x in [rollout.order.logprobs] if x is not None))


def rule(made):
    if isinstance(made, rules.PlackettLuce):
        return all(sampled(rank=made.replace(base_rank=b)) for b in (rules.MaxProb(), rules.Margin(), rules.Entropy()))
    ranks = {rules.EntropyBound: rules.Entropy(), revise.Remask: rules.RandomOrder(), revise.Edit: rules.Confidence()}
    return sampled(rank=ranks.get(type(made), rules.MaxProb()), commit=made)


def advantage(made):
    for rewards in (torch.tensor([1.0, 0.0, 0.0]), torch.ones(6), torch.tensor([1e30, 0.0, -1e30])):
        more = {} if not made.takes_component_rewards else {"parts": rewards[None], "weights": torch.ones(1)}
        if not all_finite(made(rewards, equal_groups(len(rewards) // 3, 3), **more)):
            return False
    return True


def corrects(made):
    check_corrector(made)
    return True


@pytest.mark.parametrize("tau", [1e-30, 0.05, 1e30])
def test_lambda_lies_in_0_to_1(tau):
    inputs = ((1.0, 0.0, 0.0), (0.5, 1e-6, 1.0), (1e-3, 20.0, 30.0))
    assert all(0 <= ais_lambda(*values, tau=tau) <= 1 for values in inputs)


def is_finite(made):
    if isinstance(made, losses.FixedLengthMean):
        return all_finite(made(torch.ones(2, 3, dtype=torch.bool), num_tokens=6, num_sequences=2))
    kinds = {
        estimators.LikelihoodEstimator: estimate,
        Corrector: corrects,
        losses.Loss: surrogate,
        advantages.Advantages: advantage,
    }
    return next((check for kind, check in kinds.items() if isinstance(made, kind)), rule)(made)


LIBRARY = [case for case in constants() if case.values[0].__module__.startswith("dllm_rl.")]
FLOATS = [case for case in LIBRARY if float in union_members(annotations_of(case.values[0])[case.values[1]])]


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize(("function", "keyword"), FLOATS)
def test_an_extreme_constant_is_refused_or_computes_finite_numbers(function, keyword):
    refused = 0
    for value in (*SMALL, *LARGE):
        try:
            made = bind(function, keyword, value)
        except ValueError as error:
            assert f"{keyword}={value}" in str(error) and "\n" not in str(error)
            refused += 1
            continue
        assert is_finite(made), f"{keyword}={value}"
    assert refused >= 5  # the numbers that float32 cannot hold


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**19, 10**400])
def test_an_integer_has_64_bits(value):
    for bound in (Bound(at_least=1), Bound(above=0), Bound(at_least=-(10**500))):
        with pytest.raises(ValueError, match=rf"^steps={value} must "):
            bound.check("steps", value)
    Bound(at_least=1).check("steps", 2**63 - 1)
    refuses(r"^max_new_tokens=", lambda: Unmask(max_new_tokens=value))


def autoregressed(**settings):
    policy = tiny_llama(causal=True, characters="0123456789+=", hidden_size=32, num_layers=1, head_std=0.3)
    prompts = Prompts.from_ids([[3, 4, 5]], pad_id=policy.pad_id, num_generations=4, seeds=range(4))
    rollout = Autoregress(**{"max_new_tokens": 3, "suppress": (0, 2), **settings})(policy, prompts, GENERATOR)
    assert not (rollout.tokens[:, 3:] == 2).any()
    return rollout


def renoised(**settings):
    prompts = Prompts.from_ids([[0, 1]], pad_id=0, num_generations=4, seeds=range(4))
    options = {"max_new_tokens": 3, "diffusion_steps": 4, "answer": "drawn", **settings}
    return Renoise(**options)(renoise_toys.toy(), prompts, GENERATOR)


@pytest.mark.repeated
@pytest.mark.parametrize("sample", [sampled, autoregressed])
@pytest.mark.parametrize("keyword", ["temperature", "top_p"])
def test_an_extreme_temperature_or_top_p_is_refused_or_samples(sample, keyword):
    """Where it is refused, it is refused when a recipe is made, and by `SamplingParams`."""
    sampler = Unmask if sample is sampled else Autoregress
    refused = []
    for value in (*SMALL, *LARGE, math.nan, -1e-300):
        try:
            sampler(max_new_tokens=3, **{keyword: value})
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
            prompts = Prompts.from_ids([[3]], pad_id=4, num_generations=16, seeds=range(16))
            options = {"max_new_tokens": 3, "suppress": (2, 3, 4)}
            ours = Unmask(**options | {"temperature": 1.0} | settings)(TOY, prompts, GENERATOR)
            assert torch.equal(ours.tokens, Unmask(**options, temperature=0.0)(TOY, prompts, GENERATOR).tokens)


@pytest.mark.repeated
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


@pytest.mark.parametrize("value", [1e-300, 1e-40, 1e39, 1e300])
def test_a_recipe_refuses_what_float32_cannot_hold(value):
    for record, name in ((Recipe, "learning_rate"), (Recipe, "beta"), (AdamW, "weight_decay")):
        (field,) = (f for f in record.__dataclass_fields__.values() if f.name == name)
        with pytest.raises(ValueError, match=rf"^{name}={value:g}".replace("+", r"\+")):
            field.metadata["bound"].check(name, value)
        field.metadata["bound"].check(name, 1e-30)


@pytest.mark.parametrize(
    ("base", "callable_record"),
    [
        (losses.Loss, losses.K1()),
        (losses.KL, losses.TokenMean()),
        (rules.Rank, rules.Schedule()),
        (rules.Commit, rules.MaxProb()),
        (Corrector, losses.PPOClip()),
        (estimators.LikelihoodEstimator, advantages.GroupRelative()),
    ],
)
def test_a_record_of_another_kind_is_not_taken_for_a_function(base, callable_record):
    with pytest.raises(
        ValueError, match=rf"^setting={type(callable_record).__name__}\(.* is not of type {base.__name__}; give one"
    ):
        fit("setting", base, callable_record)


@pytest.mark.parametrize(
    ("base", "function", "arguments", "result"),
    [
        (losses.KL, torch.neg, (2.0,), -2.0),
        (losses.LossReduction, lambda mask, num_tokens: mask / num_tokens, (4.0,), 2.0),
        (rules.Commit, lambda scores, masked, steps_left: scores + masked * steps_left, (1.0, 2.0, 3.0), 7.0),
        (LRSchedule, lambda step, num_steps: step / num_steps, (1, 4), 0.25),
    ],
)
def test_a_plain_function_becomes_a_record_that_calls_it(base, function, arguments, result):
    record = fit("setting", base, function)
    named = {"num_tokens": 2.0} if base is losses.LossReduction else {}
    assert isinstance(record, base) and record.function is function
    assert float(record(*map(torch.tensor, arguments), **named)) == result
    assert record.name == ("neg" if function is torch.neg else "<lambda>")


def test_a_subclass_of_the_users_leaves_the_librarys_class_known():
    class Smaller(Lora):
        pass

    assert subclasses(Lora) == {"Lora": Lora} and Smaller(r=4) != Lora(r=4)


def test_methods_keep_no_attribute_beside_their_fields():
    """jsonargparse reads the attributes of a record that is another's default as settings. Tasks are never one."""
    methods = [each for each in subclasses(Record).values() if not each.__module__.startswith("dllm_rl.tasks")]
    caches = [
        f"{each.__qualname__}.{name}"
        for each in methods
        for name, value in vars(each).items()
        if isinstance(value, functools.cached_property)
    ]
    assert len(methods) > 60 and caches == []


def test_a_path_setting_below_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for given in ("~/a", Path("~/a")):
        assert fit("path", str | None, given) == "/home/me/a"
    assert [fit("path", str, each) for each in ("a~/b", "~", "/~/a")] == ["a~/b", "~", "/~/a"]
