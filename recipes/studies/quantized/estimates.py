"""Corrections where the likelihood is an estimate, exactly: what of the gradient's error is the copy's? Claims first.

As in orders.py trained models of 4x4 Sudoku fill blanks one at a time, and everything is enumerated: a rollout is an
order of the cells and their digits, its log-prob under a likelihood estimate is a sum of log-probs of digits on
canvases that are enumerated, too, and the masks that an estimate draws are summed over, with their probabilities.
Nothing is sampled. The models are those of orders.py (seeds 30 to 49), which learned puzzles with five blanks; here
they get `PUZZLES` puzzles of their own with four blanks, in four steps.

orders       random, left to right, MaxProb
copies       FP8 (e4m3), INT4 (groups of 32) and NVFP4, weights alone; FP8 of weights and inputs
estimators   exact; 3, 2 and 1 segments (`Trajectory(num_segments=k)`; one segment is `OneStep(prompt_mask=0)`);
             ELBO(4, antithetic); Coupled(2). Steps drawn with exact ratios and weights on the loss have the exact
             replay's mean gradient, and no row of their own.
corrections  none; tis (cap 2); tis 1.2, tis 1.5 (other caps); mean 1 (TIS's weights divided by their mean over each
             view's tokens, segments alone); exact tis (TIS's weights of the exact replay, on the estimate's gradient);
             ais (lambda of this library, in a batch without end); mis; tbpo (its weight, one a row); aligned (the
             copy's operands in the learner's forward); shuffled (TIS's weights on other tokens: no correction, times
             their mean)

The mean gradient is that of g = A * sum of w * grad log-prob estimate, A the reward less the expected reward of the
rollouts. Its error is the distance from the gradient of the learner's own expected reward in its own order, in lengths
of the latter, over a model's puzzles together. It has two parts, which do not add up to it, as they may cancel:

own          the estimator's: the error that it has with the learner's own rollouts
added        the copy's: the distance from the same estimator's gradient with the learner's own rollouts

The second part, "lengths", asks how much a correction repairs by the number of tokens: the exact likelihood, a puzzle
with seven blanks of each model's own, of which all but the first L are filled in; L = 1 to 7 from left to right, 1 to 5
in random order. Weights of tokens, of prefixes (the product of the ratios up to the token) and of sequences (the
product of all), each with cap 2 and without.

The claims, on twenty models (two-sided sign flips, Holm's correction over each family):

errors (36)   for 2 segments, 1 segment, ELBO and Coupled, in each order, with each copy: TIS leaves less error than no
              correction.
added (9)     for 2 segments, in each order, with each copy: TIS leaves less of what the copy adds than no correction.
control (9)   for 2 segments, in each order, with each copy: TIS leaves less error than shuffled TIS.
lengths (8)   INT4 and NVFP4, left to right and in random order: the share of the error that token TIS leaves is larger
              at the largest L than at L = 2; and prefix weights (cap 2) leave less error there than token TIS.

The shares of the last family are compared by their logarithms, as the share of a small error may be any number. Two
puzzles a model, so that twenty models take an hour and a half of one core. Three segments and the copy with rounded
inputs were added when the claims had been read: no claim is about them.

Known before the runs, from a pilot on two models of its own (30 and 31, two puzzles and one; none -> TIS): two
segments, random order FP8 0.305 -> 0.264, INT4 0.227 -> 0.284, NVFP4 0.476 -> 0.234; MaxProb FP8 0.186 -> 0.201, INT4
0.325 -> 0.206, NVFP4 0.474 -> 0.223; one view 0.662 -> 0.644, 0.474 -> 0.676, 0.658 -> 0.610; and of the lengths: INT4
in random order, 6 models, 1 to 6 blanks: 0, 0.02, 0.07, 0.11, 0.23, 0.20 of the error are left by TIS.

And from one puzzle of model 31, with which the script was tried (INT4, none -> TIS): two segments in random order 0.481
-> 0.100, left to right 0.513 -> 0.180, MaxProb 0.500 -> 0.246; one segment 0.484 -> 0.271, 0.559 -> 0.225, 0.525 ->
0.400. On the pilot's puzzle of model 31 the script gives the pilot's numbers for FP8 and NVFP4 under MaxProb.

    python -m recipes.studies.quantized.estimates            run what is missing, estimates.json, the tables
    python -m recipes.studies.quantized.estimates --report   run nothing
"""

