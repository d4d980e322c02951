"""Aligned forward (QaRL, arXiv 2604.07853 [digest]): the learner computes with the rollout's quantized operands.

The forward is the rollout's low-bit product, with the same operands. For a batch of the same shape, the results are
bit-identical. The backward differentiates the product of the dequantized operands,
    y = Q(x) Q(w)^T + b,   dx = dy Q(w),   dw = dy^T Q(x),   db = sum dy.
docs/papers.md explains the tag [digest].
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dllm_rl.models.base import Policy
from dllm_rl.models.lora import STACKS, base_of, check_mergeable
from dllm_rl.models.merge import merged_tensor
from dllm_rl.quantization.linear import (
    UnstackedExperts,
    dequantized_input,
    dequantized_weight,
    moe_forward,
    quantizable_layers,
    quantized_forward,
    write_count,
)
from dllm_rl.quantization.rollout_policy import check_finite, gathered_weights, load_weight_


class StraightThrough(torch.autograd.Function):
    """The output of a rollout policy's layer, differentiated as if quantization were the identity."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        y, rounded_input = quantized_forward(layer, x, bias)
        ctx.save_for_backward(*rounded_input)
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
    """A learner's linear layer that computes with the weight of the rollout's layer.

    Args:
        name: Name of the layer.
        source: The learner's layer.
        target: The rollout policy's quantized layer.
    """

    def __init__(self, name: str, source: Any, target: Any) -> None:
        self.name = name
        self.source = source
        self.target = target
        # Listed here, because in the forwards of a sharded learner they are temporary gathered tensors.
        self.parameters = list(source.parameters())
        self.quantized_versions = self.weight_versions()

    def weight_versions(self) -> list[int]:
        return [parameter._version for parameter in self.parameters]

    def forward(self, *inputs: Tensor) -> Tensor:
        if not getattr(self.source, "active", True):  # a forward of the reference policy, without adapters
            return type(self.source).forward(self.source, *inputs)
        if self.weight_versions() != self.quantized_versions:  # the learner's weights have changed
            self.refresh()
        return self.product(*inputs)

    def product(self, *inputs: Any) -> Tensor:
        weight = merged_tensor(self.source, "weight")
        return StraightThrough.apply(self.target, weight, base_of(self.source).bias, *inputs)

    def targets(self) -> list[Any]:
        """Return the rollout's linear layers, in the order of `gathered_weights`."""
        return [self.target]

    def refresh(self) -> None:
        """Quantize the learner's current weight into the rollout's layer."""
        finite = {}
        for target, (name, weight) in zip(self.targets(), gathered_weights(self.name, self.source), strict=True):
            _, finite[name] = load_weight_(target, weight)
        check_finite(finite)
        self.quantized_versions = self.weight_versions()


class _AlignedExperts(_AlignedLinear):
    """Experts that the learner stores in stacks, and the rollout policy as separate layers."""

    def product(self, *inputs: Any) -> Tensor:
        products: dict[str, Any] = {}
        for stack in STACKS:
            pairs = zip(getattr(self.target, stack), merged_tensor(self.source, stack).unbind(), strict=True)
            products[stack] = [partial(StraightThrough.apply, layer, weight, None) for layer, weight in pairs]
        return moe_forward(*inputs, **products, act_fn=self.target.act_fn)

    def targets(self) -> list[Any]:
        return [layer for stack in STACKS for layer in getattr(self.target, stack)]


@contextmanager
def aligned_forward(policy: Policy, rollout_policy: Policy) -> Iterator[Callable[[], None]]:
    """In this context, run the learner's linear layers with the rollout's quantized operands, and adapters merged.

    A run with the corrector `Aligned` or `QaRL` uses it. The first forward after an optimizer step quantizes the
    changed weights into the rollout policy, in place. In this context, `policy.module.is_aligned` is True: a copy of
    the module would contain the rollout's layers.

    Args:
        policy: Learner.
        rollout_policy: Its quantized copy, with the same weights version.

    Yields:
        Function that quantizes the weights immediately. Call it after an optimizer step that autograd's version
        counters do not count.

    Raises:
        ValueError: Learner and rollout have different weights at the start, the adapters have dropout, or the learner
            is in another aligned forward.
    """
    if policy.weights_version != rollout_policy.weights_version:
        raise ValueError(
            f"weights_version={rollout_policy.weights_version} of the rollout is not the learner's "
            f"{policy.weights_version}: call sync_weights(policy, rollout_policy) first"
        )
    if getattr(policy.module, "is_aligned", False):
        raise ValueError("this policy is in another aligned_forward(): leave it first")
    aligned_layers: list[_AlignedLinear] = []
    for name, source in quantizable_layers(policy.module):
        target = rollout_policy.module.get_submodule(name)
        if isinstance(target, UnstackedExperts):
            aligned_layers.append(_AlignedExperts(name, source, target))
        elif hasattr(target, "quantization"):
            aligned_layers.append(_AlignedLinear(name, source, target))
    if aligned_layers and policy.lora is not None:
        check_mergeable(policy.lora)

    def refresh() -> None:
        for aligned in aligned_layers:
            aligned.refresh()

    policy.module.is_aligned = True
    for aligned in aligned_layers:
        aligned.source.forward = aligned.forward
    try:
        yield refresh
    finally:
        for aligned in aligned_layers:
            del aligned.source.forward
        del policy.module.is_aligned
