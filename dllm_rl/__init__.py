"""Reinforcement learning of diffusion language models with quantized rollouts.

The public names below are imported on first use, so that `import dllm_rl` is fast.
"""

import difflib
from importlib import import_module
from typing import Any

from dllm_rl.screen import imports_interruptible, silence_import_noise

silence_import_noise()  # before the libraries that log this noise are imported

__version__ = "0.3.0"

_NAMES_BY_MODULE = {
    "types": "Prompts SamplingParams Rollout",
    "recipe": "Recipe",
    "callbacks": "Callback RunControl StopBelow SaveBest",
    "config": "from_command_line",
    "members": "describe",
    "tasks": "Problem Reward Task Sudoku Countdown GSM8K MATH500 ReasoningGym task_from_dataset",
    "models.base": "Policy FamilySpec Lora",
    "models.policy": "load_policy load_weights make_policy DiffusionPolicy AutoregressivePolicy "
    "diffusion_from_causal as_causal",
    "models.checkpoint.families": "register_family",
    "models.lora": "lora_r16",
    "models.tiny": "tiny_masked_lm tiny_llama tiny_moe",
    "samplers": "unmask autoregress",
    "samplers.records": "Rank Commit",
    "samplers.rules": "confidence max_prob margin schedule threshold factor entropy_bound",
    "samplers.revise": "remask edit soft_edit",
    "samplers.cache": "block_cache prefix_cache dual_cache",
    "quantization.schemes": "float8_weight_only float8_dynamic int8_weight_only int8_dynamic "
    "int4_weight_only int4_packed fake_quantize",
    "quantization.rollout_policy": "quantized_copy sync_weights",
    "likelihoods.estimator": "LikelihoodEstimator",
    "likelihoods.estimators": "one_step elbo coupled quadrature block_elbo eubo sandwich trajectory causal",
    "algorithms.advantages": "group_relative leave_one_out decoupled",
    "algorithms.correctors": "Corrector TokenStats TokenWeights no_correction tis mis icepop reject ais tbpo aligned "
    "qarl compose drop_nonfinite",
    "algorithms.by_step": "by_step",
    "algorithms.prompt_sources": "PromptSource RewardHistory uniform_prompts mixed_reward_prompts",
    "algorithms.triage": "triage",
    "algorithms.losses": "ppo_clip gspo trust_band cispo vespo reinforce token_mean sequence_mean "
    "fixed_length_mean kl_k3",
    "algorithms.optimizers": "adamw_8bit",
    "training.trainer": "train",
    "training.grpo": "grpo grpo_recipe",
    "supervised.train": "sft",
    "supervised.recipe": "SFT",
    "cli.run_recipe": "main",
    "evaluation.evaluate": "evaluate",
    "diagnostics.doctor": "diagnose",
    "testing": "check_corrector check_estimator check_order check_policy",
}
_MODULE_OF = {name: f"dllm_rl.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        nearest = difflib.get_close_matches(name, __all__, n=1)
        hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
        raise AttributeError(f"module 'dllm_rl' has no attribute {name!r}{hint}")
    with imports_interruptible():
        return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
