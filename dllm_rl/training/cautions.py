"""Warnings, of one line each, about settings with which a run learns nothing or learns badly."""

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
from dllm_rl.members import describe, function_of
from dllm_rl.models.base import has_bf16_products
from dllm_rl.recipe import Recipe
from dllm_rl.samplers.records import Commit, Rank, as_commit, as_rank, has_order_logprob, order_probability

BF16_RELATIVE_STEPS = 512  # a change by less than 1/512 of a bf16 number is rounded away
MAX_SAFE_RATE = 1e-4  # largest learning rate without a warning for a model of LARGE_MODEL parameters
LARGE_MODEL = 7e9
BIASED_LEVEL_AND_POOL = ("sequence", "geometric")
TYPICAL_WEIGHT = 0.02  # typical absolute value of a weight in a language model's matrices


def cautions(recipe: Recipe) -> list[str]:
    """Return the warnings about a recipe that need no model. `start` prints them."""
    warnings = []
    if _keyword_value(recipe.sampler, "temperature") == 0:
        warnings.append(
            "sampler.temperature=0 is greedy: all completions of a prompt are the same and teach nothing; use 1.0"
        )
    # AdamW changes a weight by about the learning rate. In bf16, the change is lost if the weight is above this value.
    largest_updated_weight = recipe.learning_rate * BF16_RELATIVE_STEPS
    trains_bf16_weights = recipe.lora is None and isinstance(recipe.model, str) and recipe.dtype == "bfloat16"
    if trains_bf16_weights and largest_updated_weight < TYPICAL_WEIGHT:
        warnings.append(
            f"dtype='bfloat16' without lora and learning_rate={recipe.learning_rate}: bf16 weights above "
            f"{largest_updated_weight:.1g} round such updates away; use "
            f"{as_written(dtype='float32', bf16=True)}: fp32 weights, bf16 products"
        )
    if recipe.beta and function_of(recipe.kl) is kl_k1:
        warnings.append(
            f"beta={recipe.beta:g} with kl=kl_k1: the mean gradient of k1 is 0 where the learner drew the tokens, and "
            "only noise is added; use kl_k2 or kl_k3"
        )
    warnings += (
        clip_warnings(recipe) + staleness_warnings(recipe) + corrector_warnings(recipe) + likelihood_warnings(recipe)
    )
    rewards, component_arguments = made_up_rewards(recipe)
    if not recipe.advantages(rewards, **component_arguments).any():
        name = describe(function_of(recipe.advantages))
        warnings.append(
            f"num_generations={recipe.num_generations} with advantages={name} gives advantages that are all 0, "
            "which teach nothing; use at least 2"
        )
    return warnings


def learning_rate_warnings(learning_rate: float, parameters: int) -> list[str]:
    """Warn about a learning rate that suits a small model, if the model is large."""
    if learning_rate <= MAX_SAFE_RATE or parameters < LARGE_MODEL:
        return []
    return [
        f"learning_rate={learning_rate:g} for {parameters / 1e9:.1f} billion parameters suits a small model: published "
        "runs of models of this size take 1e-6 to 1e-5 (3e-6 with adapters)"
    ]


def bf16_warnings(recipe: Recipe, device: str) -> list[str]:
    """Warn about bf16 on a CPU that has no bf16 products."""
    has_bf16_weights = isinstance(recipe.model, str) and recipe.dtype == "bfloat16"
    if device != "cpu" or has_bf16_products() or not (recipe.bf16 or has_bf16_weights):
        return []
    name = "bf16=True" if recipe.bf16 else "dtype='bfloat16'"
    return [
        f"{name}: this CPU has no bf16 products, and emulated ones are slow; where memory allows use "
        f"{as_written(dtype='float32', bf16=False)}"
    ]


def clip_warnings(recipe: Recipe) -> list[str]:
    """Warn if the loss does not bound the ratio where the advantage is negative: see recipes/studies/mismatch.md."""
    if recipe.num_iterations == 1 or not recipe.has_separate_rollout_policy or not lacks_upper_keyword_value(recipe):
        return []
    return [
        f"num_iterations={recipe.num_iterations} with rollouts computed in other arithmetic and loss.delta=None: "
        "nothing bounds the ratio where the advantage is negative, and heavy mismatch then does most of its harm; use "
        f"{dual_clip_setting(recipe)}"
    ]


def staleness_warnings(recipe: Recipe) -> list[str]:
    """Warn about stale rollouts without a bound or a corrector: see recipes/studies/late_rollouts.md."""
    is_bounded = recipe.old_logprobs == "rollout" and not lacks_upper_keyword_value(recipe)
    if not recipe.max_staleness or is_bounded or recipe.corrector.has_weight_fn:
        return []
    rollout = as_written(old_logprobs="rollout")
    remedy = f"{rollout} and {dual_clip_setting(recipe)}" if lacks_upper_keyword_value(recipe) else rollout
    return [
        f"max_staleness={recipe.max_staleness} with old_logprobs={recipe.old_logprobs!r}, and no corrector with "
        "weights: the loss does not bound how far the learner is from the weights that sampled; use "
        f"{remedy}"
    ]


