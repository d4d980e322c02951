"""Sequence-likelihood estimators: masks are drawn once, as data, and every policy is scored under the same ones.

An estimator is a number of views of the batch. In view n some positions are masked and some are scored; `combine`
turns the views' log-probs into one contribution per position, whose sum over T estimates log p(completion | prompt).
Keeping views apart is what lets the learner take them one at a time, in constant memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from dllm_rl.head import token_logprobs
from dllm_rl.policies import Policy
from dllm_rl.types import Noise, Rollout, row_seeds


def weighted_sum(scores: Float[Tensor, "N B T"], noise: Noise) -> Float[Tensor, "B T"]:
    """sum_n weight_n * log p(y_t | view n), per position, nats."""
    return (scores * noise.weight).sum(0)


@dataclass(frozen=True)
class LikelihoodEstimator:
    """A named pair of pure functions: draw the masks, and combine the views' log-probs.

    Contract: contributions are zero off the completion; both sides of any ratio use the same estimator and noise.
    """

    name: str
    draw: Callable[[Rollout, Generator], Noise]
    combine: Callable[[Tensor, Noise], Tensor] = weighted_sum
    attention: tuple[str, ...] = ("full", "block_causal")

    @torch.no_grad()
    def scores(
        self, policy: Policy, rollout: Rollout, noise: Noise, *, micro_batch_size: int | None = None
    ) -> Float[Tensor, "N B T"]:
        """log p(y_t | view n) in nats where view n scores t, 0 elsewhere. No gradient."""
        self.check(policy)
        out = torch.zeros(noise.weight.shape, device=rollout.tokens.device)
        for rows in row_chunks(len(rollout.tokens), micro_batch_size, rollout.group_size, rollout.tokens.device):
            part, masks = rollout.rows(rows), noise.rows(rows)
            for n in range(len(masks.masked)):
                out[n, rows] = score_view(policy, part, masks.masked[n], masks.weight[n] != 0)
        return out

    def logprobs(
        self, policy: Policy, rollout: Rollout, noise: Noise, *, micro_batch_size: int | None = None
    ) -> Float[Tensor, "B T"]:
        """Per-position contributions to the estimate, nats; their sum over T is the sequence's. No gradient."""
        return self.combine(self.scores(policy, rollout, noise, micro_batch_size=micro_batch_size), noise)

    def check(self, policy: Policy) -> None:
        if policy.spec.attention not in self.attention:
            raise ValueError(
                f"likelihood={self.name!r} is for {' or '.join(self.attention)} attention, but the policy's is "
                f"{policy.spec.attention!r}; use {'causal()' if policy.spec.attention == 'causal' else 'trajectory()'}"
            )


