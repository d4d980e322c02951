"""The views that score a step: which groups are scored, their weights in the metrics, and the masks."""

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
    """Return the groups that the update learns from: nonzero advantages; with a KL term or entropy bonus, all."""
    return (advantages != 0).any(-1) | bool(recipe.beta or recipe.entropy_coeff)


def metric_weights(recipe: Recipe, advantages: Float[Tensor, "P G"], step: int) -> Float[Tensor, " P"]:
    """Return the groups' weights in the mismatch metrics (`group_weights`), with `num_mismatch_groups` unlearned
    groups.
    """
    generator = generator_for(recipe.seed, "mismatch sample", step)  # the same groups in every process
    return group_weights(active_groups(recipe, advantages), recipe.num_mismatch_groups, generator)


def group_weights(learned: Bool[Tensor, " P"], sample: int, generator: Generator) -> Float[Tensor, " P"]:
    """Return a weight per group for an estimate over all groups. A learned group has weight 1. At most `sample` of the
    other groups are drawn, without replacement. A drawn group has weight others / drawn, the rest 0.

    E[sum_p weight_p x_p] = sum_p x_p for every x (Horvitz and Thompson 1952, two strata).
    """
    others = (~learned).nonzero()[:, 0].cpu()  # on the generator's device
    drawn = others[torch.randperm(len(others), generator=generator)[:sample]]
    weights = learned.double()
    weights[drawn.to(learned.device)] = len(others) / max(len(drawn), 1)
    return weights


def views_of_step(recipe: Recipe, samples: Samples, number: int, accelerator: Accelerator) -> list[Views]:
    """Draw the sets of views that score a step's rollout: one for the metrics and the first update, and, if
    `resample_masks` is set and the estimator is random, one per later update. Later sets score only the groups that the
    update trains on.
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
    key: tuple[int, ...],  # the step; and the inner update, if masks are redrawn for it
    accelerator: Accelerator,
) -> Views:
    """Draw the views of a step. Groups of weight 0 in `groups` are not scored."""
    views = recipe.likelihood.draw_views(rollout, generator_for(recipe.seed, "noise", *key))
    (mine,) = send(accelerator.device, local(rearrange(advantages, "p g -> (p g)"), accelerator))
    return only_groups(recipe.likelihood.with_advantages(views, mine), groups > 0, rollout.group_size, accelerator)


def only_groups(views: Views, chosen: Bool[Tensor, " P"], group_size: int, accelerator: Accelerator) -> Views:
    if chosen.all():  # return the same object, which all policies share
        return views
    return views.restrict_to_rows(own_rows(chosen, group_size, accelerator))


def own_rows(groups: Bool[Tensor, " P"], group_size: int, accelerator: Accelerator) -> Bool[Tensor, " B"]:
    """Return the mask of this process's rows that belong to the marked groups, on its device."""
    return send(accelerator.device, local(repeat(groups, "p -> (p g)", g=group_size), accelerator))[0]
