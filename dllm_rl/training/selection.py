"""Which groups of a step are scored, with which weight in the metrics, and under which masks."""

from functools import partial

import torch
from accelerate import Accelerator
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from dllm_rl.device import send
from dllm_rl.distributed.collectives import local
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.training.samples import Samples
from dllm_rl.types import Rollout, Views


def active_groups(recipe: Recipe, advantages: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """Groups that the update learns from: nonzero advantages; all groups with a KL term or an entropy bonus."""
    return (advantages != 0).any(-1) | bool(recipe.beta or recipe.entropy_coeff)


def metric_weights(recipe: Recipe, advantages: Float[Tensor, "P G"], step: int) -> Float[Tensor, " P"]:
    """Weights of groups in the mismatch metrics (`group_weights`): learned ones, `num_mismatch_groups` others."""
    generator = generator_for(recipe.seed, "mismatch sample", step)  # the same groups in every process
    return group_weights(active_groups(recipe, advantages), recipe.num_mismatch_groups, generator)


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


def views_of_step(recipe: Recipe, samples: Samples, number: int, accelerator: Accelerator) -> list[Views]:
    """The sets of masks under which a step's rollout is scored: the first for the metrics and the first update, and
    where `resample_masks` draws them anew, one for each later update, which scores the groups to learn from alone.
    """
    active = active_groups(recipe, samples.advantages).double()
    keys = [(number, iteration) if iteration else (number,) for iteration in range(recipe.num_mask_sets)]
    groups = [active if len(key) > 1 else samples.metric_weights for key in keys]
    draw = partial(draw_views, recipe, samples.rollout, samples.advantages, accelerator=accelerator)
    return [draw(chosen, key) for chosen, key in zip(groups, keys, strict=True)]


def draw_views(
    recipe: Recipe,
    rollout: Rollout,
    advantages: Float[Tensor, "P G"],
    groups: Float[Tensor, " P"],
    key: tuple[int, ...],  # the step; and the inner update, if masks are drawn anew for it
    accelerator: Accelerator,
) -> Views:
    """The masks of a step: groups of weight 0 in `groups` are not scored."""
    views = recipe.likelihood.draw_views(rollout, generator_for(recipe.seed, "noise", *key))
    (mine,) = send(accelerator.device, local(rearrange(advantages, "p g -> (p g)"), accelerator))
    return only_groups(recipe.likelihood.with_advantages(views, mine), groups > 0, rollout.group_size, accelerator)


def only_groups(views: Views, chosen: Bool[Tensor, " P"], group_size: int, accelerator: Accelerator) -> Views:
    if chosen.all():  # the same object, which all policies share
        return views
    return views.restrict_to_rows(own_rows(chosen, group_size, accelerator))


def own_rows(groups: Bool[Tensor, " P"], group_size: int, accelerator: Accelerator) -> Bool[Tensor, " B"]:
    """The rows of this process that are of the marked groups, on its device."""
    return send(accelerator.device, local(repeat(groups, "p -> (p g)", g=group_size), accelerator))[0]
