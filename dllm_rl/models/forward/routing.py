"""What a mixture's routers choose: their load-balancing loss, and router replay.

Router replay (R3, arXiv 2510.11370 [paper]): one forward records each token's experts, and another reuses them.

If two scores of a router are almost equal, rounding decides which expert is chosen. Replay reuses the recorded choice.
The experts' weights still come from the scores of the policy that replays. M is the number of MoE layers, E the number
of experts per token. docs/papers.md explains the tag [paper].
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dllm_rl.models.base import Module, Policy, Tokens
from dllm_rl.models.lora import base_of, moe_layers


class Routing(TorchFunctionMode):
    """A mode whose forwards record the experts of each token and, optionally, replay recorded experts.

    Args:
        module: Module with M MoE layers.
        replayed_ids: Expert ids for R rows and W columns. A packed forward has clean columns before its noisy columns;
            the ids are then those of the noisy columns. None: the routers choose.
        where: Tokens that use `replayed_ids`. The router chooses the experts of the other tokens.
    """

    def __init__(
        self,
        module: Module,
        replayed_ids: Integer[Tensor, "R W M E"] | None = None,
        where: Bool[Tensor, "R W"] | None = None,
    ) -> None:
        super().__init__()
        self.layers = moe_layers(module)
        self.replayed_ids = replayed_ids
        self.where = where
        self.chosen: list[Tensor | None] = [None] * len(self.layers)  # expert ids of the last forward, by MoE layer
        self.running: int | None = None  # index of the MoE layer that runs now
        self.hooks: list[list[Any]] = []  # one entry per entered context: a recomputed block enters the mode again

    def __enter__(self) -> "Routing":
        hooks = []
        for number, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(partial(self._set_running, number)))
            hooks.append(layer.register_forward_hook(partial(self._set_running, None)))
        self.hooks.append(hooks)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.running = None
        for hook in self.hooks.pop():
            hook.remove()

    def _set_running(self, number: int | None, *_: Any) -> None:
        self.running = number

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        number = self.running
        if number is None or func not in (torch.topk, Tensor.topk) or not args:
            return out
        # A router with groups of experts also calls topk on the groups, which is not recorded.
        if args[0].dim() != 2 or args[0].shape[-1] != self.num_experts(number):
            return out
        ids = out[1]
        if self.replayed_ids is not None and self.where is not None:
            replayed = _match_columns(self.replayed_ids[:, :, number], len(ids)).flatten(0, 1)
            where = _match_columns(self.where, len(ids)).flatten(0, 1)
            ids = torch.where(where[:, None], replayed.to(ids.dtype), ids)
            # The weights and their gradient come from this policy's scores of the replayed experts.
            out = torch.return_types.topk((args[0].gather(-1, ids), ids))
        self.chosen[number] = ids
        return out

    def num_experts(self, number: int) -> int:
        return len(base_of(self.layers[number].experts).gate_up_proj)

    def unknown_reason(self) -> str:
        """Return why the last forward's experts are unknown, or "" if they are known."""
        chosen = [ids for ids in self.chosen if ids is not None]
        if len(chosen) < len(self.layers):
            return f"{len(chosen)} of {len(self.layers)} MoE layers chose their experts by one topk over all of them"
        sizes = sorted({ids.shape[-1] for ids in chosen})
        return f"the MoE layers use different numbers of experts per token, {sizes}" if len(sizes) > 1 else ""

    def experts(self, rows: int, columns: int | None = None) -> Integer[Tensor, "R W M E"]:
        """Return the experts of the last forward, in the smallest dtype that holds all ids.

        Args:
            rows: Number of rows of the forward.
            columns: Number of clean columns of a packed forward. None: the forward was not packed.
        """
        if reason := self.unknown_reason():
            raise ValueError(f"router_replay: {reason}; set router_replay=None")
        chosen = [ids for ids in self.chosen if ids is not None]
        dtype = torch.uint8 if max(map(self.num_experts, range(len(chosen)))) <= 256 else torch.int16
        experts = torch.stack(chosen, dim=1).to(dtype).unflatten(0, (rows, -1))
        if columns is None or experts.shape[1] == columns:
            return experts
        return F.pad(experts[:, columns:], (0, 0, 0, 0, 2 * columns - experts.shape[1], 0))


def _match_columns(x: Shaped[Tensor, "R W *E"], tokens: int) -> Shaped[Tensor, "R Q *E"]:
    """Return the values for a forward of `tokens` tokens, with 0 for the clean columns of a packed forward."""
    rows, columns = x.shape[:2]
    if tokens == rows * columns:
        return x
    return torch.cat([torch.zeros_like(x), x[:, 2 * columns - tokens // rows :]], dim=1)


def check_routers(policy: Policy) -> None:
    """Raise ValueError if transformers has no load-balancing loss for the policy's class."""
    module = policy.module
    if not hasattr(sys.modules[type(module).__module__], "load_balancing_loss_func") or policy.spec.mask_id is None:
        raise ValueError(
            f"router_aux_loss_coef: transformers has no load-balancing loss of {type(module).__name__}, or it has no "
            "mask token; set it to 0"
        )


def load_balancing_loss(policy: Policy, tokens: Tokens, attention_mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Return transformers' load-balancing loss of a mixture's routers in one forward, over all layers and real tokens.

    Call it in addition to a loss of the completions, so that the experts stay in even use. With an even use by all
    tokens it is the number of experts per token. Source: Switch Transformer, arXiv 2101.03961 [paper].

    Args:
        policy: A policy that `check_routers` accepts.
        tokens: Token ids that the model reads, with mask tokens.
        attention_mask: False on padding.
    """
    module, logits = policy.module, []
    hooks = (
        module.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"output_router_logits": True}), with_kwargs=True
        ),
        module.base_model.register_forward_hook(lambda _, args, output: logits.append(output.router_logits)),
    )
    try:
        policy.hidden(tokens, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    function = sys.modules[type(module).__module__].load_balancing_loss_func
    return function(*logits, module.num_experts, module.num_experts_per_tok, attention_mask)


def to_token_columns(policy: Policy, experts: Integer[Tensor, "R W M E"]) -> Integer[Tensor, "R W M E"]:
    """Move the experts of each state from its column to the column of the token that it predicts."""
    return experts.roll(1, dims=1) if policy.spec.shift else experts


def to_state_columns(policy: Policy, x: Tensor) -> Tensor:
    """Reverse `to_token_columns` along the second axis.

    The state of the last column predicts no token, and gets zeros.
    """
    if not policy.spec.shift:
        return x
    shifted = x.roll(-1, dims=1)
    shifted[:, -1] = 0
    return shifted


def agreement(ours: Integer[Tensor, "S M E"], theirs: Integer[Tensor, "S M E"]) -> Bool[Tensor, "S M E"]:
    """Return which of the experts `ours` are also in `theirs`, for the same token and MoE layer."""
    return (ours[..., :, None] == theirs[..., None, :]).any(-1)


def tokens_per_expert(experts: Integer[Tensor, "S M E"], num_experts: int) -> Int[Tensor, "M X"]:
    """Return the number of tokens that each expert of each MoE layer receives."""
    ids = experts.transpose(0, 1).flatten(1).long()
    counts = torch.zeros(len(ids), num_experts, dtype=torch.long, device=ids.device)
    return counts.scatter_add(1, ids, torch.ones_like(ids))