import argparse
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from math import comb, log
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl import MIS, NVFP4, TBPO, TIS, FakeQuantize, Float8WeightOnly, Int4WeightOnly, Policy, Scheme
from dllm_rl.algorithms.correctors import Corrector, TokenStats, ais_lambda
from dllm_rl.files import read_json, write_json
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.rollout_policy import quantized_copy
from recipes.studies.paired import claimed_rows, interval, markdown, verdict, verdict_rows
from recipes.studies.quantized.order_flips import Canvases, canvases, law_of, token_logits, trained
from recipes.sudoku_tiny import few_clues

STORED = Path(__file__).with_suffix(".json")  # by model: errors of both parts
SEEDS, PUZZLES, BLANKS = range(30, 50), 2, 4
ORDERS = {"random": "random", "left_to_right": "left to right", "max_prob": "`MaxProb`"}  # name in tables
COPIES: dict[str, Scheme] = {
    "FP8": Float8WeightOnly(dequantized=True),
    "INT4": Int4WeightOnly(),
    "NVFP4": NVFP4(),
    "FP8 with inputs": FakeQuantize(weight="e4m3", activation="e4m3"),
}
CLAIMED_COPIES = ("FP8", "INT4", "NVFP4")
ESTIMATORS = ("exact", "segments 3", "segments 2", "segments 1", "elbo", "coupled")
OF_TOKENS: dict[str, Corrector] = {
    "tis": TIS(),
    "tis 1.2": TIS(cap=1.2),
    "tis 1.5": TIS(cap=1.5),
    "mis": MIS(),
    "tbpo": TBPO(),
}
LONGEST = {"left_to_right": 7, "random": 5}  # blanks
OF_LENGTHS = ("none", "token", "prefix", "sequence", "token, cap 2", "prefix, cap 2", "sequence, cap 2")
LENGTH_COPIES = ("INT4", "NVFP4")
Model = Mapping[str, Any]  # what `run_model` leaves of one
LogProbs = Float[Tensor, "S J V"]  # of every digit in every blank, by state


@dataclass(frozen=True)
class Rollouts:
    """All rollouts that a policy can write, a row each."""

    digits: Int[Tensor, "R J"]
    step: Int[Tensor, "R J"]  # at which each blank is filled
    chance: Float[Tensor, " R"]
    reward: Float[Tensor, " R"]

    @property
    def advantages(self) -> Float[Tensor, " R"]:
        return self.reward - self.chance @ self.reward


@dataclass(frozen=True)
class Views:
    """One draw of an estimator's views: what each masks, and each blank's coefficient in it."""

    chance: float
    masked: Bool[Tensor, "N R J"]
    coefficients: Float[Tensor, "N R J"]


def states_of(digits: Int[Tensor, "R J"], masked: Bool[Tensor, "*N R J"]) -> Int[Tensor, "*N R"]:
    """The numbers of the canvases of four digits on which the `masked` blanks are empty."""
    places = 5 ** torch.arange(digits.shape[1] - 1, -1, -1)
    return (torch.where(masked, 0, digits + 1) * places).sum(-1)


def events_of(digits: Int[Tensor, "R J"], masked: Bool[Tensor, "N R J"]) -> Int[Tensor, "N R J"]:
    """Of each view and blank, where its digit's log-prob stands in a flat `LogProbs`."""
    blanks = digits.shape[1]
    return (states_of(digits, masked)[..., None] * blanks + torch.arange(blanks)) * 4 + digits


def logprobs_at(policy: Policy, at: Canvases, states: Int[Tensor, " N"]) -> Float[Tensor, "N J V"]:
    """The log-probs of the digits in all blanks of some canvases."""
    tokens = at.tokens[states]
    logits = policy.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))[:, at.cells]
    return logits[..., at.choices].double().log_softmax(-1)


def among_all(found: Float[Tensor, "N J V"], at: Canvases, states: Int[Tensor, " N"]) -> LogProbs:
    """The log-probs of some canvases, without a graph, among those of all."""
    return torch.zeros(len(at.tokens), *found.shape[1:], dtype=torch.float64).index_copy(0, states, found.detach())


def orders_of(order: str, digits: Int[Tensor, "R J"], at: Canvases, policy: Policy) -> Iterator[Int[Tensor, "R J"]]:
    """The orders, equally likely, in which a policy writes each answer: the step of each blank."""
    rows, blanks = digits.shape
    if order == "left_to_right":
        yield torch.arange(blanks).expand(rows, blanks)
    elif order == "random":
        yield from (torch.tensor(each).expand(rows, blanks) for each in permutations(range(blanks)))
    else:
        with torch.no_grad():
            first = law_of(token_logits(policy, at), at, order, policy).order[..., 0] == 0
        chosen = torch.zeros(len(at.tokens), dtype=torch.long)
        chosen[at.masked.any(-1)] = first.long().argmax(-1)
        step = torch.full((rows, blanks), blanks)
        for number in range(blanks):
            cell = chosen[states_of(digits, step == blanks)]
            step = step.scatter(1, cell[:, None], number)
        yield step


