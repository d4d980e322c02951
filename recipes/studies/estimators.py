"""Which likelihood estimator should one use? Bias, noise and cost of each, then GRPO with each at equal cost.

Part one scores completions of the main job's model (4x4 Sudoku, 16 cells in two steps) many times over. The sampler
ranks positions by the state alone, so that the two-step trajectory is the exact log-likelihood of a completion, and
its gradient the exact policy gradient; the any-order ELBO is known to a hundredth of a nat from 512 masks.
Part two trains with each estimator from the same warmed-up model (one per seed) for the same CPU seconds: the number
of steps is the budget over the cost of a step, measured just before. Finished runs are kept, one JSON each.

    python -m recipes.studies.estimators                   run what is missing, then write the table and the figure
    python -m recipes.studies.estimators --seconds 20 --seeds 2 --arms trajectory coupled
    python -m recipes.studies.estimators --report          write table and figure from what is there
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from dllm_rl.algorithms.advantages import group_relative
from dllm_rl.algorithms.correctors import none
from dllm_rl.checkpoints.checkpoint import found
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.models.base import Policy
from dllm_rl.models.policy import load_policy
from dllm_rl.models.tokens import decode, encode
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.tasks.base import grade
from dllm_rl.training.learner import accumulate_gradients
from dllm_rl.training.loop import train
from dllm_rl.types import Batch, Rollout
from recipes.studies import estimators_report
from recipes.studies.paired import warm_up
from recipes.sudoku_tiny import recipe as base

MEASURED = {
    "one_step(prompt_mask=0.15)": lik.one_step(),
    "one_step(prompt_mask=0)": lik.one_step(prompt_mask=0.0),
    "elbo(1)": lik.elbo(num_samples=1),
    "elbo(4), plain": lik.elbo(num_samples=4, stratified=False),
    "elbo(4), stratified": lik.elbo(num_samples=4),
    "elbo(4), antithetic": lik.elbo(num_samples=4, antithetic=True),
    "elbo(16), antithetic": lik.elbo(num_samples=16, antithetic=True),
    "coupled(1)": lik.coupled(num_samples=1),
    "coupled(2)": lik.coupled(num_samples=2),
    "coupled(8)": lik.coupled(num_samples=8),
    "quadrature(2)": lik.quadrature(nodes=2),
    "quadrature(3)": lik.quadrature(nodes=3),
    "block(8, 2)": lik.block(block_size=8, num_samples=2),
    "eubo on coupled(2)": lik.eubo(base=lik.coupled(num_samples=2)),
    "trajectory(1 segment)": lik.trajectory(num_segments=1),
    "trajectory": lik.trajectory(),
}
TRAINED = {
    "trajectory": lik.trajectory(),
    "one_step": lik.one_step(),
    "coupled": lik.coupled(num_samples=1),
    "elbo": lik.elbo(num_samples=4, antithetic=True),
    "trajectory-1": lik.trajectory(num_segments=1),
    "quadrature": lik.quadrature(nodes=3),
    "coupled-4": lik.coupled(num_samples=4),
    "sandwich": lik.sandwich(base=lik.coupled(num_samples=1)),
    "block": lik.block(block_size=8, num_samples=2),
}
plain = replace(base, rollout_quantization=None, corrector=none())


def start(seed: int, root: Path) -> Path:
    """The checkpoint that every arm of a seed starts from; made on first use."""
    return warm_up(plain, seed, root / f"warm-{seed}")


def trained(arm: str, seed: int, num_steps: int, folder: Path, root: Path) -> dict:
    """A finished run's summary, with the CPU seconds that its steps took."""
    likelihood = TRAINED[arm]
    recipe = replace(plain, model=str(start(seed, root)), warmup_steps=0, likelihood=likelihood, seed=seed)
    recipe = replace(recipe, num_steps=num_steps, save_steps=10**6, output_dir=str(folder), overwrite_output_dir=True)
    begin = time.process_time()
    return {**train(recipe), "cpu_seconds": time.process_time() - begin}


# Part one ---------------------------------------------------------------------------------------------------------


def sequences(estimator, policy: Policy, rollout: Rollout, noise) -> torch.Tensor:
    """Estimated log-likelihood of each completion (B,), nats."""
    return estimator.logprobs(policy, rollout, noise).double().sum(-1)


