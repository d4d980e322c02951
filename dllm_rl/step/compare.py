"""Compare two choices of rollout and learner that importance weights do not correct: the order of positions, and each
token's experts.
"""

from collections.abc import Callable

from dllm_rl.algorithms.mismatch import PREFIX
from dllm_rl.distributed.collectives import reduce_metrics, sum_over
from dllm_rl.likelihoods.routing_agreement import routing_counts, routing_metrics
from dllm_rl.models.forward.uneven import join_uneven_forwards
from dllm_rl.samplers.agreement import order_agreement
from dllm_rl.step.context import StepContext
from dllm_rl.step.features import StepFeature
from dllm_rl.types import Rollout, Views


class Agreement(StepFeature):
    """How often a learner and its separate rollout policy agree, before the update.

    order_agreement: of the positions that the first denoising step commits, how many the learner would commit too.

    routing_*: how many tokens are routed to the same experts (`routing_metrics`), for a mixture of experts.
    """

    def compare(self, context: StepContext, rollout: Rollout, views: Views) -> Callable[[], dict[str, float]]:
        policy, accelerator = context.policy, context.accelerator
        with join_uneven_forwards(policy):  # both counts run the learner, which may be sharded
            order = order_agreement(policy, rollout)
            routing = routing_counts(policy, context.rollout_policy, rollout, views)

        def reduced() -> dict[str, float]:
            metrics = {PREFIX + name: value for name, value in reduce_metrics(order, accelerator).items()}
            return metrics if routing is None else metrics | routing_metrics(sum_over(routing, accelerator))

        return reduced
