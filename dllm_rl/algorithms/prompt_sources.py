"""Which prompts a step learns from: uniform ones, or those whose rewards still differ."""

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
    """The groups of completions that a run has graded so far, oldest first: N of them. All processes have the same.

    Attributes:
        num_prompts: Prompts of the task. A source returns indices below it.
        step: The training step that graded the group.
        prompt: The prompt's index.
        mean: The group's mean reward.
        mixed: Whether the group's rewards differed.
    """

    num_prompts: int
    step: Int[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    prompt: Int[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    mean: Float[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0))
    mixed: Bool[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("step", "prompt", "mean", "mixed")}

    def add(self, step: int, prompt: Int[Tensor, " P"], rewards: Float[Tensor, "P G K"]) -> None:
        """Append the groups of a draw of prompts. The first of K rewards is the one that the mean is of."""
        self.prompt = torch.cat([self.prompt, prompt])
        self.mean = torch.cat([self.mean, rewards[..., 0].mean(-1)])
        self.mixed = torch.cat([self.mixed, has_unequal_rewards(rewards)])
        self.step = torch.cat([self.step, torch.full_like(prompt, step)])  # last: `before` counts by it

    def before(self, step: int) -> "RewardHistory":
        """The groups of earlier steps; also while another thread adds later ones."""
        count = int((self.step < step).sum())
        return RewardHistory(self.num_prompts, **{name: value[:count] for name, value in self.tensors().items()})

    def latest(self) -> "RewardHistory":
        """Each prompt's last group, in order of prompts."""
        prompts, places = self.prompt.unique(return_inverse=True)
        last = torch.zeros_like(prompts).scatter_reduce(0, places, torch.arange(len(places)), "amax")
        return RewardHistory(self.num_prompts, **{name: value[last] for name, value in self.tensors().items()})


@dataclass(frozen=True)
class PromptSource:
    """How the prompts of a step are chosen.

    Attributes:
        draw: `(history, count, generator)` -> indices of `count` prompts. It must be a pure function of the three.
        uses_history: Whether `draw` reads the groups of `history`. Without, a run keeps none.
    """

    draw: Callable[[RewardHistory, int, Generator], Int[Tensor, " P"]]
    uses_history: bool = True
    factory: partial | None = field(default=None, init=False, repr=False, compare=False)


def _uniform(history: RewardHistory, count: int, generator: Generator) -> Int[Tensor, " P"]:
    return torch.randint(history.num_prompts, (count,), generator=generator)


@configurable
def uniform_prompts() -> PromptSource:
    """Draw every prompt with the same chance, with replacement."""
    return PromptSource(_uniform, uses_history=False)


@configurable
@bounded(equal_weight=Bound(above=0, at_most=1))
def mixed_reward_prompts(*, equal_weight: float = 0.1) -> PromptSource:
    """Prefer prompts whose rewards differed in their last group, and prompts that were not drawn yet [ours].

    Take it where many groups have equal rewards (`frac_reward_zero_std`) and the run draws each prompt several times:
    groups of equal rewards teach nothing. `max_num_gen_batches` (DAPO) samples such groups and then replaces them;
    this source draws fewer of them in the first place.

    Args:
        equal_weight: The chance of a prompt whose last group had equal rewards, as a share of any other prompt's.
    """
    return PromptSource(partial(_mixed, equal_weight=equal_weight))


def _mixed(history: RewardHistory, count: int, generator: Generator, *, equal_weight: float) -> Int[Tensor, " P"]:
    """Uniform prompts, of which those with equal rewards are rejected with probability 1 - equal_weight."""
    latest = history.latest()
    equal = latest.prompt[~latest.mixed]
    accepted = torch.zeros(0, dtype=torch.long)
    while len(accepted) < count:
        prompts = torch.randint(history.num_prompts, (count,), generator=generator)
        uniform = torch.rand(count, generator=generator)
        accepted = torch.cat([accepted, prompts[~torch.isin(prompts, equal) | (uniform < equal_weight)]])
    return accepted[:count]
