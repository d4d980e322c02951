"""Samplers: functions (policy, prompts, generator) -> Rollout."""

from collections.abc import Callable

from dllm_rl.models.base import Policy
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.renoise import renoise
from dllm_rl.samplers.unmask import unmask
from dllm_rl.types import Rollout


def sampler_for(policy: Policy) -> Callable[..., Rollout]:
    """Return a policy's sampler: `autoregress` if it is causal, `renoise` for random-token noise, else `unmask`."""
    if policy.spec.attention == "encoder_decoder":
        return renoise
    return autoregress if policy.spec.attention == "causal" else unmask
