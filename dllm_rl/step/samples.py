"""The data of one training step. Keep every per-group tensor in `Samples`, so that load balancing reorders all of them
together.
"""

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.types import Logprobs, Rollout


@dataclass(frozen=True)
class Samples:
    """Data of one training step. `rollout` has this process's rows; tensors with a group axis P cover all processes, in
    rank order.

    Args:
        rollout: This process's completions.
        rewards: Rewards of all processes.
        advantages: Advantages of all processes.
        metric_weights: Weight of each group in the mismatch metrics: its inverse sampling fraction, 0 if it is not
            scored.
        rollout_logprobs: Log-probs under the weights that sampled, in nats, one tensor per set of views of the step
            (`step.mask_sets.draw_view_sets`). Set only for asynchronous rollouts whose estimator does not replay the
            sampler.
        batch_number: Number of the batch, which gives its prompts, random numbers and masks. None (default): the step
            that trains on it. Set only with rollout_schedule='first_ready'.
    """

    rollout: Rollout
    rewards: Float[Tensor, "P G"]
    advantages: Float[Tensor, "P G"]
    metric_weights: Float[Tensor, " P"]
    rollout_logprobs: tuple[Float[Tensor, "B T"], ...] = ()
    batch_number: int | None = None

    def batch_number_of(self, step: int) -> int:
        """Return the number of the batch that `step` trains on."""
        return step if self.batch_number is None else self.batch_number

    def reorder_groups(self, order: Int[Tensor, " P"], rollout: Rollout) -> "Samples":
        """Return the samples with their groups in this order; `rollout` has this process's new rows."""
        return Samples(
            rollout,
            self.rewards[order],
            self.advantages[order],
            self.metric_weights[order],
            batch_number=self.batch_number,
        )

    def of_rows(self, rows: Int[Tensor, " B"]) -> "Samples":
        """Return the samples of a process that trains on these rows of the rollout."""
        logprobs = tuple(values[rows] for values in self.rollout_logprobs)
        return replace(self, rollout=self.rollout.rows(rows), rollout_logprobs=logprobs)

    def with_metric_weights(self, weights: Float[Tensor, " P"]) -> "Samples":
        """Return a copy with these weights in the mismatch metrics."""
        return replace(self, metric_weights=weights)


@dataclass(frozen=True)
class StepResult:
    """Samples that a step trained on, and the metrics of the step.

    After load balancing, some rows come from other processes. With several sets of views, `logps` and all metrics
    except the update's belong to the first set.
    """

    samples: Samples
    logps: Logprobs
    metrics: dict[str, float]
