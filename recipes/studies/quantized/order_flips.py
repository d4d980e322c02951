"""What a quantized copy's other order costs the policy gradient, exactly: trained models of 4x4 Sudoku, five blanks.

Under max-probability or confidence order a quantized copy unmasks other positions first. The learner would have drawn
the recorded order with probability 0, and no weight of tokens repairs that. Here all 1024 outcomes in all 120 orders
are enumerated, one cell a step: a canvas is one of 5^5 states, from which an event (position, digit) leads to the next.
The reward is 1 for a solved puzzle. Of the gradient that rollouts of the copy give,

    g = A * sum of w * grad log p over a rollout's events,      A = reward less the copy's expected reward,

the mean is exact, and the truth is the gradient of the learner's own expected reward under its own order. Everything is
summed over `PUZZLES` puzzles, and said in lengths of the truth.

orders     max_prob; confidence (LLaDA's; its part of the likelihood is scored); plackett_luce at 0.05, 0.1 and 0.3;
           random, the control
copies     INT4 (groups of 32), FP8, and kernel noise: the same weights in fp32 by another attention kernel
weights    none; TIS (cap 2); AIS with the lambda of a batch without end; exact: each token's own ratio, no cap;
           answer: the product of a rollout's ratios, no cap; aligned: the copy's own gradient at its own weights
no flips   the same with a copy whose tokens are its own, and whose order is the learner's
alone      of a scored order (confidence, plackett_luce): ratios and gradient of the tokens alone
noise      mean squared distance of one rollout's gradient from its mean, exact along each of `DIRECTIONS` random
           directions a puzzle, of which it takes the mean

Each of the ten models (seeds 0 to 9) has learned solved grids, in parts of 40 steps, until it solves half of 200
validation puzzles with eleven clues, one cell a step at temperature 1. Known before the runs: that 100 steps solve 0.11
and 200 steps 0.98 (seed 100), gradients.md's toys, and, of a network without training, that all numbers are computed.

The claims, on the ten models (two-sided sign-flip tests, Holm's correction over both, intervals of Student's t):

1. Under INT4 and max_prob most of the bias that exact token weights leave comes from order flips: the share
   1 - |bias without flips| / |bias| is above a half. Counted as exact weights are both `exact` and `answer`; for
   `answer` the share is 1 by construction, so that the claim is tested on `exact`.
2. plackett_luce at 0.1, its order's part scored, removes most of it: the bias of `exact` under INT4 is less than half
   of max_prob's. And it costs less than 0.02 of reward: the interval of the learner's expected reward under max_prob
   less that under plackett_luce lies below 0.02.

    python -m recipes.studies.quantized.order_flips            run what is missing, order_flips.json, the tables
    python -m recipes.studies.quantized.order_flips --report   run nothing
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import exp
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl import Float8WeightOnly, Int4WeightOnly, Policy, Unmask
from dllm_rl.algorithms.correctors import ais_lambda
from dllm_rl.decoding.order import MIN_LOGPROB
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import read_json, write_json
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.rng import generator_for
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.tasks.sudoku.solver import is_completion
from recipes.studies.paired import half_width, holm, interval, markdown, sign_flip
from recipes.sudoku_tiny import NO_DIGITS, any_grids, few_clues, learn

STORED = Path(__file__).with_suffix(".json")  # by model: rewards, and by order, copy and weights: bias and noise
SEEDS, PUZZLES, DIRECTIONS, PART = range(10), 3, 4, 40
BLANKS, CAP = 5, 2.0
ORDERS = ("max_prob", "confidence", "plackett_luce 0.05", "plackett_luce 0.1", "plackett_luce 0.3", "random")
COPIES = ("INT4", "FP8", "kernel")
WEIGHTS = ("none", "tis", "ais", "exact", "answer", "aligned")
Model = Mapping[str, Any]  # what `run_model` leaves of one
Events = Float[Tensor, "S J V"]  # a number for each state, blank and digit


@dataclass(frozen=True)
class Canvases:
    """All ways to have filled some of a puzzle's blanks; a state's number has a digit to base V + 1 for each blank."""

    tokens: Int[Tensor, "S T"]
    choices: Int[Tensor, " V"]  # the tokens that may fill a blank
    cells: Int[Tensor, " J"]  # where the blanks are
    masked: Bool[Tensor, "S J"]
    following: Int[Tensor, "S J V"]  # the state after an event; itself where the blank is filled
    reward: Float[Tensor, " S"]  # of a full canvas; 0 elsewhere

    @property
    def layers(self) -> list[Int[Tensor, " N"]]:
        """The states by the number of filled blanks."""
        filled = (~self.masked).sum(-1)
        return [(filled == number).nonzero()[:, 0] for number in range(self.masked.shape[1] + 1)]


def canvases(
    puzzle: str, policy: Policy, choices: str = "1234", is_right: Callable[[str, str], bool] = is_completion
) -> Canvases:
    """Of a puzzle, a character a token, 0 for a blank, filled with one of `choices`; `is_right`(puzzle, answer)."""
    ids = torch.tensor(policy.tokenizer.convert_tokens_to_ids(list(choices)))
    template = [0 if character == "0" else policy.tokenizer.convert_tokens_to_ids(character) for character in puzzle]
    cells = torch.tensor([cell for cell, character in enumerate(puzzle) if character == "0"])
    blanks, number = len(cells), len(choices) + 1
    filled = torch.tensor(list(product(range(number), repeat=blanks)))  # the last blank counts ones
    tokens = torch.tensor(template).repeat(len(filled), 1)
    tokens[:, cells] = torch.cat([torch.tensor([policy.spec.mask_id]), ids])[filled]
    step = number ** torch.arange(blanks - 1, -1, -1)[:, None] * torch.arange(1, number)
    here = torch.arange(len(filled))[:, None, None]
    following = torch.where((filled == 0)[..., None], here + step, here)
    reward = torch.zeros(len(filled), dtype=torch.float64)
    for state in (filled > 0).all(-1).nonzero()[:, 0].tolist():
        written = iter(choices[index - 1] for index in filled[state].tolist())
        answer = "".join(next(written) if character == "0" else character for character in puzzle)
        reward[state] = float(is_right(puzzle, answer))
    return Canvases(tokens, ids, cells, filled == 0, following, reward)


def token_logits(policy: Policy, at: Canvases) -> Float[Tensor, "S J V"]:
    """The logits of the blanks, untempered, suppressed ids at -inf; without a row for full canvases."""
    unfinished = at.tokens[at.masked.any(-1)]
    logits = policy.logits(unfinished, torch.ones_like(unfinished, dtype=torch.bool))[:, at.cells].double()
    allowed = torch.cat([torch.tensor([policy.spec.mask_id]), at.choices])
    return torch.full_like(logits, -torch.inf).index_copy(-1, allowed, logits[..., allowed])


@dataclass(frozen=True)
class Law:
    """The log-probs of a policy's events in every unfinished state: of the token, and of the order given the token."""

    tokens: Events
    order: Events

    def chances(self, at: Canvases) -> Events:
        """Their probabilities in all states; 0 where nothing can happen."""
        every = torch.zeros(at.following.shape, dtype=torch.float64)
        unfinished = at.masked.any(-1)
        log_probs = (self.tokens + self.order).detach()
        every[unfinished] = torch.where(at.masked[unfinished][..., None], log_probs.exp(), 0.0)
        return every