def segments(step: Int[Tensor, "R J"], number: int) -> Views:
    """The views of `Trajectory(num_segments=number)`; as many segments as steps: the exact likelihood."""
    segment = step * number // step.shape[1]
    each = torch.arange(number)[:, None, None]
    return Views(1.0, segment >= each, (segment == each).double())


def rollouts_of(order: str, logprobs: LogProbs, at: Canvases, policy: Policy) -> Rollouts:
    """All rollouts of a policy, whose log-probs are given."""
    blanks = at.masked.shape[1]
    answers = torch.tensor(list(product(range(4), repeat=blanks)))
    steps = list(orders_of(order, answers, at, policy))
    digits, step = answers.repeat(len(steps), 1), torch.cat(steps)
    chance = contributions(logprobs, digits, segments(step, blanks)).sum(-1).exp() / len(steps)
    reward = at.reward[states_of(digits, torch.zeros_like(digits, dtype=torch.bool))]
    return Rollouts(digits, step, chance, reward)


def without_order(rollouts: Rollouts) -> Rollouts:
    """The answers alone, each with the chance of all of its orders."""
    answers, number = rollouts.digits.unique(dim=0, return_inverse=True)
    chance = torch.zeros(len(answers), dtype=torch.float64).index_add(0, number, rollouts.chance)
    reward = torch.zeros(len(answers), dtype=torch.float64).index_copy(0, number, rollouts.reward)
    return Rollouts(answers, torch.zeros_like(answers), chance, reward)


def subsets(number: int, size: int) -> Iterator[Bool[Tensor, " J"]]:
    for chosen in combinations(range(number), size):
        yield torch.zeros(number, dtype=torch.bool).index_fill(0, torch.tensor(chosen, dtype=torch.long), True)


def elbo_draws(blanks: int) -> Iterator[tuple[float, list[tuple[Tensor, float]]]]:
    """The draws of `ELBO(num_samples=4, antithetic=True)` for four tokens: (mask, coefficient) of four views.

    Stratified, its two pairs have k = 1 and k = 2: the first k tokens of an order, and its last 5 - k.
    """
    assert blanks == 4
    for alone, (first, both) in product(range(4), permutations(range(4), 2)):
        one, every = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
        one[alone] = True
        two, three = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
        two[[first, both]] = True
        three[first] = False
        yield 1 / 48, [(mask, 4 / int(mask.sum()) / 4) for mask in (one, every, two, three)]


def coupled_draws(blanks: int) -> Iterator[tuple[float, list[tuple[Tensor, float]]]]:
    """The draws of `Coupled(num_samples=2)` for four tokens: (mask, coefficient) of four views, a pair for each sample.

    Stratified, k of the first pair is 0, 1, 2 with probability 0.4, 0.4, 0.2, and of the second 2, 3, 4 with 0.2, 0.4,
    0.4.
    """
    assert blanks == 4

    def pair(chances: Mapping[int, float]) -> Iterator[tuple[float, list[tuple[Tensor, float]]]]:
        for size, chance in chances.items():
            for mask in subsets(4, size):
                sides = [(mask, size), (~mask, 4 - size)]
                yield chance / comb(4, size), [(side, 5 / (2 * k) / 2) for side, k in sides if k]

    for (p, one), (q, two) in product(pair({0: 0.4, 1: 0.4, 2: 0.2}), pair({2: 0.2, 3: 0.4, 4: 0.4})):
        yield p * q, [*one, *two]


DRAWS = {"elbo": elbo_draws, "coupled": coupled_draws}


def views_of(estimator: str, rollouts: Rollouts) -> Iterator[Views]:
    """All draws of an estimator's views, as every row may have them."""
    shape = rollouts.digits.shape
    if estimator in DRAWS:
        for chance, views in DRAWS[estimator](shape[1]):
            masked = torch.stack([mask.expand(shape) for mask, _ in views])
            weights = torch.tensor([weight for _, weight in views], dtype=torch.float64)[:, None, None]
            yield Views(chance, masked, masked * weights)
    else:
        yield segments(rollouts.step, shape[1] if estimator == "exact" else int(estimator.split()[1]))


