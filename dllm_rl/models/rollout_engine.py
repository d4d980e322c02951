"""Plug-in interface for rollout generation by a separate inference engine, in place of a copy of the learner."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.models.base import Policy
from dllm_rl.records import Record


class RolloutEngine(Record):
    """An inference engine that samples a run's rollouts in place of a copy of the learner.

    Subclass it, override `load` and `sync`, and test both by `check_engine`; or wrap two functions by `FunctionEngine`.
    An engine that decodes by itself also needs a sampler for `Recipe.sampler`, which receives the policy of `load`.
    """

    @property
    def is_exclusive(self) -> bool:
        """Whether the engine serves one process of a run, so that workers (`late`) cannot load it too."""
        return False

    @property
    def gives_logits(self) -> bool:
        """Whether the policy of `load` computes logits. If not, the log-probs that its sampler records are those of the
        rollout, and the run's likelihood must be exact.
        """
        return True

    def load(self, learner: Policy) -> Policy:
        """Return the policy that samplers receive, with the learner's weights and version; see `with_forward`.

        A new run calls it twice: first for its rehearsal, whose policy it deletes. So the engine must free its
        resources when its policy is deleted.
        """
        raise TypeError(f"{type(self).__name__} must define load(learner)")

    def sync(self, learner: Policy, policy: Policy) -> dict[str, float]:
        """Copy the learner's weights and version to the policy of `load`, and return metrics."""
        raise TypeError(f"{type(self).__name__} must define sync(learner, policy)")


class FunctionEngine(RolloutEngine):
    """An engine made of two functions.

    Args:
        load_fn: Function of the learner, see `RolloutEngine.load`.
        sync_fn: Function of the learner and the policy of `load_fn`, see `RolloutEngine.sync`.
        is_exclusive: Whether the engine serves one process of a run. Default: False.
    """

    load_fn: Callable[[Policy], Any]
    sync_fn: Callable[[Policy, Policy], Any]
    is_exclusive: bool = False

    def load(self, learner: Policy) -> Policy:
        return self.load_fn(learner)

    def sync(self, learner: Policy, policy: Policy) -> dict[str, float]:
        return self.sync_fn(learner, policy)


def check_single_process(learner: Policy, engine: str) -> None:
    """Raise ValueError if a run has several processes, for an engine that takes the weights of one."""
    is_initialized = torch.distributed.is_initialized()
    if hasattr(learner.module, "sharding") or (is_initialized and torch.distributed.get_world_size() > 1):
        raise ValueError(f"rollout_engine={engine} needs a run of one process; start it without a launcher")


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
        encode=lambda module, *inputs: forward(*inputs),
        head=lambda module, logits: logits,
    )
    engine_policy.module = nn.Module()  # without layers: no weight is stored twice
    # `Policy.device` is the device of the first parameter, so there must be one.
    engine_policy.module.place = nn.Parameter(torch.zeros((), device=policy.device), requires_grad=False)
    engine_policy.lora = None
    return engine_policy