def law(policy: Policy, at: Canvases, rank: str) -> Law:
    """The policy's law under a rank of `ORDERS`, one position a step, differentiable."""
    return law_of(token_logits(policy, at), at, rank, policy)


def law_of(logits: Tensor, at: Canvases, rank: str, policy: Policy) -> Law:
    """The law from the logits of `token_logits`."""
    masked = at.masked[at.masked.any(-1)]
    drawn = logits.index_fill(-1, torch.tensor([policy.spec.mask_id]), -torch.inf).log_softmax(-1)[..., at.choices]
    scores = MaxProb()(logits.flatten(0, 1), logits.logsumexp(-1).flatten()).view(masked.shape)
    scores = scores.masked_fill(~masked, -torch.inf)
    name, _, temperature = rank.partition(" ")
    if name == "max_prob":
        first = scores.detach() == scores.detach().amax(-1, keepdim=True)
        first &= first.cumsum(-1) == 1  # ties go to the leftmost
        order = torch.where(first, 0.0, -torch.inf).double()
    elif name == "random":
        order = torch.where(masked, -masked.sum(-1, keepdim=True).double().log(), -torch.inf)
    elif name == "left_to_right":
        leftmost = masked & (masked.cumsum(-1) == 1)
        order = torch.where(leftmost, 0.0, -torch.inf).double()
    elif name == "plackett_luce":
        order = (scores / float(temperature)).log_softmax(-1)
    else:
        level = (logits - logits.logsumexp(-1, keepdim=True))[
            ..., at.choices
        ].detach()  # the mask's logit counts, as in ranks
        return Law(drawn, log_stay(drawn, level, masked))
    return Law(drawn, order[..., None].expand_as(drawn))


