"""Estimate a step's duration on a GPU, from its matrix products and from speeds that were measured on one H200."""

import math

import torch

from dllm_rl.models.base import Policy
from dllm_rl.quantization.schemes import Float8Dynamic, Float8WeightOnly
from dllm_rl.recipe import Recipe
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.training.dry_run.memory import num_retained_graphs, renoising_steps, token_layers
from dllm_rl.types import Rollout

PEAK_FLOPS = 989e12  # operations per second of an H100 and an H200 in dense bf16
# Shares of PEAK_FLOPS that were measured on LLaDA-8B's shapes (benchmarks/README.md).
FORWARD_SHARE = 0.49  # a forward in bf16
BACKWARD_SHARE = 0.20  # a forward and backward
# A forward of the rollout policy's quantized copy: (eager, compiled).
QUANTIZED_SHARES: dict[type, tuple[float, float]] = {Float8WeightOnly: (0.25, 0.54), Float8Dynamic: (0.29, 0.84)}
HOST_SECONDS = 21e-3 / 225  # time on the host per linear layer: 21 ms for the 225 layers of LLaDA-8B


def peak_shares(recipe: Recipe) -> dict[str, float]:
    """Return the share of PEAK_FLOPS that each stage is assumed to reach."""
    eager, compiled = QUANTIZED_SHARES.get(type(recipe.rollout_quantization), (FORWARD_SHARE, FORWARD_SHARE))
    rollout = compiled if recipe.torch_compile else eager
    return {"rollout": rollout, "scoring": FORWARD_SHARE, "update": BACKWARD_SHARE}


def stage_seconds(recipe: Recipe, policy: Policy, prompt_tokens: int) -> dict[str, float]:
    """Return the seconds of a process's step, by stage. `recipe` has the batch of one process. All groups count as
    scored.
    """
    weights, layers = count_weights(policy)

    def duration(tokens: int, share: float, forwards: int, passes: int = 1) -> float:
        return passes * max(2 * weights * tokens / (share * PEAK_FLOPS), forwards * layers * HOST_SECONDS)

    rollout_share = peak_shares(recipe)["rollout"]
    rows = recipe.train_batch_size * recipe.num_generations
    length = recipe.max_new_tokens or prompt_tokens
    row_tokens = prompt_tokens + recipe.max_new_tokens
    sampler = recipe.sampler
    steps = getattr(sampler, "diffusion_steps", None) or length  # an adaptive commit rule needs fewer
    forward_tokens = row_tokens  # tokens of a row in one forward of a rollout
    if policy.spec.attention == "causal":
        forward_tokens = 1
    elif isinstance(sampler, Unmask) and sampler.cache is not None:
        forward_tokens = sampler.block_size or policy.spec.block_size or length
    rollout_batches = math.ceil(rows / (recipe.rollout_batch_size or rows))
    rollout_tokens = rows * forward_tokens * steps
    micro_batches = math.ceil(rows / (recipe.micro_batch_size or rows))
    if policy.spec.attention == "encoder_decoder":  # one view replays all steps, and reads the text once
        steps = renoising_steps(recipe, policy)
        view_tokens = rows * (row_tokens + steps * (policy.spec.block_size or length))
        rollout_tokens = view_tokens
        forwards = steps * micro_batches
    else:
        views = count_views(recipe, length, steps)
        forwards = views * micro_batches
        view_tokens = views * rows * row_tokens
    # Forwards of the learner, of the reference, and for the value model.
    passes = 1 + bool(recipe.beta) + bool(recipe.value_model)
    scoring = duration(view_tokens, FORWARD_SHARE, forwards, passes)
    if recipe.has_separate_rollout_policy and not recipe.likelihood.exact_for_sampler:
        scoring += duration(view_tokens, rollout_share, forwards)
    scoring *= recipe.num_mask_sets
    # A forward and the gradients of inputs; the gradients of weights; and the forwards that checkpointing runs again.
    passes = 2 + (recipe.lora is None) + recipe.gradient_checkpointing
    update = recipe.num_iterations * duration(view_tokens, BACKWARD_SHARE, forwards, passes)
    if num_retained_graphs(recipe, policy, rows=rows):  # the first update reuses the forward of scoring
        update -= duration(view_tokens, BACKWARD_SHARE, forwards)
    rollout = duration(rollout_tokens, rollout_share, rollout_batches * steps)
    return {"rollout": rollout, "scoring": scoring, "update": update}


def count_weights(policy: Policy) -> tuple[int, int]:
    """Return the number of weights that a token is multiplied with, and the number of linear layers. Of the experts,
    only those that a token uses count. Adapters are small and not counted.
    """
    layers = list(token_layers(policy))
    return sum(map(math.prod, layers)), len(layers)


def count_views(recipe: Recipe, length: int, steps: int) -> int:
    """Return the number of views that the likelihood draws for a completion that is written from left to right."""
    tokens, mask = torch.zeros(1, length, dtype=torch.long), torch.ones(1, length, dtype=torch.bool)
    unmask_step = torch.arange(length)[None] * steps // length
    rollout = Rollout(tokens, mask, mask, unmask_step, torch.zeros(1, length), torch.zeros(1, dtype=torch.long))
    return len(recipe.likelihood.draw_views(rollout, torch.Generator()).coefficients)
