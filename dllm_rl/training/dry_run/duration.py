"""How long a step takes on a GPU: an estimate from its products and from rates that one H200 reached."""

import math

import torch
from torch import nn

from dllm_rl.models.base import Policy
from dllm_rl.models.lora import STACKS, is_stacked
from dllm_rl.recipe import Recipe
from dllm_rl.training.dry_run.memory import batch_of, most_graphs
from dllm_rl.types import Rollout

PEAK = 989e12  # operations a second, dense bf16: an H100's and an H200's
# Shares of PEAK on LLaDA-8B's shapes, measured (benchmarks/README.md).
FORWARD = 0.49  # forwards in bf16
BACKWARD = 0.20  # forward and backward
COPIES = {  # forwards of a rollout's copy: scheme, compiled
    ("float8_weight_only", False): 0.25,
    ("float8_weight_only", True): 0.54,
    ("float8_dynamic", False): 0.29,
    ("float8_dynamic", True): 0.84,
}
HOST = 21e-3 / 225  # seconds that the host needs for a linear layer: 21 ms for LLaDA-8B's 225


def shares(recipe: Recipe) -> dict[str, float]:
    """The share of PEAK that each stage is taken to reach."""
    scheme = getattr(recipe.rollout_quantization, "func", recipe.rollout_quantization)
    copy = COPIES.get((getattr(scheme, "__name__", ""), recipe.torch_compile), FORWARD)
    return {"rollout": copy, "scoring": FORWARD, "update": BACKWARD}


def seconds(recipe: Recipe, policy: Policy, prompt_tokens: int) -> dict[str, float]:
    """Seconds of a process's step by stage. `recipe` has the process's batch; every group counts as scored."""
    weights, layers = products(policy)

    def time(tokens: int, share: float, forwards: int, passes: int = 1) -> float:
        return passes * max(2 * weights * tokens / (share * PEAK), forwards * layers * HOST)

    copy = shares(recipe)["rollout"]
    rows = recipe.train_batch_size * recipe.num_generations
    length = recipe.max_new_tokens or prompt_tokens
    row = prompt_tokens + recipe.max_new_tokens
    steps, width = forwards_of_a_row(recipe, policy, length, row)
    turns = math.ceil(rows / (recipe.rollout_batch_size or rows))
    views = count_views(recipe, length)
    forwards = views * math.ceil(rows / (recipe.micro_batch_size or rows))
    view_tokens = views * rows * row
    scoring = time(view_tokens, FORWARD, forwards, passes=1 + bool(recipe.beta))
    if recipe.rollout_quantization is not None and not recipe.likelihood.exact_for_sampler:
        scoring += time(view_tokens, copy, forwards)
    passes = 2 + (recipe.lora is None) + recipe.gradient_checkpointing  # gradients of inputs, of weights; run again
    update = recipe.num_iterations * time(view_tokens, BACKWARD, forwards, passes)
    if most_graphs(recipe, policy, rows=rows):  # the first update has its forward from scoring
        update -= time(view_tokens, BACKWARD, forwards)
    return {"rollout": time(rows * width * steps, copy, turns * steps), "scoring": scoring, "update": update}


def products(policy: Policy) -> tuple[float, int]:
    """The weights that a token is multiplied with, and the number of linear layers; of experts those that it takes."""
    weights = 0.0
    layers = 0
    for name, layer in policy.module.named_modules():
        if ".lora_" in name or hasattr(layer, "base_layer"):
            continue  # adapters are small, and what wraps a layer is not one more
        if isinstance(layer, nn.Linear):
            weights += layer.weight.numel()
            layers += 1
        elif is_stacked(layer):
            expert = sum(getattr(layer, stack)[0].numel() for stack in STACKS)
            weights += expert * policy.module.config.num_experts_per_tok
            layers += 2
    return weights, layers


def forwards_of_a_row(recipe: Recipe, policy: Policy, length: int, row: int) -> tuple[int, int]:
    """Forwards of a rollout's row, and its tokens in each: the whole row without a cache, else a block."""
    settings = getattr(recipe.sampler, "keywords", {})
    if policy.spec.attention == "causal":
        return length, 1
    block = settings.get("block_size") or policy.spec.block_size or length
    return settings.get("num_steps") or length, row if settings.get("cache") is None else block


def count_views(recipe: Recipe, length: int) -> int:
    """Views of the likelihood, by its own draw for a completion that is written from left to right."""
    tokens, mask = batch_of(1, length)
    steps = getattr(recipe.sampler, "keywords", {}).get("num_steps") or length
    step = torch.arange(length)[None] * steps // length
    rollout = Rollout(tokens, mask, mask, step, torch.zeros(1, length), group_size=1)
    return len(recipe.likelihood.draw(rollout, torch.Generator()).weight)
