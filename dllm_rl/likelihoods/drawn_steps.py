"""Draw the denoising steps that a training step scores, instead of replaying all of them.

A pair of a completion b and a denoising step n is drawn with chance c_bn. Its tokens are scored exactly, with the
sampler's record as the other side of their ratios, and their gradient is multiplied by 1 / c_bn; so the mean over draws
is the gradient of all steps, whatever the chances are. They decide the variance:

    q_bn = |A_b| (sum over the tokens that step n wrote of (1 - p)^2 + e^2)^(1/2),    c_bn = min(1, q_bn / threshold)

A is the advantage and p the probability with which the sampler drew the token, which it has recorded. 1 - p is the
derivative of log p with respect to the token's logit, so that q stands for the size of the pair's gradient. e, which is
RECORD_ERROR, stands for what the record does not tell: a copy may be certain where the learner is not, and in a policy
that is certain of most tokens these few tokens have much of the gradient (recipes/studies/likelihoods/drawn_noise.py
measures it). The gradients of different pairs are nearly orthogonal. The sum of q^2 then stands for the variance of the
batch, and the sum of (1 / c - 1) q^2 for the variance that the draw adds; the threshold is the one at which it is
`variance_growth` of the batch's own.

No chance is below UNIFORM_SHARE, which bounds the weights, and gives the groups without advantage an estimate in the
metrics. Pairs that the model reads alike, as the first step of all completions of a prompt, take one row of a forward:
they are drawn together, and their q^2 add up.

Scoring drawn steps of a trajectory with an inverse weight on the loss is from AGRPO (arXiv 2510.04019), which draws as
many steps of each completion. Pairs of the whole batch by advantage and recorded probability, and the threshold, are
[ours]. docs/papers.md compares, and explains the tag.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.likelihoods.masks import row_generators, uniforms_at
from dllm_rl.likelihoods.order_logprobs import recorded_order
from dllm_rl.likelihoods.views import alike_rows
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Views

UNIFORM_SHARE = 0.05  # the smallest chance of a step
RECORD_ERROR = 0.03  # of a token's 1 - p


def same_rows(values: Tensor) -> Tensor:
    """Return the values: with one process, they are those of all processes."""
    return values


def draw_steps(
    views: Views,
    rollout: Rollout,
    advantages: Float[Tensor, " B"],
    generator: Generator,
    *,
    variance_growth: float,
    gather: Callable[[Tensor], Tensor] = same_rows,
) -> Views:
    """Return the views of a trajectory with the steps that are drawn.

    A training step calls it for a likelihood with `variance_growth`. The draw of a row depends on the generator, the
    row's place in the batch, and one threshold for the rows of all processes.

    Args:
        views: Views of every step, as `Trajectory().draw_views` returns them.
        rollout: The completions, with the log-probs that the sampler recorded.
        advantages: Advantage of each row.
        generator: Generator of the draw.
        variance_growth: Variance that the draw may add to the gradient, as a share of the batch's own, above 0.
        gather: Function that returns the rows (B, N) of all processes, on the host, from those of this process.
            Default: there is one process.

    Raises:
        ValueError: A token's contribution is a sum over several steps, which cannot be drawn one by one.
    """
    check_can_be_drawn(rollout, views, variance_growth)
    step = step_of_tokens(views)
    chance, unit = step_chances(views, rollout, advantages, step, variance_growth=variance_growth, gather=gather)
    exists = torch.zeros(len(step), chance.shape[1] + 1, dtype=torch.bool).scatter(1, step.cpu() + 1, True)[:, 1:]
    u = uniforms_at(exists, row_generators(rollout, generator))
    # The number of a unit is that of its first row that has the step.
    last = len(u) - 1
    row = torch.where(exists, torch.arange(len(u))[:, None], last)
    first = torch.full((int(unit.max()) + 1,), last).scatter_reduce(0, unit.flatten(), row.flatten(), "amin")
    drawn = exists & (u.gather(0, first[unit]) < chance)
    return with_drawn_steps(views, step, drawn.to(step.device), chance.to(step.device))


def step_chances(
    views: Views,
    rollout: Rollout,
    advantages: Float[Tensor, " B"],
    step: Int[Tensor, "B T"],
    *,
    variance_growth: float,
    gather: Callable[[Tensor], Tensor] = same_rows,
) -> tuple[Float[Tensor, "B N"], Int[Tensor, "B N"]]:
    """Return the chance of each step of each row, and the number of the unit that it is drawn with, on the host. The
    pairs of a unit are one row of a forward.

    `draw_steps` explains the arguments; `step` is `step_of_tokens(views)`.
    """
    size = advantages.to("cpu", torch.float64).abs()[:, None] * step_doubt(rollout, views, step)
    unit = alike_rows(rollout, views).cpu().T - 1
    squares = torch.zeros(int(unit.max()) + 1, dtype=torch.float64).scatter_add(0, unit.flatten(), size.flatten() ** 2)
    is_first = F.pad(unit.diff(dim=0) != 0, (0, 0, 1, 0), value=True)
    threshold = growth_threshold(gather(squares.sqrt()[unit] * is_first), variance_growth)
    return (squares.sqrt() / threshold).clamp(UNIFORM_SHARE, 1)[unit], unit


def check_can_be_drawn(rollout: Rollout, views: Views, variance_growth: float) -> None:
    """Raise ValueError if a token's contribution is a sum over several steps."""
    several = None
    if rollout.renoised is not None:
        several = "Renoise replays all steps as one chain: use"
    elif rollout.events is not None:
        several = "this commit rule writes a position in several steps: use"
    elif not all(feature.is_per_token for feature in views.features) and recorded_order(rollout).rank_function is None:
        several = "the rank's order has a probability that adds up over all steps: use include_order=False, or"
    if several is not None:
        raise ValueError(
            f"likelihood.variance_growth={variance_growth:g} scores some steps by themselves, and {several} "
            "likelihood.variance_growth=None, which scores every step"
        )


