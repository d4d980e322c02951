"""Warnings, of one line each, about settings with which a run learns nothing or learns badly."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.algorithms.correctors import Compose
from dllm_rl.algorithms.losses import K1, PPOClip
from dllm_rl.distributed.stop import as_written, option_as_written
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.recipe import Recipe
from dllm_rl.records import describe
from dllm_rl.samplers.rules import SCORED_ORDERS, Commit, Rank, order_probability
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types import equal_groups

BF16_RELATIVE_STEPS = 512  # a change by less than 1/512 of a bf16 number is rounded away
MAX_SAFE_RATE = 1e-4  # largest learning rate without a warning for a model of LARGE_MODEL parameters
LARGE_MODEL = 7e9
BIASED_LEVEL_AND_POOL = ("sequence", "geometric")
TYPICAL_WEIGHT = 0.02  # typical absolute value of a weight in a language model's matrices


def cautions(recipe: Recipe) -> list[str]:
    """Return the warnings about a recipe that need no model. `start` prints them."""
    warnings = []
    if getattr(recipe.sampler, "temperature", None) == 0:
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
    if recipe.beta and recipe.kl == K1():
        warnings.append(
            f"beta={recipe.beta:g} with kl=K1(): the mean gradient of k1 is 0 where the learner drew the tokens, and "
            "only noise is added; use K2() or K3()"
        )
    warnings += (
        clip_warnings(recipe) + staleness_warnings(recipe) + corrector_warnings(recipe) + likelihood_warnings(recipe)
    )
    rewards, group, component_arguments = made_up_rewards(recipe)
    if not recipe.advantages(rewards, group, **component_arguments).any():
        name = describe(recipe.advantages)
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
    has_bf16_products = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device != "cpu" or has_bf16_products or not (recipe.bf16 or has_bf16_weights):
        return []
    name = "bf16=True" if recipe.bf16 else "dtype='bfloat16'"
    return [
        f"{name}: this CPU has no bf16 products, and emulated ones are slow; where memory allows use "
        f"{as_written(dtype='float32', bf16=False)}"
    ]


def clip_warnings(recipe: Recipe) -> list[str]:
    """Warn if the loss does not bound the ratio where the advantage is negative: see recipes/studies/mismatch.md."""
    if recipe.num_iterations == 1 or not recipe.has_separate_rollout_policy or not lacks_upper_bound(recipe):
        return []
    return [
        f"num_iterations={recipe.num_iterations} with rollouts computed in other arithmetic and loss.delta=None: "
        "nothing bounds the ratio where the advantage is negative, and heavy mismatch then does most of its harm; use "
        f"{dual_clip_setting(recipe)}"
    ]


def staleness_warnings(recipe: Recipe) -> list[str]:
    """Warn about stale rollouts without a bound or a corrector: see recipes/studies/late_rollouts.md."""
    is_bounded = recipe.old_logprobs == "rollout" and not lacks_upper_bound(recipe)
    if not recipe.max_staleness or is_bounded or recipe.corrector.has_weights:
        return []
    rollout = as_written(old_logprobs="rollout")
    remedy = f"{rollout} and {dual_clip_setting(recipe)}" if lacks_upper_bound(recipe) else rollout
    return [
        f"max_staleness={recipe.max_staleness} with old_logprobs={recipe.old_logprobs!r}, and no corrector with "
        "weights: the loss does not bound how far the learner is from the weights that sampled; use "
        f"{remedy}"
    ]


def corrector_warnings(recipe: Recipe) -> list[str]:
    """Warn about a corrector whose weights leave the gradient biased."""
    corrector = recipe.corrector
    for part in corrector.parts if isinstance(corrector, Compose) else (corrector,):
        if (getattr(part, "level", None), getattr(part, "pool", None)) == BIASED_LEVEL_AND_POOL:
            return [
                "corrector with level='sequence' and pool='geometric': the geometric mean of a row's ratios is not the "
                "row's importance weight, and the corrected gradient stays biased; use pool='product', or level='token'"
            ]
    return []


def lacks_upper_bound(recipe: Recipe) -> bool:
    """Return whether the loss is PPO's without `delta`, which leaves the ratio unbounded for negative advantages."""
    loss = recipe.resolved_loss
    return isinstance(loss, PPOClip) and loss.delta is None


