"""Samplers: functions (policy, prompts, generator) -> Rollout."""

from collections.abc import Callable

from dllm_rl.models.base import Policy
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.unmask import unmask
from dllm_rl.types import Rollout


def sampler_for(policy: Policy) -> Callable[..., Rollout]:
    """`autoregress` for a causal policy, `unmask` for a diffusion one."""
    return autoregress if policy.spec.attention == "causal" else unmask
