"""The experts that come with the states a step reads."""

from dataclasses import replace

import torch
from mixtures import moe

from dllm_rl.samplers import rules
from dllm_rl.samplers.cache import dual_cache
from dllm_rl.samplers.unmask import unmask
from dllm_rl.types import Prompts


def test_a_cache_notes_the_experts_of_the_same_states():
    """A shifted family's token is predicted one column before it. A cache that is refreshed in every step is exact."""
    policy, rollouts = moe(), []
    policy.spec, policy.records_experts = replace(policy.spec, shift=True), True
    prompts = Prompts.from_ids([[4, 5, 6], [7, 8]], pad_id=0, seeds=[1, 2])
    settings = {"max_new_tokens": 6, "block_size": 3, "num_steps": 4, "temperature": 1.0, "rank": rules.max_prob}
    for cache in (None, dual_cache(refresh=1)):
        rollouts.append(unmask(policy, prompts, torch.Generator(), cache=cache, **settings))
    plain, cached = rollouts
    assert torch.equal(plain.tokens, cached.tokens)
    assert torch.equal(plain.experts.sort(-1).values, cached.experts.sort(-1).values)
    assert len(plain.experts[plain.completion_mask].unique()) > 2
