"""SPG's and GDPO's likelihoods: bounds of the log-likelihood other than `ELBO` and `Coupled`.

`Sandwich`, `EUBO` and `BlockELBO` are those of SPG (arXiv 2510.09541), and `Quadrature` that of GDPO (2510.08554). They
serve to repeat these papers: no run was seen to gain from them.

python -m recipes.examples.bounds     checks them with `check_estimator`
RECIPE.py --likelihood recipes.examples.bounds.Sandwich --likelihood.mix 0.5
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl import Coupled, LikelihoodEstimator, Prompts, Rollout, Unmask, option, tiny_masked_lm
from dllm_rl.likelihoods import masks
from dllm_rl.testing import check_estimator
from dllm_rl.types.scoring import Views, ViewTensors


def block_view(
    completion: Bool[Tensor, "B T"],
    keys: Float[Tensor, "B T"],
    u_block: Float[Tensor, "B 1"],
    u_count: Float[Tensor, "B 1"],
    *,
    block_size: int,
) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Choose one of the row's N blocks uniformly, and mask k of its L positions, with weight N L/k.

    Earlier blocks are not masked. Later blocks are masked, and not scored.
    """
    block = masks.block_index(completion, block_size)
    num_blocks = block.amax(-1, keepdim=True) + 1
    chosen = masks.uniform_index(u_block, num_blocks)
    inside = completion & (block == chosen)
    k = 1 + masks.uniform_index(u_count, inside.sum(-1, keepdim=True))
    masked, weight = masks.k_masked_view(inside, keys, k)
    return masked | (completion & (block > chosen)), weight * num_blocks


class Quadrature(LikelihoodEstimator):
    """Estimate the any-order ELBO by Gauss-Legendre quadrature over the share of masked tokens.

    Use it to estimate the ELBO in few forwards, if a small bias is acceptable. The ELBO is the integral over t in
    [0, 1] of E_m[(L/k) sum_{i in m} l_i(m)] with k = floor(t L) + 1. With nodes t_n and weights w_n the estimate is
    sum_n w_n (L/k_n) sum_{i in m_n} l_i(m_n), k_n = floor(t_n L) + 1, with one random mask of k_n tokens per node. The
    quadrature rule and the rounding of k_n add a bias that more masks do not reduce.

    Args:
        nodes: Number of nodes of the quadrature; each takes one mask and one forward.

    Source: SDMC, from "GDPO" (arXiv 2510.08554) [paper]; `Decoupled` implements another method named GDPO. The paper
    masks tokens independently; masking exactly k tokens is [ours].
    """

    nodes: int = option(default=3, at_least=1)

    reads_order = False

    def draw_views(self, rollout: Rollout, generator: torch.Generator) -> Views:
        completion = rollout.completion_mask
        generators = masks.row_generators(rollout, generator)
        size = completion.sum(-1, keepdim=True)
        views = []
        points, node_weights = np.polynomial.legendre.leggauss(self.nodes)  # for [-1, 1]: the weights add up to 2
        for point, node_weight in zip(points, node_weights, strict=True):
            t = torch.full(size.shape, (point + 1) / 2, dtype=torch.float64, device=size.device)
            keys = masks.uniforms_at(completion, generators)
            masked, weight = masks.k_masked_view(completion, keys, 1 + masks.uniform_index(t, size))
            views.append((masked, node_weight / 2 * weight))
        return masks.stack_views(views, samples=1)


class BlockELBO(LikelihoodEstimator):
    """Estimate the ELBO of block-wise decoding: one block is partly masked, and later blocks are fully masked.

    Use it for rollouts of `Unmask` with a `block_size`. A sample draws one of N blocks, b ~ U{1..N}, stratified over
    the samples. Of the L_b tokens of this block it masks a random set m of k tokens, k ~ U{1..L_b}. The estimate is the
    mean over samples of
        N (L_b / k) sum_{i in m} l_i(m and all later blocks).
    It is unbiased for a lower bound of the block-wise sampler's likelihood: the sum of each block's any-order ELBO
    given the earlier blocks. The first block starts at the completion's first token, as in `Unmask` for a model with
    full attention. Of a model with blocks, whose first one may begin in the prompt, `Trajectory` scores the blocks.

    Args:
        block_size: Number of tokens of a block.
        num_samples: Number of masks, and of forwards. If it equals the number of blocks, every block is scored.

    Source: SPG, arXiv 2510.09541 [paper]. SPG's code also scores later blocks; scoring only the drawn block is [ours].
    """

    block_size: int = option(at_least=1)
    num_samples: int = option(default=2, at_least=1)

    reads_order = False
    supported_attention = ("full",)

    def draw_views(self, rollout: Rollout, generator: torch.Generator) -> Views:
        completion = rollout.completion_mask
        generators, device = masks.row_generators(rollout, generator), completion.device
        u_block = masks.uniforms_per_row(generators, self.num_samples, stratified=True, device=device)
        # k is not stratified: early blocks would always have few masked positions, and late blocks many.
        u_count = masks.uniforms_per_row(generators, self.num_samples, stratified=False, device=device)
        views = []
        for sample_block, sample_count in zip(u_block, u_count, strict=True):
            keys = masks.uniforms_at(completion, generators)
            views.append(block_view(completion, keys, sample_block, sample_count, block_size=self.block_size))
        return masks.stack_views(views, samples=self.num_samples)