def contributions(logprobs: LogProbs, digits: Int[Tensor, "R J"], views: Views) -> Float[Tensor, "R J"]:
    """Each blank's part of the estimate, nats."""
    found = logprobs.flatten()[events_of(digits, views.masked)]
    return torch.where(views.coefficients > 0, found * views.coefficients, 0.0).sum(0)


def token_stats(ours: Tensor, theirs: Tensor, rollouts: Rollouts) -> TokenStats:
    """What a corrector reads."""
    everywhere = torch.ones_like(rollouts.digits, dtype=torch.bool)
    return TokenStats(ours - theirs, rollouts.advantages, everywhere, ours, theirs, rollouts.step)


def counted(weights: Float[Tensor, "R J"], rollouts: Rollouts, views: Views, shape: torch.Size) -> LogProbs:
    """What each event's gradient counts in the mean of g, of one draw of the views with its chance."""
    each = views.chance * (rollouts.chance * rollouts.advantages)[:, None] * weights * views.coefficients
    counts = torch.zeros(shape.numel(), dtype=torch.float64)
    return counts.index_add_(0, events_of(rollouts.digits, views.masked).flatten(), each.flatten()).view(shape)


@dataclass
class Moments:
    """Means over rollouts, draws and tokens, from which AIS's lambda, shuffled weights and mean 1 follow."""

    found: dict[str, float]

    @classmethod
    def empty(cls) -> "Moments":
        return cls(defaultdict(float))

    def add(self, name: str, values: Tensor, rollouts: Rollouts, chance: float) -> None:
        """Add the mean over rollouts of the mean of a row's values."""
        self.found[name] += chance * float(rollouts.chance @ values.flatten(1).mean(-1))

    @property
    def lam(self) -> float:
        found = self.found
        spread = max(0.0, found["token squared"] - found["token"] ** 2) ** 0.5 / found["token"]
        lam = ais_lambda(found["row"] ** 2 / found["row squared"], found["apart"], spread, tau=0.05)
        return min(1.0, max(0.0, lam))


def counts_of(
    estimator: str, rollouts: Rollouts, ours: LogProbs, theirs: LogProbs, moments: Moments
) -> dict[str, LogProbs]:
    """By correction, but those that need the `moments` of all puzzles, what each event counts; adds to the moments.
    "tis, view n": the part of a view's tokens."""
    blanks = rollouts.digits.shape[1]
    found: dict[str, LogProbs] = {}

    def add(name: str, weights: Tensor, views: Views) -> None:
        counts = counted(weights, rollouts, views, ours.shape)
        found[name] = found[name] + counts if name in found else counts

    steps = segments(rollouts.step, blanks)
    exact = (contributions(each, rollouts.digits, steps) for each in (ours, theirs))
    of_steps = TIS().weights(token_stats(*exact, rollouts)).importance_weights
    if estimator in DRAWS:
        answers = without_order(rollouts)  # exact weights belong to an order, which these rows do not have
        number = rollouts.digits.unique(dim=0, return_inverse=True)[1]
        expected = torch.zeros(answers.digits.shape, dtype=torch.float64)
        expected.index_add_(0, number, rollouts.chance[:, None] * of_steps)
        of_steps = expected / answers.chance[:, None]
        rollouts = answers
    for views in views_of(estimator, rollouts):
        p, q = (contributions(each, rollouts.digits, views) for each in (ours, theirs))
        stats = token_stats(p, q, rollouts)
        ratio, row = stats.log_mismatch.exp(), stats.log_mismatch.sum(-1, keepdim=True).exp()
        add("none", torch.ones_like(ratio), views)
        add("exact tis", of_steps, views)
        for name, corrector in OF_TOKENS.items():
            add(name, corrector.weights(stats).importance_weights, views)
        tis = OF_TOKENS["tis"].weights(stats).importance_weights
        statistics = {"token": ratio, "token squared": ratio**2, "row": row, "row squared": row**2}
        for name, values in (statistics | {"apart": stats.log_mismatch.abs(), "tis": tis}).items():
            moments.add(name, values, rollouts, views.chance)
        if estimator not in DRAWS:
            for view, scored in enumerate(views.coefficients):
                add(f"tis, view {view}", tis * scored, views)
                moments.add(f"weight of view {view}", tis * scored, rollouts, views.chance)
                moments.add(f"size of view {view}", scored, rollouts, views.chance)
    return found


