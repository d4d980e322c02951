"""Plug-in interface for rollout generation by a separate inference engine, in place of a copy of the learner."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from dllm_rl.models.base import Policy


@dataclass(frozen=True)
class RolloutEngine:
    """Two functions: `load` makes the policy that samples a run's rollouts, and `sync` updates its weights.

    Use it to sample with an inference engine in place of a copy of the learner; `check_engine` tests both functions. An
    engine that decodes by itself also needs a sampler for `Recipe.sampler`, which receives the policy that `load` made.

    Args:
        load: Function of the learner. It returns the policy that samplers receive, with the learner's weights and
            version; see `with_forward`. A new run calls it twice: first for its rehearsal, whose policy it deletes. So
            the engine must free its resources when its policy is deleted.
        sync: Function of the learner and that policy. It copies the learner's weights and version to the policy, and
            returns metrics.
        is_exclusive: Whether the engine serves one process of a run, so that `rollout_workers` cannot load it too.
        factory: Function that made the engine, with its keyword arguments, which the command line can change.
    """

    load: Callable[[Policy], Policy]
    sync: Callable[[Policy, Policy], dict[str, float]]
    is_exclusive: bool = False
    factory: partial | None = field(default=None, init=False, repr=False, compare=False)


def with_forward(policy: Policy, forward: Callable[..., Tensor]) -> Policy:
    """Return the policy with another forward, without gradient.

    Call it in `RolloutEngine.load` for an engine that computes logits.

    Args:
        policy: Policy whose spec, tokenizer and version are copied.
        forward: Function of tokens, attention mask and positions, each (B, T). It returns fp32 logits (B, T, V), not
            shifted: the output of the module's head at each token. Logits at padding are ignored.

    Returns:
        Policy whose module has no layers.
    """
    engine_policy = copy.copy(policy)
    engine_policy.spec = replace(
        policy.spec,
        encode=lambda module, *inputs, **cache_kwargs: forward(*inputs, **cache_kwargs),
        head=lambda module, logits: logits,
    )
    engine_policy.module = nn.Module()  # without layers: no weight is stored twice
    engine_policy.module.config = getattr(policy.module, "config", None)
    # `Policy.device` is the device of the first parameter, so there must be one.
    engine_policy.module.place = nn.Parameter(torch.zeros((), device=policy.device), requires_grad=False)
    engine_policy.lora = None
    return engine_policy
