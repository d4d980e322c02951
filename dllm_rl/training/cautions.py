"""Warnings, of one line each, about settings with which a run learns nothing or learns badly."""

import os

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.algorithms.correctors import Compose
from dllm_rl.algorithms.losses import K1, PPOClip, Reinforce
from dllm_rl.distributed.stop import as_written, option_as_written
from dllm_rl.likelihoods.estimators import EXACT, LikelihoodEstimator, OneStep, Trajectory
from dllm_rl.models.base import Policy, has_bf16_products, trainable_parameters
from dllm_rl.recipe import Recipe
from dllm_rl.records import describe
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.rules import SCORED_ORDERS, order_probability
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.collect import component_arguments, component_reward_weights, compute_advantages
from dllm_rl.step.settings import StepSettings
from dllm_rl.types.groups import equal_groups
from dllm_rl.types.rollouts import SamplingParams

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
    if recipe.lora is None and trains_bf16_weights(recipe) and largest_updated_weight < TYPICAL_WEIGHT:
        weights, fp32 = "dtype='bfloat16'", as_written(dtype="float32", bf16=True)
        if isinstance(recipe.model, Policy):
            weights, fp32 = "a policy in bf16", "one in fp32, and bf16=True"
        warnings.append(
            f"{weights} without lora and learning_rate={recipe.learning_rate}: bf16 weights above "
            f"{largest_updated_weight:.1g} round such updates away; use {fp32}: fp32 weights, bf16 products"
        )
    if recipe.beta and recipe.kl == K1():
        warnings.append(
            f"beta={recipe.beta:g} with kl=K1(): the mean gradient of k1 is 0 where the learner drew the tokens, and "
            "only noise is added; use K2() or K3()"
        )
    warnings += ratio_warnings(recipe)
    likelihood = recipe.likelihood
    has_unequal_weights = likelihood.is_random and not likelihood.exact_ratios and not isinstance(likelihood, OneStep)
    if recipe.entropy_coeff and has_unequal_weights:
        warnings.append(
            f"entropy_coeff={recipe.entropy_coeff:g} with likelihood={likelihood.name!r}: the bonus grows with the "
            "mean square of the estimate's weights, and may be several times as strong; use "
            f"{EXACT}, or a smaller entropy_coeff"
        )
    corrector = recipe.corrector
    for part in corrector.parts if isinstance(corrector, Compose) else (corrector,):
        if (getattr(part, "level", None), getattr(part, "pool", None)) == BIASED_LEVEL_AND_POOL:
            warnings.append(
                "corrector with level='sequence' and pool='geometric': the geometric mean of a row's ratios is not the "
                "row's importance weight, and the corrected gradient stays biased; use pool='product', or level='token'"
            )
    corrects_mismatch = corrector.has_weights and recipe.has_separate_rollout_policy
    warnings += likelihood_warnings(recipe.likelihood, recipe.sampler, corrects_mismatch=corrects_mismatch)
    sampler, support = recipe.sampler, recipe.sampling_support
    if (
        corrects_mismatch
        and support == "per_policy"
        and isinstance(sampler, Unmask | Autoregress)
        and SamplingParams(1.0, sampler.top_k, sampler.top_p).filters
    ):
        warnings.append(
            f"sampler.top_k={sampler.top_k} and top_p={sampler.top_p} with sampling_support={support!r}: the filter "
            "may keep other tokens for the learner than for the rollout, and the mean of the corrector's weights is "
            f"then not 1; use {as_written(sampling_support='rollout')}, or leave the filter out"
        )
    if not made_up_advantages(recipe)[1].any():
        name = describe(recipe.advantages)
        warnings.append(
            f"num_generations={recipe.num_generations} with advantages={name} gives advantages that are all 0, "
            "which teach nothing; use at least 2"
        )
    return warnings


def trains_bf16_weights(recipe: Recipe) -> bool:
    """Return whether the weights to train are in bf16, as far as is known before a checkpoint is loaded."""
    if isinstance(recipe.model, Policy):
        return any(weight.dtype == torch.bfloat16 for weight in trainable_parameters(recipe.model.module))
    return isinstance(recipe.model, str) and recipe.dtype == "bfloat16"


def learning_rate_warnings(learning_rate: float, parameters: int) -> list[str]:
    """Warn about a learning rate that suits a small model, if the model is large."""
    if learning_rate <= MAX_SAFE_RATE or parameters < LARGE_MODEL:
        return []
    return [
        f"learning_rate={learning_rate:g} for {parameters / 1e9:.1f} billion parameters suits a small model: published "
        "runs of models of this size take 1e-6 to 1e-5"
    ]


