"""Whose ratio is exact: published samplers and likelihoods against the enumeration of all rollouts of a tiny network.

A network over four positions and three words (`enumeration.ToyPolicy`; three positions for DiffusionGemma's sampler)
has 256 canvases. Of each, all draws at all masked positions are followed through the sampler's own rank and commit rule
(`transitions`), which gives the probability of every step, of every trajectory and of every completion, and by autograd
the gradient of the expected reward. No formula of a likelihood is used. A row is a sampler and how it is scored.

of          what the row's estimate is compared with: "steps" are the probabilities of the steps that it scores, in
            which the positions that they write count too; "completion" is that of the tokens, whatever their order
ratio       the estimated log-ratio between a network and the same after one update, less the enumerated one, in nats:
            the largest over all rollouts and the root mean square over rollouts by their probability. The update is the
            same for all rows: along the gradient of left-to-right sampling, so large that its log-ratio is UPDATE rms
log-prob    the same for the estimated log-prob before the update, root mean square
never       share of the rollouts that the network after the update cannot write (their true ratio is 0)
bias        distance of the mean gradient of A times the estimate from the true gradient of the sampler's expected
            reward, in lengths of the true one; cosine of both
reused      the same after the update, with rollouts from before it: A exp(estimated log-ratio), not clipped
rmse        root mean square error of the gradient of a batch that BUDGET forwards pay for: a forward per step of the
            sampler and per view that scores a token
INT4, TIS   bias with rollouts of the network whose weights are rounded to 15 levels, without a weight, and with TIS
            (cap 2) from the estimate

Masks are drawn DRAWS times for each rollout, and their noise is taken out of the biases; those of Coupled and ESPO are
enumerated. Scored tokens are summed: how a method's loss divides by lengths is left out. Numbers are medians over four
random networks whose distributions are sharp, and, where it says so, over four soft ones, with random rewards.

    python -m recipes.studies.exactness
        run all rows, exactness.json, the figure, the tables
    python -m recipes.studies.exactness my_module.MyEstimator  that estimator's row beside the stored ones
    python -m recipes.studies.exactness --rank my_module.MyRank --commit my_module.MyRule
        the row of `Trajectory()`, or of an estimator that is also named, on the rollouts of these rules
    python -m recipes.studies.exactness --report               run nothing
"""

import argparse
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, product
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl import ELBO, TIS, Confidence, Coupled, MaxProb, OneStep, Threshold, Trajectory, Unmask
from dllm_rl.algorithms.correctors import TokenStats
from dllm_rl.files import read_json, write_json
from dllm_rl.likelihoods.estimators import FunctionLikelihood, LikelihoodEstimator
from dllm_rl.likelihoods.views import each_view
from dllm_rl.samplers.renoise import accept
from dllm_rl.samplers.rules import order_probability, steps_per_block
from dllm_rl.testing.enumeration import ToyPolicy
from dllm_rl.types.rollouts import Order, Rollout, SamplingParams
from dllm_rl.types.scoring import Views
from recipes.examples import bounds
from recipes.examples.fork_grpo import Fork, ForkSteps
from recipes.examples.informed_masking import informed_masks
from recipes.examples.just_grpo_fast import LeastCertain
from recipes.examples.sglang_confidence import DrawnAndLikeliest
from recipes.studies.paired import markdown

STORED = Path(__file__).with_suffix(".json")  # by row: the numbers of each network
LENGTH, WORDS = 4, 3
SOFT, SHARP = 1.0, 3.0
NETWORKS = tuple((sharpness, seed) for seed in range(4) for sharpness in (SHARP, SOFT))
DRAWS, BUDGET, UPDATE = 16, 2048, 0.3
MASK_LOGIT = -1e4  # no draw and no confidence counts the mask token
ENUMERATED = {"logits", "normalizer", "tokens", "positions", "steps"}  # what a rank or a commit rule may read
Law = Callable[[Float[Tensor, "S T V"]], list[Float[Tensor, "S S"]]]  # of the logits: each step's probabilities


