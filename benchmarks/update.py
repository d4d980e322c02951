"""One step of the learner, from the masks to the moved weights, in processor time; arms take turns in one process.

published  against the published algorithms, stated anew here: logits of every position, one graph through every view.
           d1 (TRL's): one masked forward, ratios against its own detached log-probs, so that nothing is scored; with
           more inner iterations or a KL term, each iteration's mask is first scored under old and reference policy.
           ESPO: the coupled masks of two samples.
ragged     rows of unlike lengths: padded to the longest, against buckets.
main_job   forward and backward of sudoku_unique's model and batch: fp32, against bf16.
growth     of a gradient's cost with masks, rows and length: constant memory, and kept graphs.

python -m benchmarks.update [--parts published,ragged,main_job,growth] [--repeats 3] [--smoke] [--json FILE]
"""

import argparse
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from benchmarks.measure import fastest, machine, table, write_json
from benchmarks.presets import PRESETS, Shape, make
from dllm_rl.algorithms import losses
from dllm_rl.algorithms.losses import PPOClip
from dllm_rl.likelihoods.estimators import ELBO, Coupled, LikelihoodEstimator, OneStep
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.base import Policy, copied
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.step.settings import UpdateSettings
from dllm_rl.step.update import forward_backward, update
from dllm_rl.types.retained_graphs import RetainedGraphs
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Batch, Views

BETA = 0.04
SHAPES = {"growth": Shape(128, 2, 4, 352, 1_000, 16, 32, 32), "smoke": PRESETS["smoke"]}


def against(best: dict[str, float], base: str, **facts: object) -> list[dict]:
    """A row for each arm: its seconds, and how many times faster it is than `base`."""
    return [
        {**facts, "arm": name, "cpu_seconds": round(seconds, 4), "ratio": round(best[base] / seconds, 2)}
        for name, seconds in best.items()
    ]


def advantages_of(rollout: Rollout) -> torch.Tensor:
    return torch.linspace(-1, 1, len(rollout.tokens))


def step(
    policy: Policy,
    reference: Policy | None,
    rollout: Rollout,
    noise: Views,
    optimizer: torch.optim.Optimizer,
    *,
    likelihood: LikelihoodEstimator,
    keep: bool,
    iterations: int = 1,
) -> None:
    """The library's: reference and learner are scored, then `update`."""
    anchor = None if reference is None else likelihood.logprobs(reference, rollout, noise)
    graphs, mask = graphs_of(rollout, keep), rollout.completion_mask
    scores = likelihood.view_logprobs(policy, rollout, noise, graphs=graphs)
    old = likelihood.combine(scores, noise)
    count, ones = int(mask.sum()), torch.ones_like(old)
    batch = Batch(rollout, noise, advantages_of(rollout), old, scores, ones, mask, anchor, count, len(mask))
    beta = 0.0 if reference is None else BETA
    loss = partial(
        losses.policy_loss, surrogate=PPOClip(), loss_reduction=losses.TokenMean(), beta=beta, kl=losses.K3()
    )
    settings = UpdateSettings(loss=loss, likelihood=likelihood, learning_rate=0.0)
    batches = [replace(batch, rollout=at(rollout, policy), graphs=graphs)] * iterations
    update(policy, optimizer, batches, Accelerator(cpu=True), settings)


def graphs_of(rollout: Rollout, keep: bool) -> RetainedGraphs:
    return RetainedGraphs(rollout.completion_mask.any(-1), 999 if keep else 0)


def at(rollout: Rollout, policy: Policy) -> Rollout:
    return replace(rollout, weights_version=policy.weights_version)


def published_logps(policy: Policy, rollout: Rollout, noise: Views) -> torch.Tensor:
    """sum_n weight_n log p, from the logits of every position of every view."""
    total = torch.zeros(rollout.tokens.shape)
    for masked, weight in zip(noise.masked, noise.coefficients, strict=True):
        logits = policy.logits(rollout.tokens.masked_fill(masked, policy.spec.mask_id), rollout.attention_mask)
        logits[..., policy.spec.mask_id] = -torch.inf
        found = -F.cross_entropy(logits.flatten(0, 1).float(), rollout.tokens.flatten(), reduction="none")
        total = total + torch.where(weight != 0, found.view(weight.shape), 0) * weight
    return total


