"""Plug-in interface for rollout generation: a copy of the learner, or a separate inference engine."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from dllm_rl.models.base import Policy


@dataclass(frozen=True)
class RolloutEngine:
    """Two functions that provide the policy of a run's rollouts and update its weights.

    Use it to sample with an inference engine in place of a copy of the learner; `check_engine` tests both functions. An
    engine that decodes by itself also needs a sampler for `Recipe.sampler`, which receives the policy of `load`.

    Args:
        load: Function of the learner. It returns the policy that samplers receive, with the learner's weights and
            version; see `with_forward`. A new run also loads for its rehearsal and drops that policy first, so the
            engine's resources must be freed together with the policy.
        sync: Function of the learner and that policy. It gives the policy the learner's new weights and version, and
            returns metrics.
        is_exclusive: Whether the engine serves one process of a run, so that `rollout_workers` cannot load it too.
        factory: Function that made the engine, with its keywords, so that the command line can change a keyword.
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
            shifted: the output of the module's head at each token, with any numbers at padding.

    Returns:
        Policy without layers.
    """
    twin = copy.copy(policy)
    twin.spec = replace(
        policy.spec,
        encode=lambda module, *inputs, **kept: forward(*inputs, **kept),
        head=lambda module, logits: logits,
    )
    twin.module = nn.Module()  # without layers: no weight is stored twice
    twin.module.config = getattr(policy.module, "config", None)
    twin.module.place = nn.Parameter(torch.zeros((), device=policy.device), requires_grad=False)
    twin.lora = None
    return twin
