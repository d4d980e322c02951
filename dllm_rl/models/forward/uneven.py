"""Forwards of a sharded policy (`distributed.sharding`), of which processes need different numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def join_uneven_forwards(policy: Any, *, backward: bool = False) -> Iterator[None]:
    """Let processes run different numbers of forwards of a sharded policy in the block.

    A process without remaining rows joins the others' forwards with dummy rows. All processes enter and leave the block
    together. An unsharded policy is not changed.

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
    comes = shards.backbone.register_forward_pre_hook(lambda *_: shards.anyone(True) and None, prepend=True)
    try:
        yield
    finally:
        comes.remove()
    token = torch.zeros(1, 1, dtype=torch.long, device=policy.device)  # has no weight in any gradient
    with torch.set_grad_enabled(backward):
        # A sharded forward is a collective: a process that has left the block joins the others' forwards.
        while shards.anyone(False):  # a process inside the block needs this one's part of the weights
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
