"""How much noise do drawn steps add to the gradient, and how many forwards do they take? Claims before the runs.

A batch of completions is written in N steps and random order. The gradient (with TIS, if a copy wrote them) is a sum
over units: the tokens of one step of one completion, where the first step of all completions of a prompt is one unit,
because it is one row of a forward. Each unit's gradient g is computed once. Drawn with chances c, each unit by itself,
the gradient has the variance sum (1 / c - 1) |g|^2, which is exact: no draw is simulated. It is told as a share of the
variance that the batch has anyway (between prompts: that of another batch of as many), and so is the squared distance
of the gradient of segments from that of all steps, which is a bias and noise of their own.

drawn        the chances of `Trajectory(variance_growth=...)`
uniform      every unit with the chance that gives as many row-forwards as drawn with 0.1
completions  all steps of some completions, at random, with as many row-forwards as drawn with 0.1
segments     `Trajectory(num_segments=...)`: a quarter of the steps, at least two and at most eight, as `grpo` takes

Models: that of the main job, 350,000 weights, 4x4 Sudoku, 16 cells, NVFP4 rollouts, 32 prompts x 8, before RL (the
warmed-up start of seed 21 of drawn_trained.py) and after RL (its certain start); SmolLM2-135M made a diffusion model
(adapters of rank 16 have the gradient, its own rollouts, 4 prompts x 4, answers of 32 tokens), at temperature 1 and, as
a stand-in for a certain policy, at temperature 0.3: it was not trained by RL, for time. Its reward is the share
of different characters in an answer. The two stored rows of SmolLM2 are of FP8 rollouts, by this script at commit
4dec277f; with its own rollouts, and in 16 steps and more, nothing is stored.
In 128 steps (answers of 128 tokens, 2 prompts x 2) a random part of the units stands for all, and the variance of the
batch is not measured: the sum of |g|^2 over all units stands for it, which is what the library assumes ("squares" in
the table: this sum over the batch's own variance, where both are known).

An earlier version of this study, of seed 20 and other prompts, refuted its claim: with chances by (1 - p)^2 alone and a
growth of 0.1 the variance grew by 0.75 and 1.1 after RL (8 and 16 steps), and by 2.0 with INT4. RECORD_ERROR was chosen
on those five batches, where it gives 0.09 before RL and 0.07 (NVFP4), 0.13 (16 steps), 0.19 (INT4), 0.01 (own rollouts)
after it. The claims of this one, of the main job's model: with variance_growth=0.1 the variance grows by 0.05 to 0.2 in
each of the four batches; after RL this takes fewer row-forwards than segments.

    python -m recipes.studies.likelihoods.drawn_noise [--only "main job"]   what is missing of the JSON, the table
    python -m recipes.studies.likelihoods.drawn_noise --report              the table alone
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_rl import NVFP4, Lora, Policy, RandomOrder, Trajectory, Unmask
from dllm_rl.algorithms.advantages import GroupRelative
from dllm_rl.decoding.prompts import encode
from dllm_rl.decoding.texts import decode
from dllm_rl.files import read_json, write_json
from dllm_rl.likelihoods.drawn_steps import step_chances, step_of_tokens
from dllm_rl.models.convert import diffusion_from_causal
from dllm_rl.models.load import load_policy
from dllm_rl.models.lora import add_lora
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.tasks import Problem
from dllm_rl.tasks.base import grade
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Views
from recipes import weights
from recipes.quantized_sudoku import recipe as main_job
from recipes.studies.likelihoods import drawn_trained
from recipes.studies.paired import markdown, warm_up

STORED = Path(__file__).with_suffix(".json")  # a row for each batch
GROWTHS = (0.03, 0.1, 0.3, 1.0)
SAMPLED_UNITS = 48  # of the batch of 128 steps
Made = tuple[Policy, Policy, Rollout, Tensor]  # learner, copy, completions, rewards


def sudoku(certain: bool) -> Callable[[Path, int], Made]:
    """A batch of the main job's model."""

    def made(root: Path, steps: int) -> Made:
        study, folder, seed = drawn_trained.study_of(8), root / "8", drawn_trained.SEEDS[0]
        start = drawn_trained.certain_start(study, folder, 8, seed) if certain else None
        policy = load_policy(start or warm_up(study.base, seed, folder / "warm" / str(seed)))
        copy = quantized_copy(policy, NVFP4())
        stream = torch.Generator().manual_seed(200)
        problems = [main_job.task[i] for i in torch.randperm(2000, generator=stream)[:32].tolist()]
        rollout = main_job.sampler.replace(diffusion_steps=steps)(
            copy, encode(copy, problems, num_generations=8), stream
        )
        asked = [problem for problem in problems for _ in range(8)]
        rewards = [reward.value for reward in grade(main_job.task, asked, decode(policy, rollout))]
        return policy, copy, rollout, torch.tensor(rewards)

    return made


