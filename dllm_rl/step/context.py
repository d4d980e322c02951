"""What every part of a step reads: settings, processes, policies, and the features, which are its optional parts."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.models.base import Policy
from dllm_rl.monitoring.log import RunLog
from dllm_rl.step.samples import Samples
from dllm_rl.step.settings import StepSettings
from dllm_rl.types import Copied, Logprobs, Rollout, Views, decorate_own, given_copies

if TYPE_CHECKING:
    from torch.optim import Optimizer

Metrics = dict[str, float]


class StepFeature:
    """An optional part of a training step: override what it needs.

    Subclass it to change a step without a recipe's setting for that, and pass it to `train(recipe, features=(...))`.
    `training.make_step` adds those that the recipe asks for. All methods are called in every process, in the order of
    the tuple; those of scoring also in the rehearsal before the first step, on one group. What a feature remembers from
    step to step goes through `state` and `load_state`, or is gone after a resume. The samples, rollouts, views and
    log-probs that it gets are copies; it returns changed ones, such as `replace(samples, advantages=...)`.

    A step calls `after_rollout` and `before_scoring` once, before the completions are scored. For each set of masks it
    calls `token_advantages`, `views_to_score`, `views_to_learn` (if the rollout policy is scored) and `check_scores`.
    Then it calls `metrics`, `learn`, `after_update` and `syncs`. `around_forward` and `around_learner` wrap forwards.
    """

    max_staleness: int = 0  # steps by which weights of rows may be older: `syncs` returns False, or rows are added
    changes_views: bool = False  # whether it drops views: the sampler's record, which is of all, is then not used

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        methods = ("token_advantages", "views_to_score", "views_to_learn", "check_scores")
        decorate_own(cls, given_copies, *methods)
        decorate_own(cls, _refusing_writes, "after_rollout", "before_scoring")

    def around_forward(self, context: "StepContext") -> AbstractContextManager:
        """Return a context for all forwards of the step: rollouts, a teacher's, the learner's."""
        return nullcontext()

    def around_learner(self, context: "StepContext") -> AbstractContextManager:
        """Return a context for scoring and updating."""
        return nullcontext()

    def after_rollout(self, context: "StepContext", samples: Samples, step: int) -> tuple[Samples, Metrics]:
        """Change the samples before anything is scored, and return metrics.

        To leave out a row, keep it and set its reward to NaN and its advantage to 0. `Samples.concatenate` adds rows.
        """
        return samples, {}

    def before_scoring(self, context: "StepContext", samples: Samples) -> Samples:
        """Move or reorder the samples between processes. Which groups are scored is known by now: give a group its
        advantages in `after_rollout`.
        """
        return samples

    def token_advantages(self, context: "StepContext", samples: Samples, views: Views) -> Float[Tensor, "B T"] | None:
        """Return the advantage of each scored token in place of the row's; None to keep the row's. A run with it trains
        on every group, also on those of equal rewards.
        """
        return None

    def views_to_score(self, context: "StepContext", rollout: Rollout, views: Views, *, recorded: bool) -> Views:
        """Change the views before rollout policy and learner score them, and the reference if `changes_views` is set.
        `recorded`: the rollout's log-probs are those that the sampler recorded.
        """
        return views

    def views_to_learn(self, rollout: Rollout, views: Views) -> Views:
        """Change the views after the rollout policy has scored them, and before the learner does."""
        return views

    def check_scores(self, context: "StepContext", rollout: Rollout, logps: Logprobs) -> None:
        """Check the scores. Raise RuntimeError to end the run."""

    def learn(self, context: "StepContext", optimizer: "Optimizer") -> None:
        """Update weights that belong to the learner's, or the learner itself with its optimizer, before the update
        counts as done: an error here loses it.
        """

    def after_update(self, context: "StepContext") -> Metrics:
        """Return metrics of the update. Its gradients are still there, except with replay, which updates after it. An
        error here leaves a checkpoint of it.
        """
        return {}

    def syncs(self, context: "StepContext", step: int) -> bool:
        """Return whether the rollout policy gets the learner's weights after this step, counted from 0."""
        return True

    def metrics(self, context: "StepContext") -> Metrics:
        """Return metrics of the scoring."""
        return {}

    def state(self) -> bytes | None:
        """Return what a checkpoint stores of this feature, the same in all processes; None for nothing. Change it only
        in `learn`: a checkpoint that is written after an error or a signal belongs to the last complete update.
        """
        return None

    def load_state(self, state: bytes) -> None:
        """Continue from the state of a checkpoint. Called before the first step of a resumed run."""


def _refusing_writes(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method (context, samples, ...) that returns samples, to get copies.

    Raises:
        ValueError: The method has written into them: nobody knows whether the change is meant for the run.
    """

    @wraps(method)
    def wrapped(self: StepFeature, context: StepContext, samples: Samples, *others: Any) -> Any:
        given = samples.copied()
        returned = method(self, context, given, *others)
        if name := _first_difference(samples, given):
            raise ValueError(
                f"features: {method.__name__} of {type(self).__name__} wrote into samples.{name}; write into "
                f"samples.{name}.clone(), and return replace(samples, ...) if the run is to have the change"
            )
        return returned

    return wrapped


def _first_difference(first: Any, second: Any) -> str | None:
    """Return the name of the first tensor that differs between two records of one kind."""
    for field_ in fields(first):
        one, other = getattr(first, field_.name), getattr(second, field_.name)
        pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
        for left, right in pairs:
            if isinstance(left, Copied) and (name := _first_difference(left, right)):
                return f"{field_.name}.{name}"
            if isinstance(left, Tensor) and not torch.allclose(left, right, rtol=0, atol=0, equal_nan=True):
                return field_.name
    return None


def overrides(feature: StepFeature, *methods: str) -> bool:
    """Return whether the feature's class has one of the methods of its own."""
    return any(getattr(type(feature), name) is not getattr(StepFeature, name) for name in methods)


@dataclass(eq=False, kw_only=True)
class StepContext:
    """Settings, processes, log and policies of a step. A run has one, and so has a rollout worker."""

    settings: StepSettings
    accelerator: Accelerator
    policy: Policy
    rollout_policy: Policy
    history: RewardHistory  # empty if the prompt source does not read it
    reference: Policy | None = None
    features: tuple[StepFeature, ...] = ()
    log: RunLog = field(default_factory=partial(RunLog, Path(os.devnull), start=0, main=False))  # writes nothing

    @property
    def learner_samples(self) -> bool:
        """Whether the learner makes the rollouts itself: there is no copy, and no weights to sync."""
        return self.rollout_policy is self.policy

    @property
    def trains_all_groups(self) -> bool:
        """Whether the update also trains on groups of equal rewards: a setting or a feature gives them a gradient."""
        return self.settings.trains_all_groups or any(overrides(each, "token_advantages") for each in self.features)

    @contextmanager
    def arithmetic(self, *, learner: bool = False) -> Iterator[None]:
        """Set what every forward of the step needs: autocast to bf16 if `bf16` is set, and the features'; for forwards
        of the learner also what the features need for those.
        """
        if learner:
            self.policy.module.eval()  # a callback may have changed it; rollouts and scores drop nothing
        with ExitStack() as stack:
            settings, device = self.settings, self.accelerator.device.type
            stack.enter_context(
                torch.autocast(device, torch.bfloat16, enabled=settings.bf16, cache_enabled=not settings.is_sharded)
            )
            for feature in self.features:
                stack.enter_context(feature.around_forward(self))
            for feature in self.features if learner else ():
                stack.enter_context(feature.around_learner(self))
            yield
