"""Nine small runs that take every branch of the loop but fresh masks; in several, rewards of groups are all equal."""

from pathlib import Path

from run_outputs import metrics_of
from tiny_recipe import OddPuzzles, tiny_recipe

from dllm_rl.algorithms.correctors import compose, qarl, reject, tis
from dllm_rl.algorithms.losses import kl_k2
from dllm_rl.likelihoods.estimators import coupled, elbo, one_step, sandwich, trajectory
from dllm_rl.training import train

PAIRS = {"num_generations": 2, "train_batch_size": 8}
TWICE = PAIRS | {"num_iterations": 2, "resample_masks": False}
CONFIGURATIONS = {
    "golden": {"num_steps": 5, "num_iterations": 2, "learning_rate": 5e-3, "sft_warmup_steps": 4},
    "elbo, micro-batches": TWICE | {"likelihood": elbo(num_samples=2), "micro_batch_size": 4},
    "one_step": TWICE | {"likelihood": one_step()},
    "coupled, KL": PAIRS | {"likelihood": coupled(), "beta": 0.1, "kl": kl_k2},
    "sandwich, tis, rejection": PAIRS | {"likelihood": sandwich(), "corrector": compose(tis(), reject(threshold=1e-4))},
    "qarl": PAIRS | {"corrector": qarl(), "num_iterations": 2},
    "dynamic sampling": {"task": OddPuzzles(), "train_batch_size": 8, "max_num_gen_batches": 3},
    "zero_mismatch, validation": PAIRS | {"zero_mismatch": True, "rollout_quantization": None, "eval_steps": 1},
    "entropy bonus": PAIRS | {"task": OddPuzzles(), "entropy_coeff": 0.01, "num_iterations": 2},
}


def run(name: str, directory: Path) -> list[dict[str, float]]:
    """Every number of metrics.jsonl but the times."""
    settings = {"num_steps": 3, "learning_rate": 5e-3, "likelihood": trajectory(include_order=False)}
    train(tiny_recipe(directory, **{**settings, **CONFIGURATIONS[name]}))
    return metrics_of(directory)