class Table(ToyPolicy):
    """A network as its logits on all canvases. What is looked up with `records` set can be differentiated by row."""

    def __init__(self, toy: ToyPolicy) -> None:
        self.__dict__ = dict(vars(toy))
        self.weights = [weight.detach().clone().requires_grad_() for weight in toy.weights]
        self.canvases = torch.tensor(list(product(range(self.words + 1), repeat=self.length)))
        everywhere = torch.ones_like(self.canvases, dtype=torch.bool)
        network = replace_weights(toy, self.weights)
        self.differentiable = network.hidden(self.canvases, everywhere)[..., : self.words]
        mask = torch.full_like(self.differentiable[..., :1], MASK_LOGIT)
        self.table = torch.cat([self.differentiable, mask], -1).detach()
        self.records: list[tuple[Tensor, Tensor]] | None = None

    def index(self, tokens: Int[Tensor, "R T"]) -> Int[Tensor, " R"]:
        return (tokens * (self.words + 1) ** torch.arange(self.length - 1, -1, -1)).sum(-1)

    def hidden(self, tokens: Int[Tensor, "R T"], attention_mask: Tensor) -> Float[Tensor, "R T V"]:
        at = self.index(tokens)
        found = self.table[at]
        if self.records is not None:
            self.records.append((at, found.requires_grad_()))
        return found

    logits = hidden

    def gradient(self, of_table: Float[Tensor, "S T W"]) -> Float[Tensor, " P"]:
        """The gradient with respect to the weights, of a gradient with respect to the words' logits."""
        found = torch.autograd.grad(self.differentiable, self.weights, of_table, retain_graph=True)
        return torch.cat([part.flatten() for part in found])

    @property
    def jacobian(self) -> Float[Tensor, "S*T*W P"]:
        eye = torch.eye(self.differentiable.numel(), dtype=torch.float64).view(-1, *self.differentiable.shape)
        each = partial(torch.autograd.grad, self.differentiable, self.weights, retain_graph=True, is_grads_batched=True)
        parts = [torch.cat([part.flatten(1) for part in each(some)], 1) for some in eye.split(256)]
        return torch.cat(parts)


def replace_weights(toy: ToyPolicy, weights: list[Tensor]) -> ToyPolicy:
    other = object.__new__(ToyPolicy)
    other.__dict__ = {**vars(toy), "weights": weights}
    return other


def rounded(weight: Float[Tensor, "I O"]) -> Float[Tensor, "I O"]:
    """The nearest of 15 levels, with a scale for each output."""
    scale = weight.abs().amax(0) / 7
    return (weight / scale).round() * scale


def transitions(sampler: Unmask, table: Table) -> Law:
    """Each step's probability of going from one canvas to another, from all draws at the masked positions of its block.

    A full canvas stays as it is.
    """
    length, words = table.length, table.words
    if unknown := (sampler.rank.reads | sampler.commit.reads) - ENUMERATED:
        raise ValueError(
            f"rank={sampler.rank.name} and commit={sampler.commit.name} read {', '.join(sorted(unknown))}, and only "
            f"{', '.join(sorted(ENUMERATED))} are enumerated"
        )
    size = length if sampler.commit.adaptive else sampler.block_size or length
    blocks = [range(begin, min(begin + size, length)) for begin in range(0, length, size)]
    counts = [length] if sampler.commit.adaptive else steps_per_block(sampler.diffusion_steps, [*map(len, blocks)])
    steps = []
    for block, count in zip(blocks, counts, strict=True):
        rows = [row for canvas in table.canvases for row in draws(canvas, block, words)]
        before, drawn = (torch.stack([row[i] for row in rows]) for i in range(2))
        masked = (before == words) & torch.isin(torch.arange(length), torch.tensor([*block]))
        steps += [(before, drawn, masked, left, count) for left in range(count, 0, -1)]

    def law(logits: Float[Tensor, "S T V"]) -> list[Float[Tensor, "S S"]]:
        return [step(logits, *inputs) for inputs in steps]

    def step(
        logits: Tensor, before: Tensor, drawn: Tensor, masked: Tensor, left: int, count: int
    ) -> Float[Tensor, "S S"]:
        at = table.index(before)
        chances = logits[at, :, :words].log_softmax(-1).gather(-1, drawn.clamp(max=words - 1)[..., None])[..., 0]
        with torch.no_grad():
            seen = logits[at][masked]
            given = {"logits": seen, "normalizer": seen.logsumexp(-1), "tokens": drawn[masked]}
            given["positions"] = masked.nonzero()[:, 1]
            scores = torch.full(masked.shape, -torch.inf, dtype=torch.float64)
            scores[masked] = sampler.rank(**{name: given[name] for name in sampler.rank.reads}).double()
            share = {"steps": torch.full_like(at, count)} if "steps" in sampler.commit.reads else {}
            chosen = sampler.commit(scores, masked, torch.full_like(at, left), **share) & masked
        to = table.index(torch.where(chosen, drawn, before))
        probabilities = torch.where(masked, chances, 0).sum(-1).exp()
        return torch.zeros(len(logits), len(logits), dtype=torch.float64).index_put((at, to), probabilities, True)

    return law


