"""What every part of a step reads: settings, processes, policies, and the features, which are its optional parts."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from dllm_rl.models.forward.batch_invariance import batch_invariant
from dllm_rl.monitoring.log import RunLog
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.step.samples import Samples
from dllm_rl.step.settings import StepSettings
from dllm_rl.types.batch_record import Copied, decorate_own, given_copies
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Logprobs, Views

if TYPE_CHECKING:
    from torch.optim import Optimizer

Metrics = dict[str, float]


class StepFeature:
    """An optional part of a training step: override what it needs.

    Subclass it to change a step without a recipe's setting for that, and pass it to `train(recipe, features=(...))`.
    `training/parts` has those that a recipe may ask for. All methods are called in every process, in the order of the
    tuple. What a feature remembers from step to step goes through `state` and `load_state`, or is gone after a resume.
    The samples and views that it gets are copies; it returns changed ones, such as `replace(samples, advantages=...)`.

    A step calls `after_rollout` before the completions are scored, `token_advantages` for each set of masks (also in
    the rehearsal before the first step, on one group), `before_update` before each step of the optimizer, `learn` after
    the last one, and `after_update` before the rollout policy gets the new weights.
    """

    max_staleness: int = 0  # steps by which weights of rows may be older, if it adds rows of earlier steps

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        decorate_own(cls, given_copies, "token_advantages")
        decorate_own(cls, _refusing_writes, "after_rollout")

    def after_rollout(self, context: "StepContext", samples: Samples, step: int) -> tuple[Samples, Metrics]:
        """Change the samples before anything is scored, and return metrics.

        To leave out a row, keep it and set its reward to NaN and its advantage to 0. `Samples.concatenate` adds rows.
        """
        return samples, {}

    def token_advantages(self, context: "StepContext", samples: Samples, views: Views) -> Float[Tensor, "B T"] | None:
        """Return the advantage of each scored token in place of the row's; None to keep the row's. A run with it trains
        on every group, also on those of equal rewards.
        """
        return None

    def before_update(self, context: "StepContext", metrics: Metrics) -> bool:
        """Return whether to take this step of the optimizer; False skips it, as for an outlying gradient.

        The gradients are those of the trained weights of `context.policy.module`, clipped, and may be changed in place.
        `metrics` has the loss, and grad_norm before clipping, of all processes. False in one process skips in all.
        """
        return True

    def learn(self, context: "StepContext", optimizer: "Optimizer") -> None:
        """Update weights that belong to the learner's, or the learner itself with its optimizer, before the update
        counts as done: an error here loses it.
        """

    def after_update(self, context: "StepContext") -> Metrics:
        """Return metrics of the update. Its gradients are still there, except with replay, which updates after it. An
        error here leaves a checkpoint of it.
        """
        return {}

    def state(self, context: "StepContext") -> bytes | None:
        """Return what a checkpoint stores of this feature, the same in all processes; None for nothing. Change it only
        in `learn`: a checkpoint that is written after an error or a signal belongs to the last complete update.
        """
        return None

    def load_state(self, context: "StepContext", state: bytes) -> None:
        """Continue from the state of a checkpoint. Called before the first step of a resumed run, when the context has
        the checkpoint's weights.
        """


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


def gives_token_advantages(feature: StepFeature) -> bool:
    """Return whether the feature's class has `token_advantages` of its own."""
    return type(feature).token_advantages is not StepFeature.token_advantages


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
    balances: bool = False  # whether processes with much work swap groups with others before scoring
    # Raises RuntimeError unless rollout and learner agree to the bit; all forwards are then batch-invariant.
    zero_mismatch: Callable[[Rollout, Logprobs], None] | None = None
    # What the corrector has written into `TokenStats.state`: of the last complete update, and of the one that is made.
    # None: nothing stores it, and a corrector that writes is refused.
    corrector_state: dict[str, Any] | None = field(default_factory=dict)
    next_corrector_state: dict[str, Any] = field(default_factory=dict)
    log: RunLog = field(default_factory=partial(RunLog, Path(os.devnull), start=0, main=False))  # writes nothing

    @property
    def learner_samples(self) -> bool:
        """Whether the learner makes the rollouts itself: there is no copy, and no weights to sync."""
        return self.rollout_policy is self.policy

    @property
    def trains_all_groups(self) -> bool:
        """Whether the update also trains on groups of equal rewards: a setting or a feature gives them a gradient."""
        return self.settings.trains_all_groups or any(map(gives_token_advantages, self.features))

    @contextmanager
    def arithmetic(self, *, learner: bool = False) -> Iterator[None]:
        """Set how every forward of the step computes: in bf16 if `bf16` is set, batch-invariant under `zero_mismatch`,
        and the learner's with the rollout's quantized operands if the corrector aligns them.
        """
        settings, device = self.settings, self.accelerator.device.type
        with ExitStack() as stack:
            stack.enter_context(
                torch.autocast(device, torch.bfloat16, enabled=settings.bf16, cache_enabled=not settings.is_sharded)
            )
            if self.zero_mismatch is not None:
                stack.enter_context(batch_invariant())
            if learner:
                self.policy.module.eval()  # a callback may have changed it; rollouts and scores drop nothing
            if learner and settings.corrector.align_forward and not self.learner_samples:
                stack.enter_context(aligned_forward(self.policy, self.rollout_policy))
            yield