def dual_clip_setting(recipe: Recipe) -> str:
    """Return the setting that also bounds PPO's ratio where the advantage is negative (dual clip), at the recipe's
    epsilon.
    """
    loss = recipe.resolved_loss
    assert isinstance(loss, PPOClip), "`lacks_upper_bound` found PPO's loss"
    delta = float(f"{1 + (loss.epsilon if loss.epsilon_high is None else loss.epsilon_high):.10g}")
    return option_as_written("loss", "PPOClip" if recipe.loss is None else None, "delta", delta)


def likelihood_warnings(recipe: Recipe) -> list[str]:
    """Warn about differences between rollout and learner that the ratios of the recipe's estimator do not include."""
    warnings = []
    likelihood = recipe.likelihood
    has_exact_ratios = likelihood.exact_ratios
    cache = getattr(recipe.sampler, "cache", None)
    includes_order = isinstance(likelihood, Trajectory) and likelihood.include_order
    if includes_order and (rules := rules_of(recipe)) is not None:
        rank, commit = rules
        pair = f"sampler.rank={rank.name} with commit={commit.name}"
        is_greedy = getattr(recipe.sampler, "temperature", None) == 0
        probability = order_probability(rank, commit, greedy=is_greedy)
        if probability == "unknown":
            warnings.append(
                f"{pair}: the order's probability is unknown, so likelihood=Trajectory() is not exact here: "
                "its ratios leave the order out; use rank=MaxProb() or RandomOrder() and a commit rule of the library, "
                "declare yours (Rank.order, also for base_rank, or Commit.order), or set include_order=False"
            )
        elif probability in SCORED_ORDERS and not likelihood.exact_for_sampler:
            warnings.append(
                f"{pair} and num_segments or num_sampled_steps: the order has a probability, which segments leave out "
                "of the ratios; leave both at None, or use rank=MaxProb() or RandomOrder()"
            )
    if not has_exact_ratios and recipe.corrector.has_weights and recipe.has_separate_rollout_policy:
        warnings.append(
            f"likelihood={likelihood.name!r} gives no likelihood ratios: the mean of the corrector's weights is not 1, "
            "and they need not bring the gradient nearer to the learner's own; use Trajectory(), or no corrector"
        )
    if not has_exact_ratios and cache is not None and cache.kind != "block" and cache.refresh != 1:
        warnings.append(
            f"sampler.cache={cache.kind!r} is approximate, and likelihood={likelihood.name!r} does not replay the "
            "sampler: what the cache changes enters neither loss nor metrics; use Trajectory(), or no cache"
        )
    return warnings


def order_depends_on_tokens(recipe: Recipe) -> bool:
    """Return whether the order in which the recipe's sampler writes positions depends on the tokens that it draws."""
    if (rules := rules_of(recipe)) is None or getattr(recipe.sampler, "temperature", None) == 0:
        return False
    return "tokens" in rules[0].reads or order_probability(*rules) in SCORED_ORDERS


def rules_of(recipe: Recipe) -> tuple[Rank, Commit] | None:
    """Return the rank and the commit rule of the recipe's sampler; None if the sampler has no such rules."""
    sampler = recipe.sampler
    return (sampler.rank, sampler.commit) if isinstance(sampler, Unmask) else None


def made_up_rewards(recipe: Recipe) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"], dict[str, Tensor]]:
    """Return artificial rewards of a batch, all different, their groups, and the extra arguments for
    `recipe.advantages`.
    """
    group = equal_groups(recipe.train_batch_size, recipe.num_generations)
    rewards = torch.arange(float(len(group)))
    if not recipe.advantages.takes_component_rewards:
        return rewards, group, {}
    return rewards, group, {"parts": rewards[None], "weights": torch.ones(1)}
