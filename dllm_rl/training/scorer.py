"""Which rows of a step are scored, under which masks, by whom, and in which arithmetic."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from accelerate import Accelerator
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dllm_rl.algorithms.mismatch import PREFIX
from dllm_rl.device import send
from dllm_rl.diagnostics.batch_invariance import batch_invariant, check_bitwise_equal
from dllm_rl.distributed.collectives import Metrics, local, reduce_metrics, sum_over
from dllm_rl.distributed.sharding import in_pace
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.likelihoods.replay import as_noted, as_sampled, blank, routing_counts, routing_metrics
from dllm_rl.models.base import Policy
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.samplers.agreement import order_agreement
from dllm_rl.types import Logprobs, Noise, Rollout


@contextmanager
def arithmetic(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """Autocast to bf16 with `bf16`; batch-invariant with zero_mismatch."""
    kept = recipe.shard_size == 1  # autocast's cache would hold all of a sharded model in bf16
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.bf16, cache_enabled=kept)
    with autocast, batch_invariant() if recipe.zero_mismatch else nullcontext():
        yield


def learned_groups(recipe: Recipe, advantages: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """Groups that the update learns from: nonzero advantages; all groups with a KL term or an entropy bonus."""
    return (advantages != 0).any(-1) | bool(recipe.beta or recipe.entropy_coeff)


def measured_groups(recipe: Recipe, advantages: Float[Tensor, "P G"], step: int) -> Float[Tensor, " P"]:
    """Weights of groups in the mismatch metrics (`group_weights`): learned groups, `mismatch_sample` of the others."""
    generator = generator_for(recipe.seed, "mismatch sample", step)  # the same groups in every process
    return group_weights(learned_groups(recipe, advantages), recipe.mismatch_sample, generator)


def group_weights(learned: Bool[Tensor, " P"], sample: int, generator: Generator) -> Float[Tensor, " P"]:
    """A weight per group for an estimate over all groups. A learned group weighs 1. Of the others at most `sample` are
    drawn, without replacement. A drawn group weighs others / drawn, the rest 0.

    E[sum_p weight_p x_p] = sum_p x_p for every x (Horvitz and Thompson 1952, two strata).
    """
    others = (~learned).nonzero()[:, 0].cpu()  # where the generator is
    drawn = others[torch.randperm(len(others), generator=generator)[:sample]]
    weights = learned.double()
    weights[drawn.to(learned.device)] = len(others) / max(len(drawn), 1)
    return weights


def draw_noise(
    recipe: Recipe,
    rollout: Rollout,
    advantages: Float[Tensor, "P G"],
    groups: Float[Tensor, " P"],
    key: tuple[int, ...],  # the step; and the inner update, if masks are drawn anew for it
    accelerator: Accelerator,
) -> Noise:
    """The masks of a step: groups of weight 0 in `groups` are not scored; rows of `learned_groups` are marked."""
    noise = recipe.likelihood.draw(rollout, generator_for(recipe.seed, "noise", *key))
    chosen = repeat(learned_groups(recipe, advantages), "p -> (p g)", g=rollout.group_size)
    (learned,) = send(accelerator.device, local(chosen, accelerator))
    (mine,) = send(accelerator.device, local(rearrange(advantages, "p g -> (p g)"), accelerator))
    noise = replace(recipe.likelihood.with_advantages(noise, mine), learned=learned)
    return only_groups(noise, groups > 0, rollout.group_size, accelerator)


def only_groups(noise: Noise, chosen: Bool[Tensor, " P"], group_size: int, accelerator: Accelerator) -> Noise:
    if chosen.all():  # the same object, which all policies share
        return noise
    (live,) = send(accelerator.device, local(repeat(chosen, "p -> (p g)", g=group_size), accelerator))
    return noise.only(live)


def rollout_side(recipe: Recipe, policy: Policy, rollout_policy: Policy) -> Literal["recorded", "scored", "learner"]:
    """The rollout's log-probs: the sampler's record if the estimator is exact for it, else the rollout policy's own, or
    without a copy the learner's."""
    if recipe.likelihood.exact_for_sampler:
        return "recorded"
    return "learner" if rollout_policy is policy else "scored"


