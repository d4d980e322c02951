"""The gradient laboratory: bias, error and efficiency of correctors, surrogates, estimators and orders, by enumeration.

Three words at four positions in two steps, written by a network of 336 weights: 81 outcomes (and their orders), so that
mean and covariance of a policy gradient are sums and nothing is sampled, but for an estimator's masks and, where
weights depend on the batch, 64 batches. Every number is a median over 8 networks. A corrector of your own:
`recipes.studies.enumeration.gradient_table(corrector)`. About eight minutes of one core. The reading is gradients.md.

    python -m recipes.studies.gradients                    write gradients.json and gradients.png
    python -m recipes.studies.gradients --report           the tables of gradients.json
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations, permutations, product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms import losses
from dllm_rl.files import read_json, write_json
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.samplers.rules import PlackettLuce
from dllm_rl.types import Order, Rollout
from recipes.studies import surrogates as published
from recipes.studies.controls import Shuffled, fixed_lambda
from recipes.studies.enumeration import GradientRow, ToyPolicy, against, contributions, gradient_table, per_outcome
from recipes.studies.paired import markdown

BAND = {"eps_high": 0.05, "neg_low": 0.05, "neg_high": 0.05}
CORRECTORS = {
    "none": c.NoCorrection(),
    "TIS, tokens, cap 2": c.TIS(),
    "token IS, no cap": c.TIS(cap=1e8),
    "TIS, sequence, cap 2": c.TIS(level="sequence"),
    "sequence IS, no cap": c.TIS(cap=1e8, level="sequence"),
    "geometric mean, cap 2": c.TIS(level="sequence", pool="geometric"),
    "TBPO's weight": c.FunctionCorrector(function=c.TBPO().weights),
    "MIS, tokens, .5 to 2": c.MIS(),
    "IcePop": c.IcePop(),
    "reject, k3 > .1": c.Reject(threshold=0.1),
    "TIS and reject": c.Compose(parts=(c.TIS(), c.Reject(threshold=0.1))),
    "AIS, alarm": c.AIS(),
}
WHOLE = {"level": "sequence", "cap": 1e8}
CAPPED = {"level": "sequence", "cap": 2.0}
BATCHES = {  # correctors whose weights depend on the batch, with what they must beat
    "none": c.NoCorrection(),
    "TIS, tokens, cap 2": c.TIS(),
    "TIS, sequence, cap 2": c.TIS(**CAPPED),
    "sequence IS, no cap": c.TIS(**WHOLE),
    "AIS, alarm": c.AIS(),
    **{f"lambda {lam}, sequence": fixed_lambda(lam, **WHOLE) for lam in (0.25, 0.5, 0.75)},
    **{f"lambda {lam}, sequence, cap 2": fixed_lambda(lam, **CAPPED) for lam in (0.25, 0.5, 0.75)},
    "TIS, sequence, cap 2, shuffled": Shuffled(corrector=c.TIS(**CAPPED)),
}
STORED = Path(__file__).with_suffix(".json")
ON_THE_PAGE = ("none", "TIS, tokens, cap 2", "TIS, sequence, cap 2", "sequence IS, no cap", "reject, k3 > .1")


def ebpo_a_row(log_ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`EBPO`, whose objective is the row's, counted once a row where tables count each token."""
    return published.EBPO()(log_ratio, advantages, mask) / mask.sum(-1, keepdim=True)


