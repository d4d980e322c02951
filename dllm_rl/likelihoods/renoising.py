"""The view of a rollout of `Renoise`: it replays every step, and scores the accepted draws.

A step draws a token at every position, accepts some of the draws, and replaces the others by random tokens. The
accepted positions and the end of a canvas are functions of the logits, and random tokens do not depend on the weights.
The log-prob of a rollout is therefore the sum of log p(token) over steps and accepted positions, at the step's
temperature. A step also reads the previous step's logits (self-conditioning), which are recomputed step by step.

A canvas is a part of the completion that is denoised together.
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
from dllm_rl.types.rollouts import Renoised, Rollout
from dllm_rl.types.scoring import Views


@dataclass(frozen=True)
class RenoiseReplay(ViewFeature):
    """Feature of the view that replays every step of `Renoise`.

    Args:
        full: Whether to differentiate through the self-conditioning. If False, the gradient stops at the previous
            step's logits.
        steps: Total number of steps of all canvases.
    """

    is_per_token: ClassVar[bool] = False  # a contribution is a sum over a position's draws

    full: bool
    steps: int

    @property
    def num_forwards(self) -> int:
        return self.steps

    def apply_to(self, view: View, number: int) -> View:
        return RenoiseView(view.masked, view.scored, full=self.full)


def renoise_views(rollout: Rollout, *, full: bool) -> Views:
    """Return the views of a rollout of `Renoise`: a single one, which replays all steps."""
    record = renoise_record(rollout)
    scored = (record.drawn >= 0).any(-1)
    num_steps = int(record.block.amax() + 1) * record.seen.shape[2]
    return Views(torch.zeros_like(scored)[None], scored.float()[None], features=(RenoiseReplay(full, num_steps),))


def renoise_record(rollout: Rollout) -> Renoised:
    """Return the steps that `Renoise` recorded, which must exist."""
    assert rollout.renoised is not None, "only `Renoise` records its steps"
    return rollout.renoised


class Step(NamedTuple):
    """One step of the C positions of a canvas, for R rows.

    Attributes:
        columns: Columns of the positions in the rollout.
        scored: Positions whose draw was accepted.
        logprobs: Log-prob of the draw in nats; 0 if it was not accepted.
    """

    columns: Int[Tensor, "R C"]
    scored: Bool[Tensor, "R C"]
    logprobs: Float[Tensor, "R C"]


@dataclass(frozen=True)
class RenoiseView(View):
    """The view that replays all steps. It takes one forward per step."""

    full: bool = False

    def inputs_and_targets(self, policy: Policy, rollout: Rollout) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Return the tokens that the encoder reads, which are the tokens to score."""
        return rollout.tokens, rollout.tokens

    def run(self, policy: Policy, rollout: Rollout, at: Bool[Tensor, "B T"]) -> ViewStates | None:
        """Raise ValueError: a replay has no single forward whose states could be returned."""
        raise ValueError(
            "needs_entropy of a corrector reads the states of one forward, and renoise's view takes several: leave it "
            "out"
        )

    def logprobs(self, policy: Policy, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Return the sum of each position's log-probs in nats; 0 where nothing is scored."""
        out = torch.zeros(self.scored.shape, device=self.scored.device)
        rows = self.scored.any(-1).nonzero()[:, 0]
        for step in replay_steps(policy, rollout.rows(rows), full=self.full):
            # Step by step, in the order in which the sampler adds up its record.
            out = out.to(step.logprobs.dtype).index_put((rows[:, None], step.columns), step.logprobs, accumulate=True)
        return out

    def backward(self, policy: Policy, rollout: Rollout, grad_output: Float[Tensor, "B T"]) -> None:
        """Compute `logprobs(...).backward(grad_output)`.

        With full=False, memory does not grow with the number of steps: the gradient of each step goes to the encoder's
        cache immediately, and from there through the encoder once, at the end.
        """
        rows = ((grad_output != 0) & self.scored).any(-1).nonzero()[:, 0]
        if not len(rows):
            return
        grad_output = grad_output[rows]
        if self.full:
            row_view = replace(self, scored=self.scored[rows])
            row_view.logprobs(policy, rollout.rows(rows)).backward(grad_output)
            return
        cuts: list[list[tuple[Tensor, Tensor]]] = []
        for step in replay_steps(policy, rollout.rows(rows), full=False, cuts=cuts):
            if step.logprobs.requires_grad:
                step.logprobs.backward(grad_output.gather(1, step.columns).to(step.logprobs.dtype))
        backward_through(cuts)


def replay_steps(
    policy: Policy, rollout: Rollout, *, full: bool, cuts: list[list[tuple[Tensor, Tensor]]] | None = None
) -> Iterator[Step]:
    """Yield the steps of all rows, canvas by canvas.

    With `cuts`, the encoder's cache is cut from its graph, and each cut is appended to the list
    (`models.denoiser.backward_through`).
    """
    record = renoise_record(rollout)
    if not len(rollout.tokens):
        return
    columns, start, num_canvases, length = _align_columns(record)
    tokens = _gather_columns(rollout.tokens, columns)
    attention_mask = _gather_columns(rollout.attention_mask, columns)
    # Rows that ended early read the columns after their end, where nothing is scored: a row with only padding
    # would have no key to attend to.
    attention_mask |= torch.arange(columns.shape[1], device=columns.device) >= start
    prefix = Prefix.empty(policy, len(tokens))
    for canvas in range(num_canvases):
        begin = start + canvas * length
        # Before the first canvas the encoder reads the prompt, and before each later canvas the previous one.
        new_columns = slice(0, start) if canvas == 0 else slice(begin - length, begin)
        prefix.read(policy, tokens[:, new_columns], attention_mask[:, new_columns])
        if cuts is not None:
            cuts.append(prefix.detach_cache())
        canvas_columns = columns[:, begin : begin + length]
        if canvas_columns.shape[1] < length:
            return
        width = record.block.shape[1]
        is_inside = (canvas_columns >= 0) & (canvas_columns < width)
        canvas_columns = canvas_columns.clamp(0, width - 1)
        index = canvas_columns[..., None].expand(-1, -1, record.seen.shape[2])
        seen = record.seen.gather(1, index).masked_fill(~is_inside[..., None], -1).long()
        drawn = record.drawn.gather(1, index).masked_fill(~is_inside[..., None], -1).long()
        num_steps = int((seen >= 0).any(0).any(0).sum())
        previous_logits = None
        for step, temperature in enumerate(record.temperatures[:num_steps]):
            logits = prefix.logits(policy, seen[..., step].clamp(min=0), previous_logits, temperature)
            scored = drawn[..., step] >= 0
            flat_logprobs = TokenLogprob.apply(logits.flatten(0, 1), drawn[..., step].clamp(min=0).flatten())
            logprobs = flat_logprobs.view(scored.shape).masked_fill(~scored, 0.0)
            yield Step(canvas_columns, scored, logprobs)
            previous_logits = conditioning(policy, logits if full else logits.detach())


def _align_columns(record: Renoised) -> tuple[Int[Tensor, "R W"], int, int, int]:
    """Shift the rows so that all completions begin at the same column.

    Returns:
        The rollout's column at each shifted column, which is negative or beyond the width outside the rollout; the
        shifted column at which all completions begin; the number of canvases; the length of a canvas.
    """
    row_starts = (record.block >= 0).long().argmax(-1)
    length = int((record.block == 0).sum(-1).amax())
    latest = row_starts.amax()
    # The host waits for the device once: three numbers return in one copy.
    start, num_canvases, shift = torch.stack([latest, record.block.amax() + 1, latest - row_starts.amin()]).tolist()
    columns = torch.arange(start + num_canvases * length, device=record.block.device).expand(len(record.block), -1)
    if shift:
        columns = columns - (start - row_starts)[:, None]
    return columns, start, num_canvases, length


def _gather_columns(values: Tensor, columns: Int[Tensor, "R W"]) -> Tensor:
    """Return the values at these columns; 0 or False outside the rollout."""
    width = values.shape[1]
    gathered = values.gather(1, columns.clamp(0, width - 1))
    return gathered.masked_fill((columns < 0) | (columns >= width), 0)
