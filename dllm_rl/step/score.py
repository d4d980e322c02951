"""Score a step's samples: choose the groups to score and their masks, and compute the log-probs under learner, rollout
policy and reference, in the same views.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from dllm_rl.distributed.collectives import SumsAndCounts, gather_on_host
from dllm_rl.likelihoods.drawn_steps import draw_steps
from dllm_rl.likelihoods.estimators import LikelihoodEstimator, recorded
from dllm_rl.likelihoods.views import each_forward
from dllm_rl.models.base import Policy, join_uneven_forwards
from dllm_rl.models.logprobs import chunked, process
from dllm_rl.rng import generator_for
from dllm_rl.samplers.choose import order_agreement
from dllm_rl.step.balance import balance
from dllm_rl.step.context import StepContext
from dllm_rl.step.samples import Samples, active_rows
from dllm_rl.step.settings import MEASURE_STEPS, StepSettings
from dllm_rl.types.groups import any_in_group, group_numbers, starts_group
from dllm_rl.types.retained_graphs import RetainedGraphs
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Logprobs, Views


@dataclass(frozen=True)
class ScoredSamples:
    """Samples of a step, with their log-probs before the step's first update.

    Args:
        samples: The samples, after load balancing.
        logps: Log-probs under each of the step's sets of views; the first set also serves the metrics.
        order_agreement: (sum, count) pairs of this process: how often the learner commits the rollout's positions.
            Empty in a step that does not measure it.
        graphs: Graphs of the first set's forwards, for the first update. None (default): the update runs them again.
    """

    samples: Samples
    logps: list[Logprobs]
    order_agreement: SumsAndCounts
    graphs: RetainedGraphs | None = None


def score_samples(context: StepContext, samples: Samples, step: int) -> ScoredSamples:
    """Compute the log-probs of a step's samples under learner, rollout policy and reference.

    Call it before the step's first update. `step` is the number of the samples' batch.

    Raises:
        ValueError: The update trains on rows that a worker of late rollouts left out.
    """
    settings, all_groups = context.settings, context.trains_all_groups
    if samples.source == "fresh":
        # Score the groups that the update trains on, and a random sample of the other groups. Together, weighted, they
        # estimate the metrics of all groups.
        samples = replace(samples, metric_weights=metric_weights(settings, samples, step, all_groups=all_groups))
    elif trains_unscored_rows(context, samples):
        raise ValueError(
            "the update trains on groups whose rollout log-probs their worker did not compute, because a feature or a "
            "changed setting made them count: use a likelihood that is exact for the sampler, such as Trajectory(), or "
            "late.max_staleness=0"
        )
    if context.balances:
        samples = balance(
            settings,
            samples,
            context.accelerator,
            pad_id=context.policy.pad_id,
            swaps=context.zero_mismatch is None,
            all_groups=all_groups,
        )
    rollout = samples.rollout
    # All policies use the same views. The sets after the first serve only the later updates, not the metrics.
    views = draw_view_sets(settings, samples, step, context.accelerator, all_groups=all_groups)
    order: SumsAndCounts = {}
    if not context.learner_samples and step % MEASURE_STEPS == 0:  # from the first batch, whose scoring is rehearsed
        # Importance weights do not correct a different order of positions. Compare before `score`, which
        # may retain graphs: their memory and this comparison's would add up.
        with join_uneven_forwards(context.policy):  # it runs the learner, which may be sharded
            order = order_agreement(context.policy, rollout)
    rollout_logps = samples.rollout_logprobs or (None,) * len(views)  # set only for asynchronous rollouts
    is_trained_row = samples.local(active_rows(settings, samples, all_groups=all_groups), context.accelerator)
    graphs = retained_graphs(settings, context.policy, is_trained_row)
    logps = []
    for k in reversed(range(len(views))):  # the first set comes last, since it may retain graphs
        token_advantages = None
        for feature in context.features:
            given = feature.token_advantages(context, samples, views[k])
            token_advantages = token_advantages if given is None else given
        if k < settings.num_scored_mask_sets:
            retained = graphs if k == 0 else None
            scores = score(context, rollout, views[k], rollout_logprobs=rollout_logps[k], graphs=retained)
        else:
            view_zeros = torch.zeros(views[k].coefficients.shape, device=rollout.tokens.device)
            scores = Logprobs(view_zeros[0], view_zeros, view_zeros[0], None, views[k], is_scored=False)
        logps.append(replace(scores, token_advantages=token_advantages))
    return ScoredSamples(samples, logps[::-1], order, graphs)


def rollout_logprob_source(
    likelihood: LikelihoodEstimator, *, learner_samples: bool, gives_logits: bool = True
) -> Literal["recorded", "scored", "learner"]:
    """Return the source of the rollout's log-probs: "recorded" (by the sampler; the estimator would compute
    the same numbers), "scored" (a forward of the rollout policy) or "learner" (the learner itself sampled).
    """
    if likelihood.exact_for_sampler or not gives_logits:
        return "recorded"
    return "learner" if learner_samples else "scored"


def score(
    context: StepContext,
    rollout: Rollout,
    views: Views,
    *,
    rollout_logprobs: Float[Tensor, "B T"] | None = None,
    graphs: RetainedGraphs | None = None,
) -> Logprobs:
    """Compute the log-probs of the rollout's rows under learner, rollout policy and reference, in the same views.

    Args:
        context: Settings and policies.
        rollout: The rows to score.
        views: The set of views.
        rollout_logprobs: Log-probs of the rollout policy, in nats (B, T), if the weights that sampled are no longer in
            memory. None (default): take them from `rollout_logprob_source`.
        graphs: Where to keep the autograd graphs that the first update reuses. None (default): none.

    Returns:
        Log-probs in nats, each (B, T).

    Raises:
        RuntimeError: Under zero_mismatch, the scores of learner and rollout differ.
    """
    settings, policy = context.settings, context.policy
    likelihood, micro_batch_size = settings.likelihood, settings.micro_batch_size
    source = rollout_logprob_source(
        likelihood,
        learner_samples=context.learner_samples,
        gives_logits=settings.rollout_engine is None or settings.rollout_engine.gives_logits,
    )
    reference_logprobs = None
    if context.reference is not None and settings.beta:  # with beta=0 the reference is only a teacher
        reference_logprobs = likelihood.logprobs(context.reference, rollout, views, micro_batch_size=micro_batch_size)
    if source == "recorded":
        rollout_logprobs = recorded(rollout, views)
    elif source == "scored" and rollout_logprobs is None:
        rollout_logprobs = likelihood.logprobs(
            context.rollout_policy, rollout, views, micro_batch_size=micro_batch_size
        )
    entropy = token_entropy(policy, rollout, views, micro_batch_size) if settings.corrector.needs_entropy else None
    # Last: the memory of retained graphs and of another forward would add up.
    view_logprobs = likelihood.view_logprobs(policy, rollout, views, micro_batch_size=micro_batch_size, graphs=graphs)
    old_logprobs = likelihood.combine(view_logprobs, views)
    logps = Logprobs(
        old_logprobs=old_logprobs,
        old_view_logprobs=view_logprobs,
        rollout_logprobs=old_logprobs if rollout_logprobs is None else rollout_logprobs,
        reference_logprobs=reference_logprobs,
        views=views,
        entropy=entropy,
    )
    if context.zero_mismatch is not None:
        context.zero_mismatch(rollout, logps)
    return logps


@torch.no_grad()
def token_entropy(policy: Policy, rollout: Rollout, views: Views, micro_batch_size: int | None) -> Float[Tensor, "B T"]:
    """Return the entropy in nats of the learner's distribution at each scored token, averaged over the views that score
    the token; views that score only its staying masked are not counted.

    It costs one more forward per view, so only correctors with `needs_entropy` use it.
    """

    def entropy(hidden: Tensor) -> tuple[Tensor]:
        # `process` applies the sampler's temperature and filters.
        logps = process(policy.head(hidden), rollout.sampling_params).log_softmax(-1)
        return (-(logps.exp() * logps.masked_fill(logps == -torch.inf, 0)).sum(-1),)

    found = torch.zeros(views.coefficients.shape, device=rollout.tokens.device)
    count = torch.zeros_like(found)
    with join_uneven_forwards(policy):
        for _, n, chunk, view in each_forward(rollout, views, micro_batch_size):
            at = view.scored if view.stay_masked is None else view.scored & ~view.stay_masked
            forward = view.run(policy, chunk.rollout, at)
            if forward is not None:
                token_values = torch.zeros(at.numel(), device=found.device)
                (values,) = chunked(entropy, forward.states, policy=policy)
                token_values = token_values.index_copy(0, forward.plan.flat_index, values.float())
                found[n, chunk.rows, chunk.columns] = token_values.view(at.shape)
                count[n, chunk.rows, chunk.columns] = at.float()
    return found.sum(0) / count.sum(0).clamp(min=1)


def retained_graphs(settings: StepSettings, policy: Policy, rows: Bool[Tensor, " B"]) -> RetainedGraphs | None:
    """Return where scoring keeps the autograd graphs of these rows; None if no update can reuse them."""
    has_dropout = policy.lora is not None and policy.lora.dropout  # scoring runs without dropout, an update with it
    limit = 0 if has_dropout or settings.is_sharded else settings.max_retained_graphs
    return None if limit == 0 else RetainedGraphs(rows, limit)


def trains_unscored_rows(context: StepContext, samples: Samples) -> bool:
    """Return whether the update trains on a group that scoring leaves out."""
    is_active = active_rows(context.settings, samples, all_groups=context.trains_all_groups)
    return bool((is_active & (samples.metric_weights == 0)).any())


def metric_weights(
    settings: StepSettings, samples: Samples, step: int, *, all_groups: bool = False
) -> Float[Tensor, " B"]:
    """Return each row's weight in the mismatch metrics (`inverse_sampling_weights`). Of the groups that the update
    skips, `num_mismatch_groups` are sampled.
    """
    generator = generator_for(settings.seed, "mismatch sample", step)  # every process draws the same groups
    is_trained = any_in_group(active_rows(settings, samples, all_groups=all_groups), samples.group)[
        starts_group(samples.group)
    ]
    weights = inverse_sampling_weights(is_trained, settings.num_mismatch_groups, generator)
    return weights[group_numbers(samples.group)]


def inverse_sampling_weights(
    is_trained: Bool[Tensor, " P"], num_sampled: int, generator: Generator
) -> Float[Tensor, " P"]:
    """Return weights with which a part of the groups estimates a sum over all groups.

    A group that the update trains on has weight 1. At most `num_sampled` of the n other groups are drawn, without
    replacement: a drawn group has weight n / (number drawn), the rest 0.

    E[sum_p weight_p x_p] = sum_p x_p for every x (Horvitz and Thompson 1952, two strata).
    """
    others = (~is_trained).nonzero()[:, 0].cpu()  # on the generator's device
    sampled = others[torch.randperm(len(others), generator=generator)[:num_sampled]]
    weights = is_trained.double()
    weights[sampled.to(is_trained.device)] = len(others) / max(len(sampled), 1)
    return weights


def draw_view_sets(
    settings: StepSettings, samples: Samples, step: int, accelerator: Accelerator, *, all_groups: bool = False
) -> list[Views]:
    """Draw the sets of views that score a step's rollout: one for the metrics and the first update, and, if
    `resample_masks` is set and masks or steps are drawn, one per later update. Later sets score only the groups that
    the update trains on.
    """
    likelihood, rollout = settings.likelihood, samples.rollout
    advantages = samples.local(samples.advantages, accelerator)
    view_sets = []
    for iteration in range(settings.num_mask_sets):
        key = (step, iteration) if iteration else (step,)
        views = likelihood.draw_views(rollout, generator_for(settings.seed, "noise", *key))
        views = likelihood.with_advantages(views, advantages)
        if likelihood.variance_growth is not None:
            views = draw_steps(
                views,
                rollout,
                advantages,
                generator_for(settings.seed, "drawn steps", *key),
                variance_growth=likelihood.variance_growth,
                gather=lambda local: gather_on_host([local], accelerator, samples.counts)[0],
            )
        is_scored = active_rows(settings, samples, all_groups=all_groups) if iteration else samples.metric_weights > 0
        if not is_scored.all():  # otherwise the same object, which all policies share
            views = views.restrict_to_rows(samples.local(is_scored, accelerator))
        view_sets.append(views)
    return view_sets
