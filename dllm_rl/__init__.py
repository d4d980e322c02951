"""Reinforcement learning of diffusion language models with quantised rollouts.

The public names below are imported on first use, so that `import dllm_rl` costs nothing.
"""

from importlib import import_module
from typing import Any

from dllm_rl.quiet import silence_import_noise

silence_import_noise()

__version__ = "0.1.0"

_HOME = {
    "types": ["Prompts", "SamplingParams", "Rollout", "Batch"],
    "tasks.base": ["Problem", "Reward", "Task"],
    "models.base": ["Policy"],
    "models.policy": ["load_policy", "DiffusionPolicy", "AutoregressivePolicy"],
    "samplers.unmask": ["unmask"],
    "samplers.autoregress": ["autoregress"],
    "likelihoods.estimators": [
        *["LikelihoodEstimator", "one_step", "elbo", "coupled", "quadrature", "block", "eubo", "sandwich"],
        *["trajectory", "causal"],
    ],
    "algorithms.correctors": [
        *["Corrector", "none", "tis", "mis", "icepop", "reject", "ais", "tbpo", "aligned", "qarl", "compose"],
    ],
    "quantization.rollout_policy": ["quantized_copy", "sync_weights"],
    "recipe": ["Recipe"],
    "config": ["describe", "from_command_line"],
    "training.loop": ["train"],
    "evaluation.evaluate": ["evaluate"],
}
_MODULE_OF = {name: f"dllm_rl.{module}" for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dllm_rl' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