def corrector_warnings(recipe: Recipe) -> list[str]:
    """Warn about a corrector whose weights leave the gradient biased."""
    weight_fn = recipe.corrector.weight_fn
    for part in _keyword_value(weight_fn, "weight_fns") or (weight_fn,):
        keywords = part.keywords if isinstance(part, partial) else {}
        if (keywords.get("level"), keywords.get("pool")) == BIASED_LEVEL_AND_POOL:
            return [
                "corrector with level='sequence' and pool='geometric': the geometric mean of a row's ratios is not the "
                "row's importance weight, and the corrected gradient stays biased; use pool='product', or level='token'"
            ]
    return []


def lacks_upper_keyword_value(recipe: Recipe) -> bool:
    """Return whether the loss is PPO's without `delta`, which leaves the ratio unbounded for negative advantages."""
    loss = recipe.resolved_loss
    return function_of(loss) is ppo_clip and _keyword_value(loss, "delta") is None


def dual_clip_setting(recipe: Recipe) -> str:
    """Return the setting that also bounds PPO's ratio where the advantage is negative (dual clip), at the recipe's
    epsilon.
    """
    epsilon, epsilon_high = (_keyword_value(recipe.resolved_loss, name) for name in ("epsilon", "epsilon_high"))
    delta = float(f"{1 + (epsilon if epsilon_high is None else epsilon_high):.10g}")
    return option_as_written("loss", "ppo_clip" if recipe.loss is None else None, "delta", delta)


def likelihood_warnings(recipe: Recipe) -> list[str]:
    """Warn about differences between rollout and learner that the ratios of the recipe's estimator do not include."""
    warnings = []
    likelihood = recipe.likelihood
    has_exact_ratios = likelihood.exact_ratios
    cache = _keyword_value(recipe.sampler, "cache")
    excludes_order = likelihood.factory is not None and likelihood.factory.keywords.get("include_order") is False
    if likelihood.name == "trajectory" and not excludes_order and (rules := rules_of(recipe)) is not None:
        rank, commit = rules
        pair = f"sampler.rank={rank.name} with commit={commit.name}"
        is_greedy = _keyword_value(recipe.sampler, "temperature") == 0
        if order_probability(rank, commit, greedy=is_greedy) == "unknown":
            warnings.append(
                f"{pair}: the order's probability is unknown, so likelihood=trajectory is not exact for this sampler: "
                "its ratios leave the order out; use rank=max_prob or random and a commit rule of the library, declare "
                "yours (Rank, also for base_rank, or Commit), or set include_order=False if you intend it"
            )
        elif has_order_logprob(rank, commit, greedy=is_greedy) and not likelihood.exact_for_sampler:
            warnings.append(
                f"{pair} and num_segments or num_sampled_steps: the order has a probability, which segments leave out "
                "of the ratios; leave both at None, or use rank=max_prob or random"
            )
    if not has_exact_ratios and recipe.corrector.has_weight_fn and recipe.has_separate_rollout_policy:
        warnings.append(
            f"likelihood={likelihood.name!r} gives no likelihood ratios: the mean of the corrector's weights is not 1, "
            "and they need not bring the gradient nearer to the learner's own; use trajectory(), or corrector=none"
        )
    if not has_exact_ratios and cache is not None and cache.kind != "block" and cache.refresh != 1:
        warnings.append(
            f"sampler.cache={cache.kind!r} is approximate, and likelihood={likelihood.name!r} does not replay the "
            "sampler: what the cache changes enters neither loss nor metrics; use trajectory(), or no cache"
        )
    return warnings


def order_depends_on_tokens(recipe: Recipe) -> bool:
    """Return whether the order in which the recipe's sampler writes positions depends on the tokens that it draws."""
    if (rules := rules_of(recipe)) is None or _keyword_value(recipe.sampler, "temperature") == 0:
        return False
    return "tokens" in rules[0].reads or has_order_logprob(*rules)


def rules_of(recipe: Recipe) -> tuple[Rank, Commit] | None:
    """Return the rank and the commit rule of the recipe's sampler; None if the sampler has no such rules."""
    rank, commit = _keyword_value(recipe.sampler, "rank"), _keyword_value(recipe.sampler, "commit")
    return None if rank is None or commit is None else (as_rank(rank), as_commit(commit))


def made_up_rewards(recipe: Recipe) -> tuple[Float[Tensor, "P G"], dict[str, Tensor]]:
    """Return artificial rewards of a batch, all different, and the extra arguments for `recipe.advantages`."""
    shape = (recipe.train_batch_size, recipe.num_generations)
    rewards = torch.arange(float(shape[0] * shape[1])).reshape(shape)
    if not takes_component_rewards(recipe.advantages):
        return rewards, {}
    return rewards, {"parts": rewards[None], "weights": torch.ones(1)}


def _keyword_value(function: Callable, name: str) -> Any:
    """Return the value that `partial` binds to a function's keyword, or its default; None if it has no such keyword."""
    target, keywords = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
    parameter = inspect.signature(target).parameters.get(name)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return keywords.get(name, default)
