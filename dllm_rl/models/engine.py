"""The seam for whatever makes the rollouts: a copy of the learner, or an inference engine of its own."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from dllm_rl.models.base import Policy


@dataclass(frozen=True)
class RolloutEngine:
    """What makes a run's rollouts, as two functions; `load` makes all that a run keeps. `check_engine` tests both.

    Args:
        load: Learner -> the policy that samplers get, with the learner's weights and version; see `with_forward`. A new
            run also loads for its rehearsal, and drops that policy first: what the policy holds must end with it.
        sync: Learner, that policy -> metrics, after the policy got the learner's new weights and version.
        factory: The function that made the engine, with its keywords, so that a command line can change a keyword.

    An engine that decodes by itself has a sampler of its own for `Recipe.sampler`, which gets the policy of `load`.
    """

    load: Callable[[Policy], Policy]
    sync: Callable[[Policy, Policy], dict[str, float]]
    factory: partial | None = field(default=None, init=False, repr=False, compare=False)


def with_forward(policy: Policy, forward: Callable[..., Tensor]) -> Policy:
    """The policy with another forward, without gradient: tokens, attention mask, positions (each (B, T)) -> logits.

    Args:
        forward: -> fp32 (B, T, V), not shifted: what the module's head gives at each token; any numbers at padding.
    """
    twin = copy.copy(policy)
    twin.spec = replace(
        policy.spec,
        encode=lambda module, *inputs, **kept: forward(*inputs, **kept),
        head=lambda module, logits: logits,
    )
    twin.module = nn.Module()  # without layers: no weight is held twice
    twin.module.config = getattr(policy.module, "config", None)
    twin.module.place = nn.Parameter(torch.zeros((), device=policy.device), requires_grad=False)
    twin.lora = None
    return twin