def log_stay(drawn: Events, level: Events, masked: Bool[Tensor, "N J"]) -> Events:
    """Of `Confidence`, whose scores are `level`: the log-prob that every other masked blank draws a token of a lower
    level than this event's, with the floor of `decoding.order`."""
    found = torch.zeros_like(drawn)
    for j, k in product(range(drawn.shape[1]), repeat=2):
        if j != k:
            cutoff, other = level[:, j, :, None], level[:, k, None, :]
            below = (other < cutoff) | ((other == cutoff) & (k > j))
            stays = torch.where(below, drawn[:, k, None, :].exp(), 0.0).sum(-1)
            found[:, j] += torch.where(masked[:, k, None], stays.clamp(min=exp(MIN_LOGPROB)).log(), 0.0)
    return found


def values(chances: Events, at: Canvases, baseline: float) -> Float[Tensor, " S"]:
    """The expected reward, less the baseline, from each state on; `chances` need not sum to 1."""
    found = torch.where(at.masked.any(-1), 0.0, at.reward - baseline)
    for layer in reversed(at.layers[:-1]):
        found[layer] = (chances[layer] * found[at.following[layer]]).sum((-2, -1))
    return found


def visits(chances: Events, at: Canvases) -> Float[Tensor, " S"]:
    """The probability that a rollout comes through each state."""
    found = torch.zeros(len(at.reward), dtype=torch.float64)
    found[0] = 1.0
    for layer in at.layers[:-1]:
        through = found[layer][:, None, None] * chances[layer]
        found.index_add_(0, at.following[layer].flatten(), through.flatten())
    return found


def coefficients(chances: Events, weights: Events, at: Canvases, baseline: float) -> Events:
    """What each event's gradient counts in the mean of g over rollouts of these chances."""
    value, visit = values(chances, at, baseline), visits(chances, at)
    return visit[:, None, None] * chances * weights * value[at.following]


def moments(chances: Events, each: Events, at: Canvases, baseline: float) -> tuple[float, float]:
    """The mean and the mean square, over rollouts, of A times the sum of `each` over a rollout's events."""
    mass, first, second = (torch.zeros(len(at.reward), dtype=torch.float64) for _ in range(3))
    mass[0] = 1.0
    for layer in at.layers[:-1]:
        p, x, to = chances[layer], each[layer], at.following[layer].flatten()
        m, a, b = (of[layer][:, None, None] for of in (mass, first, second))
        mass.index_add_(0, to, (p * m).flatten())
        first.index_add_(0, to, (p * (a + m * x)).flatten())
        second.index_add_(0, to, (p * (b + 2 * a * x + m * x * x)).flatten())
    full = at.layers[-1]
    advantage = at.reward[full] - baseline
    return float(advantage @ first[full]), float(advantage**2 @ second[full])


