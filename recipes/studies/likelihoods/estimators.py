"""Which likelihood estimator should one use? Bias, noise and cost of each. league.py trains with them.

Completions of sudoku_unique's model (4x4 Sudoku, 16 cells in two steps) are scored many times over. The sampler ranks
positions by the state alone. So the two-step trajectory is the exact log-likelihood of a completion, and its gradient
the exact policy gradient. The mean of the any-order ELBO is known to about 0.03 nats from 512 masks.

    python -m recipes.studies.likelihoods.estimators            measure; estimators.json, the figure and the table
    python -m recipes.studies.likelihoods.estimators --report   the table of estimators.json
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dllm_rl.algorithms.advantages import GroupRelative
from dllm_rl.algorithms.correctors import NoCorrection
from dllm_rl.checkpoints.checkpoint import list_checkpoints
from dllm_rl.decoding.prompts import encode
from dllm_rl.decoding.texts import decode
from dllm_rl.files import read_json, write_json
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.models.base import Policy
from dllm_rl.models.load import load_policy
from dllm_rl.step.update import forward_backward
from dllm_rl.tasks.base import grade
from dllm_rl.training.trainer import train
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Batch
from recipes.examples import bounds
from recipes.studies.paired import markdown, warm_up
from recipes.sudoku_unique import recipe as base

MEASURED = {
    "OneStep(prompt_mask=0.15)": lik.OneStep(),
    "OneStep(prompt_mask=0)": lik.OneStep(prompt_mask=0.0),
    "ELBO(1)": lik.ELBO(num_samples=1),
    "ELBO(4), plain": lik.ELBO(num_samples=4, stratified=False),
    "ELBO(4), stratified": lik.ELBO(num_samples=4),
    "ELBO(4), antithetic": lik.ELBO(num_samples=4, antithetic=True),
    "ELBO(16), antithetic": lik.ELBO(num_samples=16, antithetic=True),
    "Coupled(1)": lik.Coupled(num_samples=1),
    "Coupled(2)": lik.Coupled(num_samples=2),
    "Coupled(8)": lik.Coupled(num_samples=8),
    "Quadrature(2)": bounds.Quadrature(nodes=2),
    "Quadrature(3)": bounds.Quadrature(nodes=3),
    "BlockELBO(8, 2)": bounds.BlockELBO(block_size=8, num_samples=2),
    "EUBO on Coupled(2)": bounds.EUBO(base=lik.Coupled(num_samples=2)),
    "Trajectory(1 segment)": lik.Trajectory(num_segments=1),
    "Trajectory": lik.Trajectory(),
}
LEFT_OUT = {  # of the page
    "OneStep(prompt_mask=0)", "ELBO(4), plain", "ELBO(4), stratified", "ELBO(1)", "Coupled(1)", "Quadrature(2)",
    "BlockELBO(8, 2)",
}  # fmt: skip
COLUMNS = {
    "forwards": ("forwards", 2), "bias, ELBO": ("bias_elbo", 2), "bias, log p": ("bias_exact", 2), "std": ("std", 2),
    "correlation": ("correlation", 2), "ratio error": ("ratio_error", 2), "cosine": ("cosine", 2),
    "seconds": ("seconds", 3),
}  # fmt: skip
STORED = Path(__file__).with_suffix(".json")  # every estimator
plain = replace(base, rollout_quantization=None, corrector=NoCorrection())


def sequences(estimator, policy: Policy, rollout: Rollout, noise) -> torch.Tensor:
    """Estimated log-likelihood of each completion (B,), nats."""
    return estimator.logprobs(policy, rollout, noise).double().sum(-1)


def gradient(estimator, policy: Policy, rollout: Rollout, noise, advantages: torch.Tensor) -> torch.Tensor:
    """The on-policy GRPO gradient (every ratio is 1) that an estimator gives, as one vector."""
    scores = estimator.view_logprobs(policy, rollout, noise)
    old, mask = estimator.combine(scores, noise), rollout.completion_mask
    batch = Batch(rollout, noise, advantages, old, scores, torch.ones_like(old), mask, None, int(mask.sum()), len(mask))
    parameters = list(policy.module.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    forward_backward(policy, batch, scores, loss=plain.policy_loss, likelihood=estimator)
    return torch.cat([p.grad.flatten() for p in parameters]).double()


def forwarded(estimator, policy: Policy, rollout: Rollout, noise) -> float:
    """Rows sent through the model in one scoring, per row of the batch."""
    rows, hidden = [], policy.hidden
    policy.hidden = lambda tokens, mask: (rows.append(len(tokens)), hidden(tokens, mask))[1]
    estimator.view_logprobs(policy, rollout, noise)
    del policy.hidden
    return sum(rows) / len(rollout.tokens)


def measure(root: Path, *, draws: int, gradient_draws: int, prompts: int, group: int = 8) -> dict:
    """Every estimator of MEASURED against the exact likelihood, on completions of the warmed-up model of seed 0.

    The ratio is between that model and the one that 20 steps of RL make of it.
    """
    start = warm_up(plain, 0, root / "warm")
    old = load_policy(start)
    after = root / "after-20-steps"
    if not (after / "summary.json").exists():
        settings = {"num_steps": 20, "saves": {"steps": 10**6}, "output_dir": str(after), "overwrite_output_dir": True}
        train(plain.replace(model=str(start), warmup={"steps": 0}, **settings))
    current = load_policy(list_checkpoints(after / "checkpoints")[-1][1])
    stream = torch.Generator().manual_seed(7)
    problems = [base.task[i] for i in range(prompts)]
    rollout = base.sampler(old, encode(old, problems, num_generations=group), stream)
    asked = [problem for problem in problems for _ in range(group)]
    rewards = torch.tensor([r.value for r in grade(base.task, asked, decode(old, rollout))])
    advantages = GroupRelative()(rewards.float(), rollout.group)

    exact, reference = lik.Trajectory(), lik.Coupled(num_samples=256)
    own = exact.draw_views(rollout, stream)
    log_p = sequences(exact, old, rollout, own)
    log_ratio = sequences(exact, current, rollout, own) - log_p
    direction = gradient(exact, old, rollout, own, advantages)
    elbo = sequences(reference, old, rollout, reference.draw_views(rollout, stream))
    rows = []
    for name, estimator in MEASURED.items():
        drawn = [estimator.with_advantages(estimator.draw_views(rollout, stream), advantages) for _ in range(draws)]
        begin = time.process_time()
        totals = torch.stack([sequences(estimator, old, rollout, noise) for noise in drawn])
        seconds = (time.process_time() - begin) / draws
        ratios = torch.stack([sequences(estimator, current, rollout, noise) for noise in drawn]) - totals
        cosines = []
        for noise in drawn[:gradient_draws]:
            g = gradient(estimator, old, rollout, noise, advantages)
            cosines.append((g @ direction / (g.norm() * direction.norm())).item())
        correlations = [torch.corrcoef(torch.stack([r, log_ratio]))[0, 1].item() for r in ratios]
        rows.append(
            {
                "estimator": name,
                "forwards": forwarded(estimator, old, rollout, drawn[0]),
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


def told(measured: Sequence[Mapping[str, str]]) -> str:
    """The table, as the document holds it."""
    kept = [row for row in measured if row["estimator"].strip("`") not in LEFT_OUT]
    return markdown(kept, ("estimator", "forwards", "bias, log p", "std", "cosine"))


def page_tables() -> dict[str, str]:
    return {"estimators": told(read_json(STORED)["measured"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--prompts", type=int, default=8, help="8 completions each")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--gradient_draws", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="run nothing: the table of estimators.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        counts = {"draws": options.draws, "gradient_draws": options.gradient_draws, "prompts": options.prompts}
        facts = measure(options.output_dir, **counts)
        rows = [
            {"estimator": f"`{row['estimator']}`"}
            | {head: f"{row[key] + 0.0:.{digits}f}" for head, (key, digits) in COLUMNS.items()}
            for row in facts.pop("rows")
        ]
        write_json(STORED, facts | {"measured": rows})
    print(told(read_json(STORED)["measured"]))


if __name__ == "__main__":
    main()