def completed(counts: dict[str, LogProbs], moments: Moments) -> dict[str, LogProbs]:
    """With TIS's weights of mean 1, which need the moments of all puzzles, and without parts."""
    made = {name: each for name, each in counts.items() if "view" not in name}
    views = [name for name in counts if "view" in name]
    if views:
        made["mean 1"] = torch.zeros_like(counts["none"])
    for name in views:
        size, weight = (moments.found[name.replace("tis, ", f"{what} of ")] for what in ("size", "weight"))
        made["mean 1"] += counts[name] * (size / weight)
    return made


def mixed(means: Mapping[str, Tensor], moments: Moments) -> dict[str, Tensor]:
    """The mean gradients of corrections, and of those that are mixtures of others."""
    ais = means["none"] + moments.lam * (means["tis"] - means["none"])
    return {**means, "ais": ais, "shuffled": moments.found["tis"] * means["none"]}


def differentiated(found: Tensor, counts: Tensor, policy: Policy) -> Float[Tensor, " W"]:
    """The gradient of the sum of counts times log-probs with respect to all weights."""
    weights = list(policy.module.parameters())
    parts = torch.autograd.grad(found, weights, counts, retain_graph=True, allow_unused=True)
    zeros = map(torch.zeros_like, weights)
    return torch.cat([(zero if g is None else g).flatten().double() for g, zero in zip(parts, zeros, strict=True)])


def digits_of(value: float) -> float:
    """Six digits of a number, as it is stored."""
    return float(f"{value:.6g}")


def estimated(
    policy: Policy, copies: Mapping[str, Policy], every: Sequence[Canvases], stored: Collection[str] = ()
) -> dict[str, Any]:
    """The first part of a model: by order and estimator the estimator's own error, and by copy and correction the whole
    error, what the copy adds, and the cosine with the truth. Settings (order, copy, estimator) that are `stored` are
    left out."""
    tables = []  # of each puzzle: log-probs with a graph, and those of all policies
    for at in every:
        states = at.masked.any(-1).nonzero()[:, 0]
        graph = logprobs_at(policy, at, states)
        with torch.no_grad():
            theirs = {name: among_all(logprobs_at(copied, at, states), at, states) for name, copied in copies.items()}
        tables.append((at, states, graph, among_all(graph, at, states), theirs))
    result: dict[str, Any] = {"reward": {}, "own": {}, "own cosine": {}, "settings": {}, "ess": {}, "lambda": {}}
    share = 1 / len(every)
    for order in ORDERS:
        own = [rollouts_of(order, ours, at, policy) for at, _, _, ours, _ in tables]
        result["reward"][order] = share * sum(float(each.chance @ each.reward) for each in own)
        alone: dict[str, Tensor] = {}
        for estimator in ESTIMATORS:
            alone[estimator] = torch.zeros(())
            for (_, states, graph, ours, _), rollouts in zip(tables, own, strict=True):
                counts = counts_of(estimator, rollouts, ours, ours, Moments.empty())["none"]
                alone[estimator] = alone[estimator] + share * differentiated(graph, counts[states], policy)
        truth = alone["exact"]
        for estimator, found in alone.items():
            result["own"][f"{order}, {estimator}"] = digits_of(float((found - truth).norm() / truth.norm()))
            cosine = torch.cosine_similarity(found, truth, dim=0)
            result["own cosine"][f"{order}, {estimator}"] = digits_of(float(cosine))
        for name, copied in copies.items():
            theirs = [rollouts_of(order, table[4][name], table[0], copied) for table in tables]
            for estimator in ESTIMATORS:
                setting = f"{order}, {name}, {estimator}"
                if setting in stored:
                    continue
                moments = Moments.empty()
                counts = [
                    counts_of(estimator, rollouts, ours, each[name], moments)
                    for (_, _, _, ours, each), rollouts in zip(tables, theirs, strict=True)
                ]
                moments = Moments({key: share * value for key, value in moments.found.items()})
                made = [completed(each, moments) for each in counts]
                means = {}
                for weights in made[0]:
                    parts = [
                        share * differentiated(graph, each[weights][states], policy)
                        for (_, states, graph, _, _), each in zip(tables, made, strict=True)
                    ]
                    means[weights] = torch.stack(parts).sum(0)
                with aligned_forward(policy, copied):
                    parts = [
                        share * differentiated(logprobs_at(policy, at, states), each["none"][states], policy)
                        for (at, states, _, _, _), each in zip(tables, made, strict=True)
                    ]
                means = mixed(means | {"aligned": torch.stack(parts).sum(0)}, moments)
                result["ess"][setting] = digits_of(moments.found["token"] ** 2 / moments.found["token squared"])
                result["lambda"][setting] = digits_of(moments.lam)
                for weights, found in means.items():
                    result["settings"][f"{setting}, {weights}"] = {
                        "error": digits_of(float((found - truth).norm() / truth.norm())),
                        "added": digits_of(float((found - alone[estimator]).norm() / truth.norm())),
                        "cosine": digits_of(float(torch.cosine_similarity(found, truth, dim=0))),
                    }
    return result


