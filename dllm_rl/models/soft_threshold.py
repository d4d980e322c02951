"""The probability of the sets that `soft_threshold` writes: every masked position is an independent draw [ours].

Position j of the open block is written with probability q_j = sigmoid((logit p_j - logit tau) / temperature), p_j the
model's probability of its likeliest token. The set is redrawn while it is empty, so that a step writes a set S with
    log P(S | state) = sum_{j in S} log q_j + sum_{j not in S} log(1 - q_j) - log(1 - prod_j (1 - q_j)).
P is a smooth function of the logits. If an empty set were replaced by the most confident position, P would jump where
two positions swap their order of confidence, and no gradient of log P sees a jump.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.models.logprobs import invert
from dllm_rl.models.order import members

SUREST = -1e-4  # nats; a higher log p is clamped to this one, as rounding leaves few digits of 1 - p
NEVER = -1e4  # nats, far below any log q; finite, as gradients of log-sums of -inf are NaN


def log_chances(
    logprobs: Float[Tensor, "*K"], *, tau: float, temperature: float
) -> tuple[Float[Tensor, "*K"], Float[Tensor, "*K"]]:
    """Return log q and log(1 - q) of log p, in nats."""
    sure = logprobs.clamp(max=SUREST)
    odds = sure - torch.expm1(sure).neg().log()
    z = (odds - math.log(tau) + math.log1p(-tau)) / temperature
    return F.logsigmoid(z), F.logsigmoid(-z)


def drawn_set(
    logprobs: Float[Tensor, "R L"],
    masked: Bool[Tensor, "R L"],
    uniforms: Float[Tensor, "R L"],
    *,
    tau: float,
    temperature: float,
) -> Bool[Tensor, "R L"]:
    """Draw a set S of the masked positions of each row with P(S). A row without masked positions gets none."""
    yes, no = log_chances(logprobs.double(), tau=tau, temperature=temperature)
    no = no.masked_fill(~masked, 0)
    first = (yes + no.cumsum(-1) - no).masked_fill(~masked, -torch.inf)  # log-prob that j is the leftmost of S
    first = first.masked_fill(~masked.any(-1, keepdim=True), 0)  # else NaN
    begin = masked.long().argmax(-1, keepdim=True)
    at = invert((first - first.amax(-1, keepdim=True)).exp(), uniforms.gather(-1, begin)[:, 0].double())[:, None]
    place = torch.arange(masked.shape[1], device=masked.device)
    # The positions after the leftmost are independent, and none of them uses the number that drew the leftmost.
    return masked & ((place == at) | (place > at) & (uniforms < yes.exp()))


def set_logprobs(
    logprobs: Float[Tensor, " K"],
    groups: Int[Tensor, " K"],  # rising; a group is one step of one row
    drawn: Int[Tensor, " C"],  # the positions that the step wrote
    width: int,  # at least the size of a group
    *,
    tau: float,
    temperature: float,
) -> Float[Tensor, " C"]:
    """Return log P(S) in nats, in equal shares on the positions of S."""
    yes, no = log_chances(logprobs, tau=tau, temperature=temperature)
    written = torch.zeros_like(groups, dtype=torch.bool).index_fill(0, drawn, True)
    member, mine = members(groups, drawn, width)
    happened = torch.where(written, yes, no)[member].masked_fill(~mine, 0)
    # Log-probs of a nonempty and of an empty set.
    some, none = yes[member].masked_fill(~mine, NEVER), no[member].masked_fill(~mine, 0)
    while some.shape[-1] > 1:  # in pairs: more empty slots do not change the rounding
        half = some.shape[-1] // 2
        some = torch.logaddexp(some[:, :half], none[:, :half] + some[:, half:])
        none, happened = (x[:, :half] + x[:, half:] for x in (none, happened))
    count = (written[member] & mine).sum(-1)
    return (happened - some)[:, 0] / count
