"""The probability of the set of positions that a step of the commit rule `SoftThreshold` writes [ours].

Every masked position j of the current block is written independently, with probability
q_j = sigmoid((logit p_j - logit tau) / temperature), where p_j is the probability of its likeliest token. An empty set
is redrawn, so that a step writes a nonempty set S with
    log P(S | state) = sum_{j in S} log q_j + sum_{j not in S} log(1 - q_j) - log(1 - prod_j (1 - q_j)).
P is a smooth function of the logits. If an empty set were instead replaced by the most confident position, P would jump
where two positions swap their order of confidence, and the gradient of log P would miss the jump. docs/methods.md
explains the tag [ours].
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.decoding.order import step_members
from dllm_rl.models.logprobs import invert_cdf

MAX_LOGPROB = -1e-4  # nats; a higher log p is clamped to this value, because rounding leaves few digits of 1 - p
LOG_ZERO = -1e4  # nats, far below any log q; finite, because gradients of log-sums of -inf are NaN


def log_chances(
    logprobs: Float[Tensor, "*K"], *, tau: float, temperature: float
) -> tuple[Float[Tensor, "*K"], Float[Tensor, "*K"]]:
    """Return log q and log(1 - q), in nats, from log p. q is the probability that a position is written."""
    logprobs = logprobs.clamp(max=MAX_LOGPROB)
    logit = logprobs - torch.expm1(logprobs).neg().log()
    z = (logit - math.log(tau) + math.log1p(-tau)) / temperature
    return F.logsigmoid(z), F.logsigmoid(-z)


def draw_set(
    logprobs: Float[Tensor, "R L"],
    masked: Bool[Tensor, "R L"],
    uniforms: Float[Tensor, "R L"],
    *,
    tau: float,
    temperature: float,
) -> Bool[Tensor, "R L"]:
    """Draw a set S of the masked positions of each row, with probability P(S).

    A row without masked positions has an empty set. First the leftmost position of S is drawn, then the positions to
    its right, independently.
    """
    log_q, log_not_q = log_chances(logprobs.double(), tau=tau, temperature=temperature)
    log_not_q = log_not_q.masked_fill(~masked, 0)
    # The log-prob that a position is the leftmost one of S.
    log_leftmost = (log_q + log_not_q.cumsum(-1) - log_not_q).masked_fill(~masked, -torch.inf)
    log_leftmost = log_leftmost.masked_fill(~masked.any(-1, keepdim=True), 0)  # -inf everywhere would give NaN
    first_masked = masked.long().argmax(-1, keepdim=True)
    mass = (log_leftmost - log_leftmost.amax(-1, keepdim=True)).exp()
    leftmost = invert_cdf(mass, uniforms.gather(-1, first_masked)[:, 0].double())[:, None]
    position = torch.arange(masked.shape[1], device=masked.device)
    # No position to the right of the leftmost one uses the uniform number that drew the leftmost one.
    return masked & ((position == leftmost) | (position > leftmost) & (uniforms < log_q.exp()))


def set_logprobs(
    logprobs: Float[Tensor, " K"],
    step_ids: Int[Tensor, " K"],
    drawn: Int[Tensor, " C"],
    width: int,
    *,
    tau: float,
    temperature: float,
) -> Float[Tensor, " C"]:
    """Return log P(S) in nats, divided equally among the positions of S.

    Args:
        logprobs: Log-prob of the likeliest token of K positions, in nats.
        step_ids: A number for the step and row of each position, in ascending order.
        drawn: Indices of the positions that the step wrote.
        width: Upper limit of the number of positions that a step writes.
        tau: See `samplers.rules.soft_threshold`.
        temperature: See `samplers.rules.soft_threshold`.
    """
    log_q, log_not_q = log_chances(logprobs, tau=tau, temperature=temperature)
    is_written = torch.zeros_like(step_ids, dtype=torch.bool).index_fill(0, drawn, True)
    members, is_member = step_members(step_ids, drawn, width)
    log_set = torch.where(is_written, log_q, log_not_q)[members].masked_fill(~is_member, 0)
    log_nonempty = log_q[members].masked_fill(~is_member, LOG_ZERO)
    log_empty = log_not_q[members].masked_fill(~is_member, 0)
    while log_nonempty.shape[-1] > 1:  # pairwise, so that the number of empty slots does not change the rounding
        half = log_nonempty.shape[-1] // 2
        log_nonempty = torch.logaddexp(log_nonempty[:, :half], log_empty[:, :half] + log_nonempty[:, half:])
        log_empty = log_empty[:, :half] + log_empty[:, half:]
        log_set = log_set[:, :half] + log_set[:, half:]
    num_written = (is_written[members] & is_member).sum(-1)
    return (log_set - log_nonempty)[:, 0] / num_written
