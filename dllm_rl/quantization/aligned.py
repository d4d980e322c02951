"""Aligned forward (QaRL, arXiv 2604.07853 [digest]): the learner computes with the rollout's quantized operands.

The forward is the rollout's low-bit product, with the same operands. For a batch of the same shape, the results are
bit-identical. The backward differentiates the product of the dequantized operands,
    y = Q(x) Q(w)^T + b,   dx = dy Q(w),   dw = dy^T Q(x),   db = sum dy.
docs/methods.md explains the tag [digest].
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
    UnstackedExperts,
    check_finite,
    dequantized_input,
    dequantized_weight,
    moe_forward,
    quantized_forward,
    write_count,
)
from dllm_rl.quantization.rollout_policy import quantized_pairs, requantize


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
        rollout_module: Module of the rollout policy.
    """

    def __init__(self, name: str, source: Any, target: Any, rollout_module: Module) -> None:
        self.name = name
        self.source = source
        self.target = target
        self.rollout_module = rollout_module
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

    def refresh(self) -> None:
        """Quantize the learner's current weight into the rollout's layer."""
        weights = requantize(self.name, self.source, self.rollout_module)
        check_finite({weight_name: finite for weight_name, _, finite in weights})
        self.quantized_versions = self.weight_versions()


class _AlignedExperts(_AlignedLinear):
    """Experts that the learner stores in stacks, and the rollout policy as separate layers."""

    def product(self, *inputs: Any) -> Tensor:
        products: dict[str, Any] = {}
        for stack in STACKS:
            pairs = zip(getattr(self.target, stack), merged_tensor(self.source, stack).unbind(), strict=True)
            products[stack] = [partial(StraightThrough.apply, layer, weight, None) for layer, weight in pairs]
        return moe_forward(*inputs, **products, act_fn=self.target.act_fn)


@contextmanager
def aligned_forward(policy: Policy, rollout_policy: Policy) -> Iterator[Callable[[], None]]:
    """In this context, run the learner's linear layers with the rollout's quantized operands, and adapters merged.

    A run with the corrector `Aligned` or `QaRL` uses it. The first forward after an optimizer step quantizes the
    changed weights into the rollout policy, in place.

    Args:
        policy: Learner.
        rollout_policy: Its quantized copy, with the same weights version.

    Yields:
        Function that quantizes the weights immediately. Call it after an optimizer step that autograd's version
        counters do not count.

    Raises:
        ValueError: Learner and rollout have different weights at the start, or the adapters have dropout.
    """
    if policy.weights_version != rollout_policy.weights_version:
        raise ValueError(
            f"weights_version={rollout_policy.weights_version} of the rollout is not the learner's "
            f"{policy.weights_version}: call sync_weights(policy, rollout_policy) first"
        )
    aligned_layers = []
    for name, source, target in quantized_pairs(policy.module, rollout_policy.module):
        layer_class = _AlignedExperts if isinstance(target, UnstackedExperts) else _AlignedLinear
        aligned_layers.append(layer_class(name, source, target, rollout_policy.module))
    replaced: list[Any] = []

    def refresh() -> None:
        for aligned in aligned_layers:
            aligned.refresh()

    try:
        for aligned in aligned_layers:
            if "forward" in vars(aligned.source):
                raise ValueError(
                    f"{aligned.name}.forward is already replaced: is this inside another aligned_forward()?"
                )
            # Merged adapters have no separate input that dropout could apply to.
            if isinstance(aligned.source, LoraLinear | LoraExperts):
                check_mergeable(aligned.source.lora)
            aligned.source.forward = aligned.forward
            replaced.append(aligned.source)  # one by one: after an error, only the replaced layers are restored
        yield refresh
    finally:
        for layer in replaced:
            del layer.forward
