"""Whether the learner would unmask in the rollout's order: a mismatch that no importance weight corrects."""

import torch
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.samplers.choose import rank_only
from dllm_rl.samplers.records import RANKS, as_rank
from dllm_rl.samplers.rules import highest
from dllm_rl.types import Rollout


@torch.no_grad()
def order_agreement(policy: Policy, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
    """Compare what `policy` would commit in a rollout's first step with what was committed. Return (sum, count) pairs.

    max_prob, margin and entropy depend only on the state. Where the policy would choose other positions, the recorded
    order has probability 0, and importance weights of the tokens do not correct the order [ours].
    """
    ranks = {rank.__name__: as_rank(rank) for rank, order in RANKS.items() if order in ("max_prob", "deterministic")}
    order, mask_id = rollout.order, policy.spec.mask_id
    if order is None or order.rank_name not in ranks or mask_id is None or rollout.events is not None:
        return {}  # `random` and `confidence` have nothing to compare
    rank = ranks[order.rank_name]
    first = slice(None, None, rollout.group_size)  # all completions of a prompt begin the same
    masked = rollout.completion_mask[first]
    opened = order.block_first_step[first] == 0
    committed = rollout.unmask_step[first] == 0
    hidden = policy.hidden(rollout.tokens[first].masked_fill(masked, mask_id), rollout.attention_mask[first])
    states = hidden[opened]
    scores = torch.full(opened.shape, -torch.inf, device=opened.device)
    ties = torch.zeros(len(states), device=states.device)
    scores[opened] = rank_only(policy, states, ties, rollout.sampling_params, rank)
    chosen = highest(scores, opened, count=committed.sum(-1)) & opened
    begun = committed.any(-1)
    same = (chosen == committed).all(-1) & begun
    return {
        "order_agreement": ((chosen & committed).sum(), committed.sum()),  # of positions, in the policy's top ones
        "order_agreement_rows": (same.sum(), begun.sum()),  # of prompts whose two sets are equal
    }