@dataclass(frozen=True)
class Sampled:
    """Rollouts of a copy's law, and the learner's, over one puzzle.

    scored  the order's part belongs to ratios and gradients
    flips   False: the copy's tokens in the learner's order
    """

    at: Canvases
    ours: Law
    theirs: Law
    scored: bool
    flips: bool = True

    def detached(self) -> "Sampled":
        """The same without the learner's graph."""
        return replace(self, ours=Law(self.ours.tokens.detach(), self.ours.order.detach()))

    @property
    def chances(self) -> Events:
        return (self.theirs if self.flips else Law(self.theirs.tokens, self.ours.order)).chances(self.at)

    @property
    def baseline(self) -> float:
        """The expected reward of the rollouts."""
        return float(values(self.chances, self.at, 0.0)[0])

    @property
    def log_ratio(self) -> Events:
        """log p - log q of the events, of the order too where it is scored."""
        found = torch.zeros(self.at.following.shape, dtype=torch.float64)
        apart = self.ours.tokens - self.theirs.tokens
        if self.scored:
            apart = apart + self.ours.order - self.theirs.order
        happens = self.chances[self.at.masked.any(-1)] > 0
        found[self.at.masked.any(-1)] = torch.where(happens, apart.detach(), 0.0)
        return found

    def mean(self, each: Events) -> float:
        """The mean over the events of the rollouts."""
        total = float((visits(self.chances, self.at)[:, None, None] * self.chances * each).sum())
        return total / self.at.masked.shape[1]


def lam_of(sampled: list[Sampled]) -> float:
    """AIS's lambda of a batch without end over all puzzles: its three numbers are means over rollouts and tokens."""

    def over(of: Callable[[Sampled], float]) -> float:
        return mean(map(of, sampled))

    def of_answers(each: Sampled, power: int) -> float:
        certain = replace(each.at, reward=(~each.at.masked.any(-1)).double())
        return float(values(each.chances * (power * each.log_ratio).exp(), certain, 0.0)[0])

    ess = over(partial(of_answers, power=1)) ** 2 / over(partial(of_answers, power=2))
    divergence = over(lambda each: each.mean(each.log_ratio.abs()))
    first, second = (over(lambda each, n=n: each.mean((n * each.log_ratio).exp())) for n in (1, 2))
    return min(1.0, max(0.0, ais_lambda(ess, divergence, max(0.0, second - first**2) ** 0.5 / first, tau=0.05)))


def weighted(sampled: Sampled, weights: str) -> tuple[Events, Events]:
    """The chances of rollouts and the weights of their events, under one of `WEIGHTS` (AIS mixes `none` and `tis`), or
    "cis", whose cap falls with the rollout's probability p of the token."""
    ratio = sampled.log_ratio.exp()
    if weights == "answer":
        return sampled.chances * ratio, torch.ones_like(ratio)
    p = expanded(sampled.theirs.tokens.exp(), sampled.at)
    found = {"tis": ratio.clamp(max=CAP), "exact": ratio, "cis": ratio.minimum(1 + 2.3 * (1 - p).clamp(min=0.005))}
    return sampled.chances, found.get(weights, torch.ones_like(ratio))


def expanded(events: Tensor, at: Canvases) -> Events:
    """The numbers of unfinished states among those of all states; 0 where nothing can happen."""
    found = torch.zeros(at.following.shape, dtype=torch.float64)
    unfinished = at.masked.any(-1)
    found[unfinished] = torch.where(at.masked[unfinished][..., None], events, 0.0)
    return found


