"""Estimate of a step's duration on a GPU, from its products and from rates that one H200 reached."""

import math

import torch

from dllm_rl.models.base import Policy
from dllm_rl.models.lora import STACKS, base_of, is_stacked
from dllm_rl.quantization.rollout_policy import quantizable_layers
from dllm_rl.recipe import Recipe
from dllm_rl.samplers.rules import name_of
from dllm_rl.training.dry_run.memory import batch_of, most_graphs, renoising_steps
from dllm_rl.types import Rollout

PEAK = 989e12  # operations per second, dense bf16, of an H100 and an H200
# Shares of PEAK on LLaDA-8B's shapes, measured (benchmarks/README.md).
FORWARD = 0.49  # forwards in bf16
BACKWARD = 0.20  # forward and backward
# Forwards of a rollout's copy: (eager, compiled).
COPIES = {"float8_weight_only": (0.25, 0.54), "float8_dynamic": (0.29, 0.84)}
HOST = 21e-3 / 225  # seconds that the host needs for a linear layer: 21 ms for LLaDA-8B's 225


def shares(recipe: Recipe) -> dict[str, float]:
    """Return the share of PEAK that each stage is assumed to reach."""
    copies = COPIES.get(name_of(recipe.rollout_quantization), (FORWARD, FORWARD))
    return {"rollout": copies[recipe.torch_compile], "scoring": FORWARD, "update": BACKWARD}


def seconds(recipe: Recipe, policy: Policy, prompt_tokens: int) -> dict[str, float]:
    """Return the seconds of a process's step by stage. `recipe` has the process's batch; all groups count as scored."""
    weights, layers = products(policy)

    def time(tokens: int, share: float, forwards: int, passes: int = 1) -> float:
        return passes * max(2 * weights * tokens / (share * PEAK), forwards * layers * HOST)

    copy = shares(recipe)["rollout"]
    rows = recipe.train_batch_size * recipe.num_generations
    length = recipe.max_new_tokens or prompt_tokens
    row = prompt_tokens + recipe.max_new_tokens
    settings = getattr(recipe.sampler, "keywords", {})
    steps = settings.get("diffusion_steps") or length  # an adaptive commit rule needs fewer
    width = row  # tokens of a row in each forward of a rollout
    if policy.spec.attention == "causal":
        width = 1
    elif settings.get("cache") is not None:
        width = settings.get("block_size") or policy.spec.block_size or length
    turns = math.ceil(rows / (recipe.rollout_batch_size or rows))
    sampled = rows * width * steps
    chunks = math.ceil(rows / (recipe.micro_batch_size or rows))
    if policy.spec.attention == "encoder_decoder":  # one view replays all steps, and reads the text once
        steps = renoising_steps(recipe, policy)
        view_tokens = rows * (row + steps * (policy.spec.block_size or length))
        sampled = view_tokens
        forwards = steps * chunks
    else:
        views = count_views(recipe, length, steps)
        forwards = views * chunks
        view_tokens = views * rows * row
    scoring = time(view_tokens, FORWARD, forwards, passes=1 + bool(recipe.beta) + bool(recipe.value_model))
    if recipe.has_separate_rollout_policy and not recipe.likelihood.exact_for_sampler:
        scoring += time(view_tokens, copy, forwards)
    scoring *= recipe.num_mask_sets
    passes = 2 + (recipe.lora is None) + recipe.gradient_checkpointing  # gradients of inputs, of weights; recomputation
    update = recipe.num_iterations * time(view_tokens, BACKWARD, forwards, passes)
    if most_graphs(recipe, policy, rows=rows):  # the first update reuses the forward of scoring
        update -= time(view_tokens, BACKWARD, forwards)
    return {"rollout": time(sampled, copy, turns * steps), "scoring": scoring, "update": update}


def products(policy: Policy) -> tuple[float, int]:
    """Return the number of weights that a token is multiplied with, and of linear layers. Only experts that the token
    uses count.
    """
    weights = 0.0
    layers = 0
    for name, layer in quantizable_layers(policy.module):
        if "vision" in name:  # layers for images, which are not supported
            continue
        base = base_of(layer)
        if is_stacked(base):
            expert = sum(getattr(base, stack)[0].numel() for stack in STACKS)
            weights += expert * experts_per_token(policy)
            layers += 2
        else:  # adapters are small and not counted
            weights += base.weight.numel()
            layers += 1
    return weights, layers


def experts_per_token(policy: Policy) -> int:
    config = policy.module.config.get_text_config()
    return getattr(config, "top_k_experts", None) or config.num_experts_per_tok


def count_views(recipe: Recipe, length: int, steps: int) -> int:
    """Return the number of views that the likelihood draws for a completion that is written from left to right."""
    tokens, mask = batch_of(1, length)
    step = torch.arange(length)[None] * steps // length
    rollout = Rollout(tokens, mask, mask, step, torch.zeros(1, length), group_size=1)
    return len(recipe.likelihood.draw_views(rollout, torch.Generator()).coefficients)
