"""What a step samples: one record, so that whatever reorders a step's groups reorders all that is known of them."""

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.types import Logprobs, Rollout


@dataclass(frozen=True)
class Samples:
    """The rollout holds this process's rows; what is said by group is of all processes, theirs in order of rank.

    Args:
        metric_weights: Of a group in the mismatch metrics: its inverse sampling fraction, 0 where it is not scored.
        rollout_logprobs: Of late rollouts, where the estimate does not replay the sampler: the estimate by the weights
            that sampled, nats, under each set of the step's masks (`selection.views_of_step`).
    """

    rollout: Rollout
    rewards: Float[Tensor, "P G"]
    advantages: Float[Tensor, "P G"]
    metric_weights: Float[Tensor, " P"]
    rollout_logprobs: tuple[Float[Tensor, "B T"], ...] = ()

    def reordered(self, order: Int[Tensor, " P"], rollout: Rollout) -> "Samples":
        """All groups in this order, and this process's rows of them."""
        return Samples(rollout, self.rewards[order], self.advantages[order], self.metric_weights[order])

    def weighted(self, weights: Float[Tensor, " P"]) -> "Samples":
        return replace(self, metric_weights=weights)


@dataclass(frozen=True)
class Step:
    """What a step learned from, and its metrics. After load balancing, some rows come from other processes. With
    several sets of masks, `logps` and all metrics but the update's are of the first set.
    """

    samples: Samples
    logps: Logprobs
    metrics: dict[str, float]
