"""Samplers: records that complete prompts, (policy, prompts, generator) -> Rollout."""

from dataclasses import fields
from typing import Any

from dllm_rl.models.base import Policy
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.renoise import Renoise
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.samplers.unmask import Unmask

__all__ = ["Autoregress", "Renoise", "Sampler", "Unmask", "decodes_in_engine", "sampler_for", "settings_for"]


def sampler_for(policy: Policy) -> type[Unmask] | type[Autoregress] | type[Renoise]:
    """Return a policy's sampler: `Autoregress` if it is causal, `Renoise` for random-token noise, else `Unmask`."""
    if policy.spec.attention == "encoder_decoder":
        return Renoise
    return Autoregress if policy.spec.attention == "causal" else Unmask


def decodes_in_engine(sampler: Sampler) -> bool:
    """Return whether a sampler beside a rollout engine is the engine's own: others decode the logits of any policy."""
    return type(sampler) not in (Unmask, Autoregress, Renoise)


def settings_for(sampler_class: type[Sampler], sampler: Sampler) -> dict[str, Any]:
    """Return the fields of a class that a sampler has, such as those of `Autoregress` that `HTTPSampler` has."""
    names = [field.name for field in fields(sampler_class) if hasattr(sampler, field.name)]  # type: ignore[arg-type]
    return {name: getattr(sampler, name) for name in names}