def aligns(recipe: Recipe, policy: Policy, rollout_policy: Policy) -> bool:
    """Whether the learner computes with the rollout's quantised operands."""
    return recipe.corrector.align_forward and rollout_policy is not policy


def score(
    recipe: Recipe,
    rollout: Rollout,
    noise: Noise,
    *,
    policy: Policy,
    rollout_policy: Policy,
    reference: Policy | None,
    keep: bool = False,
) -> Logprobs:
    """The rollout's log-probs under every policy, same masks; `keep`: with graphs, where `keeps_graphs` allows them.
    Raises RuntimeError if zero_mismatch does not hold."""
    likelihood = recipe.likelihood
    side = rollout_side(recipe, policy, rollout_policy)
    size = recipe.micro_batch_size
    note = blank(policy, rollout, noise) if recipe.router_replay is not None and side == "scored" else None
    reference_logps = None
    if reference is not None:
        with in_pace(reference):
            reference_logps = likelihood.logprobs(reference, rollout, noise, micro_batch_size=size)
    rollout_logps = recorded(rollout, noise) if side == "recorded" else None
    if side == "scored":  # by a full copy; fills `note`
        rollout_logps = likelihood.logprobs(rollout_policy, rollout, noise, micro_batch_size=size, note=note)
    if recipe.router_replay is not None:  # the experts that the learner takes again
        noise = as_sampled(noise, rollout) if note is None else as_noted(noise, rollout, note)
    keep = keep and keeps_graphs(recipe, policy, views=len(noise.weight), rows=len(rollout.tokens))
    with in_pace(policy):  # last: kept graphs and another forward would add up
        scores = likelihood.scores(policy, rollout, noise, micro_batch_size=size, keep_graphs=keep)
    old = likelihood.combine(scores.detach(), noise)
    logps = Logprobs(
        old=old,
        old_scores=scores,
        rollout=old if rollout_logps is None else rollout_logps,
        reference=reference_logps,
        noise=noise,
    )
    if recipe.zero_mismatch:
        check_bitwise_equal(rollout, noise, logps, policy=policy, rollout_policy=rollout_policy)
    return logps


def keeps_graphs(recipe: Recipe, policy: Policy, *, views: int, rows: int) -> bool:
    """Whether an update goes back through the forwards that scored: at most `kept_graphs`, each of a micro-batch."""
    forwards = views * math.ceil(rows / (recipe.micro_batch_size or rows))
    dropout = policy.lora is not None and policy.lora.dropout  # scoring leaves it out, an update does not
    unsharded = recipe.shard_size == 1  # a sharded learner's forwards run `in_pace`, with a backward each or none
    return unsharded and forwards <= recipe.kept_graphs and not dropout


def compare_sides(
    policy: Policy, rollout_policy: Policy, rollout: Rollout, noise: Noise
) -> tuple[Metrics, Int[Tensor, "M X"] | None]:
    """This process's `routing_counts`, and `order_agreement`: how many of the first step's committed positions the
    learner would commit too, in one row per prompt."""
    if rollout_policy is policy:
        return {}, None
    with in_pace(policy):  # both run the learner, which may be sharded
        return order_agreement(policy, rollout), routing_counts(policy, rollout_policy, rollout, noise)


def side_metrics(order: Metrics, routing: Int[Tensor, "M X"] | None, accelerator: Accelerator) -> dict[str, float]:
    """Metrics over all processes of what `compare_sides` found."""
    metrics = {PREFIX + name: value for name, value in reduce_metrics(order, accelerator).items()}
    return metrics if routing is None else metrics | routing_metrics(sum_over(routing, accelerator))
