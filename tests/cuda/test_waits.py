"""How often the host waits for the device, counted on a simulated one."""

from functools import partial

import pytest
import torch
from layouts import checkpoint
from simulated_cuda import SimulatedCuda

from dllm_rl import load_policy
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers import rules, unmask
from dllm_rl.samplers.cache import block_cache, dual_cache, prefix_cache
from dllm_rl.types import Prompts

SIZES = {"characters": "1234.=", "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 16}
STEPS = {
    "plain": {},
    "filters and suppressed tokens": {"top_k": 3, "suppress": (2, 0)},
    "greedy": {"temperature": 0.0},
    "drawn where it is known": {"rank": rules.random},
    "blocks": {"block_size": 4},
    "prefix cache": {"block_size": 4, "cache": prefix_cache()},
    "dual cache": {"block_size": 4, "cache": dual_cache(refresh=2)},
    "block cache": {"cache": block_cache()},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_sampler_step_waits_once_at_most(name, tmp_path):
    """Twelve positions in 6 steps and in 12 differ by 6 steps, each of which may wait where transformers asks for padding."""
    waits = []
    with SimulatedCuda() as cuda:
        if name == "block cache":
            policy = load_policy(checkpoint(tmp_path, "sdar"), device="cuda")
            prompts = Prompts.from_ids([[3, 4, 5, 6], [6, 7, 8, 9]], pad_id=0, group_size=2)
        else:
            policy = tiny_llama(**SIZES, causal=False).to("cuda")
            prompts = Prompts.from_ids([[3, 4, 5], [6, 7]], pad_id=0, group_size=2)
        sampler = partial(unmask, max_new_tokens=12, **({"temperature": 1.0} | STEPS[name]))
        for steps in (6, 12):
            with cuda.phase(f"{steps} steps"):
                rollout = sampler(policy, prompts, torch.Generator().manual_seed(0), num_steps=steps)
            assert rollout.forwards == steps
            waits.append(cuda.waits(f"{steps} steps"))
        assert waits[1] - waits[0] <= 6, cuda.report()
        assert cuda.waits(place="samplers/unmask.py") == 2, "the seeds' copy, once a rollout"