def gradient(of: Law, counts: Events, at: Canvases, scored: bool, policy: Policy) -> Float[Tensor, " W"]:
    """The gradient of the sum of counts times the events' log-probs, with respect to all weights."""
    log_probs = of.tokens + of.order if scored else of.tokens
    counts = counts[at.masked.any(-1)]
    surrogate = (counts * torch.where(counts != 0, log_probs, 0.0)).sum()
    found = torch.autograd.grad(surrogate, list(policy.module.parameters()), retain_graph=True, allow_unused=True)
    zeros = (torch.zeros_like(weight) for weight in policy.module.parameters())
    return torch.cat([(zero if g is None else g).flatten().double() for g, zero in zip(found, zeros, strict=True)])


@dataclass(frozen=True)
class Setting:
    """One estimator of the gradient."""

    order: str
    copy: str
    weights: str
    part: str = ""  # "alone", "no flips", or neither

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.order, self.copy, self.weights, self.part)))


def scored(order: str) -> bool:
    return order.startswith(("confidence", "plackett_luce"))


def settings() -> Iterator[Setting]:
    """Every estimator whose bias is computed."""
    for order in ORDERS:
        for each in WEIGHTS:
            yield Setting(order, "INT4", each)
        if scored(order):
            yield Setting(order, "INT4", "exact", "alone")
    for each in WEIGHTS:
        yield Setting("max_prob", "FP8", each)
    yield from (Setting(order, "FP8", "exact") for order in ("confidence", "plackett_luce 0.1", "random"))
    yield Setting("max_prob", "kernel", "exact")
    yield from (Setting("max_prob", name, "exact", "no flips") for name in COPIES)
    yield Setting("max_prob", "INT4", "none", "no flips")


NOISY = ("none", "exact", "answer")  # the weights whose noise is computed, under INT4 and every order


@dataclass(frozen=True)
class Puzzle:
    """One puzzle under the learner and its copies."""

    at: Canvases
    policy: Policy
    copies: dict[str, Policy]
    ours: Tensor  # logits with a graph
    theirs: dict[str, Tensor]

    def own(self, order: str) -> Law:
        return law_of(self.ours, self.at, order, self.policy)

    def sampled(self, setting: Setting) -> Sampled:
        theirs = law_of(self.theirs[setting.copy], self.at, setting.order, self.policy)
        counts = scored(setting.order) and setting.part != "alone"
        return Sampled(self.at, self.own(setting.order), theirs, counts, setting.part != "no flips")

    def mean_gradient(self, setting: Setting) -> Float[Tensor, " W"]:
        """The mean of g, of all weights but AIS's."""
        rollouts = self.sampled(setting)
        counts = coefficients(*weighted(rollouts, setting.weights), self.at, rollouts.baseline)
        if setting.weights != "aligned":
            return gradient(rollouts.ours, counts, self.at, rollouts.scored, self.policy)
        with aligned_forward(self.policy, self.copies[setting.copy]):
            return gradient(law(self.policy, self.at, setting.order), counts, self.at, rollouts.scored, self.policy)

    def truth(self, order: str) -> Float[Tensor, " W"]:
        """The gradient of the learner's own expected reward."""
        own = self.own(order)
        chances = own.chances(self.at)
        baseline = float(values(chances, self.at, 0.0)[0])
        counts = coefficients(chances, torch.ones_like(chances), self.at, baseline)
        return gradient(own, counts, self.at, scored(order), self.policy)

    def variances(self, number: int) -> dict[str, float]:
        """By setting the squared distance of one rollout's g from its mean, along a random direction of all weights."""
        slopes = self.slopes(number)
        found = {}
        for order, each in product(ORDERS, NOISY):
            rollouts = self.sampled(Setting(order, "INT4", each))
            chances, weights = weighted(rollouts, each)
            first, second = moments(chances, weights * slopes[order], self.at, rollouts.baseline)
            if each == "answer":
                squared = rollouts.chances * (2 * rollouts.log_ratio).exp()
                _, second = moments(squared, slopes[order], self.at, rollouts.baseline)
            found[str(Setting(order, "INT4", each))] = second - first**2
        return found

    def slopes(self, number: int) -> dict[str, Events]:
        """By order the derivatives of the events' log-probs along a random direction, by central differences."""
        step, moved = 1e-5, copy(self.policy)
        moved.module = deepcopy(self.policy.module).double()
        weights = list(moved.module.parameters())
        generator = generator_for(0, "direction", number)
        direction = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) for weight in weights]
        ends = []
        with torch.no_grad():
            for sign in (1, -2):
                for weight, way in zip(weights, direction, strict=True):
                    weight.add_(way, alpha=sign * step)
                ends.append(token_logits(moved, self.at))
        found = {}
        for order in ORDERS:
            laws = [law_of(logits, self.at, order, self.policy) for logits in ends]
            high, low = (each.tokens + each.order if scored(order) else each.tokens for each in laws)
            found[order] = expanded((high - low) / (2 * step), self.at)
        return found


