"""Experts as stock classes store them, in two stacks per layer, and adapters on each expert."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call

from dllm_rl.models.base import whole

if TYPE_CHECKING:
    from dllm_rl.models.lora import Lora

STACKS = ("gate_up_proj", "down_proj")
LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


def is_stacked(layer: nn.Module) -> bool:
    """Whether a module, adapted or not, stores gated experts without biases as two stacks (E, out, in)."""
    layer = getattr(layer, "base_layer", layer)
    for name in STACKS:
        stack = getattr(layer, name, None)
        if not isinstance(stack, nn.Parameter) or stack.dim() != 3:
            return False
    return (
        len(list(layer.parameters(recurse=False))) == len(STACKS)
        and isinstance(getattr(layer, "act_fn", None), nn.Module)
        and all(getattr(layer, name, value) == value for name, value in LAYOUT.items())
    )


class LoraExperts(nn.Module):
    """A stock module of experts with a pair of fp32 adapters for every expert of both stacks.

    A forward merges them for the stock grouped product. Without gradient checkpointing it keeps the merged copy.
    """

    base_layer: Any

    def __init__(self, base_layer: nn.Module, lora: "Lora", generator: Generator) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora = lora
        self.active = True
        self.calls = 0  # of dropout, which experts do not have; saved with the adapters
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        for name in STACKS:
            weight = getattr(base_layer, name)
            experts, outputs, inputs = weight.shape
            a = (torch.rand(experts, lora.r, inputs, generator=generator) * 2 - 1) * inputs**-0.5
            self.lora_A[name] = nn.Parameter(a.to(weight.device))
            self.lora_B[name] = nn.Parameter(torch.zeros(experts, outputs, lora.r, device=weight.device))

    def forward(self, *args: Any) -> Tensor:
        if not self.active:
            return self.base_layer(*args)
        return functional_call(self.base_layer, {name: self.merged(name) for name in STACKS}, args)

    def merged(self, name: str) -> Float[Tensor, "E O I"]:
        """W + (alpha / r) B A per expert, summed in fp32 and rounded once to W's dtype; differentiable in A and B."""
        weight = whole(getattr(self.base_layer, name).detach())
        added = whole(self.lora_B[name]).float() @ whole(self.lora_A[name]).float()
        return (weight.float() + added * (self.lora.alpha / self.lora.r)).to(weight.dtype)

    @torch.no_grad()
    def plain(self, memo: dict[int, Any]) -> nn.Module:
        """The stock module with the adapters merged; `memo` is deepcopy's."""
        stacks = {id(getattr(self.base_layer, name)): nn.Parameter(self.merged(name), False) for name in STACKS}
        return copy.deepcopy(self.base_layer, memo | stacks)

    def saved(self) -> dict[str, Tensor]:
        """The adapters as peft names them: its wrapper of the second stack contains its wrapper of the first."""
        found = {}
        for place, name in zip((".base_layer", ""), STACKS, strict=True):
            found[f"{place}.lora_A.weight"] = self.lora_A[name].detach().flatten(0, 1)  # (E r, in)
            found[f"{place}.lora_B.weight"] = self.lora_B[name].detach().permute(1, 2, 0).flatten(1)  # (out, r E)
        return found

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copy tensors in that `saved` returned."""
        for place, name in zip((".base_layer", ""), STACKS, strict=True):
            self.lora_A[name].copy_(state[f"{place}.lora_A.weight"].view_as(self.lora_A[name]))
            stacked = state[f"{place}.lora_B.weight"].unflatten(1, (self.lora.r, -1))  # (out, r, E)
            self.lora_B[name].copy_(stacked.permute(2, 0, 1))
