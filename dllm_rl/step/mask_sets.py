"""The views that score a step: which groups are scored, their weights in the metrics, and the masks."""

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from dllm_rl.rng import generator_for
from dllm_rl.step.samples import Samples
from dllm_rl.step.settings import StepSettings
from dllm_rl.types import Views, any_in_group, group_numbers, starts_group


def active_rows(settings: StepSettings, samples: Samples) -> Bool[Tensor, " B"]:
    """Return which rows the update trains on: the groups with a nonzero advantage, or all rows if the loss has a KL
    term or an entropy bonus, or if a value model gives the tokens advantages.
    """
    return any_in_group(samples.advantages != 0, samples.group) | settings.trains_all_groups


def metric_weights(settings: StepSettings, samples: Samples, step: int) -> Float[Tensor, " B"]:
    """Return each row's weight in the mismatch metrics (`inverse_sampling_weights`). Of the groups that the update
    skips, `num_mismatch_groups` are sampled.
    """
    generator = generator_for(settings.seed, "mismatch sample", step)  # every process draws the same groups
    is_trained = active_rows(settings, samples)[starts_group(samples.group)]
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


def draw_view_sets(settings: StepSettings, samples: Samples, step: int, accelerator: Accelerator) -> list[Views]:
    """Draw the sets of views that score a step's rollout: one for the metrics and the first update, and, if
    `resample_masks` is set and the estimator is random, one per later update. Later sets score only the groups that the
    update trains on.
    """
    is_trained = active_rows(settings, samples)
    view_sets = [draw_views(settings, samples, samples.metric_weights > 0, (step,), accelerator)]
    for iteration in range(1, settings.num_mask_sets):
        view_sets.append(draw_views(settings, samples, is_trained, (step, iteration), accelerator))
    return view_sets


def draw_views(
    settings: StepSettings,
    samples: Samples,
    is_scored: Bool[Tensor, " B"],
    key: tuple[int, ...],  # (step,), or (step, iteration) if an update redraws its masks
    accelerator: Accelerator,
) -> Views:
    """Draw the views of a step. Of the rows of all processes, those in `is_scored` are scored."""
    views = settings.likelihood.draw_views(samples.rollout, generator_for(settings.seed, "noise", *key))
    views = settings.likelihood.with_advantages(views, samples.local(samples.advantages, accelerator))
    return restrict_views(views, is_scored, samples, accelerator)


def restrict_views(views: Views, is_scored: Bool[Tensor, " B"], samples: Samples, accelerator: Accelerator) -> Views:
    """Return the views without the rows that are not in `is_scored`, which has the rows of all processes."""
    if is_scored.all():  # return the same object, which all policies share
        return views
    return views.restrict_to_rows(samples.local(is_scored, accelerator))
