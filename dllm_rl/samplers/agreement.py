"""How often the learner would commit the same positions as the sampler did in its first step.

Importance weights of the tokens do not correct a disagreement about positions.

docs/methods.md explains the tag [ours].
"""

import torch
from torch import Tensor

from dllm_rl.decoding.order import highest
from dllm_rl.models.base import Policy
from dllm_rl.samplers.choose import rank_positions
from dllm_rl.samplers.rules import DETERMINISTIC
from dllm_rl.types import Rollout, starts_group


@torch.no_grad()
def order_agreement(policy: Policy, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
    """Compare the positions that `policy` would commit in the rollout's first step with those that were committed.

    The ranks `MaxProb`, `Margin` and `Entropy` depend only on the canvas and the weights. If the policy chooses other
    positions, the recorded order has probability 0 under it, and importance weights of the tokens do not correct this
    [ours].

    Returns:
        (sum, count) pairs: order_agreement, the share of committed positions that the policy chooses too, and
        order_agreement_rows, the share of prompts for which both choose the same positions. Empty if the rollout's rank
        is none of the three, or if its commit rule rewrites tokens.
    """
    order, mask_id = rollout.order, policy.spec.mask_id
    if order is None or order.rank_name not in DETERMINISTIC or mask_id is None or rollout.events is not None:
        return {}  # the order of RandomOrder and Confidence is not a function of the canvas and the weights
    rank = DETERMINISTIC[order.rank_name]
    first_rows = starts_group(rollout.group)  # all completions of a prompt begin with the same canvas
    masked = rollout.completion_mask[first_rows]
    in_first_block = order.block_first_step[first_rows] == 0
    committed = rollout.unmask_step[first_rows] == 0
    tokens = rollout.tokens[first_rows].masked_fill(masked, mask_id)
    attention_mask = rollout.attention_mask[first_rows]
    if rollout.first_step is not None:  # the first canvas has no columns of later turns
        attention_mask = attention_mask & (rollout.first_step[first_rows] == 0)
    states = policy.hidden(tokens, attention_mask)[in_first_block]
    scores = torch.full(in_first_block.shape, -torch.inf, device=in_first_block.device)
    uniforms = torch.zeros(len(states), device=states.device)  # not read by these ranks
    scores[in_first_block] = rank_positions(policy, states, uniforms, rollout.sampling_params, rank)
    chosen = highest(scores, in_first_block, count=committed.sum(-1)) & in_first_block
    has_commit = committed.any(-1)
    is_same = (chosen == committed).all(-1) & has_commit
    return {
        "order_agreement": ((chosen & committed).sum(), committed.sum()),
        "order_agreement_rows": (is_same.sum(), has_commit.sum()),
    }
