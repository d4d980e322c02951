"""Whether a learner would have unmasked in the order that its rollouts were: a mismatch that no weight corrects."""

import torch
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.samplers.propose import rank_only
from dllm_rl.samplers.rules import RANKS, _best, rank_inputs
from dllm_rl.types import Rollout


@torch.no_grad()
def order_agreement(policy: Policy, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
    """What `policy` would have committed in the first step of a rollout, against what was; (sum, count) pairs.

    order_agreement       share of the committed positions that are among the policy's own, as many as were committed
    order_agreement_rows  share of the prompts where the two sets are equal

    The ranks max_prob, margin and entropy are functions of the state: where the policy's own would choose other
    positions, the recorded order has probability 0 under it, and importance weights of the tokens given the order
    correct nothing of that [ours]. For other ranks there is nothing to compare: `random` depends on no policy,
    `confidence` on the draws. All completions of a prompt begin in the same state and, under these ranks, at the same
    positions: one forward of one row a prompt.
    """
    ranks = {rank.__name__: rank for rank in RANKS if not rank_inputs(rank) & {"tokens", "uniforms"}}
    rank, mask_id = ranks.get(rollout.rank or ""), policy.spec.mask_id
    if rank is None or rollout.open_step is None or mask_id is None or rollout.revised:
        return {}
    first = slice(None, None, rollout.group_size)
    masked, opened = rollout.completion_mask[first], rollout.open_step[first] == 0
    committed = rollout.unmask_step[first] == 0
    hidden = policy.hidden(rollout.tokens[first].masked_fill(masked, mask_id), rollout.attention_mask[first])
    states, scores = hidden[opened], torch.full(opened.shape, -torch.inf, device=opened.device)
    ties = torch.zeros(len(states), device=states.device)
    scores[opened] = rank_only(policy, states, ties, rollout.sampling_params, rank)
    chosen = _best(scores, opened, committed.sum(-1)) & opened
    whole, rows = ((chosen == committed).all(-1) & committed.any(-1)).sum(), committed.any(-1).sum()
    return {
        "order_agreement": ((chosen & committed).sum(), committed.sum()),
        "order_agreement_rows": (whole, rows),
    }
