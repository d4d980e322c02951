"""The bias and the noise of a policy gradient, exactly: a network so small that all its rollouts can be enumerated.

A rollout policy q (the learner p with Gaussian noise on its weights) writes `length` words in a few steps of a fixed
order; each of the words ** length outcomes y has a reward. Of the gradient that a batch of n rollouts gives,
    g(y) = sum_t dJ_t/dlogp_t * grad logp_t(y),   J the library's own surrogate under the corrector's own weights,
mean and covariance under q are sums over all outcomes, and the truth is grad E_p[reward]. Nothing is sampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import permutations, product
from math import log
from statistics import median
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dllm_rl.algorithms.correctors import Corrector, NoCorrection, TokenStats
from dllm_rl.algorithms.losses import K2, FixedLengthMean, PPOClip, policy_loss
from dllm_rl.likelihoods.estimators import LikelihoodEstimator, Trajectory
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.base import Policy
from dllm_rl.models.checkpoint.families import DIFFUSION_LM
from dllm_rl.step.score import token_entropy
from dllm_rl.types.rollouts import Rollout, SamplingParams
from dllm_rl.types.scoring import Batch, Views

ROUNDING = 1e-6  # nats, and lengths of a gradient: what the toy's fp64 stays well below
POPULATION = 2**13  # rows of the batch that a corrector sees: each outcome as often as it is likely, once at least


class ToyPolicy:
    """A network of one hidden layer on a one-hot canvas: logits of each of `length` positions over words and a mask.

    sharpness  factor on the logits: 1 is soft, as early in training, 3 concentrated.
    """

    def __init__(self, *, length: int, words: int, sharpness: float, generator: Generator) -> None:
        self.length, self.words, self.sharpness, self.vocab_size = length, words, sharpness, words + 1
        wide, hidden = length * (words + 1), 12
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.weights = [draw(wide, hidden) / length**0.5, draw(hidden, length * words) / hidden**0.5]
        self.spec, self.device = replace(DIFFUSION_LM, mask_id=words), torch.device("cpu")
        # What else a policy has; scoring asks for none of it.
        self.module, self.tokenizer, self.pad_id, self.weights_version = None, None, 0, 0
        self.float32_head, self.gradient_checkpointing = True, False
        self.lora = self.quantization = self.quantization_report = None

    def moved(self, sigma: float, generator: Generator) -> "ToyPolicy":
        """The same network with Gaussian noise on its weights, of `sigma` times each matrix's own spread."""
        other = object.__new__(ToyPolicy)
        other.__dict__ = dict(vars(self))
        noise = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in self.weights]
        other.weights = [w.detach() + sigma * w.detach().std() * z for w, z in zip(self.weights, noise, strict=True)]
        return other

    def hidden(self, tokens: Int[Tensor, "B T"], attention_mask: Tensor) -> Float[Tensor, "B T V"]:
        """The logits themselves; the head passes them on."""
        canvas = torch.nn.functional.one_hot(tokens, self.words + 1).double().flatten(1)
        logits = self.sharpness * (torch.tanh(canvas @ self.weights[0]) @ self.weights[1])
        return torch.nn.functional.pad(logits.view(*tokens.shape, self.words), (0, 1))

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    encode = logits = to = save_pretrained = reference = hidden

    def rollout(self, diffusion_steps: int) -> Rollout:
        """All outcomes, a row each, written from left to right in equal parts; no log-probs."""
        tokens = torch.tensor(list(product(range(self.words), repeat=self.length)))
        step = (torch.arange(self.length) * diffusion_steps // self.length).expand_as(tokens)
        everywhere, params = torch.ones_like(tokens, dtype=torch.bool), SamplingParams(suppress=(self.words,))
        blank = torch.zeros(tokens.shape, dtype=torch.float64)
        return Rollout(
            tokens, everywhere, everywhere, step, blank, group=torch.arange(len(tokens)), sampling_params=params
        )


def contributions(
    policy: ToyPolicy, rollout: Rollout, noise: Views, estimator: LikelihoodEstimator
) -> Float[Tensor, "B T"]:
    """The estimator's contributions, nats, differentiable and in fp64."""
    scored = cast(Policy, policy)  # it has what scoring asks of one
    scores = [view.logprobs(scored, rollout) for view in each_view(noise)]
    return estimator.combine(torch.stack(scores), noise)


def per_outcome(policy: ToyPolicy, logps: Float[Tensor, "B T"]) -> Float[Tensor, "B T W"]:
    """The gradient of every contribution with respect to all weights."""
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(x, policy.weights, retain_graph=True)])
        for x in logps.flatten()
    ]
    return torch.stack(rows).view(*logps.shape, -1)