def measured(
    policy: Policy,
    copies: dict[str, Policy],
    every: Sequence[Canvases],
    chosen: Sequence[Setting] | None = None,
    directions: int = DIRECTIONS,
) -> dict[str, Any]:
    """Of one model: expected rewards by order, shares of flipped positions, and the bias of each chosen setting (None:
    of all) and, with `directions`, its noise."""
    chosen = list(settings() if chosen is None else chosen)
    orders, share = list(dict.fromkeys(setting.order for setting in chosen)), 1 / len(every)
    zero = torch.zeros(sum(weight.numel() for weight in policy.module.parameters()), dtype=torch.float64)
    truths = {order: zero.clone() for order in orders}
    means = {setting: zero.clone() for setting in chosen}
    rollouts: dict[Setting, list[Sampled]] = {setting: [] for setting in chosen if setting.weights == "ais"}
    reward, flips, noise = dict.fromkeys(orders, 0.0), dict.fromkeys(copies, 0.0), dict[str, float]()
    for number, at in enumerate(every):
        with torch.no_grad():
            theirs = {name: token_logits(copied, at) for name, copied in copies.items()}
        puzzle = Puzzle(at, policy, copies, token_logits(policy, at), theirs)
        for order in orders:
            truths[order] += share * puzzle.truth(order)
            reward[order] += share * float(values(puzzle.own(order).chances(at), at, 0.0)[0])
        for name in copies:
            flips[name] += share * flipped(puzzle.sampled(Setting("max_prob", name, "none")))
        for setting in chosen:
            if setting in rollouts:  # a mixture of two others
                rollouts[setting].append(puzzle.sampled(setting).detached())
            else:
                means[setting] += share * puzzle.mean_gradient(setting)
        for direction in range(directions):
            for name, value in puzzle.variances(direction * len(every) + number).items():
                noise[name] = noise.get(name, 0.0) + value * share / directions
    for setting, sampled in rollouts.items():
        none, tis = (means[replace(setting, weights=weights)] for weights in ("none", "tis"))
        means[setting] = none + lam_of(sampled) * (tis - none)
    found = {}
    for setting in chosen:
        mean_gradient, truth = means[setting], truths[setting.order]
        found[str(setting)] = {
            "bias": float((mean_gradient - truth).norm() / truth.norm()),
            "cosine": float(torch.cosine_similarity(mean_gradient, truth, dim=0)),
        }
        if str(setting) in noise:
            found[str(setting)]["noise"] = noise[str(setting)] / float(truth.norm()) ** 2
    lengths = {order: float(truth.norm()) for order, truth in truths.items()}
    return {"reward": reward, "length": lengths, "flips": flips, "settings": found}


def flipped(rollouts: Sampled) -> float:
    """The share of a copy's events for which the learner has another position."""
    return rollouts.mean(expanded((rollouts.ours.order == -torch.inf).double(), rollouts.at))