def upper_bound(scores: Float[Tensor, "N B T"], views: Views, *, beta: float) -> Float[Tensor, "B T"]:
    """Return (1/beta) log sum_n coefficient_n p_i(view n)^beta per position, in nats; 0 if no view scores it."""
    is_scored = views.coefficients > 0
    terms = torch.where(is_scored, beta * scores + views.coefficients.where(is_scored, 1).log(), -torch.inf)
    unscored = ~is_scored.any(0)
    # The terms of a position that no view scores, or of a token of probability 0, are all -inf. Their logsumexp would
    # have a NaN gradient, so they are first replaced by 0.
    is_zero = (terms == -torch.inf).all(0)
    bound = terms.masked_fill(is_zero, 0).logsumexp(0) / beta
    return torch.where(unscored, 0, bound.masked_fill(is_zero, -torch.inf))


class _FromBase(LikelihoodEstimator):
    """An estimator that combines the views of another one, `base`, in its own way."""

    base: LikelihoodEstimator = Coupled()

    @property
    def supported_attention(self) -> tuple[str, ...]:
        return self.base.supported_attention

    @property
    def replays_steps(self) -> bool:
        return self.base.replays_steps

    @property
    def is_random(self) -> bool:
        return self.base.is_random

    @property
    def reads_order(self) -> bool:
        return self.base.reads_order

    @property
    def required_block_size(self) -> int | None:
        return self.base.required_block_size

    def draw_views(self, rollout: Rollout, generator: torch.Generator) -> Views:
        return self.base.draw_views(rollout, generator)


class EUBO(_FromBase):
    """Estimate SPG's evidence upper bound (EUBO) from the masks that another estimator draws.

    Use `Sandwich` instead to apply the upper bound only to rows with a negative advantage. The contribution of position
    i is (1/beta) log sum_n w_n p_i(m_n)^beta. The sum covers the views n of `base` that score position i; m_n is the
    view's mask and w_n its weight. SPG writes the sum as a mean of p_i^beta / t over masks. The cost is the cost of
    `base`, by default Coupled().

    If the sum covers all masks, the result is at least the ELBO, for every beta > 0 (by Jensen's inequality). For
    beta >= L it is an upper bound of log p(y) (by Hoelder's inequality). For beta < L it is certain to be an upper
    bound only if the model's conditionals are consistent, which means that one joint distribution has all of them. A
    network does not guarantee that, so log p(y) may exceed the result [ours]; the bound in SPG's theorem, for
    beta >= 1, has an additional constant. With few masks the result is biased downwards, because it is the log of a
    mean.

    Args:
        beta: Exponent of the probabilities, in [0.01, 1e6].
        base: Estimator that draws the masks and their weights, with its settings: one of ELBO, Coupled, Quadrature
            and BlockELBO. Default: Coupled().

    Source: SPG, arXiv 2510.09541 [paper]. SPG's code divides by the number of scored tokens.
    """

    beta: float = option(default=1.5, at_least=0.01, at_most=10**6)

    def combine(self, scores: Float[Tensor, "N B T"], views: Views) -> Float[Tensor, "B T"]:
        return upper_bound(scores, views, beta=self.beta)


@dataclass(frozen=True)
class UpperBoundWeight(ViewTensors):
    """Weight of the upper bound in each row, in [0, 1]."""

    weight: Float[Tensor, " B"]


class Sandwich(_FromBase):
    """Score rows by the ELBO if their advantage is >= 0, else by mix * EUBO + (1 - mix) * ELBO, as SPG does.

    Use it so that training on a negative advantage lowers an upper bound of the likelihood, and not only the ELBO. Both
    bounds are computed from the same views, which `base` draws (see `EUBO`; by default Coupled()).

    Args:
        beta: Exponent of the upper bound, in [0.01, 1e6].
        mix: Weight of the upper bound, in [0, 1].
        base: Estimator that draws the masks of both bounds, with its settings. Default: Coupled().

    Source: SPG, arXiv 2510.09541, and its code [paper]. Here the estimate enters a clipped ratio, per token, and is not
    divided by the number of tokens [ours].
    """

    beta: float = option(default=1.5, at_least=0.01, at_most=10**6)
    mix: float = option(default=0.5, at_least=0, at_most=1)

    def combine(self, scores: Float[Tensor, "N B T"], views: Views) -> Float[Tensor, "B T"]:
        lower = super().combine(scores, views)
        for feature in views.features:
            if isinstance(feature, UpperBoundWeight):
                return torch.lerp(lower, upper_bound(scores, views, beta=self.beta), feature.weight[:, None].to(lower))
        return lower  # the advantages are not known yet

    def with_advantages(self, views: Views, advantages: Float[Tensor, " B"]) -> Views:
        weight = UpperBoundWeight(self.mix * (advantages < 0).to(views.coefficients))
        return replace(views, features=(*views.features, weight))


if __name__ == "__main__":
    policy = tiny_masked_lm(characters="1234.=")
    prompts = Prompts.from_ids([[3, 4, 5], [6, 5, 4]], pad_id=policy.pad_id, num_generations=2, seeds=range(4))
    rollout = Unmask(max_new_tokens=6, temperature=1.0)(policy, prompts, torch.Generator())
    for estimator in (Quadrature(), BlockELBO(block_size=3), EUBO(), Sandwich(base=BlockELBO(block_size=2))):
        check_estimator(estimator, policy, rollout)
