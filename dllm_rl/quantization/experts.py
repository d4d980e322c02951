"""Stacked experts as linear layers, one per expert, which are quantised, synced and aligned like any other layer.

Stock classes multiply two stacks, gate_up_proj (E, 2I, D) and down_proj (E, D, I), by one grouped product. Quantised
tensors are two-dimensional with their own kernels, so a quantised copy multiplies expert by expert.
"""

import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dllm_rl.models.adapters.experts import STACKS


class Experts(nn.Module):
    """The experts of one layer, instead of a stock module of two stacks."""

    def __init__(self, gate_up_proj: list[nn.Linear], down_proj: list[nn.Linear], act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = nn.ModuleList(gate_up_proj)
        self.down_proj = nn.ModuleList(down_proj)
        self.act_fn = act_fn

    @torch.compiler.disable  # only the host knows an expert's number of rows, which differs per step
    def forward(
        self, hidden_states: Float[Tensor, "S D"], top_k_index: Int[Tensor, "S K"], top_k_weights: Float[Tensor, "S K"]
    ) -> Float[Tensor, "S D"]:
        products = {stack: list(getattr(self, stack)) for stack in STACKS}
        return mixture(hidden_states, top_k_index, top_k_weights, **products, act_fn=self.act_fn)


def mixture(
    hidden_states: Float[Tensor, "S D"],
    top_k_index: Int[Tensor, "S K"],
    top_k_weights: Float[Tensor, "S K"],
    gate_up_proj: Sequence[Callable[[Tensor], Tensor]],
    down_proj: Sequence[Callable[[Tensor], Tensor]],
    *,
    act_fn: Callable[[Tensor], Tensor],
) -> Float[Tensor, "S D"]:
    """sum_k weight_k down_e(act(gate_e(x)) * up_e(x)), e = index_k, as a stock mixture."""
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=len(gate_up_proj)).tolist()  # the only wait for the device
    parts = []
    for expert, rows in enumerate(hidden_states[order // top_k_index.shape[1]].split(counts)):
        if len(rows):
            gate, up = gate_up_proj[expert](rows).chunk(2, dim=-1)
            parts.append(down_proj[expert](act_fn(gate) * up))
    weighted = torch.cat(parts) * top_k_weights.flatten()[order][:, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[back].unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)


def place(name: str) -> tuple[str, int | None]:
    """A quantised layer's place in a plain module: the parameter's name, and the expert in a stack."""
    stacked = re.fullmatch(rf"(.*\.(?:{'|'.join(STACKS)}))\.(\d+)", name)
    return (stacked[1], int(stacked[2])) if stacked else (f"{name}.weight", None)
