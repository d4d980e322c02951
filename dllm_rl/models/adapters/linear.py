"""Adapters on linear layers."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from dllm_rl.models.adapters.experts import LoraExperts, is_stacked
from dllm_rl.models.base import Policy, whole
from dllm_rl.models.lora import Lora
from dllm_rl.rng import keep_mask


class LoraLinear(nn.Module):
    """A linear layer and its fp32 adapter; the adapter's products are in the input's dtype.

    calls  counts dropout masks. A mask depends on (seed, number) alone, so runs and recomputed blocks repeat it.
    """

    def __init__(self, base_layer: nn.Linear, lora: Lora, generator: Generator) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora = lora
        self.active = True
        self.calls = 0
        self.seed = int(torch.randint(2**40, (), generator=generator))
        device = base_layer.weight.device
        # Drawn on the host, so that every device starts from the same numbers.
        a = (torch.rand(lora.r, base_layer.in_features, generator=generator) * 2 - 1) * base_layer.in_features**-0.5
        self.lora_A = linear_of(a.to(device), None).requires_grad_()
        self.lora_B = linear_of(torch.zeros(base_layer.out_features, lora.r, device=device), None).requires_grad_()

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        out = self.base_layer(x)
        if not self.active:
            return out
        small = F.linear(self.dropped(x), self.lora_A.weight.to(x.dtype))
        added = F.linear(small, self.lora_B.weight.to(x.dtype)) * (self.lora.alpha / self.lora.r)
        return (out + added).to(out.dtype)

    def dropped(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... I"]:
        if not self.lora.dropout or not torch.is_grad_enabled():  # policies stay in eval mode: train() tells nothing
            return x
        self.calls += 1
        keep = keep_mask(x.shape, seed=self.seed, step=self.calls, drop=self.lora.dropout, device=x.device)
        return x * keep / (1 - self.lora.dropout)

    def merged(self) -> Float[Tensor, "O I"]:
        """W + (alpha / r) B A, summed in fp32 and rounded once to W's dtype; differentiable in A and B."""
        weight = plain_weight(self.base_layer)
        added = whole(self.lora_B.weight).float() @ whole(self.lora_A.weight).float()
        return (weight.float() + added * (self.lora.alpha / self.lora.r)).to(weight.dtype)


def add_lora(policy: Policy, lora: Lora) -> None:
    """Put adapters on the policy's module, in place; freeze everything else and free its gradients.

    Raises ValueError without a layer of a target name, without stacked experts to adapt, or on existing adapters.
    """
    module = policy.module
    names = lora.targets or policy.spec.lora_targets
    if adapted_layers(module):
        raise ValueError("lora: the policy has adapters already; merge them first (merge_lora)")
    chosen = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear) and is_target(path, names)]
    if not chosen:
        raise ValueError(
            f"lora.targets={names} names no linear layer in a block of {type(module).__name__}; name other layers"
        )
    stacks = [path for path, layer in module.named_modules() if is_stacked(layer)] if lora.experts else []
    if lora.experts and not stacks:
        raise ValueError(f"lora.experts=True, but {type(module).__name__} has no stacked experts; leave it out")
    module.requires_grad_(False)
    module.zero_grad(set_to_none=True)  # old gradients would take memory and count in clipping
    generator = Generator().manual_seed(lora.seed)
    for paths, adapted in ((chosen, LoraLinear), (stacks, LoraExperts)):
        for path in paths:
            module.set_submodule(path, adapted(module.get_submodule(path), lora, generator))
    policy.lora = lora


def is_target(path: str, names: Sequence[str]) -> bool:
    """Whether a layer is named by its full path, or, inside a block, by its last name."""
    return path in names or (re.search(r"\.\d+\.", path) is not None and path.rpartition(".")[2] in names)


def adapted_layers(module: nn.Module) -> dict[str, LoraLinear | LoraExperts]:
    """The layers that carry adapters, by name."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, LoraLinear | LoraExperts)}


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """Run the block without adapters."""
    layers = adapted_layers(module).values()
    before = [layer.active for layer in layers]  # an outer block may have disabled some already
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.active = was


def without_adapters(policy: Policy) -> Policy:
    """The reference that RL started from: a policy on the same weights without adapters. Raises ValueError without any
    adapters, for then training would change the reference."""
    if not adapted_layers(policy.module):
        raise ValueError(
            f"{type(policy.module).__name__} has no adapters to leave out; keep a copy of it as the reference"
        )
    spec = policy.spec
    reference = copy.copy(policy)
    reference.spec = replace(spec, encode=partial(_without, spec.encode), head=partial(_without, spec.head))
    return reference


def _without(f: Callable[..., Tensor], module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with disable_adapters(module):
        return f(module, *args, **kwargs)


def linear_of(weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None) -> nn.Linear:
    """A layer of these tensors, not copied; the weight is frozen."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")  # meta: draws no random weights
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = cast(Any, bias)
    return layer


def is_bitsandbytes(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and type(layer.weight).__module__.startswith("bitsandbytes")


@torch.no_grad()
def plain_weight(layer: nn.Linear) -> Float[Tensor, "O I"]:
    """A linear layer's weight: dequantised from bitsandbytes, gathered if sharded."""
    if not is_bitsandbytes(layer):
        return whole(layer.weight.detach())
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit  # an optional dependency

        return dequantize_4bit(weight.data, weight.quant_state)
    # An 8-bit layer moves its rows and scales (absolute maxima, 127 steps) to `state` at its first forward.
    kept: Any = layer.state if weight.SCB is None else weight
    return kept.CB * (kept.SCB.float() / 127)[:, None]
