"""Nine small runs that take every branch of the loop but fresh masks; in several, rewards of groups are all equal."""

from functools import partial
from pathlib import Path

from run_outputs import metrics_of
from tiny_recipe import SIZES, OddPuzzles, tiny_recipe

from dllm_rl.algorithms.correctors import TIS, Compose, QaRL, Reject
from dllm_rl.algorithms.losses import K2
from dllm_rl.likelihoods.estimators import ELBO, Coupled, OneStep, Trajectory
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.rules import Confidence
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.training.trainer import train
from recipes.examples.bounds import Sandwich

MODEL = partial(tiny_masked_lm, **SIZES | {"num_layers": 2})
PAIRS = {"num_generations": 2, "train_batch_size": 8}
TWICE = PAIRS | {"num_iterations": 2, "resample_masks": False}
CONFIGURATIONS = {
    "golden": {"num_steps": 5, "num_iterations": 2, "learning_rate": 5e-3, "sft_warmup_steps": 4},
    "elbo, micro-batches": TWICE | {"likelihood": ELBO(num_samples=2), "micro_batch_size": 4},
    "one_step": TWICE | {"likelihood": OneStep()},
    "coupled, KL": PAIRS | {"likelihood": Coupled(), "beta": 0.1, "kl": K2()},
    "sandwich, tis, rejection": PAIRS
    | {"likelihood": Sandwich(), "corrector": Compose(parts=(TIS(), Reject(threshold=1e-4)))},
    "qarl": PAIRS | {"corrector": QaRL(), "num_iterations": 2},
    "dynamic sampling": {"task": OddPuzzles(), "train_batch_size": 8, "max_num_gen_batches": 3},
    "zero_mismatch, validation": PAIRS | {"zero_mismatch": True, "rollout_quantization": None, "eval_steps": 1},
    "entropy bonus": PAIRS | {"task": OddPuzzles(), "entropy_coeff": 0.01, "num_iterations": 2},
}


def run(name: str, directory: Path, **changes) -> list[dict[str, float]]:
    """Every number of metrics.jsonl but the times."""
    settings = {"model": MODEL, "num_steps": 3, "learning_rate": 5e-3, "likelihood": Trajectory(include_order=False)}
    settings["eval_sampler"] = Unmask(max_new_tokens=16, diffusion_steps=3, rank=Confidence())  # of the stored curves
    train(tiny_recipe(directory, **{**settings, **CONFIGURATIONS[name], **changes}))
    return metrics_of(directory)