PROMPTS = ("The city of Paris is known for", "A recipe for bread:", "12 + 30 =", "My favorite animal is the")


def smollm2(temperature: float) -> Callable[[Path, int], Made]:
    """A batch of SmolLM2 as a diffusion model."""

    def made(root: Path, steps: int) -> Made:
        policy = diffusion_from_causal(weights.smollm2())
        add_lora(policy, Lora())
        number, group = (2, 2) if steps == 128 else (4, 4)
        problems = [Problem(prompt, {}, "") for prompt in PROMPTS[:number]]
        sampler = Unmask(
            max_new_tokens=max(32, steps), diffusion_steps=steps, rank=RandomOrder(), temperature=temperature
        )
        rollout = sampler(policy, encode(policy, problems, num_generations=group), torch.Generator().manual_seed(100))
        texts = decode(policy, rollout)
        return policy, policy, rollout, torch.tensor([len(set(text)) / max(1, len(text)) for text in texts])

    return made


# By model and policy: its batch, and the numbers of steps.
BATCHES: dict[tuple[str, str], tuple[Callable[[Path, int], Made], tuple[int, ...]]] = {
    ("main job", "before RL"): (sudoku(certain=False), (8, 16)),
    ("main job", "after RL"): (sudoku(certain=True), (8, 16)),
    ("SmolLM2", "temperature 1"): (smollm2(1.0), (8, 16, 32, 128)),
    ("SmolLM2", "temperature 0.3"): (smollm2(0.3), (8, 16, 32, 128)),
}