def published_step(
    policy: Policy,
    reference: Policy | None,
    rollout: Rollout,
    noise: Views,
    optimizer: torch.optim.Optimizer,
    *,
    iterations: int = 1,
) -> None:
    mask, advantages = rollout.completion_mask, advantages_of(rollout)[:, None]
    with torch.no_grad():
        anchors = [None if reference is None else published_logps(reference, rollout, noise) for _ in range(iterations)]
        olds = [None if iterations == 1 else published_logps(policy, rollout, noise) for _ in range(iterations)]
    for old, anchor in zip(olds, anchors, strict=True):
        optimizer.zero_grad()
        logps = published_logps(policy, rollout, noise)
        ratio = torch.where(mask, logps - (logps.detach() if old is None else old), 0).exp()
        objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        if anchor is not None:
            objective = objective - BETA * losses.K3()(torch.where(mask, anchor - logps, 0))
        (-(objective * mask).sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.module.parameters(), 1.0)
        optimizer.step()


def published(shape: Shape, repeats: int) -> list[dict]:
    policy, rollout = make(shape, "cpu", torch.float32)
    reference, optimizer = copied(policy), torch.optim.AdamW(policy.module.parameters(), lr=0.0)
    rows = []
    for name, likelihood, anchor, iterations in (
        ("d1's estimator, one inner iteration", OneStep(), None, 1),
        ("d1's estimator, two inner iterations and KL", OneStep(), reference, 2),
        ("ESPO's coupled masks, 4 views", Coupled(num_samples=2), None, 1),
    ):
        noise = likelihood.draw_views(rollout, torch.Generator().manual_seed(0))
        given, norms = (policy, anchor, rollout, noise, optimizer), []
        ours = partial(step, *given, likelihood=likelihood, iterations=iterations)
        arms = {
            "published": partial(published_step, *given, iterations=iterations),
            "constant memory": partial(ours, keep=False),
            "kept graphs": partial(ours, keep=True),
        }
        for run in arms.values():  # warmed up, and seen to compute the same
            run()
            norms.append(sum(p.grad.double().norm().item() ** 2 for p in policy.module.parameters()) ** 0.5)
        assert max(norms) <= min(norms) * (1 + 1e-3), f"the arms disagree: {norms}"
        rows += against(fastest(arms, repeats), "published", step=name)
    return rows


def gradient(policy: Policy, rollout: Rollout, noise: Views, estimator: LikelihoodEstimator, *, keep: bool) -> None:
    """Scoring and one gradient."""
    policy.module.zero_grad()
    graphs, mask = graphs_of(rollout, keep), rollout.completion_mask
    scores = estimator.view_logprobs(policy, rollout, noise, graphs=graphs)
    old = estimator.combine(scores, noise)
    weights = torch.ones_like(old)
    given = rollout, noise, advantages_of(rollout), old, scores, weights, mask, None
    batch = Batch(*given, num_tokens=1, num_sequences=1, graphs=graphs)
    loss = partial(losses.policy_loss, surrogate=PPOClip(), loss_reduction=losses.TokenMean(), beta=0.0, kl=losses.K3())
    forward_backward(policy, batch, scores, loss=loss, likelihood=estimator)


def padded_gradient(policy: Policy, rollout: Rollout, noise: Views, estimator: LikelihoodEstimator) -> None:
    """As `gradient` with its graphs kept would be, of one batch as wide as its longest row: forward and backward."""
    policy.module.zero_grad()
    for view, weight in zip(each_view(noise), noise.coefficients, strict=True):
        view.backward(policy, rollout, weight)