def launch_warnings(dtype: str | None, bf16: bool) -> list[str]:
    """Warn about a launch's `mixed_precision`, which a run does not read. `dtype`: of weights loaded from a path."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by Accelerate's launcher
    if precision == "no" or (precision == "bf16" and (bf16 or dtype == "bfloat16")):
        return []
    remedy = f"for bf16 products use {as_written(bf16=True)}"
    return [f"mixed_precision={precision} of the launch's config is not read: set it to no; {remedy}"]


def bf16_warnings(dtype: str | None, bf16: bool, device: str) -> list[str]:
    """Warn about bf16 on a CPU that has no bf16 products. `dtype`: of weights loaded from a path, else None."""
    if device != "cpu" or has_bf16_products() or not (bf16 or dtype == "bfloat16"):
        return []
    name = "bf16=True" if bf16 else "dtype='bfloat16'"
    return [
        f"{name}: this CPU has no bf16 products, and emulated ones are slow; where memory allows use "
        f"{as_written(dtype='float32', bf16=False)}"
    ]


def ratio_warnings(recipe: Recipe) -> list[str]:
    """Warn if the loss does not bound the ratio where the advantage is negative (see docs/losses.md), and
    about stale rollouts without a bound or a corrector (see recipes/studies/late/README.md).
    """
    loss = recipe.resolved_loss
    bound = ""  # the setting that also bounds PPO's ratio where the advantage is negative (dual clip)
    if isinstance(loss, PPOClip) and loss.delta is None:
        delta = float(f"{1 + (loss.epsilon if loss.epsilon_high is None else loss.epsilon_high):.10g}")
        bound = option_as_written("loss", "PPOClip" if recipe.loss is None else None, "delta", delta)
    warnings = []
    if recipe.num_iterations > 1 and recipe.has_separate_rollout_policy and bound:
        warnings.append(
            f"num_iterations={recipe.num_iterations} with rollouts computed in other arithmetic and loss.delta=None: "
            "nothing bounds the ratio where the advantage is negative, and heavy mismatch then does most of its harm; "
            f"use {bound}"
        )
    if recipe.num_iterations > 1 and isinstance(loss, Reinforce):
        warnings.append(
            f"num_iterations={recipe.num_iterations} with loss=Reinforce(): nothing bounds how far the later updates "
            "go, and such runs have collapsed at learning rates of supervised training; use PPOClip(), "
            "num_iterations=1, or replay"
        )
    is_bounded = recipe.old_logprobs == "rollout" and not bound
    if recipe.max_staleness > 1 and not is_bounded and not recipe.corrector.has_weights:
        rollout = as_written(old_logprobs="rollout")
        warnings.append(
            f"late.max_staleness={recipe.max_staleness} with old_logprobs={recipe.old_logprobs!r}, and no corrector "
            "with weights: the loss does not bound how far the learner is from the weights that sampled; use "
            f"{f'{rollout} and {bound}' if bound else rollout}"
        )
    if recipe.max_staleness > 1 and not recipe.likelihood.exact_ratios:
        has_more = recipe.late is not None and recipe.late.workers > 2
        fewer = as_written(**{"late.max_staleness": 1} | ({"late.workers": 2} if has_more else {}))
        warnings.append(
            f"late.max_staleness={recipe.max_staleness} with likelihood={recipe.likelihood.name!r}: no likelihood "
            f"ratio says how far the learner is from the weights that sampled; use {fewer}, or likelihood={EXACT}"
        )
    return warnings


def likelihood_warnings(likelihood: LikelihoodEstimator, sampler: Sampler, *, corrects_mismatch: bool) -> list[str]:
    """Warn about differences between rollout and learner that the ratios of the estimator do not include."""
    warnings = []
    has_exact_ratios = likelihood.exact_ratios
    cache = getattr(sampler, "cache", None)
    includes_order = isinstance(likelihood, Trajectory) and likelihood.include_order
    if includes_order and isinstance(sampler, Unmask):
        rank, commit = sampler.rank, sampler.commit
        pair = f"sampler.rank={rank.name} with commit={commit.name}"
        is_greedy = sampler.temperature == 0
        probability = order_probability(rank, commit, greedy=is_greedy)
        if probability == "unknown":
            warnings.append(
                f"{pair}: the order's probability is unknown, so likelihood=Trajectory() is not exact here: "
                "its ratios leave the order out; use rank=MaxProb() or RandomOrder() and a commit rule of the library, "
                "declare yours (Rank.order, also for base_rank, or Commit.order), or set include_order=False"
            )
        elif probability in SCORED_ORDERS and not likelihood.exact_for_sampler:
            warnings.append(
                f"{pair} and num_segments: the order has a probability, which segments leave out of the ratios; leave "
                "num_segments at None, or use rank=MaxProb() or RandomOrder()"
            )
        elif probability == "deterministic" and commit.adaptive:
            warnings.append(
                f"{pair}: how many positions a step writes depends on the weights, and neither the ratios nor the "
                "gradient contain this choice; use rank=MaxProb() with commit=SoftThreshold(tau=...), or "
                "commit=Schedule()"
            )
    if not has_exact_ratios and corrects_mismatch:
        warnings.append(
            f"likelihood={likelihood.name!r} estimates the ratios: with two segments no gain of TIS, nor of AIS on "
            "FP8 rollouts, was shown in training (answers of 16 tokens), and other cases were not trained; compare "
            "with corrector=NoCorrection() (docs/mismatch.md)"
        )
    if not has_exact_ratios and cache is not None and cache.kind != "block" and cache.refresh != 1:
        warnings.append(
            f"sampler.cache={cache.kind!r} is approximate, and likelihood={likelihood.name!r} does not replay the "
            f"sampler: what the cache changes enters neither loss nor metrics; use {EXACT}, or no cache"
        )
    return warnings


def order_depends_on_tokens(sampler: Sampler) -> bool:
    """Return whether the order in which a sampler writes positions depends on the tokens that it draws."""
    if not isinstance(sampler, Unmask) or sampler.temperature == 0:
        return False
    return "tokens" in sampler.rank.reads or order_probability(sampler.rank, sampler.commit) in SCORED_ORDERS


def made_up_advantages(settings: StepSettings) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Return the groups of a step, and the advantages of artificial rewards in [0, 1) that are all different. The
    component rewards, if the advantages take them, are powers of these, because a rule may subtract one from another.
    """
    group = equal_groups(settings.train_batch_size, settings.num_generations)
    rewards = torch.arange(len(group)) / len(group)
    weights = component_reward_weights(settings)
    components = component_arguments(rewards ** torch.arange(1, len(weights) + 1)[:, None], weights)
    return group, compute_advantages(settings.advantages, rewards, group, components)