def pieces(
    policy: Policy, estimator: Trajectory, rollout: Rollout, views: Views, rollout_logprobs: Tensor, advantage: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """For the one row of a rollout: each view that scores something, and A w grad log p of its tokens, w of TIS."""
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    for n in (views.coefficients[:, 0] != 0).any(-1).nonzero()[:, 0].tolist():  # a graph at a time
        keep = torch.arange(len(views.masked)) == n
        alone = replace(views, coefficients=views.coefficients * keep[:, None, None])
        logps = estimator.view_logprobs(policy, rollout, alone, retain_graphs=True)[n, 0]
        scored = alone.coefficients[n, 0] != 0
        w = torch.where(scored, logps.detach() - rollout_logprobs, 0).exp().clamp(max=2)
        total = (advantage * torch.where(scored, w * logps, 0)).sum()
        parts = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
        yield n, torch.cat([part.flatten() for part in parts])


def one_row(views: Views, row: int, keep: Tensor | None = None) -> Views:
    """The views of a row; only those that are to be kept score it."""
    found = views.rows(torch.tensor([row]))
    return found if keep is None else replace(found, coefficients=found.coefficients * keep[:, None, None])


def measure(made: Callable[[Path, int], Made], root: Path, steps: int) -> dict[str, Any]:
    began = time.process_time()
    policy, copy, rollout, rewards = made(root, steps)
    advantages = GroupRelative()(rewards.float(), rollout.group)
    exact = Trajectory()
    views = exact.draw_views(rollout, torch.Generator())
    step = step_of_tokens(views)
    chances = {g: step_chances(views, rollout, advantages, step, variance_growth=g)[0] for g in GROWTHS}
    unit = step_chances(views, rollout, advantages, step, variance_growth=0.1)[1]
    exists = (views.coefficients != 0).any(-1).T
    rows, groups = len(rewards), int(rollout.group.max()) + 1
    kept, share = exists, 1.0
    if steps == 128:  # of the units of rows with an advantage, a random part
        of_rows = exists & (advantages != 0)[:, None]
        number = of_rows.flatten().nonzero()[:, 0]
        chosen = number[torch.randperm(len(number), generator=torch.Generator().manual_seed(0))[:SAMPLED_UNITS]]
        kept = torch.zeros_like(exists).flatten().index_fill(0, chosen, True).view_as(exists)
        share = len(chosen) / len(number)
    shared = {int(name) for name in unit[:, 0].unique() if (unit[:, 0] == name).sum() > 1} if share == 1 else set()
    squares = torch.zeros(int(unit.max()) + 1, dtype=torch.float64)
    of_row = torch.zeros(rows, dtype=torch.float64)
    size = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
    totals, merged = torch.zeros(groups, size), torch.zeros(size)
    segments = Trajectory(num_segments=max(2, min(8, steps // 4)))
    merged_views = segments.draw_views(rollout, torch.Generator())
    at_first: dict[int, Tensor] = {}
    for row in range(rows):
        if not advantages[row]:
            continue
        one, total = rollout.rows(torch.tensor([row])), torch.zeros(size)
        chosen = one_row(views, row, kept[row])
        for n, gradient in pieces(policy, exact, one, chosen, one.logprobs[0], advantages[row]):
            name, total = int(unit[row, n]), total + gradient
            if name in shared:
                at_first[name] = at_first.get(name, 0) + gradient
            else:
                squares[name] += gradient.double().square().sum()
        of_row[row] = total.double().square().sum()
        totals[int(rollout.group[row])] += total
        if share == 1:
            its = one_row(merged_views, row)
            theirs = segments.logprobs(copy, one, its)[0]
            for _, gradient in pieces(policy, segments, one, its, theirs, advantages[row]):
                merged += gradient
    for name, gradient in at_first.items():
        squares[name] = gradient.double().square().sum()
    written = rollout.logprobs[rollout.completion_mask].exp()
    live = (advantages.view(groups, -1) != 0).any(1)
    own = groups / (groups - 1) * float((totals - totals.mean(0)).double().square().sum())
    all_forwards = len(unit[exists].unique()) / rows
    found: dict[str, Any] = {
        "rows": rows, "live groups": int(live.sum()), "mean p": float(written.mean()), "all": all_forwards,
        "squares": float(squares.sum()) / share / own if share == 1 else None, "share of units": share, "ways": [],
    }  # fmt: skip
    if share < 1:
        own = float(squares.sum()) / share
    ways = found["ways"]
    names = torch.arange(len(squares))
    first = {int(name): index for index, name in reversed(list(enumerate(unit.flatten().tolist())))}
    existing = torch.tensor(
        [first.get(name, -1) >= 0 and bool(exists.flatten()[first[name]]) for name in names.tolist()]
    )
    place = torch.tensor([max(0, first.get(name, 0)) for name in names.tolist()])
    for g, chance in chances.items():
        c = chance.flatten()[place]
        forwards = float(c[existing].sum()) / rows
        growth = float(((1 / c - 1) * squares)[existing].sum()) / share / own
        ways.append({"way": "drawn", "setting": g, "row-forwards": forwards, "growth": growth})
        if g == 0.1:
            c = forwards / all_forwards
            ways.append(
                {"way": "uniform", "row-forwards": forwards, "growth": (1 / c - 1) * float(squares.sum()) / share / own}
            )
            if share == 1:
                ways.append(
                    {"way": "completions", "row-forwards": forwards, "growth": (1 / c - 1) * float(of_row.sum()) / own}
                )
    if share == 1:
        distance = float((merged - totals.sum(0)).double().square().sum())
        number = len(merged_views.masked)
        ways.append({"way": "segments", "setting": number, "row-forwards": float(number), "growth": distance / own})
    return found | {"processor seconds": round(time.process_time() - began, 1)}


def told(rows: list[dict[str, Any]]) -> str:
    """A row for each batch: row-forwards of a completion, and in parentheses what the variance grows by."""
    table = []
    for row in rows:
        cell = {
            (way["way"], way.get("setting")): f"{way['row-forwards']:.2f} ({way['growth']:.2g})" for way in row["ways"]
        }
        squares = "-" if row["squares"] is None else f"{row['squares']:.2f}"
        (number,) = (way["setting"] for way in row["ways"] if way["way"] == "segments") if row["squares"] else ("",)
        table.append({
            "model": f"{row['model']}, {row['policy']}", "steps": str(row["steps"]), "mean p": f"{row['mean p']:.2f}",
            "live prompts": str(row["live groups"]), "squares": squares, "all steps": f"{row['all']:.2f}",
            **{f"drawn, {g:g}": cell["drawn", g] for g in GROWTHS},
            "uniform": cell["uniform", None], "completions": cell.get(("completions", None), "-"),
            "segments": cell.get(("segments", number), "-"),
        })  # fmt: skip
    return markdown(table)


def page_tables() -> dict[str, str]:
    return {"noise": told(read_json(STORED))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/drawn-trained"), help="of drawn_trained.py")
    parser.add_argument("--only", help="a model: main job or SmolLM2")
    parser.add_argument("--steps", type=int, nargs="*", help="numbers of steps. Default: all")
    parser.add_argument("--report", action="store_true", help=f"run nothing: the table of {STORED.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_json(STORED) if STORED.exists() else []
    if not options.report:
        for (model, policy), (made, numbers) in BATCHES.items():
            for steps in numbers:
                of = {"model": model, "policy": policy, "steps": steps}
                is_there = any(of.items() <= row.items() for row in rows)
                if is_there or options.only not in (None, model) or steps not in (options.steps or numbers):
                    continue
                rows.append(of | measure(made, options.output_dir, steps))
                order = [(*name, n) for name, (_, of_it) in BATCHES.items() for n in of_it]
                rows.sort(key=lambda row: order.index((row["model"], row["policy"], row["steps"])))
                write_json(STORED, rows)
                print(rows[-1] | {"of": of}, flush=True)
    print(told(rows))


if __name__ == "__main__":
    main()