def step_of_tokens(views: Views) -> Int[Tensor, "B T"]:
    """Return the number of the view that scores each token as written; -1 where none does."""
    numbers = torch.arange(len(views.coefficients), device=views.coefficients.device)[:, None, None]
    # A view before it may score that the position stayed masked.
    return torch.where(views.coefficients != 0, numbers, -1).amax(0)


def step_doubt(rollout: Rollout, views: Views, step: Int[Tensor, "B T"]) -> Float[Tensor, "B N"]:
    """Return the root of the sum of (1 - p)^2 + RECORD_ERROR^2 over the tokens that each step wrote, on the host."""
    miss = -torch.expm1(recorded(rollout, views).double().clamp(max=0))
    squares = miss.square() + RECORD_ERROR**2
    squares = squares.new_zeros(len(step), len(views.masked) + 1).scatter_add(1, step + 1, squares)
    return squares[:, 1:].sqrt().cpu()


def growth_threshold(size: Float[Tensor, "B N"], variance_growth: float) -> float:
    """Return the threshold at which the sum of (1 / c - 1) q^2 is `variance_growth` times the sum of q^2; infinite if
    all sizes q are 0.
    """
    size = size[size > 0].sort().values  # sorted: the same sums for any order of the rows
    if not len(size):
        return torch.inf
    allowed = variance_growth * size.square().sum()

    def added(threshold: float) -> Tensor:
        return ((1 / (size / threshold).clamp(UNIFORM_SHARE, 1) - 1) * size.square()).sum()

    low, high = size[0].item(), size[-1].item() / UNIFORM_SHARE  # all pairs are certain; all have the smallest chance
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if added(middle) <= allowed else (low, middle)
    return low


def with_drawn_steps(
    views: Views, step: Int[Tensor, "B T"], drawn: Bool[Tensor, "B N"], chance: Float[Tensor, "B N"]
) -> Views:
    """Return views that score only the steps that were `drawn`, each with its `chance`."""
    weight = torch.where(drawn, 1 / chance, 0).float()
    weight = torch.where(step >= 0, weight.gather(1, step.clamp(min=0)), 0)
    return replace(views, coefficients=views.coefficients * drawn.T[..., None], inverse_chances=weight[None])
