"""One contract for every estimator; a new one joins by one line. And the contract itself notices broken ones."""

from dataclasses import replace
from itertools import count

import pytest
import torch

from dllm_rl.likelihoods import estimators as lik
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.rules import max_prob
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


def made(causal: bool = False):
    """A policy and completions of prompts of three lengths, two each."""
    policy = tiny_llama(causal=True, **SMALL) if causal else tiny_masked_lm(**SMALL)
    prompts = Prompts.from_ids([[3, 4, 5, 6, 7], [8, 9], [4, 4, 4]], pad_id=policy.pad_id, group_size=2)
    generator = torch.Generator().manual_seed(1)
    if causal:
        return policy, autoregress(policy, prompts, generator, max_new_tokens=7)
    options = {"max_new_tokens": 7, "diffusion_steps": 4, "temperature": 1.0, "rank": max_prob}
    return policy, unmask(policy, prompts, generator, confidence_radius=10, **options)


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
