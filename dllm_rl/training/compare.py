"""Differences of rollout and learner that no importance weight corrects: the order of positions, a token's experts."""

from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor

from dllm_rl.algorithms.mismatch import PREFIX
from dllm_rl.diagnostics.routing import routing_counts, routing_metrics
from dllm_rl.distributed.collectives import Metrics, reduce_metrics, sum_over
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.uneven import join_uneven_forwards
from dllm_rl.samplers.agreement import order_agreement
from dllm_rl.types import Rollout, Views


def compare_sides(
    policy: Policy, rollout_policy: Policy, rollout: Rollout, views: Views
) -> tuple[Metrics, Int[Tensor, "M X"] | None]:
    """Return `order_agreement` and `routing_counts` of this process. The first counts how many of the first step's
    committed positions the learner would commit too, in one row per prompt.
    """
    if rollout_policy is policy:
        return {}, None
    with join_uneven_forwards(policy):  # both counts run the learner, which may be sharded
        return order_agreement(policy, rollout), routing_counts(policy, rollout_policy, rollout, views)


def side_metrics(order: Metrics, routing: Int[Tensor, "M X"] | None, accelerator: Accelerator) -> dict[str, float]:
    """Reduce the counts of `compare_sides` to metrics over all processes."""
    metrics = {PREFIX + name: value for name, value in reduce_metrics(order, accelerator).items()}
    return metrics if routing is None else metrics | routing_metrics(sum_over(routing, accelerator))
