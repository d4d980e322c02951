"""Rollouts of `renoise`: their one view replays every step, and scores the accepted draws.

A step draws a token at every position, and random tokens. Only the draws at accepted positions are used. The accepted
positions and the end of a canvas are functions of the logits, and random tokens do not depend on the weights. So a
rollout's log-prob is the sum of log p(token) over steps and accepted positions, at the step's temperature. Each step's
state includes the logits of the step before, which are recomputed step by step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.likelihoods.views import View, ViewFeature, ViewStates
from dllm_rl.models.base import Policy
from dllm_rl.models.denoiser import Prefix, backward_through, conditioning
from dllm_rl.models.logprobs import TokenLogprob
from dllm_rl.types import Renoised, Rollout, Views

SELF_CONDITIONING = ("detached", "full")


@dataclass(frozen=True)
class Replayed(ViewFeature):
    """Feature of the view that replays every step of `renoise`.

    Args:
        full: Differentiate through the self-conditioning. False: the gradient stops at the step before.
        steps: Largest number of steps, over all canvases.
    """

    is_per_token: ClassVar[bool] = False  # a contribution is a sum over a position's draws

    full: bool
    steps: int

    @property
    def num_forwards(self) -> int:
        return self.steps

    def apply_to(self, view: View, number: int) -> View:
        return Replay(view.masked, view.scored, full=self.full)


def renoised_view(rollout: Rollout, *, full: bool) -> Views:
    """Return the one view, of all steps, of a rollout of `renoise`."""
    part = renoised(rollout)
    scored = (part.drawn >= 0).any(-1)
    count = int(part.block.amax() + 1) * part.seen.shape[2]
    return Views(torch.zeros_like(scored)[None], scored.float()[None], features=(Replayed(full, count),))


def renoised(rollout: Rollout) -> Renoised:
    """Return the record of `renoise`, which must exist."""
    assert rollout.renoised is not None, "only `renoise` records its steps"
    return rollout.renoised


class Step(NamedTuple):
    """A step of R rows: the accepted draws, and the log-probs of all draws at these positions."""

    places: Int[Tensor, "R C"]  # columns of the rollout
    scored: Bool[Tensor, "R C"]
    logprobs: Float[Tensor, "R C"]  # nats, 0 where not scored


@dataclass(frozen=True)
class Replay(View):
    """The view of all steps, which takes one forward for each."""

    full: bool = False

    def seen(self, policy: Policy, rollout: Rollout) -> Int[Tensor, "B T"]:
        """Return the tokens that the encoder reads."""
        return rollout.tokens

    def run(self, policy: Policy, rollout: Rollout, at: Bool[Tensor, "B T"]) -> ViewStates | None:
        raise ValueError("a corrector with needs_entropy does not go with renoise, whose view is several forwards")

    def logprobs(self, policy: Policy, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Return the sum of each position's log-probs in nats; 0 where nothing is scored."""
        out = torch.zeros(self.scored.shape, device=self.scored.device)
        rows = self.scored.any(-1).nonzero()[:, 0]
        for step in steps(policy, rollout.rows(rows), full=self.full):
            # Step by step, as the sampler sums its record.
            out = out.to(step.logprobs.dtype).index_put((rows[:, None], step.places), step.logprobs, accumulate=True)
        return out

    def backward(self, policy: Policy, rollout: Rollout, vector: Float[Tensor, "B T"]) -> None:
        """Compute `logprobs(...).backward(vector)`.

        Unless `full`, memory does not grow with the number of steps: each step is differentiated immediately, down to
        the encoder's cache, and the encoder once, at the end.
        """
        rows = ((vector != 0) & self.scored).any(-1).nonzero()[:, 0]
        if not len(rows):
            return
        vector = vector[rows]
        if self.full:
            part = replace(self, scored=self.scored[rows])
            part.logprobs(policy, rollout.rows(rows)).backward(vector)
            return
        cuts: list[list[tuple[Tensor, Tensor]]] = []
        for step in steps(policy, rollout.rows(rows), full=False, cuts=cuts):
            weights = vector.gather(1, step.places) * step.scored
            if step.logprobs.requires_grad:
                step.logprobs.backward(weights.to(step.logprobs.dtype))
        backward_through(cuts)


def steps(
    policy: Policy, rollout: Rollout, *, full: bool, cuts: list[list[tuple[Tensor, Tensor]]] | None = None
) -> Iterator[Step]:
    """Yield all rows' steps, canvas by canvas.

    With `cuts`, the encoder's cache is cut from its graph, and each cut is appended to the list.
    """
    part = renoised(rollout)
    if not len(rollout.tokens):
        return
    columns, first, canvases, length = _aligned(part)
    tokens = _at(rollout.tokens, columns)
    real = _at(rollout.attention_mask, columns)
    # Rows that ended early read the columns after their end, where nothing is scored: a row with only padding
    # would have no key to attend to.
    real |= torch.arange(columns.shape[1], device=columns.device) >= first
    prefix = Prefix.empty(policy, len(tokens))
    for number in range(canvases):
        begin = first + number * length
        new = slice(0, first) if number == 0 else slice(begin - length, begin)
        prefix.read(policy, tokens[:, new], real[:, new])
        if cuts is not None:
            cuts.append(prefix.cut())
        places = columns[:, begin : begin + length]
        if places.shape[1] < length:
            return
        inside = (places >= 0) & (places < part.block.shape[1])
        where = places.clamp(0, part.block.shape[1] - 1)
        index = where[..., None].expand(-1, -1, part.seen.shape[2])
        seen = part.seen.gather(1, index).masked_fill(~inside[..., None], -1).long()
        drawn = part.drawn.gather(1, index).masked_fill(~inside[..., None], -1).long()
        taken = int((seen >= 0).any(0).any(0).sum())
        previous = None
        for step, temperature in enumerate(part.temperatures[:taken]):
            logits = prefix.logits(policy, seen[..., step].clamp(min=0), previous, temperature)
            scored = drawn[..., step] >= 0
            flat = TokenLogprob.apply(logits.flatten(0, 1), drawn[..., step].clamp(min=0).flatten())
            yield Step(where, scored, flat.view(scored.shape).masked_fill(~scored, 0.0))
            previous = conditioning(policy, logits if full else logits.detach())


def _aligned(part: Renoised) -> tuple[Int[Tensor, "R W"], int, int, int]:
    """Return columns at which all completions begin together, that column, and the canvases' number and length.

    Columns outside of the rollout are negative, or beyond its width.
    """
    there = part.block >= 0
    starts = there.long().argmax(-1)
    length = int((part.block == 0).sum(-1).amax())
    first, canvases, apart = torch.stack([starts.amax(), part.block.amax() + 1, starts.amax() - starts.amin()]).tolist()
    columns = torch.arange(first + canvases * length, device=part.block.device).expand(len(part.block), -1)
    return columns - (first - starts)[:, None] if apart else columns, first, canvases, length


def _at(values: Tensor, columns: Int[Tensor, "R W"]) -> Tensor:
    """Return values at these columns; 0 or False outside of the rollout."""
    wide = values.shape[1]
    found = values.gather(1, columns.clamp(0, wide - 1))
    return found.masked_fill((columns < 0) | (columns >= wide), 0)
