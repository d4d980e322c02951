"""`Sampler`: the base of the records that complete prompts."""

from collections.abc import Callable
from typing import Any

from torch import Generator

from dllm_rl.models.base import Policy
from dllm_rl.records import Record, annotations_of, describe, option
from dllm_rl.types.batch_record import decorate_own, given_copies
from dllm_rl.types.rollouts import Prompts, Rollout


class Sampler(Record):
    """A rule that completes prompts with a policy.

    Use `Unmask`, `Autoregress` or `Renoise`. For a custom sampler, subclass this class and define `__call__`, or wrap a
    function by `FunctionSampler`.

    Args:
        max_new_tokens: Largest number of tokens of a completion.
    """

    max_new_tokens: int = option(at_least=0)

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        decorate_own(cls, given_copies, "__call__")

    def __call__(self, policy: Policy, prompts: Prompts, generator: Generator) -> Rollout:
        """Complete every row of the prompts; `generator` draws one seed per row."""
        raise TypeError(f"{type(self).__name__} must define __call__(policy, prompts, generator)")

    def greedy(self) -> "Sampler":
        """Return the sampler for evaluations: at temperature 0, or itself if it has no temperature.

        Raises:
            ValueError: It cannot have the temperature 0.
        """
        return self.replace(temperature=0.0) if "temperature" in annotations_of(type(self)) else self


class FunctionSampler(Sampler):
    """A sampler that a function computes.

    Args:
        function: Function (policy, prompts, generator) -> Rollout.
        max_new_tokens: Largest number of tokens of a completion that it makes.
    """

    function: Callable[..., Any]

    def __call__(self, policy: Policy, prompts: Prompts, generator: Generator, **keywords: Any) -> Rollout:
        return self.function(policy, prompts.copied(), generator, **keywords)


def check_rollout(sampler: Callable[..., Rollout], policy: Policy, prompts: Prompts, rollout: Rollout) -> None:
    """Raise ValueError if a rollout lacks a row of the prompts that a sampler got, or a position to fill in.

    Call it after each sampler that a user may have written. The message names the sampler.
    """
    rows, width = prompts.tokens.shape
    if len(rollout.tokens) != rows:
        raise ValueError(
            f"sampler={describe(sampler)} must return one row for each row of its prompts; it returned "
            f"{len(rollout.tokens)} for {rows}"
        )
    if prompts.infill_mask is None:
        return
    is_filled = rollout.completion_mask[:, :width] & (rollout.tokens[:, :width] != policy.spec.mask_id)
    if num_left := int((prompts.infill_mask & ~is_filled.to(prompts.infill_mask.device)).sum()):
        raise ValueError(
            f"sampler={describe(sampler)} did not fill {num_left} of {int(prompts.infill_mask.sum())} blanks; write "
            "the positions of prompts.infill_mask, and set completion_mask there, or give rows without blanks"
        )
