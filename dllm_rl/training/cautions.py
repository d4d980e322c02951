"""Warnings about settings that cannot learn: one line each."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_rl.algorithms.advantages import takes_component_rewards
from dllm_rl.algorithms.losses import kl_k1, ppo_clip
from dllm_rl.distributed.stop import as_written, option_as_written
from dllm_rl.members import function_of
from dllm_rl.models.base import has_bf16_products
from dllm_rl.recipe import Recipe
from dllm_rl.samplers.records import Commit, Rank, as_commit, as_rank, has_order_logprob, order_probability

BF16_STEPS = 512  # half a step of bf16 is at least a 512th of the number
LARGEST_RATE = 1e-4  # largest rate that a model of LARGE_MODEL parameters can have without a warning
LARGE_MODEL = 7e9
GEOMETRIC = ("sequence", "geometric")
TYPICAL_WEIGHT = 0.02  # size of a matrix entry in a language model


def cautions(recipe: Recipe) -> list[str]:
    said = []
    if _bound(recipe.sampler, "temperature") == 0:
        said.append("sampler.temperature=0 is greedy: completions of a prompt are all alike and teach nothing; use 1.0")
    steps = recipe.learning_rate * BF16_STEPS  # AdamW's update of a weight is about the learning rate
    if recipe.lora is None and isinstance(recipe.model, str) and recipe.dtype == "bfloat16" and steps < TYPICAL_WEIGHT:
        said.append(
            f"dtype='bfloat16' without lora and learning_rate={recipe.learning_rate}: bf16 weights above {steps:.1g} "
            f"round such updates away; use {as_written(dtype='float32', bf16=True)}: fp32 weights, bf16 products"
        )
    if recipe.beta and function_of(recipe.kl) is kl_k1:
        said.append(
            f"beta={recipe.beta:g} with kl=kl_k1: the mean gradient of k1 is 0 where the learner drew the tokens, and "
            "only noise is added; use kl_k2 or kl_k3"
        )
    said += of_the_clip(recipe) + of_the_lag(recipe) + of_the_corrector(recipe) + of_the_likelihood(recipe)
    rewards, parts = made_up_rewards(recipe)
    if not recipe.advantages(rewards, **parts).any():
        name = getattr(recipe.advantages, "func", recipe.advantages).__name__
        said.append(
            f"num_generations={recipe.num_generations} with advantages={name} gives advantages that are all 0, "
            "which teach nothing; use at least 2"
        )
    return said


def of_the_rate(learning_rate: float, parameters: int) -> list[str]:
    """Warn about a learning rate that suits a small model, if the model is large."""
    if learning_rate <= LARGEST_RATE or parameters < LARGE_MODEL:
        return []
    return [
        f"learning_rate={learning_rate:g} for {parameters / 1e9:.1f} billion parameters is a small model's: published "
        "runs of such models take 1e-6 to 1e-5 (3e-6 with adapters)"
    ]


def of_emulated_products(recipe: Recipe, device: str) -> list[str]:
    """Warn about bf16 on a CPU that has no bf16 products."""
    stored = isinstance(recipe.model, str) and recipe.dtype == "bfloat16"
    if device != "cpu" or has_bf16_products() or not (recipe.bf16 or stored):
        return []
    name = "bf16=True" if recipe.bf16 else "dtype='bfloat16'"
    return [
        f"{name}: this CPU has no bf16 products, and emulated ones are slow; where memory allows use "
        f"{as_written(dtype='float32', bf16=False)}"
    ]


def of_the_clip(recipe: Recipe) -> list[str]:
    """Warn if PPO does not bound ratios above 1 + epsilon at a negative advantage: see recipes/studies/mismatch.md."""
    if recipe.num_iterations == 1 or not recipe.has_separate_rollout_policy or not open_above(recipe):
        return []
    return [
        f"num_iterations={recipe.num_iterations} with rollouts of other arithmetic and loss.delta=None: nothing "
        "bounds the ratio where the advantage is negative, and heavy mismatch then does most of its harm; use "
        f"{dual(recipe)}"
    ]


def of_the_lag(recipe: Recipe) -> list[str]:
    """Warn about stale rollouts without a bound or a corrector: see recipes/studies/late_rollouts.md."""
    bounded = recipe.old_logprobs == "rollout" and not open_above(recipe)
    if not recipe.max_staleness or bounded or recipe.corrector.weighs:
        return []
    rollout = as_written(old_logprobs="rollout")
    remedy = f"{rollout} and {dual(recipe)}" if open_above(recipe) else rollout
    return [
        f"max_staleness={recipe.max_staleness} with old_logprobs={recipe.old_logprobs!r}, and no corrector that "
        "weighs: the loss does not bound how far the learner is from the weights that sampled; use "
        f"{remedy}"
    ]


def of_the_corrector(recipe: Recipe) -> list[str]:
    weight_fn = recipe.corrector.weight_fn
    biased = [
        each.keywords
        for each in _bound(weight_fn, "weight_fns") or (weight_fn,)
        if isinstance(each, partial) and (each.keywords.get("level"), each.keywords.get("pool")) == GEOMETRIC
    ]
    return [
        "corrector with level='sequence' and pool='geometric': the geometric mean of a row's ratios is not the "
        "row's importance weight, and the corrected gradient stays biased; use pool='product', or level='token'"
    ] * bool(biased)


def open_above(recipe: Recipe) -> bool:
    """Return whether the objective is PPO's, without a bound of the ratio if the advantage is negative."""
    surrogate = recipe.resolved_loss
    return function_of(surrogate) is ppo_clip and _bound(surrogate, "delta") is None