def trained(seed: int) -> tuple[Policy, int]:
    """A model that solves half of 200 validation puzzles, and the supervised steps that this took."""
    policy = tiny_masked_lm(characters="1234", seed=seed, hidden_size=64, num_layers=2, intermediate_size=192)
    task = few_clues(split="validation", clues=(11, 11), unique=True, size=200)
    sampler = Unmask(max_new_tokens=0, diffusion_steps=BLANKS, rank=MaxProb(), suppress=NO_DIGITS, temperature=1.0)
    for part in range(1, 26):
        policy.module.train()
        learn(policy, PART, 1000 * seed + part, any_grids)
        policy.module.eval()
        if evaluate(policy, task, sampler, batch_size=200).means["solve_rate"] >= 0.5:
            return policy, PART * part
    raise ValueError(f"seed {seed} does not solve half of the puzzles after {25 * PART} steps")


def copies_of(policy: Policy) -> dict[str, Policy]:
    """What samples in the learner's place."""
    other_kernel = copy(policy)
    other_kernel.module = deepcopy(policy.module)
    other_kernel.module.set_attn_implementation("eager")
    schemes = {"INT4": Int4WeightOnly(), "FP8": Float8WeightOnly(dequantized=True)}
    return {name: quantized_copy(policy, scheme) for name, scheme in schemes.items()} | {"kernel": other_kernel}


def run_model(seed: int) -> dict[str, Any]:
    """Train the model of a seed, and measure it on puzzles of its own."""
    policy, steps = trained(seed)
    task = few_clues(split="test", clues=(11, 11), unique=True, size=PUZZLES * len(SEEDS))
    every = [canvases(task[PUZZLES * seed + i].fields["puzzle"], policy) for i in range(PUZZLES)]
    return {"seed": seed, "steps": steps, **measured(policy, copies_of(policy), every)}


def bias(model: Model, *setting: str) -> float:
    return model["settings"][str(Setting(*setting))]["bias"]


def over(models: Sequence[Model], of: Callable[[Model], float]) -> str:
    """The mean over models with its interval."""
    return interval([of(model) for model in models])


ORDER_NAMES = {  # in tables
    "max_prob": "`MaxProb`",
    "confidence": "`Confidence`",
    "plackett_luce 0.05": "`PlackettLuce`, 0.05",
    "plackett_luce 0.1": "`PlackettLuce`, 0.1",
    "plackett_luce 0.3": "`PlackettLuce`, 0.3",
    "random": "random",
}
COPY_NAMES = {"INT4": "INT4", "FP8": "FP8", "kernel": "another attention kernel"}
WEIGHT_NAMES = {
    "none": "no correction",
    "tis": "TIS",
    "exact": "TIS without the cut",
    "answer": "completion weights",
    "ais": "AIS (our lambda)",
    "aligned": "aligned forward",
}


def order_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By order under INT4: the learner's expected reward, and the error that each of the weights leaves."""
    return [
        {
            "order": ORDER_NAMES[order],
            "solved by the learner": over(models, lambda model, order=order: model["reward"][order]),
        }
        | {
            name: over(models, lambda model, order=order, weights=weights: bias(model, order, "INT4", weights))
            for weights, name in WEIGHT_NAMES.items()
        }
        for order in ORDERS
    ]


def noise_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By order under INT4: the median noise of one rollout's gradient, to two digits."""

    def noise(order: str, weights: str) -> str:
        found = [model["settings"][str(Setting(order, "INT4", weights))]["noise"] for model in models]
        return f"{float(f'{median(found):.2g}'):,.0f}"

    return [
        {"order": ORDER_NAMES[order]} | {WEIGHT_NAMES[weights]: noise(order, weights) for weights in NOISY}
        for order in ORDERS
    ]


