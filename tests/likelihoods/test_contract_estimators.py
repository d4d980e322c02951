"""One contract for every estimator; a new one joins by one line. And the contract itself notices broken ones."""

from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.rules import confidence, max_prob, plackett_luce, soft_threshold
from dllm_rl.samplers.unmask import unmask
from dllm_rl.testing import check_estimator
from dllm_rl.types import Prompts, Views

SMALL = {
    "characters": "abcdefgh",
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
SMALL |= {"head_std": 0.3}
ESTIMATORS = {
    "one_step": lik.one_step(),
    "one_step-bare": lik.one_step(prompt_mask=0.0),
    "elbo": lik.elbo(),
    "elbo-plain": lik.elbo(num_samples=3, stratified=False),
    "elbo-antithetic": lik.elbo(num_samples=6, antithetic=True),
    "coupled": lik.coupled(),
    "elbo-informed": lik.elbo(num_samples=4, informed_masking=1.5),
    "coupled-informed": lik.coupled(informed_masking=1.5),
    "coupled-3": lik.coupled(num_samples=3),
    "quadrature": lik.quadrature(),
    "block": lik.block_elbo(block_size=4),
    "eubo": lik.eubo(),
    "eubo-block": lik.eubo(beta=1.0, base=lik.block_elbo(block_size=3, num_samples=4)),
    "sandwich": lik.sandwich(),
    "trajectory": lik.trajectory(),
    "trajectory-drawn": lik.trajectory(num_sampled_steps=2),
    "trajectory-2": lik.trajectory(num_segments=2),
    "causal": lik.causal(),
}


def made(causal: bool = False, **changes):
    """A policy and completions of prompts of three lengths, two each."""
    policy = tiny_llama(causal=True, **SMALL) if causal else tiny_masked_lm(**SMALL)
    prompts = Prompts.from_ids([[3, 4, 5, 6, 7], [8, 9], [4, 4, 4]], pad_id=policy.pad_id, group_size=2)
    generator = torch.Generator().manual_seed(1)
    if causal:
        return policy, autoregress(policy, prompts, generator, max_new_tokens=7)
    options = {"max_new_tokens": 7, "diffusion_steps": 4, "temperature": 1.0, "rank": max_prob} | changes
    return policy, unmask(policy, prompts, generator, **{"confidence_radius": 10} | options)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_contract(name):
    check_estimator(ESTIMATORS[name], *made(causal=name == "causal"))


def drawing(change):
    base = lik.elbo(num_samples=3)
    return replace(base, draw_views=lambda rollout, generator: change(base.draw_views(rollout, generator), rollout))


def global_noise(noise, rollout):
    torch.rand(1)
    return noise


def shuffled(noise, rollout):
    """Masks that depend on how many rows there are."""
    return noise.rows((torch.arange(len(rollout.tokens)) + len(rollout.tokens) // 3) % len(rollout.tokens))


TIMES = count(1)
BROKEN = {
    "global generator": drawing(global_noise),
    "written to": drawing(lambda n, r: (r.tokens.fill_(4), n)[1]),
    "same seed": drawing(lambda n, r: replace(n, coefficients=n.coefficients * next(TIMES))),
    "keep the masks": replace(lik.elbo(), with_advantages=lambda n, a: Views(n.masked.clone(), n.coefficients)),
    "padding must not be masked": drawing(lambda n, r: replace(n, masked=n.masked | ~r.attention_mask)),
    "zero off the completion": drawing(lambda n, r: replace(n, coefficients=n.coefficients + 1.0)),
    "read it off": drawing(lambda n, r: replace(n, coefficients=n.coefficients + r.completion_mask)),
    "finite": replace(lik.elbo(), combine=lambda s, n: (s * n.coefficients).sum(0) / 0),
    "rows that follow": drawing(shuffled),
    "depend on padding": drawing(
        lambda n, r: n if r.tokens.shape[1] < 14 else replace(n, masked=r.completion_mask.expand_as(n.masked))
    ),
    "no gradient there": replace(lik.elbo(), combine=lambda s, n: s.sum(0)),
    "pass a gradient": replace(lik.elbo(), combine=lambda s, n: (s.detach() * n.coefficients).sum(0) + 0 * s.sum(0)),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_contract_notices(promise):
    with pytest.raises(AssertionError, match=promise):
        check_estimator(BROKEN[promise], *made())


def of_steps(change, **fields):
    """`trajectory()`, with its views changed."""
    base = lik.trajectory()
    return replace(base, draw_views=lambda rollout, generator: change(base.draw_views(rollout, generator)), **fields)


def first_two(views):
    return replace(views, masked=views.masked[:2], coefficients=views.coefficients[:2])


def backwards(views):
    return replace(views, masked=views.masked.flip(0), coefficients=views.coefficients.flip(0))


UNTRUE = {
    "steps left out": ("exact_for_sampler=True", of_steps(first_two)),
    "weights of no sum": ("exact_for_sampler=True", of_steps(lambda v: replace(v, coefficients=v.coefficients * 1.1))),
    "every token alone": ("exact_for_sampler=True", replace(lik.one_step(prompt_mask=0.0), exact_for_sampler=True)),
    "merged steps": ("exact_for_sampler=True", replace(lik.trajectory(num_segments=2), exact_for_sampler=True)),
    "an upper bound": ("exact_for_sampler=True", replace(lik.eubo(), exact_for_sampler=True)),
    "random masks": ("is_random=False", replace(lik.elbo(), is_random=False)),
    "random prompts": ("is_random=False", replace(lik.one_step(), is_random=False)),
    "random steps": ("is_random=False", replace(lik.trajectory(num_sampled_steps=1), is_random=False)),
    "confidences": ("reads_confidence_change", replace(lik.elbo(informed_masking=1.5), reads_confidence_change=False)),
    "no replay": ("no state of the sampler", replace(lik.one_step(prompt_mask=0.5), replays_steps=True)),
    "pairs of masks": ("no state of the sampler", replace(lik.coupled(), replays_steps=True)),
    "backwards": ("not in the sampler's order", of_steps(backwards)),
}


@pytest.mark.parametrize("name", UNTRUE)
def test_contract_notices_what_is_declared_and_untrue(name):
    message, estimator = UNTRUE[name]
    with pytest.raises(AssertionError, match=message):
        check_estimator(estimator, *made())


ORDERS = {
    "confidence": {"rank": confidence},
    "plackett_luce": {"rank": partial(plackett_luce, temperature=0.3)},
    "soft_threshold": {"rank": max_prob, "commit": partial(soft_threshold, tau=0.3), "diffusion_steps": None},
}


@pytest.mark.parametrize("name", ORDERS)
def test_contract_of_orders(name):
    """With the order's log-prob and without it, and an estimator that says that it scores the order, and does not."""
    inputs = made(confidence_radius=None, **ORDERS[name])
    check_estimator(lik.trajectory(), *inputs)
    check_estimator(lik.trajectory(include_order=False), *inputs)
    with pytest.raises(AssertionError, match="leave out the order"):
        check_estimator(replace(lik.trajectory(include_order=False), scores_order=True), *inputs)