def dual(recipe: Recipe) -> str:
    """Return the setting that bounds PPO's ratio from both sides, at the recipe's epsilon."""
    epsilon, high = (_bound(recipe.resolved_loss, name) for name in ("epsilon", "epsilon_high"))
    delta = float(f"{1 + (epsilon if high is None else high):.10g}")
    return option_as_written("loss", "ppo_clip" if recipe.loss is None else None, "delta", delta)


def of_the_likelihood(recipe: Recipe) -> list[str]:
    """Warn about differences that the ratios of the recipe's estimator cannot correct, with the remedy."""
    said = []
    likelihood = recipe.likelihood
    exact = likelihood.exact_ratios
    cache = _bound(recipe.sampler, "cache")
    given = likelihood.factory is not None and likelihood.factory.keywords.get("include_order") is False
    if likelihood.name == "trajectory" and not given and (rules := rules_of(recipe)) is not None:
        rank, commit = rules
        pair = f"sampler.rank={rank.name} with commit={commit.name}"
        greedy = _bound(recipe.sampler, "temperature") == 0
        if order_probability(rank, commit, greedy=greedy) == "unknown":
            said.append(
                f"{pair}: the order's probability is unknown, so likelihood=trajectory is not exact for this sampler: "
                "its ratios leave the order out; use rank=max_prob or random and a commit rule of the library, declare "
                "yours (Rank, Commit), or include_order=False to say that it is meant"
            )
        elif has_order_logprob(rank, commit, greedy=greedy) and not likelihood.exact_for_sampler:
            said.append(
                f"{pair} and num_segments or num_sampled_steps: the order has a probability, which segments leave out "
                "of the ratios; leave both at None, or use rank=max_prob or random"
            )
    if not exact and recipe.corrector.weighs and recipe.has_separate_rollout_policy:
        said.append(
            f"likelihood={likelihood.name!r} gives no likelihood ratios: the mean of the corrector's weights is not 1, "
            "and they need not bring the gradient nearer to the learner's own; use trajectory(), or corrector=none"
        )
    if not exact and cache is not None and cache.kind != "block" and cache.refresh != 1:
        said.append(
            f"sampler.cache={cache.kind!r} is approximate, and likelihood={likelihood.name!r} does not replay the "
            "sampler: what the cache changes enters neither loss nor metrics; use trajectory(), or no cache"
        )
    return said


def order_by_draws(recipe: Recipe) -> bool:
    """Return whether the order in which the recipe's sampler writes depends on the tokens that it draws."""
    if (rules := rules_of(recipe)) is None or _bound(recipe.sampler, "temperature") == 0:
        return False
    return "tokens" in rules[0].reads or has_order_logprob(*rules)


def rules_of(recipe: Recipe) -> tuple[Rank, Commit] | None:
    """Return the rank and the commit rule of the recipe's sampler; None if the sampler has no such rules."""
    rank, commit = _bound(recipe.sampler, "rank"), _bound(recipe.sampler, "commit")
    return None if rank is None or commit is None else (as_rank(rank), as_commit(commit))


def made_up_rewards(recipe: Recipe) -> tuple[Float[Tensor, "P G"], dict[str, Tensor]]:
    """Return rewards of a batch that all differ, and the extra arguments of `recipe.advantages`."""
    shape = (recipe.train_batch_size, recipe.num_generations)
    rewards = torch.arange(float(shape[0] * shape[1])).reshape(shape)
    return rewards, {"parts": rewards[None], "weights": torch.ones(1)} if takes_component_rewards(
        recipe.advantages
    ) else {}


def _bound(function: Callable, name: str) -> Any:
    """Return the value of a keyword that a function is bound with, or its default; None if it has no such keyword."""
    target, keywords = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
    parameter = inspect.signature(target).parameters.get(name)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return keywords.get(name, default)
