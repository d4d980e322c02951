"""Quantised rollout copies and their refresh. With its fellow `quantize_*` modules the only room that sees torchao.

A torchao config object describes the quantisation; None is none. The functions named after a scheme build the config
with the settings that matter here, so that a recipe or a command line can pick one by name.
"""

import copy
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dllm_rl.policies import Policy

__all__ = ["float8_weight_only", "int8_weight_only", "quantized_copy", "sync_weights"]


def float8_weight_only():
    """e4m3 weights, products in the learner's dtype. Saves memory, not time; runs anywhere, CPU included."""
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def int8_weight_only():
    """int8 weights per row, products in the learner's dtype. Runs anywhere, CPU included."""
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def in_blocks(module: nn.Module, name: str) -> bool:
    """Whether a layer is a linear layer of a transformer block: not a head, an embedding, or a router."""
    return isinstance(module, nn.Linear) and bool(re.search(r"\.\d+\.", name)) and not re.search(r"(router|\.gate)$", name)


def quantized_copy(policy: Policy, config, *, skip: Callable[[nn.Module, str], bool] | None = None) -> Policy:
    """A second policy whose block linears are quantised by a torchao config; None copies without quantising.

    skip  (module, name) -> True for further layers that keep their precision.
    """
    rollout_policy = copy.copy(policy)
    rollout_policy.module = copy.deepcopy(policy.module).requires_grad_(False)
    rollout_policy.quantization = config
    if config is not None:
        from torchao.quantization import quantize_

        quantize_(rollout_policy.module, config, lambda m, name: in_blocks(m, name) and not (skip and skip(m, name)))
    return rollout_policy


@torch.no_grad()
def sync_weights(policy: Policy, rollout_policy: Policy) -> None:
    """Give the rollout policy the learner's weights, quantised afresh, in place: no storage moves."""
    if rollout_policy is not policy:
        source = dict(policy.module.named_parameters(remove_duplicate=False)) | dict(policy.module.named_buffers())
        for name, layer in rollout_policy.module.named_modules():
            for kind, target in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                value = source[f"{name}.{kind}" if name else kind]
                target.copy_(requantized(value, rollout_policy.quantization) if is_quantized(target) else value)
    rollout_policy.version = policy.version


def is_quantized(tensor: Tensor) -> bool:
    return type(tensor.data) is not Tensor and hasattr(tensor, "dequantize") and "torchao" in type(tensor.data).__module__


def requantized(weight: Tensor, config) -> Tensor:
    """A fresh quantisation of one linear weight under `config`."""
    from torchao.quantization import quantize_

    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    quantize_(layer, config)
    return layer.weight
