"""The views that score a step: which groups are scored, their weights in the metrics, and the masks."""

from functools import partial

import torch
from accelerate import Accelerator
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.distributed.collectives import local
from dllm_rl.rng import generator_for
from dllm_rl.step.samples import Samples
from dllm_rl.step.settings import StepSettings
from dllm_rl.types import Rollout, Views


def active_groups(settings: StepSettings, advantages: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """Return which groups the update trains on: groups with a nonzero advantage, or all groups if the loss has a KL
    term or an entropy bonus, or if a value model gives the tokens advantages.
    """
    return (advantages != 0).any(-1) | settings.trains_all_groups


def metric_weights(settings: StepSettings, advantages: Float[Tensor, "P G"], step: int) -> Float[Tensor, " P"]:
    """Return each group's weight in the mismatch metrics (`inverse_sampling_weights`). Of the groups that the update
    skips, `num_mismatch_groups` are sampled.
    """
    generator = generator_for(settings.seed, "mismatch sample", step)  # every process draws the same groups
    return inverse_sampling_weights(active_groups(settings, advantages), settings.num_mismatch_groups, generator)


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


def draw_view_sets(settings: StepSettings, samples: Samples, step: int, accelerator: Accelerator) -> list[Views]:
    """Draw the sets of views that score a step's rollout: one for the metrics and the first update, and, if
    `resample_masks` is set and the estimator is random, one per later update. Later sets score only the groups that the
    update trains on.
    """
    trained_weights = active_groups(settings, samples.advantages).double()
    draw_set = partial(draw_views, settings, samples.rollout, samples.advantages, accelerator=accelerator)
    view_sets = [draw_set(samples.metric_weights, (step,))]
    for iteration in range(1, settings.num_mask_sets):
        view_sets.append(draw_set(trained_weights, (step, iteration)))
    return view_sets


def draw_views(
    settings: StepSettings,
    rollout: Rollout,
    advantages: Float[Tensor, "P G"],
    group_weights: Float[Tensor, " P"],
    key: tuple[int, ...],  # (step,), or (step, iteration) if an update redraws its masks
    accelerator: Accelerator,
) -> Views:
    """Draw the views of a step. Groups of weight 0 are not scored."""
    views = settings.likelihood.draw_views(rollout, generator_for(settings.seed, "noise", *key))
    (local_advantages,) = copy_to_device(accelerator.device, local(rearrange(advantages, "p g -> (p g)"), accelerator))
    return restrict_to_groups(
        settings.likelihood.with_advantages(views, local_advantages), group_weights > 0, rollout.group_size, accelerator
    )


def restrict_to_groups(
    views: Views, is_selected: Bool[Tensor, " P"], group_size: int, accelerator: Accelerator
) -> Views:
    """Return the views without the groups that are not selected: their rows are not scored."""
    if is_selected.all():  # return the same object, which all policies share
        return views
    return views.restrict_to_rows(select_local_rows(is_selected, group_size, accelerator))


def select_local_rows(is_selected: Bool[Tensor, " P"], group_size: int, accelerator: Accelerator) -> Bool[Tensor, " B"]:
    """Return the mask of this process's rows that belong to the selected groups, on its device."""
    return copy_to_device(accelerator.device, local(repeat(is_selected, "p -> (p g)", g=group_size), accelerator))[0]
