"""`Sampler`: the base of the records that complete prompts."""

from collections.abc import Callable
from typing import Any

from torch import Generator

from dllm_rl.models.base import Policy
from dllm_rl.records import Record, option
from dllm_rl.types import Prompts, Rollout


class Sampler(Record):
    """A rule that completes prompts with a policy.

    Use `Unmask`, `Autoregress` or `Renoise`. For a custom sampler, subclass this class and define `__call__`, or wrap a
    function by `FunctionSampler`.

    Args:
        max_new_tokens: Largest number of tokens of a completion.
    """

    max_new_tokens: int = option(at_least=0)

    def __call__(self, policy: Policy, prompts: Prompts, generator: Generator) -> Rollout:
        """Complete every row of the prompts; `generator` draws one seed per row."""
        raise TypeError(f"{type(self).__name__} must define __call__(policy, prompts, generator)")


class FunctionSampler(Sampler):
    """A sampler that a function computes.

    Args:
        function: Function (policy, prompts, generator) -> Rollout.
        max_new_tokens: Largest number of tokens of a completion that it makes.
    """

    function: Callable[..., Any]

    def __call__(self, policy: Policy, prompts: Prompts, generator: Generator, **keywords: Any) -> Rollout:
        return self.function(policy, prompts, generator, **keywords)
