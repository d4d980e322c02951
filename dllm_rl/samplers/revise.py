"""Commit rules that rewrite tokens of a block: ReMDM masks them again, LLaDA2.1 edits them.

Such a rule takes one of `remaskable`, `redrawable` and `replaceable` by name, in addition to the inputs of every
commit rule (`rules`). Scores then also cover written positions. The rollout records every event (`Rollout.events`).
    remaskable   (B, L)  written positions; picked ones are masked again, and the row uses all its steps
    redrawable   (B, L)  written positions; picked ones are redrawn, and the row uses all its steps
    replaceable  (B, L)  positions whose proposal differs from the token written; picked ones take the proposal, and the
                      row leaves its block when nothing is masked and a step changed nothing. `trajectory()` refuses it
    steps     (B,)    the block's total steps; optional with each
    uniforms  (B, L)  fresh random numbers in [0, 1); with rank=random they are the scores
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.bounds import Bound, bounded
from dllm_rl.renamed import refuse_renamed
from dllm_rl.samplers.canvas import Decision, Turn
from dllm_rl.samplers.rules import Counts, Places, Scores, check_last_step, name_of, schedule, threshold
from dllm_rl.types import Events

COMMIT_INPUTS = ("remaskable", "redrawable", "replaceable", "steps", "uniforms")
KINDS = frozenset(COMMIT_INPUTS[:3])


@bounded(eta=Bound(at_least=0, at_most=1))
def remask(
    scores: Scores, masked: Places, steps_left: Counts, remaskable: Places, steps: Counts, *, eta: float
) -> Places:
    """Mask written positions again with probability sigma, and write masked ones (ReMDM's capped remasking).

    Use it to let a sampler correct itself with more steps; `trajectory()` scores its rollouts. It needs rank=random,
    whose scores are the uniforms. A masked position is written with probability
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), independently. The written share alpha_t is j/n before step j of n
    and (j+1)/n after it. The last step masks nothing again.

    Args:
        scores: Uniform random numbers (B, L), the scores of rank=random.
        masked: Masked positions (B, L).
        steps_left: Remaining steps of the block (B,), including the current one.
        remaskable: Written positions (B, L).
        steps: Total steps of the block (B,).
        eta: Cap in [0, 1]: sigma = min(eta, (1 - alpha_s) / alpha_t). 0 never masks again and is `origin`.

    Source: ReMDM, arXiv 2503.00307 [paper]; alpha linear over the block's steps [ours].
    """
    done = (steps - steps_left).clamp(min=0)
    sigma = ((steps_left - 1) / done.clamp(min=1)).clamp(max=eta)
    write = (1 + sigma * done) / steps_left
    return masked & (scores >= 1 - write[:, None]) | remaskable & (scores >= 1 - sigma[:, None])


@bounded(tau=Bound(above=0, at_most=1), tau_edit=Bound(at_least=0, at_most=1))
def edit(
    scores: Scores, masked: Places, steps_left: Counts, replaceable: Places, *, tau: float, tau_edit: float = 0.5
) -> Places:
    """Commit masked positions as `threshold` does, and replace written tokens (LLaDA2.1's editing).

    A written token is replaced by a different proposal of probability >= tau_edit.

    Use it only for models trained to see wrong tokens, as LLaDA2.1: editing ruins other models' answers.
    `trajectory()` refuses its rollouts; `soft_edit` is the form with a known probability. Edits continue after the last
    mask while steps remain and a step changes something. It needs log-probabilities of the proposal as scores
    (rank=confidence; max_prob at temperature 0).

    Args:
        scores: Log-probabilities (B, L) of the proposals.
        masked: Masked positions (B, L).
        steps_left: Remaining steps (B,); not used.
        replaceable: Written positions (B, L) whose proposal differs from their token.
        tau: Lowest probability at which a masked position is written, in (0, 1].
        tau_edit: Lowest probability of the proposal at which a written token is replaced, in [0, 1].

    Source: LLaDA2.1, arXiv 2602.08676 [paper]; the block's steps are the bound, not max_post_steps [ours].
    """
    log_edit = torch.tensor(tau_edit, dtype=torch.float64).log().item()
    best = threshold(scores.masked_fill(~masked, -torch.inf), masked, steps_left, tau=tau)
    return best | replaceable & (scores >= log_edit)


@bounded(rate=Bound(at_least=0, at_most=1))
def soft_edit(
    scores: Scores, masked: Places, steps_left: Counts, redrawable: Places, uniforms: Scores, *, rate: float
) -> Places:
    """Commit masked positions as `schedule` does, and redraw each written token independently with probability `rate`.

    Use it in place of `edit` if the probability of an edit must be known: the model's probability of another token is
    the chance of an edit, and there is no threshold. With rank=random or max_prob, `trajectory()` scores its rollouts;
    a redraw of the same token counts too.

    Args:
        scores: Scores of the rank (B, L).
        masked: Masked positions (B, L).
        steps_left: Remaining steps of the block (B,), including the current one.
        redrawable: Written positions (B, L).
        uniforms: Fresh random numbers in [0, 1), (B, L).
        rate: Probability of a redraw, in [0, 1]. A written position becomes v with probability rate p(v), p the sampled
            distribution. 0 is `schedule` in the same number of steps.

    Source: ours.
    """
    return schedule(scores.masked_fill(~masked, -torch.inf), masked, steps_left) | redrawable & (uniforms < rate)


def commit_inputs(commit: Callable) -> frozenset[str]:
    """Return the names of COMMIT_INPUTS that a rule takes. Raise ValueError if it takes two of KINDS."""
    parameters = inspect.signature(commit).parameters.values()
    refuse_renamed((p.name for p in parameters if p.default is p.empty), "commit")
    taken = frozenset(p.name for p in parameters if p.name in COMMIT_INPUTS and p.default is p.empty)
    kinds = sorted(taken & KINDS, key=COMMIT_INPUTS.index)
    if len(kinds) > 1:
        raise ValueError(
            f"commit={name_of(commit)} takes {' and '.join(kinds)}, which say different things of a position that it "
            "picks: take one of them"
        )
    return taken


def revise(
    turn: Turn,
    scores: Float[Tensor, "R L"],
    proposed: Int[Tensor, " K"] | None,
    tokens: Int[Tensor, "B T"],
    commit: Callable,
    kind: str,
) -> Decision:
    """Apply a rule that rewrites to one step's plan.

    Args:
        turn: Plan of the step.
        scores: Scores (R, L) of the rank.
        proposed: Tokens drawn (K,); a rule that takes `replaceable` needs them.
        tokens: Canvas (B, T).
        commit: The rule, with its further inputs bound.
        kind: Name of KINDS that the rule takes.

    Raises:
        ValueError: A block's last step commits nothing, or masks a position again.
    """
    assert turn.written is not None, "the turn of a canvas that is revised"
    changed = torch.zeros_like(turn.masked)
    if proposed is not None:
        changed[turn.row, turn.place] = proposed != tokens[turn.canvas_row, turn.column]
    offered = turn.written & changed if kind == "replaceable" else turn.written
    flipped = commit(scores, turn.masked, turn.left, **{kind: offered})
    again = flipped & turn.written & (kind == "remaskable")
    chosen = flipped & (turn.masked | offered) & ~again
    # One wait for the device gives the host all three counts.
    committed, num_chosen, reopened = torch.stack([chosen & turn.masked, chosen, again]).sum(-1).cpu()
    check_last_step(name_of(commit), turn.steps_left, turn.num_masked, committed)
    if ((turn.steps_left == 1) & (reopened > 0)).any():
        raise ValueError(
            f"commit={name_of(commit)} masked positions again in the last step of a block; it must not by then"
        )
    return Decision(
        chosen,
        num_chosen=num_chosen,
        committed=committed - reopened,
        reopened=turn.among(again, int(reopened.sum())),
        # A row uses all its steps, except that under `replaceable` it leaves when a step changes nothing.
        held=(num_chosen > 0) | (kind != "replaceable"),
    )


def packed_events(noted: list[tuple[Tensor, ...]], shape: torch.Size, *, depends_on_tokens: bool) -> Events:
    """Return each position's events (B, L, W) in order, from the records of every step.

    The host waits for the device, because it does not know how many events a position has.
    """
    rows, places, steps, tokens, logprobs = map(torch.cat, zip(*noted, strict=True))
    position = rows * shape[1] + places
    order = position.argsort(stable=True)  # steps were recorded in order
    position = position[order]
    slot = torch.arange(len(order), device=order.device) - torch.searchsorted(position, position)
    size = (*shape, int(F.pad(slot, (0, 1)).max()) + 1)

    def packed(values: Tensor, fill: int) -> Tensor:
        blank = torch.full(size, fill, dtype=values.dtype, device=order.device)
        blank[rows[order], places[order], slot] = values[order]
        return blank

    return Events(packed(steps.int(), -1), packed(tokens.int(), -1), packed(logprobs, 0), depends_on_tokens)