SURROGATES = {
    "reinforce": losses.Reinforce(),
    "r A, no clip": losses.PPOClip(epsilon=1e8),
    "ppo_clip, .2": losses.PPOClip(epsilon=0.2),
    "dual clip, delta 1.2": losses.PPOClip(epsilon=0.2, delta=1.2),
    "dual clip, delta 3": losses.PPOClip(epsilon=0.2, delta=3.0),
    "DAPO, .2 and .28": losses.PPOClip(epsilon=0.2, epsilon_high=0.28),
    "cispo, 5": losses.CISPO(),
    "vespo": losses.VESPO(),
    "gspo, .2": losses.GSPO(epsilon=0.2, epsilon_high=0.2),
    "dppo_tv, .2": published.DPPOTV(),
    "bgpo, .2 and 3": published.BGPO(),
    "ebpo, .2": ebpo_a_row,
    "gdsd, .04": published.GDSD(),
    "stable_drl, 5": published.StableDRL(),
    "sequence_masked, .1": published.SequenceMasked(bound=0.1),
    "TBPO's band, .05": losses.TrustBand(**BAND),
}
ESTIMATORS = {
    "trajectory": lik.Trajectory(),
    "trajectory, 1 segment": lik.Trajectory(num_segments=1),
    "trajectory, 1 step drawn": lik.Trajectory(num_sampled_steps=1),
    "one_step": lik.OneStep(prompt_mask=0.0),
    "elbo, 2 masks": lik.ELBO(num_samples=2),
    "elbo, 8 masks": lik.ELBO(num_samples=8),
    "coupled, 2 masks": lik.Coupled(),
    "quadrature, 3 masks": lik.Quadrature(),
    "block of 2, 2 masks": lik.BlockELBO(block_size=2),
    "eubo, 2 masks": lik.EUBO(),
    "sandwich, 2 masks": lik.Sandwich(),
}
# The temperature of plackett_luce that gives a rank's law (None: the law is confidence's), and `order` of its gradient.
RANKED: dict[str, tuple[float | None, str]] = {
    "max_prob": (1e-6, False),
    "confidence": (None, True),
    "random": (1e9, False),
    **{f"plackett_luce {tau}": (tau, True) for tau in (0.03, 0.1, 0.3, 1.0)},
    **{f"plackett_luce {tau}, tokens alone": (tau, False) for tau in (0.03, 0.1, 0.3, 1.0)},
}
SIGMAS, KINDS, SHARPNESS = (0.1, 0.3, 0.5), ("early", "late"), {"early": 1.0, "late": 3.0}
COLUMNS = [f"{kind} {sigma}" for kind, sigma in product(KINDS, SIGMAS)]


def shown(bias: float, rmse: float, efficiency: float) -> str:
    return "/".join(f"{x:.2f}" for x in (bias, rmse, efficiency))


def table(columns: list[str], rows: dict[str, list[str]]) -> list[dict[str, str]]:
    return [{"row": name, **dict(zip(columns, cells, strict=True))} for name, cells in rows.items()]


def of_correctors(made: dict[str, c.Corrector], **options: Any) -> dict[str, list[GradientRow]]:
    tables = partial(gradient_table, sigmas=SIGMAS, policies=KINDS, **options)
    return {name: tables(corrector) for name, corrector in made.items()}


def as_cells(rows: dict[str, list[GradientRow]]) -> dict[str, list[str]]:
    return {name: [shown(row.bias, row.rmse, row.efficiency) for row in each] for name, each in rows.items()}


def toys(kind: str, networks: int) -> list[tuple[ToyPolicy, torch.Generator]]:
    generators = [torch.Generator().manual_seed(1000 * network) for network in range(networks)]
    made = [ToyPolicy(length=4, words=3, sharpness=SHARPNESS[kind], generator=g) for g in generators]
    return list(zip(made, generators, strict=True))


def of_estimators(
    networks: int,
    *,
    draws: int = 8,
    batch: int = 128,
    estimators: Mapping[str, lik.LikelihoodEstimator] = ESTIMATORS,
) -> dict[str, list[str]]:
    """On-policy: the gradient of mean A * estimate, of `draws` draws of the masks, against that of the exact reward.

    The scale of a bound's gradient is its own: what counts of it is the efficiency, and the cosine of its mean.
    """
    found: dict[str, list[str]] = {name: [] for name in estimators}
    for kind, name in product(KINDS, estimators):
        numbers = []
        for toy, generator in toys(kind, networks):
            rollout, estimator = toy.rollout(2), estimators[name]
            rewards = torch.randn(len(rollout.tokens), generator=generator, dtype=torch.float64)
            for weight in toy.weights:
                weight.requires_grad_()
            exact = lik.Trajectory()
            logps = contributions(toy, rollout, exact.draw_views(rollout, generator), exact)
            p = logps.detach().sum(-1).exp()
            advantages = rewards - p @ rewards
            truth = torch.einsum("b,btw->w", p * advantages, per_outcome(toy, logps))
            each = []
            for _ in range(draws if estimator.is_random else 1):
                noise = estimator.with_advantages(estimator.draw_views(rollout, generator), advantages)
                if noise.upper_bound_weight is not None:
                    noise = replace(noise, upper_bound_weight=noise.upper_bound_weight.double())
                sums = contributions(toy, rollout, noise, estimator).sum(-1, keepdim=True)
                each.append(advantages[:, None] * per_outcome(toy, sums)[:, 0])
            rows, chances = torch.cat(each), p.repeat(len(each)) / len(each)
            bias, rmse, efficiency = against(truth, rows, chances, batch)
            mean = chances @ rows
            numbers.append((bias, rmse, efficiency, float(mean @ truth / (mean.norm() * truth.norm()))))
        *three, cosine = (median(column) for column in zip(*numbers, strict=True))
        found[name] += [shown(*three), f"{cosine:.2f}"]
    return found