def length_weights(ours: Tensor, theirs: Tensor, step: Int[Tensor, "R J"]) -> dict[str, Float[Tensor, "R J"]]:
    """By name of `OF_LENGTHS` the weight of each token, from the log-probs of both policies."""
    ratio = ours - theirs
    earlier = step[:, None] <= step[..., None]  # of each token those that were written up to it
    logs = {
        "token": ratio,
        "prefix": (earlier * ratio[:, None]).sum(-1),
        "sequence": ratio.sum(-1, keepdim=True).expand_as(ratio),
    }
    found = {"none": torch.ones_like(ratio)} | {name: each.exp() for name, each in logs.items()}
    return found | {f"{name}, cap 2": each.exp().clamp(max=2.0) for name, each in logs.items()}


def filled(puzzle: str, solution: str, blanks: int) -> str:
    """The puzzle with all but its first blanks filled in."""
    left = iter(range(len(puzzle)))
    return "".join(
        solution[cell] if digit == "0" and next(left) >= blanks else digit for cell, digit in enumerate(puzzle)
    )


def by_length(policy: Policy, copies: Mapping[str, Policy], puzzle: str, solution: str) -> dict[str, float]:
    """The second part of a model: the error by order, number of blanks, copy and kind of weights, exact likelihood."""
    found = {}
    for order, longest in LONGEST.items():
        for blanks in range(1, longest + 1):
            at = canvases(filled(puzzle, solution, blanks), policy)
            reached = at.masked.any(-1)
            if order == "left_to_right":  # only these canvases are written on
                reached &= (at.masked.long().diff(dim=-1) >= 0).all(-1)
            states = reached.nonzero()[:, 0]
            graph = logprobs_at(policy, at, states)
            ours = among_all(graph, at, states)
            own = rollouts_of(order, ours, at, policy)

            def mean_gradient(
                rollouts: Rollouts, weights: Tensor, blanks=blanks, ours=ours, graph=graph, states=states
            ):
                counts = counted(weights, rollouts, segments(rollouts.step, blanks), ours.shape)
                return differentiated(graph, counts[states], policy)

            truth = mean_gradient(own, torch.ones_like(own.digits, dtype=torch.float64))
            for name in LENGTH_COPIES:
                with torch.no_grad():
                    theirs = among_all(logprobs_at(copies[name], at, states), at, states)
                rollouts = rollouts_of(order, theirs, at, copies[name])
                views = segments(rollouts.step, blanks)
                p, q = (contributions(each, rollouts.digits, views) for each in (ours, theirs))
                for kind, weights in length_weights(p, q, rollouts.step).items():
                    apart = (mean_gradient(rollouts, weights) - truth).norm() / truth.norm()
                    found[f"{order}, {blanks}, {name}, {kind}"] = digits_of(float(apart))
    return found


def run_model(seed: int, stored: Model | None) -> dict[str, Any]:
    """Train the model of a seed, and measure on puzzles of its own what of it is not `stored`."""
    policy, steps = trained(seed)
    task = few_clues(split="test", clues=(16 - BLANKS, 16 - BLANKS), unique=True, size=PUZZLES * SEEDS.stop)
    every = [canvases(task[PUZZLES * seed + i].fields["puzzle"], policy) for i in range(PUZZLES)]
    copies = {name: quantized_copy(policy, scheme) for name, scheme in COPIES.items()}
    cpu = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    if stored is not None:
        more = estimated(policy, copies, every, stored["ess"])
        for name in stored["own"]:
            if (more["own"][name], steps) != (stored["own"][name], stored["steps"]):
                raise SystemExit(f"model {seed} is not the one of {STORED.name}: {name}")
        merged = {name: {**stored[name], **found} for name, found in more.items()}
        return {**stored, **merged, "added with": cpu}
    long = few_clues(split="test", clues=(9, 9), unique=True, size=SEEDS.stop)[seed]
    lengths = by_length(policy, copies, long.fields["puzzle"], long.fields["solution"])
    return {"seed": seed, "steps": steps, **cpu, **estimated(policy, copies, every), "lengths": lengths}


