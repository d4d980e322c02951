"""Aligned forward (QaRL, arXiv 2604.07853 [digest]): the learner computes with the rollout's quantized operands.

The forward is the rollout's low-bit product: the same operands, and the same bits for a batch of the same shape. The
backward differentiates the product of the dequantized operands,
    y = Q(x) Q(w)^T + b,   dx = dy Q(w),   dw = dy^T Q(x),   db = sum dy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.models.base import Module, Policy
from dllm_rl.models.lora import STACKS, LoraExperts, LoraLinear, base_of, check_mergeable
from dllm_rl.models.merge import merged_tensor
from dllm_rl.quantization.linear import (
    Experts,
    check_finite,
    dequantized_input,
    dequantized_weight,
    mixture,
    quantized_forward,
    write_count,
)
from dllm_rl.quantization.rollout_policy import quantized_pairs, requantize


class StraightThrough(torch.autograd.Function):
    """A rollout layer's product, differentiated as if quantization were the identity."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        y, seen = quantized_forward(layer, x, bias)
        ctx.save_for_backward(*seen)
        ctx.layer = layer
        ctx.version = write_count(layer)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None]:
        if write_count(ctx.layer) != ctx.version:
            raise RuntimeError("rollout weights changed between a forward and its backward: sync after the backward")
        dx = dw = db = None
        if ctx.needs_input_grad[3]:
            dx = dy @ dequantized_weight(ctx.layer).to(dy.dtype)
        if ctx.needs_input_grad[1]:
            dw = dy.flatten(0, -2).T @ dequantized_input(ctx.layer, *ctx.saved_tensors).to(dy.dtype).flatten(0, -2)
        if ctx.needs_input_grad[2]:
            db = dy.flatten(0, -2).sum(0)
        return None, dw, db, dx


class _AlignedLinear:
    """The operand that a learner's layer shares with the rollout's."""

    def __init__(self, name: str, source: Any, target: Any, rollout_module: Module) -> None:
        self.name = name
        self.source = source
        self.target = target
        self.rollout_module = rollout_module
        self.held = list(source.parameters())  # read outside of a forward: a sharded learner's parts
        self.seen = self.versions()

    def versions(self) -> list[int]:
        return [parameter._version for parameter in self.held]

    def forward(self, *inputs: Tensor) -> Tensor:
        if not getattr(self.source, "active", True):  # the reference runs without adapters
            return type(self.source).forward(self.source, *inputs)
        if self.versions() != self.seen:  # the learner's weights have changed
            self.refresh()
        return self.product(*inputs)

    def product(self, *inputs: Any) -> Tensor:
        weight = merged_tensor(self.source, "weight")
        return StraightThrough.apply(self.target, weight, base_of(self.source).bias, *inputs)

    def refresh(self) -> None:
        check_finite({part: fine for part, _, fine in requantize(self.name, self.source, self.rollout_module)})
        self.seen = self.versions()


class _AlignedExperts(_AlignedLinear):
    """The operands of experts that the learner stores in stacks."""

    def product(self, *inputs: Any) -> Tensor:
        products: dict[str, Any] = {}
        for stack in STACKS:
            pairs = zip(getattr(self.target, stack), merged_tensor(self.source, stack).unbind(), strict=True)
            products[stack] = [partial(StraightThrough.apply, layer, weight, None) for layer, weight in pairs]
        return mixture(*inputs, **products, act_fn=self.target.act_fn)


@contextmanager
def aligned_forward(policy: Policy, rollout_policy: Policy) -> Iterator[Callable[[], None]]:
    """Run the learner's linear layers with the rollout's quantized operands in the block, adapters merged.

    Use it with the correctors `aligned` and `qarl`; a run with them does so. The next forward after an optimizer step
    quantizes the changed weights into the rollout's storage.

    Args:
        policy: Learner.
        rollout_policy: Its quantized copy, with the same weights version.

    Yields:
        Function that quantizes the weights immediately, for an optimizer that bypasses autograd's version counters.

    Raises:
        ValueError: Learner and rollout have different weights at the start, or the adapters have dropout.
    """
    if policy.weights_version != rollout_policy.weights_version:
        wrong = f"weights_version={rollout_policy.weights_version} of the rollout is not the learner's"
        raise ValueError(f"{wrong} {policy.weights_version}: call sync_weights(policy, rollout_policy) first")
    links = []
    for name, source, target in quantized_pairs(policy.module, rollout_policy.module):
        kind = _AlignedExperts if isinstance(target, Experts) else _AlignedLinear
        links.append(kind(name, source, target, rollout_policy.module))
    swapped: list[Any] = []

    def refresh() -> None:
        for link in links:
            link.refresh()

    try:
        for link in links:
            if "forward" in vars(link.source):
                raise ValueError(f"{link.name}.forward is already replaced: is this inside another aligned_forward()?")
            if isinstance(link.source, LoraLinear | LoraExperts):  # adapters are merged, which leaves no input to drop
                check_mergeable(link.source.lora)
            link.source.forward = link.forward
            swapped.append(link.source)  # one by one: on an error, the layers replaced so far are restored
        yield refresh
    finally:
        for layer in swapped:
            del layer.forward