def confidence_outcomes(toy: ToyPolicy) -> Rollout:
    """Every set of two positions that the first of two steps can commit, with every outcome: 6 * 81 rows, whose order
    has a law; where it cannot be chosen, its log-prob is the floor of `decoding.order`."""
    base = toy.rollout(2)
    firsts = list(combinations(range(toy.length), 2))
    steps = [[int(i not in first) for i in range(toy.length)] for first in firsts]
    rows = torch.arange(len(base.tokens)).repeat(len(steps))
    step = torch.tensor(steps).repeat_interleave(len(base.tokens), 0)
    order = Order(block_first_step=torch.zeros_like(step), logprobs=torch.zeros(step.shape))
    return replace(base.rows(rows), unmask_step=step, order=order)


def of_orders(networks: int, *, batch: int = 128) -> dict[str, list[str]]:
    """Rollouts ranked by confidence: tokens and order, or tokens alone, on-policy and with sequence weights."""
    found: dict[str, list[str]] = {}
    for kind, sigma in product(KINDS, (0.0, *SIGMAS)):
        numbers: dict[str, list[tuple[float, float, float]]] = {}
        for toy, generator in toys(kind, networks):
            rollout, behavior = confidence_outcomes(toy), toy.moved(sigma, generator)
            rewards = torch.randn(81, generator=generator, dtype=torch.float64).repeat(6)
            for weight in toy.weights:
                weight.requires_grad_()
            laws = {order: lik.Trajectory(include_order=order) for order in (True, False)}
            noises = {order: law.draw_views(rollout, generator) for order, law in laws.items()}
            ours = {order: contributions(toy, rollout, noises[order], laws[order]).sum(-1) for order in laws}
            theirs = {order: contributions(behavior, rollout, noises[order], laws[order]).sum(-1) for order in laws}
            scores = {order: per_outcome(toy, ours[order][:, None])[:, 0] for order in laws}
            p, q = ours[True].detach().exp(), theirs[True].detach().exp()
            p, q = map(without_floor, (p, q))
            advantages = rewards - q @ rewards
            truth = torch.einsum("b,bw->w", p * advantages, scores[True])
            for order, weighted in product(laws, (False, True)):
                ratio = (ours[order] - theirs[order]).detach().clamp(-20, 20).exp() if weighted else torch.ones_like(q)
                each = (ratio * advantages)[:, None] * scores[order]
                name = "tokens and order" if order else "tokens alone"
                name += ", sequence IS" if weighted else ", none"
                numbers.setdefault(name, []).append(against(truth, each, q, batch))
        for name, rows in numbers.items():
            found.setdefault(name, []).append(shown(*(median(column) for column in zip(*rows, strict=True))))
    return found


def without_floor(chances: torch.Tensor) -> torch.Tensor:
    """0 for an order that the ranks rule out: `decoding.order` gives it a log-prob of MIN_LOGPROB, and not of -inf."""
    return torch.where(chances > 1e-8, chances, 0)


def in_every_order(toy: ToyPolicy, temperature: float | None) -> Rollout:
    """All outcomes, each in every order of one position a step, ranked by `PlackettLuce`; None: by confidence."""
    base = toy.rollout(toy.length)
    steps = torch.tensor(list(permutations(range(toy.length))))
    step = steps.repeat_interleave(len(base.tokens), 0)
    blank = torch.zeros_like(step)
    order = Order(block_first_step=blank, logprobs=torch.zeros(step.shape))
    if temperature is not None:
        order = replace(order, draw_index=blank, rank_function=PlackettLuce(temperature=temperature))
    return replace(base.rows(torch.arange(len(base.tokens)).repeat(len(steps))), unmask_step=step, order=order)


def along_a_line(toy: ToyPolicy, rank: str, generator: torch.Generator, *, points: int) -> tuple[float, float]:
    """The change of the expected reward as all weights move along a random line, by 0.6 of their spread, and what the
    integral of the policy gradient makes of it."""
    temperature, order = RANKED[rank]
    rollout = in_every_order(toy, temperature)
    rewards = torch.randn(toy.words**toy.length, generator=generator, dtype=torch.float64).repeat(6)
    starts, ends = toy.weights, toy.moved(0.6, generator).weights
    laws = {each: lik.Trajectory(include_order=each) for each in (True, False)}
    noises = {each: law.draw_views(rollout, generator) for each, law in laws.items()}
    moving = toy.moved(0.0, generator)
    change = integral = 0.0
    for place in [0.0, 1.0, *((i + 0.5) / points for i in range(points))]:
        moving.weights = [(a + place * (b - a)).requires_grad_() for a, b in zip(starts, ends, strict=True)]
        logps = {each: contributions(moving, rollout, noises[each], laws[each]).sum(-1) for each in laws}
        chances = logps[True].detach().exp()
        if temperature is None:
            chances = without_floor(chances)
        if place in (0.0, 1.0):
            change += (2 * place - 1) * float(chances @ rewards)
            continue
        gradients = torch.autograd.grad((chances * rewards * logps[order]).sum(), moving.weights)
        slope = sum((g * (b - a)).sum() for g, a, b in zip(gradients, starts, ends, strict=True))
        integral += float(slope) / points
    return change, integral


