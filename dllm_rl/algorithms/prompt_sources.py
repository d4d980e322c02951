"""Choice of the prompts of a training step: uniform, or prompts whose completions still have different rewards.

docs/papers.md explains the tag [ours].
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dllm_rl.algorithms.advantages import has_unequal_rewards, to_groups
from dllm_rl.records import FunctionRecord, Record, option
from dllm_rl.types.batch_record import Copied, decorate_own, given_copies


@dataclass(eq=False)
class RewardHistory(Copied):
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
    mean: Float[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.double))
    mixed: Bool[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("step", "prompt", "mean", "mixed")}

    def add(
        self, step: int, prompt: Int[Tensor, " P"], rewards: Float[Tensor, "B K"], group: Int[Tensor, " B"]
    ) -> None:
        """Append one group per drawn prompt. Its `mean` is the mean of the first of the K rewards, without those that
        are NaN.
        """
        self.prompt = torch.cat([self.prompt, prompt])
        values = to_groups(rewards[:, 0], group)
        self.mean = torch.cat([self.mean, values.nanmean(-1) if values.isnan().any() else values.mean(-1)])
        self.mixed = torch.cat([self.mixed, has_unequal_rewards(rewards, group)])
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


class PromptSource(Record):
    """A rule that chooses the prompts of a step.

    Subclass it for a custom rule. Where a prompt source is expected, a plain function (history, count, generator) is
    one too.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        decorate_own(cls, given_copies, "draw", "group_sizes")

    @property
    def uses_history(self) -> bool:
        """Whether `draw` reads the groups of `history`. If False, a run records none."""
        return True

    def draw(self, history: RewardHistory, count: int, generator: Generator) -> Int[Tensor, " P"]:
        """Return the indices of `count` prompts. It must be a pure function of its arguments."""
        raise TypeError(f"{type(self).__name__} must define draw(history, count, generator)")

    def group_sizes(
        self, history: RewardHistory, prompts: Int[Tensor, " P"], num_generations: int, generator: Generator
    ) -> Int[Tensor, " P"]:
        """Return the number of completions of each drawn prompt, at least 1. Default: the recipe's num_generations.

        Override it for groups of different sizes. A recipe's `--dry_run` counts num_generations for each. With dynamic
        sampling, a group that replaces another has the other's size. It must be a pure function of its arguments.
        """
        return torch.full_like(prompts, num_generations)


class FunctionPromptSource(FunctionRecord, PromptSource):
    """A prompt source that a function computes.

    Args:
        function: Function (history, count, generator) -> indices of `count` prompts. It must be pure.
        uses_history: Whether the function reads `history`. If False, a run records none. Default: True.
    """

    uses_history: bool = True

    def draw(self, history: RewardHistory, count: int, generator: Generator) -> Tensor:
        return self.function(history.copied(), count, generator)


class UniformPrompts(PromptSource):
    """Draw every prompt with the same probability, with replacement.

    This is the default.
    """

    uses_history = False

    def draw(self, history: RewardHistory, count: int, generator: Generator) -> Int[Tensor, " P"]:
        return torch.randint(history.num_prompts, (count,), generator=generator)


class MixedRewardPrompts(PromptSource):
    """Prefer prompts whose rewards differed in their last group, and prompts that have not been drawn yet [ours].

    Use it if many groups have equal rewards (`frac_reward_zero_std`), which have no advantage, and the run draws each
    prompt several times. This source draws fewer such groups; `max_num_gen_batches` (DAPO) replaces them after they
    have been sampled.

    Args:
        equal_weight: Probability of a prompt whose last group had equal rewards, relative to any other prompt, above 0
            and at most 1. Default: 0.1.
    """

    equal_weight: float = option(default=0.1, above=0, at_most=1)

    def draw(self, history: RewardHistory, count: int, generator: Generator) -> Int[Tensor, " P"]:
        """Draw uniform prompts, and reject a prompt with equal rewards with probability 1 - equal_weight."""
        latest = history.latest()
        equal_reward_prompts = latest.prompt[~latest.mixed]
        accepted = torch.zeros(0, dtype=torch.long)
        while len(accepted) < count:
            prompts = torch.randint(history.num_prompts, (count,), generator=generator)
            uniform = torch.rand(count, generator=generator)
            has_differing = ~torch.isin(prompts, equal_reward_prompts)
            accepted = torch.cat([accepted, prompts[has_differing | (uniform < self.equal_weight)]])
        return accepted[:count]