def copy_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By copy under max_prob: the share of flips, and the error of exact weights with flips and without."""
    rows = []
    for name in COPIES:
        exact = ("max_prob", name, "exact")
        rows.append(
            {
                "copy": COPY_NAMES[name],
                "flips": over(models, lambda model, name=name: model["flips"][name]),
                "TIS without the cut": over(models, lambda model, exact=exact: bias(model, *exact)),
                "TIS without the cut, no flips": over(
                    models, lambda model, exact=exact: bias(model, *exact, "no flips")
                ),
            }
        )
    return rows


def alone_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By scored order under INT4: the error of exact weights with the order's part, and of the tokens alone."""
    return [
        {
            "order": ORDER_NAMES[order],
            "tokens and order scored": over(models, lambda model, order=order: bias(model, order, "INT4", "exact")),
            "only tokens scored": over(models, lambda model, order=order: bias(model, order, "INT4", "exact", "alone")),
        }
        for order in filter(scored, ORDERS)
    ]


def claim_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """The claims of this module, with exact tests where there is one."""
    exact = ("max_prob", "INT4", "exact")
    shares = [1 - bias(model, *exact, "no flips") / bias(model, *exact) for model in models]
    left = [bias(model, "plackett_luce 0.1", "INT4", "exact") / bias(model, *exact) for model in models]
    lost = [model["reward"]["max_prob"] - model["reward"]["plackett_luce 0.1"] for model in models]
    tests = holm([sign_flip([each - 0.5 for each in values]) for values in (shares, left)])
    rows = []
    for claim, values, p, holds in (
        ("the share of the error that flips make is above 0.5", shares, tests[0], mean(shares) > 0.5),
        ("the error under `PlackettLuce`, 0.1, divided by that under `MaxProb`, is below 0.5",
         left, tests[1], mean(left) < 0.5),
        ("the share of solved puzzles that `PlackettLuce`, 0.1, loses is below 0.02",
         lost, None, mean(lost) + half_width(lost) < 0.02),
    ):  # fmt: skip
        is_sure = p is None or p < 0.05
        opposite = "the opposite is shown" if p is not None and is_sure else "not shown"
        rows.append({"claim": claim, "found": interval(values), "p": "-" if p is None else f"{p:.3f}"})
        rows[-1]["verdict"] = "shown" if holds and is_sure else opposite
    return rows


def picture(models: Sequence[Model], path: Path) -> None:
    """The bias of each kind of weights under INT4, by order, a dot a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = ("none", "tis", "exact", "answer", "aligned")
    figure, axis = plt.subplots(figsize=(9.0, 4.0), layout="constrained")
    for place, weights in enumerate(shown):
        for column, order in enumerate(ORDERS):
            found = [max(bias(model, order, "INT4", weights), 1e-3) for model in models]
            x = column + 0.15 * (place - (len(shown) - 1) / 2)
            style = {"color": f"C{place}", "label": WEIGHT_NAMES[weights] if column == 0 else None}
            axis.plot([x] * len(found), found, ".", alpha=0.6, **style)
            axis.plot([x - 0.06, x + 0.06], [mean(found)] * 2, color=f"C{place}", linewidth=2)
    axis.set(yscale="log", ylabel="error of the gradient (below 0.001: 0.001)", xticks=range(len(ORDERS)))
    axis.set_xticklabels([name.replace("`", "").replace(", ", "\n") for name in ORDER_NAMES.values()], fontsize="small")
    axis.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page_tables() -> dict[str, str]:
    models = read_json(STORED)
    rows = {
        "orders": order_rows,
        "claims": claim_rows,
        "copies": copy_rows,
        "tokens alone": alone_rows,
        "noise": noise_rows,
    }
    return {name: markdown(of(models)) for name, of in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of order_flips.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = read_json(STORED) if STORED.exists() else []
    for seed in SEEDS:
        if not options.report and seed not in {model["seed"] for model in models}:
            models.append(run_model(seed))
            write_json(STORED, models)
    print("\n".join(page_tables().values()))
    if not options.report:
        picture(models, STORED.with_suffix(".png"))


if __name__ == "__main__":
    main()