def row_chunks(num_rows: int, micro_batch_size: int | None, group_size: int, device) -> tuple[Tensor, ...]:
    """Row indices in chunks of whole groups, of at most micro_batch_size rows (but at least one group)."""
    if not num_rows:
        return ()
    size = num_rows if micro_batch_size is None else max(group_size, micro_batch_size // group_size * group_size)
    return torch.arange(num_rows, device=device).split(size)


def score_view(
    policy: Policy, rollout: Rollout, masked: Bool[Tensor, "B T"], scored: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """One forward: log p of the rollout's tokens at `scored`, with `masked` positions hidden; nats, 0 elsewhere.

    Where all completions of a prompt look the same to the model, one forward serves the group; rows without a scored
    position are left out.
    """
    mask_id = policy.spec.mask_id
    tokens = rollout.tokens if mask_id is None else rollout.tokens.masked_fill(masked, mask_id)
    group, attention_mask = rollout.group_size, rollout.attention_mask
    first = lambda x: x[::group].repeat_interleave(group, dim=0)  # noqa: E731
    if group > 1 and torch.equal(tokens, first(tokens)) and torch.equal(attention_mask, first(attention_mask)):
        states = policy.hidden(tokens[::group], attention_mask[::group]).repeat_interleave(group, dim=0)[scored]
    else:
        live = scored.any(-1)
        if live.all():
            states = policy.hidden(tokens, attention_mask)[scored]
        elif live.any():
            states = policy.hidden(tokens[live], attention_mask[live])[scored[live]]
        else:
            return torch.zeros(scored.shape, device=scored.device)
    logp = token_logprobs(policy, states, rollout.tokens[scored], rollout.processors)
    return torch.zeros(scored.shape, device=scored.device).masked_scatter(scored, logp)


def _uniforms(mask: Bool[Tensor, "B T"], generators: list[Generator]) -> Float[Tensor, "B T"]:
    """Uniforms in [0, 1) where `mask` holds, +inf elsewhere; row i's come from its own generator."""
    out = torch.full(mask.shape, torch.inf)
    for row, marked, generator in zip(out, mask.cpu(), generators, strict=True):
        row[marked] = torch.rand(int(marked.sum()), generator=generator)
    return out.to(mask.device)


def _generators(rollout: Rollout, generator: Generator) -> list[Generator]:
    return [torch.Generator().manual_seed(int(s)) for s in row_seeds(generator, len(rollout.tokens))]


def causal() -> LikelihoodEstimator:
    """log p(y) = sum_t log p(y_t | prompt, y_<t). One forward, exact. For autoregressive policies."""

    def draw(rollout: Rollout, generator: Generator) -> Noise:
        scored = rollout.completion_mask[None]
        return Noise(torch.zeros_like(scored), scored.float())

    return LikelihoodEstimator("causal", draw, attention=("causal",))


def one_step(*, prompt_mask: float = 0.15) -> LikelihoodEstimator:
    """d1's mean-field estimate: sum_t log p(y_t | prompt, all of y masked), each prompt token masked with probability
    `prompt_mask`. One forward; biased, low variance. Source: arXiv 2504.12216 [paper]."""
    if not 0 <= prompt_mask < 1:
        raise ValueError(f"prompt_mask={prompt_mask} must lie in [0, 1)")

    def draw(rollout: Rollout, generator: Generator) -> Noise:
        prompt = rollout.attention_mask & ~rollout.completion_mask
        hidden = _uniforms(prompt, _generators(rollout, generator)) < prompt_mask
        return Noise((hidden | rollout.completion_mask)[None], rollout.completion_mask[None].float())

    return LikelihoodEstimator("one_step", draw)


def coupled(*, num_samples: int = 1) -> LikelihoodEstimator:
    """The any-order ELBO from a mask and its complement, so that every token is scored.

    k is stratified over 0..L, m holds exactly k of the L completion positions, and with l_i(m) = log p(y_i | y, m masked)
        ( sum_{i in m} l_i(m) (L+1)/k + sum_{i not in m} l_i(m^c) (L+1)/(L-k) ) / 2,
    a term with an empty set being 0. Unbiased for the ELBO; 2 * num_samples forwards. Source: ESPO's form [paper].
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")

    def draw(rollout: Rollout, generator: Generator) -> Noise:
        completion, generators = rollout.completion_mask, _generators(rollout, generator)
        size = completion.sum(-1, keepdim=True)
        masked, weight = [], []
        for j in range(num_samples):
            u = torch.stack([torch.rand(1, generator=g) for g in generators]).to(size.device)
            k = ((j + u) / num_samples * (size + 1)).long().clamp(max=size)
            order = _uniforms(completion, generators).argsort(-1).argsort(-1)
            for mask, count in ((completion & (order < k), k), (completion & (order >= k), size - k)):
                masked.append(mask)
                weight.append(mask * (size + 1) / (2 * num_samples * count.clamp(min=1)))
        return Noise(torch.stack(masked), torch.stack(weight))

    return LikelihoodEstimator("coupled", draw)


def trajectory(*, num_segments: int | None = None) -> LikelihoodEstimator:
    """Replay the recorded unmasking: in segment s, score the tokens committed there, everything from s on masked.

    With every step its own segment (None) it is the exact log-probability of the tokens given the order; with
    num_segments each row's steps are merged into that many equal parts. One forward a segment. Sources: TraceRL,
    d2's StepMerge [paper].
    """
    if num_segments is not None and num_segments < 1:
        raise ValueError(f"num_segments={num_segments} must be at least 1, or None for every step")

    def draw(rollout: Rollout, generator: Generator) -> Noise:
        segment = rollout.unmask_step
        if num_segments is not None:
            steps = rollout.unmask_step.amax(-1, keepdim=True) + 1
            segment = torch.where(segment < 0, -1, segment * num_segments // steps.clamp(min=1))
        index = torch.arange(int(segment.max()) + 1, device=segment.device)[:, None, None]
        masked = rollout.completion_mask & (segment >= index)
        return Noise(masked, (rollout.completion_mask & (segment == index)).float())

    return LikelihoodEstimator("trajectory", draw)
