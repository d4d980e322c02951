"""Commit rules that rewrite tokens of a block: ReMDM masks them again, LLaDA2.1 edits them.

In addition to the inputs of every commit rule (`rules`), such a rule takes exactly one of these three inputs, by name.
The input determines what happens to the written positions that the rule picks. Scores then also cover written
positions. The rollout records every write and remasking as an event (`Rollout.events`).
    remaskable   (B, L)  written positions; picked ones are masked again, and the row uses all its steps
    redrawable   (B, L)  written positions; picked ones are redrawn, and the row uses all its steps
    replaceable  (B, L)  written positions whose newly drawn token differs from their token; picked ones take the new
                         token, and the row leaves its block when nothing is masked and a step changed nothing.
                         `Trajectory` refuses such rollouts

A rule may also take one or both of these inputs:
    steps        (B,)    total number of steps of the block
    uniforms     (B, L)  fresh random numbers in [0, 1); with rank=RandomOrder() they are the same numbers as the scores

docs/papers.md explains the tags [paper] and [ours].
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.records import option
from dllm_rl.samplers.canvas import Decision, StepPositions, StepRows
from dllm_rl.samplers.rules import (
    REWRITES,
    Commit,
    Confidence,
    Counts,
    MaxProb,
    PositionMask,
    RandomOrder,
    Schedule,
    Scores,
    above_threshold,
)
from dllm_rl.types.rollouts import Events


class Remask(Commit):
    """Mask written positions again with probability sigma, and write masked ones (ReMDM's capped remasking).

    Use it to let a sampler correct itself with more steps; `Trajectory` scores its rollouts. It needs
    rank=RandomOrder(), whose scores are uniform random numbers.

    In step j of n, counted from 0, let alpha_t = j/n and alpha_s = (j+1)/n be the shares of written positions before
    and after the step. A written position is masked again with probability sigma, and a masked position is written with
    probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), each independently. The last step masks nothing again.

    Args:
        eta: Upper limit of sigma, in [0, 1]: sigma = min(eta, (1 - alpha_s) / alpha_t). With eta=0 nothing is masked
            again, as under `Origin`.

    Source: ReMDM, arXiv 2503.00307 [paper]; alpha linear over the block's steps [ours].
    """

    eta: float = option(at_least=0, at_most=1)

    order = "deterministic"
    required_ranks = (RandomOrder(),)

    def __call__(
        self, scores: Scores, masked: PositionMask, steps_left: Counts, remaskable: PositionMask, steps: Counts
    ) -> PositionMask:
        steps_done = (steps - steps_left).clamp(min=0)
        sigma = ((steps_left - 1) / steps_done.clamp(min=1)).clamp(max=self.eta)
        write_probability = (1 + sigma * steps_done) / steps_left
        return masked & (scores >= 1 - write_probability[:, None]) | remaskable & (scores >= 1 - sigma[:, None])


class Edit(Commit):
    """Commit masked positions as `Threshold` does, and replace written tokens (LLaDA2.1's editing).

    A step draws a token for written positions too. It replaces the written token if it differs and has a probability
    >= tau_edit.

    Use it only for models trained to see wrong tokens, such as LLaDA2.1: editing ruins other models' answers.
    `Trajectory` refuses its rollouts; use `SoftEdit` if the probability of an edit must be known. Edits continue
    after the last mask is written, while steps remain and a step changes something. The rule needs the
    log-probabilities of the drawn tokens as scores (rank=Confidence(); MaxProb() at temperature 0).

    Args:
        tau: Lowest probability at which a masked position is written, in (0, 1].
        tau_edit: Lowest probability of the drawn token at which it replaces the written token, in [0, 1].

    Source: LLaDA2.1, arXiv 2602.08676 [paper]. LLaDA2.1 limits the edits by max_post_steps, this rule by the block's
    steps [ours].
    """

    tau: float = option(above=0, at_most=1)
    tau_edit: float = option(default=0.5, at_least=0, at_most=1)

    order = "deterministic"
    adaptive = True
    required_ranks = (Confidence(), MaxProb())

    def __call__(
        self, scores: Scores, masked: PositionMask, steps_left: Counts, replaceable: PositionMask
    ) -> PositionMask:
        log_tau_edit = torch.tensor(self.tau_edit, dtype=torch.float64).log().item()
        committed = above_threshold(scores.masked_fill(~masked, -torch.inf), masked, steps_left, self.tau)
        return committed | replaceable & (scores >= log_tau_edit)


class SoftEdit(Commit):
    """Commit masked positions as `Schedule` does, and redraw each written token independently with probability `rate`.

    Use it in place of `Edit` if the probability of an edit must be known. It has no threshold: a token changes if
    another token is drawn. `Trajectory` scores its rollouts: exactly with rank=RandomOrder(); with MaxProb() it
    scores the tokens given the order. A redraw of the same token is recorded as an event too.

    Args:
        rate: Probability of a redraw, in [0, 1]. A written position becomes token v with probability rate * p(v), where
            p is the sampling distribution. With rate=0 the rule is `Schedule` with the same number of steps.

    Source: ours.
    """

    rate: float = option(at_least=0, at_most=1)

    order = "deterministic"

    def __call__(
        self, scores: Scores, masked: PositionMask, steps_left: Counts, redrawable: PositionMask, uniforms: Scores
    ) -> PositionMask:
        committed = Schedule()(scores.masked_fill(~masked, -torch.inf), masked, steps_left)
        return committed | redrawable & (uniforms < self.rate)


def revise(
    at: StepPositions,
    step: StepRows,
    scores: Float[Tensor, "R L"],
    commit: Commit,
    inputs: dict[str, Tensor],
    differs: Bool[Tensor, " K"] | None,
    contradicts: Bool[Tensor, ""],
) -> Decision:
    """Apply a commit rule that rewrites tokens, in one step.

    Args:
        at: Positions of the step.
        step: Its rows, on the host.
        scores: Scores of the rank.
        commit: The rule.
        inputs: Its inputs `steps` and `uniforms`, if it takes them.
        differs: Whether the token drawn at each of the K positions differs from the one there. None: none was drawn.
        contradicts: Set to True if the rule contradicts what it declares.

    Raises:
        ValueError: The last step of a block masks a position again.
    """
    assert at.rewritable is not None, "the rule rewrites"
    (kind,) = commit.reads.intersection(REWRITES)
    rewritable = at.rewritable
    if kind == "replaceable":
        assert differs is not None, "tokens are drawn first"
        is_different = torch.zeros_like(rewritable)
        is_different[at.row_index, at.offset] = differs
        rewritable = rewritable & is_different
    picked = commit.choose(contradicts, scores, at.masked, at.steps_left, **{kind: rewritable}, **inputs)
    remasked = picked & at.rewritable & (kind == "remaskable")
    chosen = picked & (at.masked | rewritable) & ~remasked
    # The host waits for the device once for all three counts.
    num_unmasked, num_chosen, num_remasked = torch.stack([chosen & at.masked, chosen, remasked]).sum(-1).cpu()
    if ((step.steps_left == 1) & (num_remasked > 0)).any():
        raise ValueError(
            f"commit={commit.name} masked positions again in the last step of a block, where it must not do so"
        )
    return Decision(
        chosen,
        at.indices_of(chosen, int(num_chosen.sum())),
        num_unmasked - num_remasked,
        remasked=at.indices_of(remasked, int(num_remasked.sum())),
        # A row uses all its steps, except that under `replaceable` it leaves when a step changes nothing.
        stays_open=(num_chosen > 0) | (kind != "replaceable"),
    )


def packed_events(records: list[tuple[Tensor, ...]], shape: torch.Size, *, depends_on_tokens: bool) -> Events:
    """Collect the events of each position, in order of time, from the records of all steps.

    The result has the shape (B, L, W), where W is the largest number of events of a position. A record is (rows,
    offsets, steps, tokens, log-probs) of the positions that a step changed. The host waits for the device, because it
    does not know W.
    """
    rows, offsets, steps, tokens, logprobs = map(torch.cat, zip(*records, strict=True))
    position = rows * shape[1] + offsets
    order = position.argsort(stable=True)  # stable: the events of a position stay in order of time
    position = position[order]
    # Number each position's events from 0. Because `position` is sorted, searchsorted returns its first event.
    slot = torch.arange(len(order), device=order.device) - torch.searchsorted(position, position)
    size = (*shape, int(F.pad(slot, (0, 1)).max()) + 1)

    def pack(values: Tensor, fill: int) -> Tensor:
        packed = torch.full(size, fill, dtype=values.dtype, device=order.device)
        packed[rows[order], offsets[order], slot] = values[order]
        return packed

    return Events(pack(steps.int(), -1), pack(tokens.int(), -1), pack(logprobs, 0), depends_on_tokens)
