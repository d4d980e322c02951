"""Which steps of a trajectory should be scored, if not all? The gradient's noise and bias at equal forwards.

Completions of sudoku_unique's model (4x4 Sudoku, 16 cells) are written in 4, 8 and 16 steps. The exact gradient is a
sum over rows and steps, sum_rs A_r grad log p(step s of row r). Each summand is computed once, and so are all products
of two of them; what a way of drawing steps gives is then known from 2,000 draws without another forward. A way scores k
of the N steps of each row:

    uniform        k steps without replacement, weight N / k
    by surprise    k draws with replacement, a step's chance in proportion to -log p of the tokens that it wrote (plus a
                   hundredth of the row's mean), weight 1 / (k chance): the least certain steps, without a bias
    by size        the same with the chance in proportion to the norm of the step's own gradient, which nobody knows
                   before computing it: of draws with replacement the least noise
    rows by advantage  all steps of a share k / N of the rows, drawn in proportion to |A|, with the weight that makes
                   the mean right
    k segments     `Trajectory(num_segments=k)`: neighboring steps merged into k views. No noise, but a bias

`cosine` is that of one draw's gradient with the exact one, mean over the draws. `mean` is the mean gradient's share of
the exact one along it: 1, to the noise of the draws, where there is no bias.

    python -m recipes.studies.likelihoods.some_steps [--report]     some_steps.json and the table
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_rl.algorithms.advantages import GroupRelative
from dllm_rl.decoding.prompts import encode
from dllm_rl.decoding.texts import decode
from dllm_rl.files import read_json, write_json
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.models.load import load_policy
from dllm_rl.tasks.base import grade
from recipes.studies.likelihoods.estimators import gradient, plain
from recipes.studies.paired import markdown, warm_up

STORED = Path(__file__).with_suffix(".json")
STEPS = {4: (1, 2), 8: (1, 2, 4), 16: (1, 2, 4)}  # of a completion, and how many of them are scored
DRAWS = 2_000
WAYS = ("uniform", "by surprise", "by size", "rows by advantage", "segments")


def summands(policy: Any, rollout: Any, advantages: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """A_r grad log p of each step of each row (R, N, P), and -log p of its tokens (R, N), nats."""
    exact = lik.Trajectory()
    views = exact.draw_views(rollout, torch.Generator())
    parameters = list(policy.module.parameters())
    found, surprise = [], torch.zeros(len(advantages), steps)
    for row, advantage in enumerate(advantages):
        one = torch.zeros(len(advantages), dtype=torch.bool)
        one[row] = True
        logps = exact.view_logprobs(policy, rollout, views.restrict_to_rows(one), retain_graphs=True)[:, row].sum(
            -1
        )  # (N,)
        surprise[row] = -logps.detach()
        for logp in logps:
            parts = torch.autograd.grad(logp, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            found.append(advantage * torch.cat([part.flatten() for part in parts]))
    return torch.stack(found).view(len(advantages), steps, -1), surprise


def weights(way: str, k: int, sizes: Tensor, surprise: Tensor, advantages: Tensor, stream: Any) -> Tensor:
    """One draw of what each summand is multiplied by (R, N)."""
    rows, steps = surprise.shape
    if way == "uniform":
        chosen = torch.rand(rows, steps, generator=stream).argsort(-1) < k
        return chosen * (steps / k)
    if way == "rows by advantage":
        chance = advantages.abs() / advantages.abs().sum()
        count = max(1, rows * k // steps)
        drawn = torch.multinomial(chance, count, replacement=True, generator=stream)
        times = torch.bincount(drawn, minlength=rows)
        return torch.where(chance > 0, times / (count * chance.clamp(min=1e-30)), 0)[:, None].expand(rows, steps)
    size = sizes if way == "by size" else surprise + surprise.mean(-1, keepdim=True) / 100
    chance = size.clamp(min=1e-30) / size.clamp(min=1e-30).sum(-1, keepdim=True)
    drawn = torch.multinomial(chance, k, replacement=True, generator=stream)
    times = torch.zeros_like(chance).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=chance.dtype))
    return times / (k * chance)


def measure(root: Path, prompts: int, group: int = 8) -> list[dict[str, Any]]:
    policy = load_policy(warm_up(plain, 0, root / "warm"))
    rows: list[dict[str, Any]] = []
    for steps, few in STEPS.items():
        stream = torch.Generator().manual_seed(7)
        sampler = plain.sampler.replace(diffusion_steps=steps)
        problems = [plain.task[i] for i in range(prompts)]
        rollout = sampler(policy, encode(policy, problems, num_generations=group), stream)
        asked = [problem for problem in problems for _ in range(group)]
        rewards = torch.tensor([r.value for r in grade(plain.task, asked, decode(policy, rollout))])
        advantages = GroupRelative()(rewards.float(), rollout.group)
        parts, surprise = summands(policy, rollout, advantages, steps)
        flat = parts.flatten(0, 1)
        products = (flat @ flat.T).double()  # (RN, RN)
        exact = products.sum()
        sizes = parts.norm(dim=-1)
        for k in few:
            for way in WAYS[:-1]:
                cosines, lengths = [], []
                for _ in range(DRAWS):
                    w = weights(way, k, sizes, surprise, advantages, stream).flatten().double()
                    along, square = products.sum(0) @ w, w @ products @ w
                    cosines.append(float(along / (square * exact).sqrt()))
                    lengths.append(float(along / exact))
                mean = sum(lengths) / DRAWS
                rows.append({"steps": steps, "scored": k, "way": way, "cosine": sum(cosines) / DRAWS, "mean": mean})
                print(rows[-1], flush=True)
            merged = lik.Trajectory(num_segments=k)
            g = gradient(merged, policy, rollout, merged.draw_views(rollout, stream), advantages)
            total = -flat.double().sum(0)  # `gradient` is that of a loss, and divided by the number of tokens
            cosine = float(g @ total / (g.norm() * total.norm()))
            mean = float(g @ total / total.square().sum() * rollout.completion_mask.sum())
            rows.append({"steps": steps, "scored": k, "way": "segments", "cosine": cosine, "mean": mean})
            print(rows[-1], flush=True)
    return rows


def told(rows: list[dict[str, Any]]) -> str:
    """The table: a row for each number of steps and of scored ones, the cosine of each way."""
    found = {(row["steps"], row["scored"], row["way"]): f"{row['cosine']:.2f}" for row in rows}
    return markdown(
        [
            {"steps": str(steps), "scored, or segments": str(k)} | {way: found[steps, k, way] for way in WAYS}
            for steps, few in STEPS.items()
            for k in few
        ]
    )


def page_tables() -> dict[str, str]:
    return {"ways": told(read_json(STORED)["rows"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/some_steps"))
    parser.add_argument("--prompts", type=int, default=16, help="8 completions each; 16 are a step of the league")
    parser.add_argument("--report", action="store_true", help="run nothing: the table of some_steps.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        write_json(STORED, {"draws": DRAWS, "rows": measure(options.output_dir, options.prompts)})
    print(told(read_json(STORED)["rows"]))


if __name__ == "__main__":
    main()