CLAIMED = ("segments 2", "segments 1", "elbo", "coupled")  # of the estimators
NAMES = {  # of estimators, in tables
    "exact": "exact",
    "segments 3": "3 segments",
    "segments 2": "2 segments",
    "segments 1": "1 segment",
    "elbo": "`ELBO`, 4 masks",
    "coupled": "`Coupled`, 2 pairs",
}
CORRECTIONS = {  # in tables
    "none": "no correction",
    "tis": "TIS",
    "tis 1.2": "TIS, cap 1.2",
    "tis 1.5": "TIS, cap 1.5",
    "mean 1": "TIS, mean 1 in each view",
    "exact tis": "TIS's weights of the exact replay",
    "ais": "AIS (our lambda)",
    "mis": "MIS",
    "tbpo": "TBPO's weights",
    "aligned": "aligned forward",
    "shuffled": "shuffled TIS",
}
Claims = Mapping[str, Sequence[float]]
HOLM = "Holm's p"


def in_table(copied: str) -> str:
    return copied.replace(" with inputs", ", inputs too")


def found(model: Model, what: str, *setting: str) -> float:
    """A number of a model: "error", "added" or "cosine" of an order, copy, estimator and correction."""
    return model["settings"][", ".join(setting)][what]


def left_at(model: Model, order: str, blanks: int, copied: str) -> float:
    """The share of the error of an exact likelihood that token TIS leaves."""
    none, tis = (model["lengths"][f"{order}, {blanks}, {copied}, {kind}"] for kind in ("none", "token, cap 2"))
    return tis / none


def families(models: Sequence[Model]) -> dict[str, Claims]:
    """By family its claims: of each the models' numbers, which are above 0 where it holds."""

    def less(what: str, estimator: str, order: str, copied: str, worse: str) -> list[float]:
        setting = (order, copied, estimator)
        return [found(model, what, *setting, worse) - found(model, what, *setting, "tis") for model in models]

    def of_lengths(order: str, copied: str) -> Iterator[tuple[str, list[float]]]:
        last, begin = LONGEST[order], f"{ORDERS[order]}, {copied}: "
        yield (
            f"{begin}token TIS leaves a larger share at {last} blanks than at 2",
            [log(left_at(model, order, last, copied)) - log(left_at(model, order, 2, copied)) for model in models],
        )
        kinds = [[model["lengths"][f"{order}, {last}, {copied}, {kind}, cap 2"] for model in models] for kind in
                 ("token", "prefix")]  # fmt: skip
        apart = [token - prefix for token, prefix in zip(*kinds, strict=True)]
        yield f"{begin}prefix weights leave less error at {last} blanks than token TIS", apart

    pairs = list(product(ORDERS, CLAIMED_COPIES))
    return {
        "errors": {
            f"{NAMES[each]}, {ORDERS[order]}, {copied}: TIS leaves less error than no correction": less(
                "error", each, order, copied, "none"
            )
            for each in CLAIMED
            for order, copied in pairs
        },
        "added": {
            f"2 segments, {ORDERS[order]}, {copied}: TIS leaves less of what the copy adds than no correction": less(
                "added", "segments 2", order, copied, "none"
            )
            for order, copied in pairs
        },
        "control": {
            f"2 segments, {ORDERS[order]}, {copied}: TIS leaves less error than shuffled TIS": less(
                "error", "segments 2", order, copied, "shuffled"
            )
            for order, copied in pairs
        },
        "lengths": {
            claim: values
            for order, copied in product(("left_to_right", "random"), ("INT4", "NVFP4"))
            for claim, values in of_lengths(order, copied)
        },
    }


def whole_families(models: Sequence[Model]) -> list[Claims]:
    """The claims, once there are all models: none is read before."""
    return list(families(models).values()) if len(models) == len(SEEDS) else []


def over(models: Sequence[Model], what: str, *setting: str) -> str:
    return interval([found(model, what, *setting) for model in models])


def pair_rows(copies: Iterable[str] = COPIES) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Every order and copy, with the first columns of their row."""
    for order, copied in product(ORDERS, copies):
        yield order, copied, {"order": ORDERS[order], "copy": in_table(copied)}


def part_rows(models: Sequence[Model], what: str) -> list[dict[str, str]]:
    """By order and copy, for each estimator: the whole "error" or what the copy has "added", without a correction and
    with TIS, and in how many models it is less with TIS."""
    rows = []
    for order, copied, row in pair_rows():
        for each, name in NAMES.items():
            settings = [(order, copied, each, correction) for correction in ("none", "tis")]
            none, tis = ([found(model, what, *setting) for model in models] for setting in settings)
            less = sum(a > b for a, b in zip(none, tis, strict=True))
            row[name] = f"{interval(none)} → {interval(tis)} ({less})"
        rows.append(row)
    return rows


def own_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By estimator its own error, with the learner's own rollouts."""
    return [
        {"likelihood": name}
        | {ORDERS[order]: interval([model["own"][f"{order}, {each}"] for model in models]) for order in ORDERS}
        for each, name in NAMES.items()
        if each != "exact"
    ]