def left_padded(rollout: Rollout, lengths: list[int]) -> Rollout:
    """The rows with the last so many tokens of each prompt."""
    begin = int((~rollout.completion_mask[0]).sum()) - torch.tensor(lengths)
    return replace(rollout, attention_mask=torch.arange(rollout.tokens.shape[1]) >= begin[:, None])


def ragged(shape: Shape, repeats: int, *, longest: int) -> list[dict]:
    rows, count = [], 32
    spread = [int(x) for x in torch.linspace(longest * 40 // 260, longest, count)]
    one_long = [longest * 60 // 260] * (count - 1) + [longest * 900 // 260]
    for name, lengths in (("prompts of 40 to 260", spread), ("one of 900, 31 of 60", one_long)):
        wide = replace(shape, num_rows=count, prompt_length=max(lengths))
        policy, rollout = make(wide, "cpu", torch.float32)
        rollout, estimator = left_padded(rollout, lengths), OneStep()
        noise = estimator.draw_views(rollout, torch.Generator().manual_seed(0))
        arms = {
            "padded": partial(padded_gradient, policy, rollout, noise, estimator),
            "buckets": partial(gradient, policy, rollout, noise, estimator, keep=True),
        }
        rows += against(fastest(arms, repeats), "padded", lengths=name, completion=shape.completion_length)
    return rows


def main_job(rows: int, repeats: int) -> list[dict]:
    """Forward and backward of sudoku_unique's model and batch."""
    policy = tiny_masked_lm(characters="1234.=")
    _, rollout = make(Shape(8, 1, 2, 8, policy.vocab_size, rows, 17, 16), "cpu", torch.float32)
    noise = OneStep().draw_views(rollout, torch.Generator().manual_seed(0))

    def run(narrow: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            gradient(policy, rollout, noise, OneStep(), keep=True)

    return against(fastest({"fp32": partial(run, False), "bf16": partial(run, True)}, repeats), "fp32", rows=rows)


def growth(shape: Shape, repeats: int, *, masks: list[int], batch: list[int], length: list[int]) -> list[dict]:
    rows = []
    for axis, values in (("masks", masks), ("rows", batch), ("tokens", length)):
        base: dict[str, float] = {}
        for value in values:
            number = value if axis == "masks" else 1
            wide = replace(shape, num_rows=value) if axis == "rows" else shape
            if axis == "tokens":
                wide = replace(wide, prompt_length=value // 2, completion_length=value // 2)
            policy, rollout = make(wide, "cpu", torch.float32)
            estimator = ELBO(num_samples=number)
            noise = estimator.draw_views(rollout, torch.Generator().manual_seed(0))
            given = (policy, rollout, noise, estimator)
            found = fastest({k: partial(gradient, *given, keep=k == "kept") for k in ("constant", "kept")}, repeats)
            base = base or found
            times = {f"{name}, times the first": round(found[name] / base[name], 2) for name in found}
            seconds = {f"{name}, s": round(found[name], 4) for name in found}
            rows.append({"axis": axis, "value": value, **seconds, **times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="published,ragged,main_job,growth")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, repeats, small = {}, options.repeats, SHAPES["growth"]
    sizes = {"masks": [1, 2, 4, 8, 16], "batch": [4, 8, 16, 32, 64], "length": [64, 128, 256, 512, 1024]}
    if options.smoke:
        repeats, small, sizes = 1, SHAPES["smoke"], {"masks": [1, 2], "batch": [2, 4], "length": [8, 16]}
    for part in options.parts.split(","):
        if part == "published":
            found[part] = published(PRESETS["smoke" if options.smoke else "medium"], repeats)
        if part == "ragged":
            found[part] = ragged(small, repeats, longest=26 if options.smoke else 260)
        if part == "main_job":
            found[part] = main_job(8 if options.smoke else 256, repeats)
        if part == "growth":
            found[part] = growth(small, repeats, **sizes)
        print(f"\n{part}\n{table(found[part])}", flush=True)
    facts = {"benchmark": "update", "repeats": repeats, "machine": machine("cpu")}
    write_json(options.json, facts | found)


if __name__ == "__main__":
    main()
