"""Choice of the prompts of a training step: uniform, or prompts whose completions still have different rewards.

docs/methods.md explains the tag [ours].
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dllm_rl.algorithms.advantages import has_unequal_rewards
from dllm_rl.bounds import Bound, bounded
from dllm_rl.members import configurable


@dataclass(eq=False)
class RewardHistory:
    """The N groups of completions that a run has graded so far, in order of time.

    All processes have the same history. A prompt source reads it.

    Attributes:
        num_prompts: Number of prompts of the task. A source returns indices below this number.
        step: Training step that graded the group.
        prompt: Index of the prompt.
        mean: Mean reward of the group.
        mixed: Whether the rewards of the group differed.
    """

    num_prompts: int
    step: Int[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    prompt: Int[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    mean: Float[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0))
    mixed: Bool[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("step", "prompt", "mean", "mixed")}

    def add(self, step: int, prompt: Int[Tensor, " P"], rewards: Float[Tensor, "P G K"]) -> None:
        """Append one group per drawn prompt. Its `mean` is the mean of the first of the K rewards, without those that
        are NaN.
        """
        self.prompt = torch.cat([self.prompt, prompt])
        values = rewards[..., 0]
        self.mean = torch.cat([self.mean, values.nanmean(-1) if values.isnan().any() else values.mean(-1)])
        self.mixed = torch.cat([self.mixed, has_unequal_rewards(rewards)])
        # Last, because `before`, in another thread, relies on `step` for the number of complete entries.
        self.step = torch.cat([self.step, torch.full_like(prompt, step)])

    def before(self, step: int) -> "RewardHistory":
        """Return the groups of earlier steps. Safe while another thread adds later groups."""
        count = int((self.step < step).sum())
        return RewardHistory(self.num_prompts, **{name: value[:count] for name, value in self.tensors().items()})

    def latest(self) -> "RewardHistory":
        """Return each prompt's last group, ordered by prompt."""
        prompts, prompt_index = self.prompt.unique(return_inverse=True)
        last = torch.zeros_like(prompts).scatter_reduce(0, prompt_index, torch.arange(len(prompt_index)), "amax")
        return RewardHistory(self.num_prompts, **{name: value[last] for name, value in self.tensors().items()})


@dataclass(frozen=True)
class PromptSource:
    """A rule that chooses the prompts of a step.

    To choose prompts by a custom rule, write a function that returns a PromptSource, and decorate it with
    `members.configurable`.

    Attributes:
        draw: Function `(history, count, generator)` -> indices of `count` prompts. It must be a pure function of these
            arguments.
        uses_history: Whether `draw` reads the groups of `history`. If False, a run records none. Default: True.
        factory: Function that made the source, with its arguments. Set by `members.configurable`.
    """

    draw: Callable[[RewardHistory, int, Generator], Int[Tensor, " P"]]
    uses_history: bool = True
    factory: partial | None = field(default=None, init=False, repr=False, compare=False)


def _uniform(history: RewardHistory, count: int, generator: Generator) -> Int[Tensor, " P"]:
    return torch.randint(history.num_prompts, (count,), generator=generator)


@configurable
def uniform_prompts() -> PromptSource:
    """Draw every prompt with the same probability, with replacement.

    This is the default.
    """
    return PromptSource(_uniform, uses_history=False)


@configurable
@bounded(equal_weight=Bound(above=0, at_most=1))
def mixed_reward_prompts(*, equal_weight: float = 0.1) -> PromptSource:
    """Prefer prompts whose rewards differed in their last group, and prompts that have not been drawn yet [ours].

    Use it if many groups have equal rewards (`frac_reward_zero_std`), which have no advantage, and the run draws each
    prompt several times. This source draws fewer such groups; `max_num_gen_batches` (DAPO) replaces them after they
    have been sampled.

    Args:
        equal_weight: Probability of a prompt whose last group had equal rewards, relative to any other prompt, above 0
            and at most 1. Default: 0.1.

    Raises:
        ValueError: equal_weight is out of its range.
    """
    return PromptSource(partial(_mixed, equal_weight=equal_weight))


def _mixed(history: RewardHistory, count: int, generator: Generator, *, equal_weight: float) -> Int[Tensor, " P"]:
    """Draw uniform prompts, and reject a prompt with equal rewards with probability 1 - equal_weight."""
    latest = history.latest()
    equal_reward_prompts = latest.prompt[~latest.mixed]
    accepted = torch.zeros(0, dtype=torch.long)
    while len(accepted) < count:
        prompts = torch.randint(history.num_prompts, (count,), generator=generator)
        uniform = torch.rand(count, generator=generator)
        accepted = torch.cat([accepted, prompts[~torch.isin(prompts, equal_reward_prompts) | (uniform < equal_weight)]])
    return accepted[:count]