def draws(canvas: Int[Tensor, " T"], block: Sequence[int], words: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The canvas, and the canvas with each possible draw at the masked positions of the block."""
    masked = [i for i in block if canvas[i] == words]
    for tokens in product(range(words), repeat=len(masked)):
        drawn = canvas.clone()
        drawn[masked] = torch.tensor(tokens, dtype=torch.long)
        yield canvas, drawn


@dataclass(frozen=True)
class Renoised:
    """DiffusionGemma's sampler without self-conditioning: `Renoise` with these numbers, whose answer is the argmax."""

    steps: int = 3
    t_max: float = 0.8
    t_min: float = 0.4
    entropy_bound: float = 0.1

    def temperature(self, step: int) -> float:
        return self.t_min + (self.t_max - self.t_min) * (self.steps - step) / self.steps

    def accepted(self, logits: Float[Tensor, "S T W"], step: int) -> Bool[Tensor, "S T"]:
        logps = (logits.detach() / self.temperature(step)).log_softmax(-1)
        return accept(-(logps.exp() * logps).sum(-1), self.entropy_bound)

    def noise(self, accepted: Bool[Tensor, "S T"], words: int) -> Float[Tensor, " S"]:
        """Nats by which a step is likelier without the probabilities of its random tokens, which no weight changes."""
        return (~accepted).sum(-1) * torch.tensor(float(words), dtype=torch.float64).log()

    def law(self, table: Table) -> Law:
        full = (table.canvases < table.words).all(-1).nonzero()[:, 0]
        tokens = table.canvases[full]  # (F, T)

        def law(logits: Float[Tensor, "S T V"]) -> list[Float[Tensor, "S S"]]:
            seen = logits[full][..., : table.words]
            found = []
            for step in range(self.steps):
                last = step + 1 == self.steps
                taken = self.accepted(seen, step)
                logps = (seen / self.temperature(step)).log_softmax(-1)
                each = logps.gather(-1, tokens.T.expand(len(full), -1, -1))  # (F, T, F): of the next canvas's tokens
                noise = torch.full_like(each, 1 / table.words).log()
                chances = torch.where(taken[..., None], each, noise).sum(1).exp()
                if last:
                    chances = (seen.argmax(-1)[:, None] == tokens).all(-1).double()
                every = torch.zeros(len(logits), len(logits), dtype=torch.float64)
                found.append(every.index_put((full[:, None], full), chances))
            return found

        return law


@dataclass(frozen=True)
class Outcomes:
    """All rollouts of a sampler with a network: the canvases before and after each step, and their probabilities."""

    path: Int[Tensor, "B K"]
    chances: Float[Tensor, " B"]
    rollout: Rollout
    steps: Int[Tensor, " B"]  # those that wrote something


def start(table: Table, sampler: Unmask | Renoised) -> Float[Tensor, " S"]:
    """The probabilities of the first canvas."""
    begins = (table.canvases == table.words).all(-1)
    if isinstance(sampler, Renoised):
        begins = (table.canvases < table.words).all(-1)
    return begins.double() / begins.sum()


def law_of(sampler: Unmask | Renoised, table: Table) -> Law:
    return sampler.law(table) if isinstance(sampler, Renoised) else transitions(sampler, table)


def outcomes(table: Table, sampler: Unmask | Renoised, law: Law) -> Outcomes:
    first = start(table, sampler)
    path = first.nonzero()
    chances = first[path[:, 0]]
    for step in law(table.table):
        row, to = step[path[:, -1]].nonzero(as_tuple=True)
        chances = chances[row] * step[path[row, -1], to]
        path = torch.cat([path[row], to[:, None]], 1)
    tokens = table.canvases[path[:, -1]]
    canvases = table.canvases[path]  # (B, K, T)
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    if isinstance(sampler, Renoised):
        blank = torch.zeros(tokens.shape, dtype=torch.float64)
        steps = torch.full((len(path),), sampler.steps)
        return Outcomes(path, chances, Rollout(tokens, everywhere, everywhere, tokens, blank, steps.cumsum(0)), steps)
    changed = path[:, 1:] != path[:, :-1]
    clock = changed.cumsum(1) - 1  # a step that writes nothing is none
    written = ((canvases[:, 1:] < table.words) & (canvases[:, :-1] == table.words)).long().argmax(1)  # (B, T)
    before = path.gather(1, written)
    position = torch.arange(table.length).expand_as(before)
    logps = table.table[before, position, : table.words].log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    probability = order_probability(sampler.rank, sampler.commit)
    zeros = torch.zeros_like(tokens)
    scored = torch.zeros_like(logps) if probability == "confidence" else None
    rollout = Rollout(
        tokens,
        everywhere,
        everywhere,
        clock.gather(1, written),
        logps,
        group=torch.arange(len(tokens)),
        sampling_params=SamplingParams(1.0, suppress=(table.words,)),
        order=Order(zeros, sampler.rank.name, scored, probability=probability),
    )
    return Outcomes(path, chances, rollout, changed.sum(1))


def finals(table: Table, sampler: Unmask | Renoised, law: Law) -> Float[Tensor, " S"]:
    """The probability of every completion."""
    found = start(table, sampler)
    for step in law(table.table):
        found = found @ step
    return found


def truth(table: Table, sampler: Unmask | Renoised, law: Law, rewards: Float[Tensor, " S"]) -> Float[Tensor, " P"]:
    """The gradient of the expected reward, by autograd through all steps."""
    logits = table.table.clone().requires_grad_()
    value = rewards
    for step in reversed(law(logits)):
        value = step @ value
    (found,) = torch.autograd.grad(start(table, sampler) @ value, logits)
    return table.gradient(found[..., : table.words])


# How a row is scored: of a rollout's outcomes, and the policy that sampled them.
Score = Callable[[Table], Float[Tensor, "B T"]]


@dataclass(frozen=True)
class Scored:
    """One draw of an estimate: contributions of a policy, the rows of each of its forwards, the views that a row takes,
    and the steps of the path that are scored (None: the estimate is of the completion)."""

    score: Score
    rows: list[Int[Tensor, " R"]]
    forwards: Int[Tensor, " B"]
    steps: Bool[Tensor, "B K-1"] | None


def with_estimator(
    estimator: LikelihoodEstimator, found: Outcomes, advantages: Float[Tensor, " B"], seed: int
) -> Scored:
    rollout = found.rollout
    views = estimator.draw_views(rollout, torch.Generator().manual_seed(seed))
    views = estimator.with_advantages(views, advantages)

    def score(table: Table) -> Float[Tensor, "B T"]:
        return estimator.combine(torch.stack([view.logprobs(table, rollout) for view in each_view(views)]), views)

    each = [view.scored.any(-1) for view in each_view(views)]
    rows = [some.nonzero()[:, 0] for some in each if some.any()]
    steps = scored_steps(found, views) if estimator.replays_steps else None
    return Scored(score, rows, torch.stack(each).sum(0), steps)


def scored_steps(found: Outcomes, views: Views) -> Bool[Tensor, "B K-1"]:
    """The steps of the path that wrote a token which some view scores."""
    scored = (views.coefficients != 0).any(0)
    clock = (found.path[:, 1:] != found.path[:, :-1]).cumsum(1) - 1
    of_step = (found.rollout.unmask_step[:, None] == clock[..., None]) & scored[:, None]
    return of_step.any(-1)


def renoised(last_step: bool, sampler: Renoised, found: Outcomes, table: Table) -> Scored:
    """DiffusionGemma's rollouts, scored by the raw log-probs of the last step, or by all accepted draws."""
    path, words = table.canvases[found.path], table.words

    def score(policy: Table) -> Float[Tensor, "B T"]:
        total = torch.zeros(path[:, 0].shape, dtype=torch.float64)
        for step in range(sampler.steps - 1, sampler.steps) if last_step else range(sampler.steps - 1):
            logits = policy.hidden(path[:, step], path)[..., :words]
            temperature = 1 if last_step else sampler.temperature(step)
            logps = (logits / temperature).log_softmax(-1).gather(-1, path[:, step + 1, :, None])[..., 0]
            taken = table.table[found.path[:, step], :, :words]  # what the policy that sampled accepted
            total = total + logps * (last_step | sampler.accepted(taken, step))
        return total

    calls = 1 if last_step else sampler.steps - 1
    everything = torch.ones(found.path.shape[0], found.path.shape[1] - 1, dtype=torch.bool)
    return Scored(score, [torch.arange(len(path))] * calls, torch.full((len(path),), calls), everything)


@dataclass(frozen=True)
class Row:
    """A sampler, and how its rollouts are scored.

    estimator  of the policy that sampled, the estimator; or whether `Renoised` is scored by its last step alone
    power      of the estimate in the ratio: 1 / length where a method takes the mean over tokens
    draws      every draw of the estimator's masks, as an estimator without draws, with its chance; (): it draws
    """

    sampler: Unmask | Renoised
    estimator: Callable[[Table], LikelihoodEstimator] | bool
    power: float = 1.0
    draws: tuple[tuple[float, LikelihoodEstimator], ...] = ()

    def versions(self, table: Table, number: int) -> list[tuple[float, "Row"]]:
        """The rows whose mean this is, with their chances: one of each draw, or `number` equal ones that draw."""
        if self.draws:
            return [(chance, replace(self, estimator=fixed(each), draws=())) for chance, each in self.draws]
        is_random = callable(self.estimator) and self.estimator(table).is_random
        return [(1 / number, self)] * number if is_random else [(1.0, self)]

    def draw(self, found: Outcomes, table: Table, advantages: Float[Tensor, " B"], seed: int) -> Scored:
        if isinstance(self.sampler, Renoised):
            return renoised(bool(self.estimator), self.sampler, found, table)
        assert callable(self.estimator), "`Unmask` is scored by an estimator"
        return with_estimator(self.estimator(table), found, advantages, seed)


def gradients(table: Table, drawn: Scored, weights: Float[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
    """The contributions (B, T), and the gradient of each row's weighted sum with respect to the words' logits, as a
    sparse matrix (B, S*T*W)."""
    table.records = []
    contributions = drawn.score(table)
    (contributions * weights).sum().backward()
    records, table.records = table.records, None
    wide = table.length * table.words
    entries = []
    for (at, leaf), rows in zip(records, drawn.rows, strict=True):
        values = leaf.grad[..., : table.words].flatten(1)
        row, column = values.nonzero(as_tuple=True)
        entries.append((rows[row], at[row] * wide + column, values[row, column]))
    row, column, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
    size = (len(weights), len(table.canvases) * wide)
    return contributions.detach(), torch.sparse_coo_tensor(
        torch.stack([row, column]), value, size, check_invariants=False
    )


def mean_gradient(table: Table, each: Tensor, chances: Float[Tensor, " B"]) -> Float[Tensor, " P"]:
    return table.gradient((each.t() @ chances[:, None]).view(len(table.canvases), table.length, table.words))


def log_steps(found: Outcomes, sampler: Unmask | Renoised, table: Table, law: Law, sampled: Table) -> Tensor:
    """The log-prob (B, K - 1) of each step of each rollout of `sampled`; -inf where this network has no such step."""
    columns = []
    for k, step in enumerate(law(table.table)):
        before, after = found.path[:, k], found.path[:, k + 1]
        columns.append(step[before, after].log())
        if isinstance(sampler, Renoised) and k + 1 < sampler.steps:  # of the accepted draws, which must be the same
            here, there = (sampler.accepted(each.table[..., : each.words], k) for each in (table, sampled))
            columns[-1] += sampler.noise(there, table.words)[before]
            columns[-1] = columns[-1].masked_fill((here != there).any(-1)[before], -torch.inf)
    return torch.stack(columns, 1)


@dataclass(frozen=True)
class Networks:
    """A network, the same after an update, and its rounded copy, with the rewards of the completions."""

    before: Table
    after: Table
    copy: Table
    rewards: Float[Tensor, " S"]


@cache
def networks(sharpness: float, seed: int, length: int) -> Networks:
    generator = torch.Generator().manual_seed(seed)
    toy = ToyPolicy(length=length, words=WORDS, sharpness=sharpness, generator=generator)
    table = Table(toy)
    rewards = torch.randn(len(table.canvases), generator=generator, dtype=torch.float64)
    sampler = Unmask(max_new_tokens=length, temperature=1.0, block_size=1)
    law = transitions(sampler, table)
    found, direction = outcomes(table, sampler, law), truth(table, sampler, law, rewards)
    size = 0.01

    def moved(size: float) -> Table:
        parts = (size * direction / direction.norm()).split([weight.numel() for weight in toy.weights])
        return Table(replace_weights(toy, [w + p.view_as(w) for w, p in zip(toy.weights, parts, strict=True)]))

    for _ in range(4):  # the log-ratio grows nearly in proportion
        ratio = (log_steps(found, sampler, moved(size), law, table) - log_steps(found, sampler, table, law, table)).sum(
            -1
        )
        size *= UPDATE / float((found.chances @ ratio.square()).sqrt())
    copy = Table(replace_weights(toy, [rounded(weight) for weight in toy.weights]))
    return Networks(table, moved(size), copy, rewards)


@cache
def jacobian(sharpness: float, seed: int, length: int) -> Tensor:
    return networks(sharpness, seed, length).before.jacobian


def off(means: list[Tensor], chances: Float[Tensor, " N"], target: Tensor, drawn: bool) -> float:
    """The distance of the mean of these gradients from the target, in its lengths, freed of their noise if `drawn`."""
    each = torch.stack(means)
    noise = each.var(0).sum() / len(each) if drawn and len(each) > 1 else 0.0
    squared = (chances @ each - target).square().sum() - noise
    return float(squared.clamp(min=0).sqrt() / target.norm())


def measure(row: Row, sharpness: float, seed: int, number: int = DRAWS) -> dict[str, Any]:
    """The numbers of the module's docstring for one network."""
    length = 3 if isinstance(row.sampler, Renoised) else LENGTH
    nets = networks(sharpness, seed, length)
    table, after, copy = nets.before, nets.after, nets.copy
    law = law_of(row.sampler, table)
    found, rolled = outcomes(table, row.sampler, law), outcomes(copy, row.sampler, law)
    steps, steps_after = (log_steps(found, row.sampler, each, law, table) for each in (table, after))
    completion, completion_after = (finals(each, row.sampler, law).log()[found.path[:, -1]] for each in (table, after))
    target, target_after = (truth(each, row.sampler, law, nets.rewards) for each in (table, after))

    def advantages(of: Outcomes) -> Tensor:
        reward = nets.rewards[of.path[:, -1]]
        return reward - of.chances @ reward

    gained, gained_copy = advantages(found), advantages(rolled)
    means: dict[str, list[Tensor]] = {name: [] for name in ("bias", "reused", "INT4", "TIS")}
    largest, square, level, second, forwards, of, never = 0.0, [], [], [], [], "", 0.0
    one = torch.ones(1, table.length, dtype=torch.float64)
    versions = row.versions(table, number)
    for sample, (_, version) in enumerate(versions):
        drawn = version.draw(found, table, gained, sample)
        estimate, each = gradients(table, drawn, gained[:, None] * one)
        by_row = torch.sparse.mm(each.coalesce(), jacobian(sharpness, seed, length))
        means["bias"].append(found.chances @ by_row)
        second.append(float(found.chances @ by_row.square().sum(-1)))
        forwards.append(float(found.chances @ (found.steps + drawn.forwards).double()))
        with torch.no_grad():
            moved = row.power * (drawn.score(after) - estimate).sum(-1)
        old, new, of = completion, completion_after, "completion"
        if drawn.steps is not None:
            old, new = (torch.where(drawn.steps, each, 0).sum(-1) for each in (steps, steps_after))
            of = "steps"
        true, can = new - old, new.isfinite()
        level.append(float(found.chances @ (estimate.sum(-1) - old).square()))
        never = float(found.chances @ (~can).double())
        error = torch.where(can, moved - true, 0)
        largest = max(largest, float(error.abs().max()))
        square.append(float(found.chances @ error.square()))
        _, each = gradients(after, drawn, (moved.exp() * gained)[:, None] * one)
        means["reused"].append(mean_gradient(after, each, found.chances))
        drawn = version.draw(rolled, copy, gained_copy, sample)
        with torch.no_grad():
            ours, theirs = drawn.score(table), drawn.score(copy)
        weights, _, _ = TIS().weights(
            TokenStats(ours - theirs, gained_copy, torch.ones_like(ours, dtype=torch.bool), ours, theirs, ours.long())
        )
        for name, weight in (("INT4", torch.ones_like(ours)), ("TIS", weights)):
            _, each = gradients(table, drawn, gained_copy[:, None] * weight)
            means[name].append(mean_gradient(table, each, rolled.chances))
    chances = torch.tensor([chance for chance, _ in versions], dtype=torch.float64)

    def over(values: list[float]) -> float:
        return float(chances @ torch.tensor(values, dtype=torch.float64))

    mean = chances @ torch.stack(means["bias"])
    apart = partial(off, chances=chances, drawn=not row.draws)
    bias, cost = apart(means["bias"], target=target), over(forwards)
    variance = (over(second) - float(mean.square().sum())) / float(target.square().sum())
    return {
        "sharpness": sharpness,
        "seed": seed,
        "of": of,
        "largest": largest,
        "rms": over(square) ** 0.5,
        "level": over(level) ** 0.5,
        "never": never,
        "bias": bias,
        "cosine": float(torch.cosine_similarity(mean, target, dim=0)),
        "reused": apart(means["reused"], target=target_after),
        "forwards": cost,
        "rmse": (bias**2 + max(variance, 0.0) * cost / BUDGET) ** 0.5,
        "INT4": apart(means["INT4"], target=target),
        "TIS": apart(means["TIS"], target=target),
    }


def unmask(**settings: Any) -> Unmask:
    return Unmask(max_new_tokens=LENGTH, temperature=1.0, **settings)


SAMPLERS = {"llada": unmask(rank=Confidence()), "left_to_right": unmask(block_size=1), "max_prob": unmask()}
LLADA, LEFT_TO_RIGHT = SAMPLERS["llada"], SAMPLERS["left_to_right"]


def fixed(estimator: LikelihoodEstimator) -> Callable[[Table], LikelihoodEstimator]:
    return lambda policy: estimator


def pairs_of(chances: Mapping[int, float]) -> Iterator[tuple[float, list[tuple[Tensor, float]]]]:
    """The draws of a pair of `Coupled`, a mask of k tokens and its complement, from the chances of k: (mask, (T + 1) /
    2k) of each view that masks a token."""
    for size, chance in chances.items():
        for chosen in combinations(range(LENGTH), size):
            mask = torch.zeros(LENGTH, dtype=torch.bool)
            mask[list(chosen)] = True
            sides = [(mask, size), (~mask, LENGTH - size)]
            yield chance / comb(LENGTH, size), [(side, (LENGTH + 1) / (2 * k)) for side, k in sides if k]


def fixed_views(views: Sequence[tuple[Tensor, float]]) -> LikelihoodEstimator:
    """These views of every row: (mask, coefficient of its tokens)."""

    def draw(rollout: Rollout, generator: torch.Generator) -> Views:
        shape = rollout.tokens.shape
        masked = torch.stack([mask.expand(shape) for mask, _ in views])
        weights = torch.tensor([weight for _, weight in views], dtype=torch.float64)
        return Views(masked, masked * weights[:, None, None])

    return FunctionLikelihood(function=draw)


def coupled_draws(num_samples: int) -> tuple[tuple[float, LikelihoodEstimator], ...]:
    """Every draw of `Coupled` for four tokens, of one pair or of two stratified ones: k of the first of two is 0, 1, 2
    with probability 0.4, 0.4, 0.2, and of the second 2, 3, 4 with 0.2, 0.4, 0.4."""
    strata = {1: [dict.fromkeys(range(5), 0.2)], 2: [{0: 0.4, 1: 0.4, 2: 0.2}, {2: 0.2, 3: 0.4, 4: 0.4}]}
    found = []
    for pairs in product(*map(pairs_of, strata[num_samples])):
        chance, views = 1.0, []
        for each, sides in pairs:
            chance *= each
            views += [(mask, weight / num_samples) for mask, weight in sides]
        found.append((chance, fixed_views(views)))
    return tuple(found)


ROWS = {
    "JustGRPO": Row(LEFT_TO_RIGHT, fixed(Trajectory())),
    "MaxProb, tokens": Row(SAMPLERS["max_prob"], fixed(Trajectory())),
    "JustGRPO-Fast (NeMo-RL)": Row(LEFT_TO_RIGHT, fixed(LeastCertain(block_size=LENGTH))),
    "LLaDA, tokens and order": Row(LLADA, fixed(Trajectory())),
    "LLaDA, tokens alone": Row(LLADA, fixed(Trajectory(include_order=False))),
    "TraceRL, shrinkage 2": Row(LLADA, fixed(Trajectory(num_segments=2))),
    "TraceRL, shrinkage 4": Row(LLADA, fixed(Trajectory(num_segments=1))),
    "d1": Row(LLADA, fixed(OneStep(prompt_mask=0.0))),
    "ELBO, 1 sample": Row(LLADA, fixed(ELBO(num_samples=1))),
    "ELBO, 2 samples": Row(LLADA, fixed(ELBO(num_samples=2))),
    "ELBO, 4 samples": Row(LLADA, fixed(ELBO(num_samples=4))),
    "Coupled": Row(LLADA, fixed(Coupled()), draws=coupled_draws(1)),
    "ESPO": Row(LLADA, fixed(Coupled(num_samples=2)), 1 / LENGTH, coupled_draws(2)),
    "SPG": Row(LLADA, fixed(bounds.Sandwich())),
    "Informed Masking": Row(LLADA, lambda policy: FunctionLikelihood(function=partial(informed_masks, policy=policy))),
    "ForkGRPO": Row(unmask(rank=Confidence(), commit=Fork()), fixed(ForkSteps())),
    "threshold on the likeliest": Row(unmask(rank=MaxProb(), commit=Threshold(tau=0.8)), fixed(Trajectory())),
    "SGLang's sampling": Row(unmask(rank=DrawnAndLikeliest(), commit=Threshold(tau=0.8)), fixed(Trajectory())),
    "DiffusionGemma, accepted draws": Row(Renoised(), False),
    "DiffusionGemma, last step": Row(Renoised(), True),
}
DRAWN = "the surest drawn token first"  # LLaDA's sampler
IN_WORDS = {  # in which order a row's sampler writes, and what its likelihood scores
    "JustGRPO": ("left to right", "every step"),
    "MaxProb, tokens": ("the position of the likeliest token first", "every step"),
    "JustGRPO-Fast (NeMo-RL)": ("left to right", "the least certain quarter of the tokens"),
    "LLaDA, tokens and order": (DRAWN, "every step: the token, and that its position came first"),
    "LLaDA, tokens alone": (DRAWN, "every step: the token alone"),
    "TraceRL, shrinkage 2": (DRAWN, "two steps in one view"),
    "TraceRL, shrinkage 4": (DRAWN, "all four steps in one view"),
    "d1": (DRAWN, "all tokens, with the whole completion masked"),
    "ELBO, 1 sample": (DRAWN, "the tokens of one random mask"),
    "ELBO, 2 samples": (DRAWN, "the tokens of two random masks"),
    "ELBO, 4 samples": (DRAWN, "the tokens of four random masks"),
    "Coupled": (DRAWN, "a random mask and its complement"),
    "ESPO": (DRAWN, "two random masks and their complements; the mean over tokens"),
    "SPG": (DRAWN, "random masks; an upper bound for negative advantages"),
    "Informed Masking": (DRAWN, "two masks, more often where a token changed little"),
    "ForkGRPO": ("drawn tokens above 0.8 at once, else the leftmost", "the steps that write the leftmost"),
    "threshold on the likeliest": ("all positions whose likeliest token has 0.8 or more", "every step"),
    "SGLang's sampling": ("drawn tokens that its confidence rule accepts", "every step"),
    "DiffusionGemma, accepted draws": ("draws at the positions of lowest entropy", "all draws that were accepted"),
    "DiffusionGemma, last step": ("draws at the positions of lowest entropy", "the answer in the last step"),
}
SUMMARY = {"rms": "ratio off by, nats", "never": "became impossible", "bias": "gradient's bias", "forwards": "forwards"}
RATIO = {"rms": "rms error, nats", "largest": "largest", "level": "log-prob, rms error", "never": "never"}
GRADIENT = {
    "forwards": "forwards", "bias": "bias", "cosine": "cosine", "reused": "reused", "rmse": "rmse",
    "INT4": "INT4", "TIS": "INT4, TIS",
}  # fmt: skip
RANGES = ("rms", "bias")  # shown with a range, and for soft networks


def cell(values: Sequence[float], name: str, with_range: bool = False) -> str:
    """The median, and the range where it is asked for."""
    digits = 1 if name == "forwards" else 2
    shown = f"{median(values):.{digits}f}"
    return shown + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if with_range else "")


def table_of(stored: Mapping[str, Sequence[Mapping[str, Any]]], columns: Mapping[str, str], of: bool) -> str:
    rows = []
    for name, found in stored.items():
        sharp, soft = ([each for each in found if each["sharpness"] == kind] for kind in (SHARP, SOFT))
        row = {"method": name} | ({"of": found[0]["of"]} if of else {})
        for key, head in columns.items():
            row[head] = cell([each[key] for each in sharp], key, key in RANGES)
            if key in RANGES:
                row["soft"] = cell([each[key] for each in soft], key) if soft else "-"
        rows.append(row)
    return markdown(rows)


def summary_of(stored: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A row per method: what it scores, and the medians over the sharp networks; exact ratios first."""
    sharp = {name: [each for each in found if each["sharpness"] == SHARP] for name, found in stored.items()}
    rows = []
    for name, found in sharp.items():
        writes, scores = IN_WORDS.get(name, ("-", "-"))
        values = {key: [each[key] for each in found] for key in SUMMARY}
        shown = {head: cell(values[key], key) for key, head in SUMMARY.items()}
        row = {"method": name, "the sampler writes": writes, "the likelihood scores": scores} | shown
        rows.append((median(values["rms"]) > 0.005, median(values["bias"]), row))
    return markdown([row for *_, row in sorted(rows, key=lambda each: each[:2])])


def tables(stored: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    detailed = {"ratio": table_of(stored, RATIO, True), "gradient": table_of(stored, GRADIENT, False)}
    return {"summary": summary_of(stored)} | detailed


def page_tables() -> dict[str, str]:
    return tables(read_json(STORED))


def draw_figure(stored: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """The bias of each row against its forwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    colors = plt.get_cmap("tab20").colors
    for i, (name, found) in enumerate(stored.items()):
        sharp = [each for each in found if each["sharpness"] == SHARP]
        middle, low, high = (of([each["bias"] for each in sharp]) for of in (median, min, max))
        cost = median(each["forwards"] for each in sharp)
        bars = [[middle - low], [high - middle]]
        look = {"marker": "os^DvP*X"[i % 8], "color": colors[i % 20], "linestyle": "", "capsize": 2}
        axis.errorbar(cost + 0.06 * (i % 5 - 2), middle, bars, label=name, **look)
    limit = 1.6  # the last step of DiffusionGemma is above it
    axis.set(xlabel="forwards of a rollout, to sample and to score", ylabel="bias of the gradient", ylim=(0, limit))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def named(name: str) -> Any:
    """What MODULE.NAME names: a function, an object, or one of a class whose settings have defaults."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ValueError, ImportError, AttributeError) as error:
        raise SystemExit(
            f"{name!r} is not found ({error}); give MODULE.NAME, MODULE importable from this folder"
        ) from error
    return found() if isinstance(found, type) else found


def own_row(estimator: str | None, sampler: str, rank: str | None, commit: str | None) -> tuple[str, Row]:
    """The name and the row of an estimator, a rank or a commit rule of one's own; `Trajectory()` if none is named."""
    likelihood = Trajectory() if estimator is None else named(estimator)
    if not isinstance(likelihood, LikelihoodEstimator):
        likelihood = FunctionLikelihood(function=likelihood)
    rules = {kind: name for kind, name in (("rank", rank), ("commit", commit)) if name is not None}
    used = SAMPLERS[sampler].replace(**{kind: named(name) for kind, name in rules.items()})
    return ", ".join([estimator or "Trajectory", *rules.values()]), Row(used, fixed(likelihood))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("estimator", nargs="?", help="MODULE.NAME of an estimator of your own")
    parser.add_argument("--sampler", choices=SAMPLERS, default="llada", help="whose rollouts your estimator scores")
    parser.add_argument("--rank", help="MODULE.NAME of a rank of your own, in place of the sampler's")
    parser.add_argument("--commit", help="MODULE.NAME of a commit rule of your own, in place of the sampler's")
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of exactness.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, is_own = ROWS, any((options.estimator, options.rank, options.commit))
    if is_own:
        rows = dict([own_row(options.estimator, options.sampler, options.rank, options.commit)])
    measured: dict[str, list[dict[str, Any]]] = {}
    if not options.report:
        for name, row in rows.items():
            measured[name] = [measure(row, *network, DRAWS) for network in NETWORKS]
            print(name, flush=True)
    if measured and not is_own:
        write_json(STORED, measured)
        draw_figure(measured, STORED.with_suffix(".png"))
    for table in tables(read_json(STORED) | measured).values():
        print(table)


if __name__ == "__main__":
    main()