def gradient(estimator, policy: Policy, rollout: Rollout, noise, advantages: torch.Tensor) -> torch.Tensor:
    """The on-policy GRPO gradient (every ratio is 1) that an estimator gives, as one vector."""
    scores = estimator.scores(policy, rollout, noise)
    old, mask = estimator.combine(scores, noise), rollout.completion_mask
    batch = Batch(rollout, noise, advantages, old, scores, torch.ones_like(old), mask, None, int(mask.sum()), len(mask))
    parameters = list(policy.module.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    accumulate_gradients(policy, batch, scores, loss=replace(base, corrector=none()).policy_loss, likelihood=estimator)
    return torch.cat([p.grad.flatten() for p in parameters]).double()


def forwarded(estimator, policy: Policy, rollout: Rollout, noise) -> float:
    """Rows sent through the model in one scoring, per row of the batch."""
    rows, hidden = [], policy.hidden
    policy.hidden = lambda tokens, mask: (rows.append(len(tokens)), hidden(tokens, mask))[1]
    estimator.scores(policy, rollout, noise)
    del policy.hidden
    return sum(rows) / len(rollout.tokens)


def measure(root: Path, *, draws: int, gradient_draws: int, prompts: int, group: int = 8) -> dict:
    """Every estimator of MEASURED against the exact likelihood, on completions of the warmed-up model of seed 0.

    The ratio is between that model and the one that 20 steps of RL make of it.
    """
    old = load_policy(start(0, root))
    after = root / "after-20-steps"
    if not (after / "summary.json").exists():
        trained("trajectory", 0, 20, after, root)
    current = load_policy(found(after / "checkpoints")[-1][1])
    stream = torch.Generator().manual_seed(7)
    problems = [base.task[i] for i in range(prompts)]
    rollout = base.sampler(old, encode(old, problems, group_size=group), stream)
    rewards = torch.tensor([r.value for r in grade(base.task, problems, decode(old, rollout))]).view(prompts, group)
    advantages = group_relative(rewards.float()).flatten()

    exact, reference = lik.trajectory(), lik.coupled(num_samples=256)
    own = exact.draw(rollout, stream)
    log_p = sequences(exact, old, rollout, own)
    log_ratio = sequences(exact, current, rollout, own) - log_p
    direction = gradient(exact, old, rollout, own, advantages)
    elbo = sequences(reference, old, rollout, reference.draw(rollout, stream))
    rows = []
    for name, estimator in MEASURED.items():
        told = [estimator.with_advantages(estimator.draw(rollout, stream), advantages) for _ in range(draws)]
        begin = time.process_time()
        totals = torch.stack([sequences(estimator, old, rollout, noise) for noise in told])
        seconds = (time.process_time() - begin) / draws
        ratios = torch.stack([sequences(estimator, current, rollout, noise) for noise in told]) - totals
        cosines = []
        for noise in told[:gradient_draws]:
            g = gradient(estimator, old, rollout, noise, advantages)
            cosines.append((g @ direction / (g.norm() * direction.norm())).item())
        correlations = [torch.corrcoef(torch.stack([r, log_ratio]))[0, 1].item() for r in ratios]
        rows.append(
            {
                "estimator": name,
                "forwards": forwarded(estimator, old, rollout, told[0]),
                "bias_elbo": (totals.mean(0) - elbo).mean().item(),
                "bias_exact": (totals.mean(0) - log_p).mean().item(),
                "std": totals.var(0).mean().sqrt().item(),
                "correlation": sum(correlations) / draws,
                "ratio_error": (ratios - log_ratio).square().mean().sqrt().item(),
                "cosine": sum(cosines) / len(cosines),
                "seconds": seconds,
            }
        )
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    facts = {"completions": len(log_p), "draws": draws, "gradient_draws": gradient_draws, "torch": torch.__version__}
    facts |= {"log_p": log_p.mean().item(), "elbo": elbo.mean().item(), "log_ratio_std": log_ratio.std().item()}
    return facts | {"rows": rows}


# Part two ---------------------------------------------------------------------------------------------------------


def train_for(arm: str, seed: int, seconds: float, root: Path) -> dict:
    """GRPO with one estimator for a budget of CPU seconds; curves against CPU seconds."""
    probe = root / "probe"
    fixed = trained(arm, seed, 0, probe, root)["cpu_seconds"]
    step = max(1e-3, (trained(arm, seed, 6, probe, root)["cpu_seconds"] - fixed) / 6)
    num_steps = max(1, math.floor(seconds / step))
    folder = root / "runs" / f"{arm}-{seed}"
    summary = trained(arm, seed, num_steps, folder, root)
    curve = [row["rewards/solve_rate/mean"] for row in read_metrics(folder)]
    return {
        "arm": arm,
        "seed": seed,
        "budget": seconds,
        "num_steps": num_steps,
        "cpu_seconds": summary["cpu_seconds"] - fixed,
        "before": summary["eval_before"]["solve_rate"],
        "after": summary["eval_after"]["solve_rate"],
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of RL for each run of part two")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--prompts", type=int, default=16, help="of part one, 8 completions each")
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--gradient_draws", type=int, default=12)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = options.output_dir
    results = root / "results"
    results.mkdir(parents=True, exist_ok=True)
    if not options.report:
        path = results / "measured.json"
        if not path.exists():
            counts = {"draws": options.draws, "gradient_draws": options.gradient_draws, "prompts": options.prompts}
            path.write_text(json.dumps(measure(root, **counts), indent=1) + "\n")
        for seed in range(options.seeds):
            for arm in options.arms:
                path = results / f"trained-{options.seconds:g}s-{arm}-{seed}.json"
                if not path.exists():
                    path.write_text(json.dumps(train_for(arm, seed, options.seconds, root)) + "\n")
    estimators_report.write(results, Path(__file__).parent, seconds=options.seconds, order=list(TRAINED))


if __name__ == "__main__":
    main()