def correction_rows(models: Sequence[Model], estimator: str) -> list[dict[str, str]]:
    """By correction the error with one estimator, in random order and under `MaxProb`, by copy."""
    rows = []
    for name, head in CORRECTIONS.items():
        if f"random, INT4, {estimator}, {name}" in models[0]["settings"]:
            rows.append({"correction": head})
            for order, copied in product(("random", "max_prob"), COPIES):
                rows[-1][f"{ORDERS[order]}, {in_table(copied)}"] = over(models, "error", order, copied, estimator, name)
    return rows


def ratio_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By order and copy the effective sample size of the token ratios, of each estimator."""
    return [
        row
        | {
            name: f"{mean(model['ess'][f'{order}, {copied}, {each}'] for model in models):.3f}"
            for each, name in NAMES.items()
        }
        for order, copied, row in pair_rows()
    ]


def length_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By order, copy and number of blanks the error without a correction, and the shares of it that kinds of weights
    leave (of the means)."""
    rows = []
    for order, copied in product(LONGEST, LENGTH_COPIES):
        for blanks in range(1, LONGEST[order] + 1):
            each = {
                kind: [model["lengths"][f"{order}, {blanks}, {copied}, {kind}"] for model in models]
                for kind in OF_LENGTHS
            }
            rows.append({"order": ORDERS[order], "copy": copied, "blanks": str(blanks)})
            rows[-1]["error, no correction"] = interval(each["none"])
            rows[-1] |= {kind: f"{mean(each[kind]) / mean(each['none']):.2f}" for kind in OF_LENGTHS[1:]}
    return rows


def claim_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By order and copy the verdicts of the first three families: difference, and p of Holm's correction over each."""
    of = families(models)
    verdicts = {
        row["stated before the runs"]: f"{verdict(row)}, p {row[HOLM]}".replace("p 0.000", "p < 0.001")
        for name in ("errors", "added", "control")
        for row in claimed_rows(of[name])
    }
    begins = {f"less error, {NAMES[each]}": f"{NAMES[each]}, " for each in CLAIMED}
    rows = []
    for order, copied, row in pair_rows(CLAIMED_COPIES):
        for head, begin in begins.items():
            row[head] = verdicts[f"{begin}{ORDERS[order]}, {copied}: TIS leaves less error than no correction"]
        two = f"2 segments, {ORDERS[order]}, {copied}: TIS leaves less "
        row["less of what the copy adds, 2 segments"] = verdicts[f"{two}of what the copy adds than no correction"]
        row["less error than shuffled TIS, 2 segments"] = verdicts[f"{two}error than shuffled TIS"]
        rows.append(row)
    return rows


def length_claim_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    return verdict_rows(families(models)["lengths"], str, "models")


def page_tables() -> dict[str, str]:
    """The tables of README.md and appendix.md, by name. No claim is read before the last model."""
    models = read_json(STORED) if STORED.exists() else []
    rows: dict[str, list[dict[str, str]]] = {
        "own": own_rows(models),
        "errors": part_rows(models, "error"),
        "added": part_rows(models, "added"),
        "corrections, 2 segments": correction_rows(models, "segments 2"),
        "corrections, ELBO": correction_rows(models, "elbo"),
        "ratios": ratio_rows(models),
        "lengths": length_rows(models),
    }
    for name, of in {"claims": claim_rows, "claims, lengths": length_claim_rows}.items():
        rows[name] = of(models) if len(models) == len(SEEDS) else [{"models": f"{len(models)} of {len(SEEDS)}"}]
    return {name: markdown(each) for name, each in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = read_json(STORED) if STORED.exists() else []
    done = {model["seed"]: model for model in models}
    settings = {", ".join(each) for each in product(ORDERS, COPIES, ESTIMATORS)}
    for seed in SEEDS:
        stored = done.get(seed)
        if not options.report and (stored is None or settings - stored["ess"].keys()):
            done[seed] = run_model(seed, stored)
            models = list(done.values())
            write_json(STORED, models)
            print(f"model {seed}", flush=True)
    print(f"{len(models)} of {len(SEEDS)} models\n")
    for name, table in page_tables().items():
        print(f"{name}:\n\n{table}")


if __name__ == "__main__":
    main()
