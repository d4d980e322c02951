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
        metric_weights: Weight of each group in the mismatch metrics: its inverse sampling fraction, 0 if it is not
            scored.
        rollout_logprobs: For asynchronous rollouts whose estimator does not replay the sampler: the estimate by the
            weights that sampled, in nats, under each set of the step's masks (`training.views.views_of_step`).
    """

    rollout: Rollout
    rewards: Float[Tensor, "P G"]
    advantages: Float[Tensor, "P G"]
    metric_weights: Float[Tensor, " P"]
    rollout_logprobs: tuple[Float[Tensor, "B T"], ...] = ()

    def reordered(self, order: Int[Tensor, " P"], rollout: Rollout) -> "Samples":
        """Return all groups in this order, with this process's rows."""
        return Samples(rollout, self.rewards[order], self.advantages[order], self.metric_weights[order])

    def weighted(self, weights: Float[Tensor, " P"]) -> "Samples":
        return replace(self, metric_weights=weights)


@dataclass(frozen=True)
class Step:
    """Samples that a step learned from, and its metrics.

    After load balancing, some rows come from other processes. With several sets of masks, `logps` and all metrics
    except the update's belong to the first set.
    """

    samples: Samples
    logps: Logprobs
    metrics: dict[str, float]