@dataclass(frozen=True)
class EstimatorRow:
    """A likelihood estimator against one enumerated quantity, over all completions of the toy; log-probs in nats.

    reference       order taken: log p of the completion in the order in which the sampler wrote it; its gradient is the
                    policy gradient
                    ELBO: the mean over all orders of log p in that order, which `ELBO` and `Coupled` estimate
                    random order: log p where every order is as likely, the log of the mean of p; bounds bound it
    bias            estimate less reference, mean over draws, and over completions by their probability
    error           the standard error of that mean
    lowest, highest the bias of single completions
    below, above    the largest deviation of a completion to either side, in its own standard errors (which count as at
                    least ROUNDING, so that an estimate without noise has some); 0: none
    gradient_bias   distance of the mean gradient of sum_y p(y) A(y) estimate(y) from the reference's, in its lengths
    gradient_error  what the noise of this many draws alone makes that distance
    cosine          of both gradients
    noise           standard deviation of one draw's estimate, mean over completions by their probability
    gradient_noise  squared noise of one draw's gradient times the number of views, in squared lengths: noise at equal
                    forwards
    """

    reference: str
    bias: float
    error: float
    lowest: float
    highest: float
    below: float
    above: float
    gradient_bias: float
    gradient_error: float
    cosine: float
    noise: float
    gradient_noise: float


CLAIMS = {
    "exact": "order taken",
    "unbiased for the order taken": "order taken",
    "unbiased for the ELBO": "ELBO",
    "lower bound": "random order",
    "upper bound": "random order",
}


