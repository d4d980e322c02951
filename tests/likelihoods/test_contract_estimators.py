"""One contract for every estimator; a new one joins by one line. And the contract itself notices broken ones."""

from dataclasses import fields, replace
from itertools import count

import pytest
import torch
from refusals import refuses

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.rules import Confidence, MaxProb, PlackettLuce, SoftThreshold
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.testing import check_estimator
from dllm_rl.types.rollouts import Prompts
from dllm_rl.types.scoring import Views

SMALL = {
    "characters": "abcdefgh",
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
SMALL |= {"head_std": 0.3}
ESTIMATORS = {
    "one_step": lik.OneStep(),
    "one_step-bare": lik.OneStep(prompt_mask=0.0),
    "elbo": lik.ELBO(),
    "elbo-plain": lik.ELBO(num_samples=3, stratified=False),
    "elbo-antithetic": lik.ELBO(num_samples=6, antithetic=True),
    "coupled": lik.Coupled(),
    "coupled-3": lik.Coupled(num_samples=3),
    "trajectory": lik.Trajectory(),
    "trajectory-drawn": lik.Trajectory(variance_growth=0.5),
    "trajectory-2": lik.Trajectory(num_segments=2),
    "causal": lik.Causal(),
}


def made(causal: bool = False, num_generations: int | list[int] = 2, **changes):
    """A policy and completions of prompts of three lengths, two each."""
    policy = tiny_llama(causal=True, **SMALL) if causal else tiny_masked_lm(**SMALL)
    prompts = Prompts.from_ids(
        [[3, 4, 5, 6, 7], [8, 9], [4, 4, 4]], pad_id=policy.pad_id, num_generations=num_generations
    )
    generator = torch.Generator().manual_seed(1)
    if causal:
        return policy, Autoregress(max_new_tokens=7)(policy, prompts, generator)
    options = {"max_new_tokens": 7, "diffusion_steps": 4, "temperature": 1.0, "rank": MaxProb()} | changes
    return policy, Unmask(**options)(policy, prompts, generator)


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_contract(name):
    check_estimator(ESTIMATORS[name], *made(causal=name == "causal"))


@pytest.mark.parametrize("sizes", [[3, 2, 2], [4, 1, 1]], ids=str)
@pytest.mark.parametrize("name", ["one_step", "coupled", "trajectory", "causal"])
@pytest.mark.repeated
def test_contract_of_groups_of_unequal_size(name, sizes):
    inputs = made(causal=name == "causal", num_generations=sizes)
    check_estimator(ESTIMATORS[name], *inputs)
    if name != "causal":
        refuses("rows that follow", lambda: check_estimator(drawing(shuffled), *inputs), AssertionError)


def overriding(base, **members):
    """Return an estimator with the settings of `base`, of a subclass that overrides these members."""
    settings = {setting.name: getattr(base, setting.name) for setting in fields(base)}
    return type("Overriding", (type(base),), members)(**settings)


def drawing(change):
    base = lik.ELBO(num_samples=3)
    return overriding(base, draw_views=lambda self, r, generator: change(base.draw_views(r, generator), r))


def of_the_library(draw_views):
    """Views of a class that gets the rollout itself, as the library's own classes do, and not a copy."""
    draw_views.__module__ = "dllm_rl.likelihoods"
    return overriding(lik.ELBO(num_samples=3), draw_views=draw_views)


def global_noise(noise, rollout):
    torch.rand(1)
    return noise


def shuffled(noise, rollout):
    """Masks that depend on how many rows there are."""
    return noise.rows((torch.arange(len(rollout.tokens)) + len(rollout.tokens) // 3) % len(rollout.tokens))


TIMES = count(1)
BROKEN = {
    "global generator": drawing(global_noise),
    "written to": of_the_library(lambda self, r, g: (lik.ELBO.draw_views(self, r, g), r.tokens.fill_(4))[0]),
    "same seed": drawing(lambda n, r: replace(n, coefficients=n.coefficients * next(TIMES))),
    "keep the masks": overriding(lik.ELBO(), with_advantages=lambda self, n, a: Views(~n.masked, n.coefficients)),
    "padding must not be masked": drawing(lambda n, r: replace(n, masked=n.masked | ~r.attention_mask)),
    "zero off the completion": drawing(lambda n, r: replace(n, coefficients=n.coefficients + 1.0)),
    "read it off": drawing(lambda n, r: replace(n, coefficients=n.coefficients + r.completion_mask)),
    "finite": overriding(lik.ELBO(), combine=lambda self, s, n: (s * n.coefficients).sum(0) / 0),
    "rows that follow": drawing(shuffled),
    "depend on padding": drawing(
        lambda n, r: n if r.tokens.shape[1] < 14 else replace(n, masked=r.completion_mask.expand_as(n.masked))
    ),
    "no gradient there": overriding(lik.ELBO(), combine=lambda self, s, n: s.sum(0)),
    "pass a gradient": overriding(
        lik.ELBO(), combine=lambda self, s, n: (s.detach() * n.coefficients).sum(0) + 0 * s.sum(0)
    ),
}


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("promise", BROKEN)
def test_contract_notices(promise):
    refuses(promise, lambda: check_estimator(BROKEN[promise], *made()), AssertionError)


def of_steps(change):
    """`Trajectory()`, with its views changed."""
    base = lik.Trajectory()
    return overriding(base, draw_views=lambda self, rollout, generator: change(base.draw_views(rollout, generator)))


def first_two(views):
    return replace(views, masked=views.masked[:2], coefficients=views.coefficients[:2])


def backwards(views):
    return replace(views, masked=views.masked.flip(0), coefficients=views.coefficients.flip(0))


UNTRUE = {
    "steps left out": ("exact_for_sampler=True", of_steps(first_two)),
    "weights of no sum": ("exact_for_sampler=True", of_steps(lambda v: replace(v, coefficients=v.coefficients * 1.1))),
    "every token alone": ("exact_for_sampler=True", overriding(lik.OneStep(prompt_mask=0.0), exact_for_sampler=True)),
    "merged steps": ("exact_for_sampler=True", overriding(lik.Trajectory(num_segments=2), exact_for_sampler=True)),
    "random masks": ("is_random=False", overriding(lik.ELBO(), is_random=False)),
    "random prompts": ("is_random=False", overriding(lik.OneStep(), is_random=False)),
    "no replay": ("not a state of the sampler", overriding(lik.OneStep(prompt_mask=0.5), replays_steps=True)),
    "pairs of masks": ("not a state of the sampler", overriding(lik.Coupled(), replays_steps=True)),
    "backwards": ("not in the sampler's order", of_steps(backwards)),
}


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("name", UNTRUE)
def test_contract_notices_what_is_declared_and_untrue(name):
    message, estimator = UNTRUE[name]
    refuses(message, lambda: check_estimator(estimator, *made()), AssertionError)


ORDERS = {
    "confidence": {"rank": Confidence()},
    "plackett_luce": {"rank": PlackettLuce(temperature=0.3)},
    "soft_threshold": {"rank": MaxProb(), "commit": SoftThreshold(tau=0.3), "diffusion_steps": None},
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.repeated
def test_contract_of_orders(name):
    """With the order's log-prob and without it."""
    inputs = made(**{"max_new_tokens": 4, "diffusion_steps": 2} | ORDERS[name])
    for likelihood in (lik.Trajectory(), lik.Trajectory(include_order=False)):
        check_estimator(likelihood, *inputs)
    with pytest.raises(AssertionError, match="reads_order=True"):
        check_estimator(overriding(of_steps(lambda views: views), reads_order=False), *inputs)
