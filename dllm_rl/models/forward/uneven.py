"""Forwards of a sharded policy (`distributed.sharding`) when processes need different numbers of forwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def join_uneven_forwards(policy: Any, *, backward: bool = False) -> Iterator[None]:
    """In this context, let processes run different numbers of forwards of a sharded policy.

    A process without remaining rows joins the others' forwards with dummy rows. All processes must enter and leave the
    context together. For an unsharded policy nothing happens.

    Args:
        policy: Policy, sharded or not.
        backward: True if every forward is followed by its backward. False if no forward needs gradients.
    """
    shards = getattr(policy.module, "sharding", None)
    if shards is None:
        yield
        return
    for head in shards.heads:
        head.unshard()  # once, not for every chunk
        head.set_requires_gradient_sync(False)
        head.set_reshard_after_backward(False)
    # Each forward first tells the other processes that it runs.
    announce = shards.backbone.register_forward_pre_hook(lambda *_: shards.anyone(True) and None, prepend=True)
    try:
        yield
    finally:
        announce.remove()
    token = torch.zeros(1, 1, dtype=torch.long, device=policy.device)  # a dummy row, whose gradients are zero
    with torch.set_grad_enabled(backward):
        # A sharded forward is a collective. This process has no forwards left, and joins those of the other processes,
        # which need its shards of the weights.
        while shards.anyone(False):
            states = policy.hidden(token, token == 0)
            if backward:
                states.backward(torch.zeros_like(states))
        for head in shards.heads:
            head.set_requires_gradient_sync(True)
            head.set_reshard_after_backward(True)
        if backward:  # one collective sums the heads' gradients of all chunks
            weight = next(policy.module.parameters())
            leaf = torch.zeros(1, policy.module.config.hidden_size, dtype=weight.dtype, device=policy.device)
            logits = policy.head(leaf.requires_grad_())
            logits.backward(torch.zeros_like(logits))
    for head in shards.heads:
        head.reshard()