def references(toy: ToyPolicy, rollout: Rollout) -> dict[str, Float[Tensor, " B"]]:
    """What an estimate is compared with: log p of every completion by the name of each reference, differentiable."""

    def in_order(steps: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
        views = Trajectory().draw_views(
            replace(rollout, unmask_step=steps), _stream(0)
        )  # every step: nothing is random
        return contributions(toy, rollout, views, Trajectory()).sum(-1)

    orders = [torch.tensor(order).expand_as(rollout.tokens) for order in permutations(range(toy.length))]
    each = torch.stack([in_order(steps) for steps in orders])
    return {
        "order taken": in_order(rollout.unmask_step),
        "ELBO": each.mean(0),
        "random order": each.logsumexp(0) - log(len(orders)),
    }


def estimator_table(
    estimator: LikelihoodEstimator, *, draws: int = 100, length: int = 4, words: int = 3, seed: int = 0
) -> list[EstimatorRow]:
    """How far an estimator is from what it may estimate, by enumeration: a row for each reference of `EstimatorRow`.

    draws          of the estimator's masks, for all completions, at least 2
    length, words  of the toy, which writes from left to right in two steps: words ** length completions, length! orders
    """
    if draws < 2:
        raise ValueError(f"draws={draws} must be at least 2, to take a variance of")
    generator = _stream(seed)
    toy = ToyPolicy(length=length, words=words, sharpness=1.0, generator=generator)
    rollout = toy.rollout(2)
    for weight in toy.weights:
        weight.requires_grad_()
    compared = references(toy, rollout)
    p = compared["order taken"].detach().exp()
    rewards = torch.randn(len(p), generator=generator, dtype=torch.float64)
    advantages = rewards - p @ rewards

    def gradient(logps: Float[Tensor, " B"]) -> Float[Tensor, " W"]:
        found = torch.autograd.grad((p * advantages) @ logps, toy.weights, retain_graph=True)
        return torch.cat([weight.flatten() for weight in found])

    def drawn(number: int) -> tuple[Tensor, Tensor, int]:
        views = estimator.with_advantages(estimator.draw_views(rollout, _stream(seed + number)), advantages)
        logps = contributions(toy, rollout, views, estimator).sum(-1)
        return logps.detach(), gradient(logps), len(views.coefficients)

    draws = draws if estimator.is_random else 2  # which are then alike
    found = [drawn(number) for number in range(draws)]
    estimates, gradients = torch.stack([one for one, _, _ in found]), torch.stack([two for _, two, _ in found])
    error = (estimates.std(0) / draws**0.5).clamp(min=ROUNDING)
    spread = gradients.var(0).sum()
    rows = []
    for name, reference in compared.items():
        apart, target = estimates.mean(0) - reference.detach(), gradient(reference)
        size, mean = target.norm(), gradients.mean(0)
        row = {
            "bias": p @ apart,
            "error": (estimates @ p).std() / draws**0.5,
            "lowest": apart.min(),
            "highest": apart.max(),
            "below": (-apart / error).max().clamp(min=0),
            "above": (apart / error).max().clamp(min=0),
            "gradient_bias": (mean - target).norm() / size,
            "gradient_error": (spread / draws).sqrt() / size,
            "cosine": torch.cosine_similarity(mean, target, dim=0),
            "noise": p @ estimates.std(0),
            "gradient_noise": spread / size**2 * found[0][2],
        }
        rows.append(EstimatorRow(name, **{key: float(value) for key, value in row.items()}))
    return rows


def speaks_against(rows: Sequence[EstimatorRow], claim: str) -> list[str]:
    """What in the rows of `estimator_table` contradicts a claim of `CLAIMS`, a sentence each; none if nothing does.

    exact            every completion within ROUNDING nats, the gradient within as much of its length
    unbiased for ..  every completion within 4 of its standard errors, their mean within 3 of its own, the gradient
                     within twice what noise makes
    lower bound      no completion above log p in random order by more than 4 of its standard errors
    upper bound      none below it by more
    """
    if claim not in CLAIMS:
        raise ValueError(f"claim={claim!r} must be one of {', '.join(map(repr, CLAIMS))}")
    (row,) = (row for row in rows if row.reference == CLAIMS[claim])
    worst, errors = max(-row.lowest, row.highest), max(row.below, row.above)
    gradient = f"the gradient is off by {row.gradient_bias:.2g} of its length, noise makes {row.gradient_error:.2g}"
    against = {
        "exact": {
            f"a completion is off by {worst:.2g} nats": worst > ROUNDING,
            gradient: row.gradient_bias > ROUNDING,
        },
        "lower bound": {f"a completion lies {row.above:.1f} standard errors above": row.above > 4},
        "upper bound": {f"a completion lies {row.below:.1f} standard errors below": row.below > 4},
    }
    unbiased = {
        f"a completion is off by {errors:.1f} standard errors": errors > 4,
        f"the mean is off by {row.bias:.2g}, its standard error is {row.error:.2g}": (
            abs(row.bias) > 3 * max(row.error, ROUNDING)
        ),
        gradient: row.gradient_bias > 2 * max(row.gradient_error, ROUNDING),
    }
    return [sentence for sentence, holds in against.get(claim, unbiased).items() if holds]


@dataclass(frozen=True)
class GradientRow:
    """One corrector in one setting: medians over networks.

    bias        |E g - truth| / |truth|, exact; 0 is unbiased
    rmse        (E |mean of n g - truth|^2)^(1/2) / |truth|, of batches of `batch` rows whose weights are those of a
                batch without end; with `draws`, of so many real batches, each with its own weights
    efficiency  <E g, truth> / (|truth| (E |mean of n g|^2)^(1/2)): rmse's complement, indifferent to scale; 1 is best
    mean_weight E w over the rollout's tokens; ess 1 / E (w / E w)^2 of them
    """

    policy: str
    sigma: float
    batch: int
    bias: float
    rmse: float
    efficiency: float
    mean_weight: float
    ess: float


def gradient_table(  # noqa: PLR0913
    corrector: Corrector,
    *,
    sigmas: Sequence[float] = (0.1, 0.3, 0.5),
    policies: Sequence[str] = ("early", "late"),
    batch: int = 128,
    length: int = 4,
    words: int = 3,
    diffusion_steps: int = 2,
    networks: int = 8,
    moved: str = "rollout",
    draws: int = 0,
    seed: int = 0,
) -> list[GradientRow]:
    """How far a corrector's gradient is from the learner's own, by enumeration: a row for each policy and sigma.

    sigmas    noise on the weights, in parts of their spread
    policies  early: soft distributions; late: concentrated ones
    batch     rows of the batch whose noise is given
    length, words, diffusion_steps  of the toy: words ** length outcomes
    networks  random networks, rewards and directions of the noise; medians over them are given
    moved     rollout: the rollout policy has the noise, and the learner has made no update (what weights correct);
              old: the rollout is the learner's before an update of that size (what a surrogate's clip is for)
    draws     real batches that are drawn, in place of a batch without end: for what depends on the batch's size, as a
              self-normalized weight does. Numbers are then estimates; every corrector sees the same batches.
    """
    if moved not in ("rollout", "old"):
        raise ValueError(f"moved={moved!r} must be 'rollout' or 'old'")
    if draws < 0 or draws == 1:
        raise ValueError(f"draws={draws} must be 0 (a batch without end), or at least 2 batches to take a variance of")
    table = []
    for kind, sigma in product(policies, sigmas):
        cases = _cases(length, words, diffusion_steps, kind, networks, seed)
        found = [_measure(case, corrector, sigma, batch, moved, draws) for case in cases]
        table.append(GradientRow(kind, sigma, batch, *map(median, zip(*found, strict=True))))
    return table


def corrects(corrector: Corrector) -> bool:
    """Whether it lowers the bias of each row of `gradient_table` to 0.9 or less, and efficiencies by 0.01 at most."""
    pairs = zip(gradient_table(corrector), gradient_table(NoCorrection()), strict=True)
    return all(row.bias <= 0.9 * none.bias and row.efficiency >= none.efficiency - 0.01 for row, none in pairs)


@dataclass(frozen=True)
class _Case:
    """A network, and what does not depend on the noise: all outcomes, their rewards, log-probs and gradients."""

    toy: ToyPolicy
    rollout: Rollout
    noise: Views
    rewards: Float[Tensor, " B"]
    logps: Float[Tensor, "B T"]
    jacobian: Float[Tensor, "B T W"]
    seed: int


def _cases(length: int, words: int, diffusion_steps: int, kind: str, networks: int, seed: int) -> list[_Case]:
    """Networks of a kind of policy."""
    sharpness = {"early": 1.0, "late": 3.0}[kind]
    return [_case(length, words, diffusion_steps, sharpness, seed + 1000 * network) for network in range(networks)]


@lru_cache(maxsize=64)
def _case(length: int, words: int, diffusion_steps: int, sharpness: float, seed: int) -> _Case:
    generator = torch.Generator().manual_seed(seed)
    toy = ToyPolicy(length=length, words=words, sharpness=sharpness, generator=generator)
    rollout = toy.rollout(diffusion_steps)
    noise = Trajectory().draw_views(rollout, generator)
    rewards = torch.randn(len(rollout.tokens), generator=generator, dtype=torch.float64)
    for weight in toy.weights:
        weight.requires_grad_()
    logps = contributions(toy, rollout, noise, Trajectory())
    return _Case(toy, rollout, noise, rewards, logps.detach(), per_outcome(toy, logps), seed)


def _measure(case: _Case, corrector: Corrector, sigma: float, batch: int, moved: str, draws: int) -> tuple[float, ...]:
    behavior = case.toy.moved(sigma, _stream(case.seed + 1))
    sampled = contributions(behavior, case.rollout, case.noise, Trajectory())
    p, q = (each.sum(-1).exp() for each in (case.logps, sampled))
    advantages = case.rewards - (q * case.rewards).sum()
    truth = torch.einsum("b,btw->w", p * advantages, case.jacobian)
    old, learner = (case.logps, case.toy) if moved == "rollout" else (sampled, behavior)
    entropy = None
    if corrector.needs_entropy:
        entropy = token_entropy(cast(Policy, learner), case.rollout, case.noise, None)
    gradients = partial(_gradients, case, corrector, advantages, sampled, old=old, entropy=entropy)
    if draws:
        drawn = torch.multinomial(q, draws * batch, replacement=True, generator=_stream(case.seed + 2))
        found = [(rows, *gradients(rows)) for rows in drawn.view(draws, batch)]
        sums = torch.stack([torch.zeros_like(sampled).index_add(0, rows, one) for rows, one, _ in found])
        means = torch.einsum("dbt,btw->dw", sums / batch, case.jacobian)
        return *of_batches(truth, means), *_spread(torch.cat([weights for _, _, weights in found]))
    counts = (q * POPULATION).round().long().clamp(min=1)
    gradient, weights = gradients(torch.arange(len(q)).repeat_interleave(counts))
    first = counts.cumsum(0) - counts
    each = torch.einsum("bt,btw->bw", gradient[first], case.jacobian)
    return *against(truth, each, q, batch), *_spread(weights[first], q)


def _stream(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def _spread(weights: Float[Tensor, "B T"], chances: Tensor | None = None) -> tuple[float, float]:
    """The mean of weights of rows with these chances (None: equal ones), and their effective sample size."""
    chances = torch.full_like(weights[:, 0], 1 / len(weights)) if chances is None else chances
    mean, square = (float((chances[:, None] * x).sum() / weights.shape[1]) for x in (weights, weights.square()))
    return mean, mean**2 / square if square else 0.0


def _gradients(
    case: _Case,
    corrector: Corrector,
    advantages: Float[Tensor, " B"],
    sampled: Float[Tensor, "B T"],
    rows: Int[Tensor, " R"],
    *,
    old: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "R T"], Float[Tensor, "R T"]]:
    """What a batch of these outcomes gives: d objective / d log-probs, by `policy_loss`, and weights (0 where they are
    dropped)."""
    old, advantages, sampled = old[rows], advantages[rows], sampled[rows]
    stats = TokenStats(
        log_mismatch=old - sampled,
        advantages=advantages,
        mask=torch.ones_like(old, dtype=torch.bool),
        old_logprobs=old,
        rollout_logprobs=sampled,
        unmask_step=case.rollout.unmask_step[rows],
        entropy=None if entropy is None else entropy[rows],
    )
    weights, keep, _ = corrector.weights(stats)
    made = Batch(
        rollout=case.rollout.rows(rows),
        views=case.noise.rows(rows),
        advantages=advantages,
        old_logprobs=old,
        old_view_logprobs=old[None],
        importance_weights=weights,
        loss_mask=keep,
        reference_logprobs=None,
        num_tokens=1,
        num_sequences=1,
        rollout_logprobs=sampled,
    )
    aggregate: Callable[..., Tensor] = FixedLengthMean(length=1)  # every sequence counts 1
    loss = partial(policy_loss, surrogate=corrector.loss or PPOClip(), loss_reduction=aggregate, beta=0.0, kl=K2())
    gradient = -loss(case.logps[rows], made)[2]
    return gradient, torch.where(keep, weights, 0)


def of_batches(truth: Float[Tensor, " W"], means: Float[Tensor, "D W"]) -> tuple[float, float, float]:
    """Bias, root mean square error and efficiency of a gradient of which D batches gave these; the bias is freed of
    the noise of D."""
    noise = means.var(0).sum() / len(means)
    bias = ((means.mean(0) - truth).square().sum() - noise).clamp(min=0).sqrt()
    size, squares = truth.norm(), means.square().sum(-1).mean()
    rmse = (means - truth).square().sum(-1).mean().sqrt()
    efficiency = (means.mean(0) @ truth) / (size * squares.sqrt()).clamp(min=1e-300)
    return (bias / size).item(), (rmse / size).item(), efficiency.item()


def against(
    truth: Float[Tensor, " W"], each: Float[Tensor, "B W"], chances: Float[Tensor, " B"], batch: int
) -> tuple[float, float, float]:
    """Bias, root mean square error and efficiency of the mean of `batch` draws of the rows of `each`."""
    mean = chances @ each
    variance = (chances @ each.square().sum(-1) - mean.square().sum()) / batch
    bias, size = (mean - truth).norm(), truth.norm()
    rmse = (bias.square() + variance).sqrt()
    efficiency = (mean @ truth) / (size * (mean.square().sum() + variance).sqrt()).clamp(min=1e-300)
    return (bias / size).item(), (rmse / size).item(), efficiency.item()
