"""Which rows run together, and the experts that come with the states a step reads."""

from dataclasses import replace

import torch
from likelihood_toys import TablePolicy
from mixtures import moe

from dllm_rl.models.forward import buckets
from dllm_rl.samplers import rules
from dllm_rl.samplers.cache import dual_cache
from dllm_rl.samplers.canvas import make_canvas
from dllm_rl.samplers.states import States
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


def test_a_cached_bucket_pays_for_every_step_of_a_block(monkeypatch):
    """Apart, the rows save 37 columns of padding once. A second bucket costs 30 per forward: one, or two with a cache
    that runs the padding in the first of two steps."""
    monkeypatch.setitem(buckets.FORWARD, "cpu", 30)
    policy = TablePolicy(length=2, words=2, seed=0)
    canvas = make_canvas(policy, Prompts.from_ids([[3] * 3, [3] * 40], pad_id=4), 2, 2, block_aligned=False)
    steps = torch.tensor([[2], [2]])
    assert len(States(policy, canvas, None, steps).buckets) == 2
    assert len(States(policy, canvas, dual_cache(), steps).buckets) == 1