def of_lines(networks: int, *, points: int = 100) -> dict[str, list[str]]:
    """Mean |change|, what the integrated gradient misses of it, and in how many networks its sign is wrong."""
    found: dict[str, list[str]] = {}
    for rank, kind in product(RANKED, KINDS):
        pairs = []
        for network in range(networks):
            generator = torch.Generator().manual_seed(1000 * network)
            toy = ToyPolicy(length=3, words=3, sharpness=SHARPNESS[kind], generator=generator)
            pairs.append(along_a_line(toy, rank, generator, points=points))
        size = sum(abs(change) for change, _ in pairs) / networks
        missed = sum(abs(change - integral) for change, integral in pairs) / networks
        wrong = sum(change * integral < 0 for change, integral in pairs)
        found.setdefault(rank, []).append(f"{size:.3f}/{missed:.3f}/{wrong}")
    return found


def plot(rows: dict[str, list[GradientRow]], path: Path) -> None:
    """Bias against error of each corrector, early and late, as sigma grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        for i, (name, each) in enumerate(rows.items()):
            points = [(row.bias, row.rmse) for row in each if row.policy == kind]
            style = {"marker": "osDv^<>PX*hd8"[i], "markersize": 5, "linewidth": 1}
            axis.plot(*zip(*points, strict=True), label=name, color=plt.colormaps["tab20"](i), **style)
        axis.set(title=f"{kind} policies", xlabel="bias / |gradient|", ylim=(0, 1.6))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error of 128 rows / |gradient|")
    axes[1].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure(networks: int, draws: int, folder: Path) -> None:
    """Write gradients.json and gradients.png."""
    of_batches = partial(of_correctors, BATCHES)
    many = of_correctors(CORRECTORS, networks=networks)
    few = of_correctors(CORRECTORS, networks=networks, batch=16)
    weights = {name: [f"{row.mean_weight:.2f}/{row.ess:.2f}" for row in rows] for name, rows in many.items()}
    sized = partial(of_correctors, CORRECTORS, networks=networks, words=2, diffusion_steps=2)
    short, long = sized(length=2), sized(length=6)
    clipped = {name: c.FunctionCorrector(loss=surrogate) for name, surrogate in SURROGATES.items()}
    updated = of_correctors(clipped, networks=networks, moved="old")
    with_none = [f"{kind} {sigma}" for kind, sigma in product(KINDS, (0.0, *SIGMAS))]
    tables = {
        "corrector, n = 128": table(COLUMNS, as_cells(many)),
        "corrector, n = 16": table(COLUMNS, as_cells(few)),
        "corrector: mean weight/ESS": table(COLUMNS, weights),
        "corrector, 2 tokens of 2 words, n = 128": table(COLUMNS, as_cells(short)),
        "corrector, 6 tokens of 2 words, n = 128": table(COLUMNS, as_cells(long)),
        "real batches, n = 128": table(COLUMNS, as_cells(of_batches(draws=draws, networks=networks))),
        "real batches, n = 16": table(COLUMNS, as_cells(of_batches(draws=draws, networks=networks, batch=16))),
        "surrogate after an update, n = 128": table(COLUMNS, as_cells(updated)),
        "estimator, n = 128": table(["early", "early cosine", "late", "late cosine"], of_estimators(networks)),
        "rank confidence, n = 128": table(with_none, of_orders(networks)),
        "12 lines: change/missed/wrong sign": table(list(KINDS), of_lines(12)),
    }
    write_json(folder / "gradients.json", tables)
    plot(many, folder / "gradients.png")


def page_tables() -> dict[str, str]:
    rows = {row["row"]: row for row in read_json(STORED)["corrector, n = 128"]}
    columns = ("early 0.5", "late 0.3", "late 0.5")
    return {"correctors": markdown([{"corrector": n} | {c: rows[n][c] for c in columns} for n in ON_THE_PAGE])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--draws", type=int, default=64, help="real batches, where weights depend on the batch")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of gradients.json")
    options = parser.parse_args()
    if not options.report:
        measure(options.networks, options.draws, options.output_dir)
    for title, rows in read_json(options.output_dir / "gradients.json").items():
        print(f"{title}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
