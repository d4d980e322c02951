"""Router replay (R3, arXiv 2510.11370 [paper]): one forward records each token's experts, and another uses them.

Rounding changes an expert where two scores are almost equal. Replay fixes the choice; gates use the scores of the
replaying side.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Integer, Shaped
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dllm_rl.models.base import Module, Policy
from dllm_rl.models.lora import base_of


def mixtures(module: Module) -> list[Any]:
    """Return the layers that route tokens to experts, in the order of the blocks; none in a dense model."""
    return [layer for layer in module.modules() if hasattr(base_of(getattr(layer, "experts", None)), "gate_up_proj")]


class Routing(TorchFunctionMode):
    """A mode whose forwards record the experts of each token, and use `given` experts where `where` holds."""

    def __init__(
        self, module: Module, given: Integer[Tensor, "R W M E"] | None = None, where: Bool[Tensor, "R W"] | None = None
    ) -> None:
        super().__init__()
        self.layers = mixtures(module)
        self.given = given  # ids for R rows, W columns, M mixtures; of a packed forward, for the repeated columns
        self.where = where  # elsewhere the router chooses
        self.taken: list[Tensor | None] = [None] * len(self.layers)
        self.layer: int | None = None  # the mixture that runs
        self.hooks: list[list[Any]] = []  # a stack: a recomputed block enters the mode again

    def __enter__(self) -> "Routing":
        hooks = []
        for number, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(partial(self._at, number)))
            hooks.append(layer.register_forward_hook(partial(self._at, None)))
        self.hooks.append(hooks)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.layer = None
        for hook in self.hooks.pop():
            hook.remove()

    def _at(self, number: int | None, *_: Any) -> None:
        self.layer = number

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        number = self.layer
        if number is None or func not in (torch.topk, Tensor.topk) or not args:
            return out
        # A router with groups of experts also ranks the groups by a topk.
        if args[0].dim() != 2 or args[0].shape[-1] != self.num_experts(number):
            return out
        ids = out[1]
        if self.given is not None and self.where is not None:
            given = _packed(self.given[:, :, number], len(ids)).flatten(0, 1)
            where = _packed(self.where, len(ids)).flatten(0, 1)
            ids = torch.where(where[:, None], given.to(ids.dtype), ids)
            # The weights and their gradient come from this side's scores of the given experts.
            out = torch.return_types.topk((args[0].gather(-1, ids), ids))
        self.taken[number] = ids
        return out

    def num_experts(self, number: int) -> int:
        return len(base_of(self.layers[number].experts).gate_up_proj)

    def unread(self) -> str:
        """Return why the last forward's experts are unknown, or ""."""
        taken = [ids for ids in self.taken if ids is not None]
        if len(taken) < len(self.layers):
            return f"{len(taken)} of {len(self.layers)} mixtures chose their experts by one topk over all of them"
        sizes = sorted({ids.shape[-1] for ids in taken})
        return f"the mixtures take different numbers of experts, {sizes}" if len(sizes) > 1 else ""

    def experts(self, rows: int, columns: int | None = None) -> Integer[Tensor, "R W M E"]:
        """Return the last forward's experts, of `rows` rows and, if packed, `columns` clean columns.

        The ids are bytes where they fit.
        """
        if why := self.unread():
            raise ValueError(f"router_replay: {why}; set router_replay=None")
        taken = [ids for ids in self.taken if ids is not None]
        narrow = torch.uint8 if max(map(self.num_experts, range(len(taken)))) <= 256 else torch.int16
        experts = torch.stack(taken, dim=1).to(narrow).unflatten(0, (rows, -1))
        if columns is None or experts.shape[1] == columns:
            return experts
        return F.pad(experts[:, columns:], (0, 0, 0, 0, 2 * columns - experts.shape[1], 0))


def _packed(x: Shaped[Tensor, "R W *E"], tokens: int) -> Shaped[Tensor, "R Q *E"]:
    """Return values of a row's columns for a forward of `tokens` tokens; 0 for a packed forward's clean columns."""
    rows, columns = x.shape[:2]
    if tokens == rows * columns:
        return x
    return torch.cat([torch.zeros_like(x), x[:, 2 * columns - tokens // rows :]], dim=1)


def of_tokens(policy: Policy, experts: Integer[Tensor, "R W M E"]) -> Integer[Tensor, "R W M E"]:
    """Move experts from the state at each column to the column whose token the state predicts."""
    return experts.roll(1, dims=1) if policy.spec.shift else experts


def of_states(policy: Policy, x: Tensor) -> Tensor:
    """Reverse `of_tokens` along the second axis. The last column's state predicts nothing and gets zeros."""
    if not policy.spec.shift:
        return x
    moved = x.roll(-1, dims=1)
    moved[:, -1] = 0
    return moved


def agreement(ours: Integer[Tensor, "S M E"], theirs: Integer[Tensor, "S M E"]) -> Bool[Tensor, "S M E"]:
    """Return which experts of this side the other side also chose."""
    return (ours[..., :, None] == theirs[..., None, :]).any(-1)


def load(experts: Integer[Tensor, "S M E"], num_experts: int) -> Int[Tensor, "M X"]:
    """Return the number of tokens of each expert of each mixture."""
    by_layer = experts.transpose(0, 1).flatten(1).long()
    empty = torch.zeros(len(by_layer), num_experts, dtype=torch.long, device=by_layer.device)
    return empty.scatter_add(1, by_layer, torch.ones_like(by_layer))
