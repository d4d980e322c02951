"""Compare two choices of rollout and learner that importance weights do not correct: the order of positions, and each
token's experts.
"""

from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from dllm_rl.algorithms.mismatch import PREFIX
from dllm_rl.diagnostics.routing_agreement import routing_counts, routing_metrics
from dllm_rl.distributed.collectives import Metrics, reduce_metrics, sum_over
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.uneven import join_uneven_forwards
from dllm_rl.samplers.agreement import order_agreement
from dllm_rl.types import Rollout, Views


def compare_rollout_and_learner(
    policy: Policy, rollout_policy: Policy, rollout: Rollout, views: Views
) -> tuple[Metrics, Int[Tensor, "M X"] | None]:
    """Count how often learner and rollout policy agree, over this process's rows. Call it before the update.

    Returns:
        `order_agreement`: of the positions that the first denoising step commits, how many the learner would commit
        too, in one row per prompt. `routing_counts`: how many tokens are routed to the same experts. Without a separate
        rollout policy: {}, None.
    """
    if rollout_policy is policy:
        return {}, None
    with join_uneven_forwards(policy):  # both counts run the learner, which may be sharded
        return order_agreement(policy, rollout), routing_counts(policy, rollout_policy, rollout, views)


def order_and_routing_metrics(
    order: Metrics, routing: Int[Tensor, "M X"] | None, accelerator: Accelerator
) -> dict[str, float]:
    """Reduce the counts of `compare_rollout_and_learner` to metrics over all processes."""
    metrics = {PREFIX + name: value for name, value in reduce_metrics(order, accelerator).items()}
    return metrics if routing is None else metrics | routing_metrics(sum_over(routing, accelerator))
