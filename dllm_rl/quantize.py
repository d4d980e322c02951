"""Quantised rollout copies and their refresh. With its fellow `quantize_*` modules the only room that sees torchao.

A torchao config object, or a FakeQuantize, describes the quantisation; None is none. The functions named after a
scheme build the config with the settings that matter here; `__all__` lists those that a recipe can pick by name.
"""

import copy
import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_rl.emulate import EmulatedLinear, FakeQuantize
from dllm_rl.policies import Policy

__all__ = [
    "e4m3_emulated",
    "e5m2_emulated",
    "fake_quantize",
    "five_level_emulated",
    "float8_weight_only",
    "int3_emulated",
    "int4_emulated",
    "int8_emulated",
    "int8_weight_only",
    "ternary_emulated",
]


def float8_weight_only():
    """e4m3 weights, products in the learner's dtype. Saves memory, not time; runs anywhere, CPU included."""
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def int8_weight_only():
    """int8 weights per row, products in the learner's dtype. Runs anywhere, CPU included."""
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def fake_quantize(
    *, weight: str | None = "int8", activation: str | None = None, granularity: str = "row"
) -> FakeQuantize:
    """Emulation of any pair of schemes: e4m3, e5m2, int8, int4, int3, five_level, ternary, or None."""
    return FakeQuantize(weight=weight, activation=activation, granularity=granularity)


def e4m3_emulated() -> FakeQuantize:
    """e4m3 weights per row and e4m3 inputs per token, emulated: what dynamic FP8 does, on any device."""
    return FakeQuantize("e4m3", "e4m3")


def e5m2_emulated() -> FakeQuantize:
    """e5m2 weights per row and e4m3 inputs per token, emulated."""
    return FakeQuantize("e5m2", "e4m3")


def int8_emulated() -> FakeQuantize:
    """int8 weights per row and int8 inputs per token, emulated."""
    return FakeQuantize("int8", "int8")


def int4_emulated() -> FakeQuantize:
    """15-level weights per row and e4m3 inputs per token, emulated."""
    return FakeQuantize("int4", "e4m3")


def int3_emulated() -> FakeQuantize:
    """7-level weights per row and e4m3 inputs per token, emulated."""
    return FakeQuantize("int3", "e4m3")


def five_level_emulated() -> FakeQuantize:
    """5-level weights per row and e4m3 inputs per token, emulated."""
    return FakeQuantize("five_level", "e4m3")


def ternary_emulated() -> FakeQuantize:
    """Ternary weights per row, scaled by their mean magnitude, and e4m3 inputs per token, emulated."""
    return FakeQuantize("ternary", "e4m3")


def in_blocks(module: nn.Module, name: str) -> bool:
    """Whether a layer is a linear layer of a transformer block: not a head, an embedding, or a router."""
    inside = re.search(r"\.\d+\.", name) and not re.search(r"(router|\.gate)$", name)
    return isinstance(module, nn.Linear) and bool(inside)


def quantized_copy(policy: Policy, config, *, skip: Callable[[nn.Module, str], bool] | None = None) -> Policy:
    """A second policy whose block linears are quantised by `config`; None copies without quantising.

    skip  (module, name) -> True for further layers that keep their precision.
    """
    rollout_policy = copy.copy(policy)
    rollout_policy.module = copy.deepcopy(policy.module).requires_grad_(False)
    rollout_policy.quantization = config
    if config is None:
        return rollout_policy
    for name, layer in list(rollout_policy.module.named_modules()):
        if not in_blocks(layer, name) or (skip and skip(layer, name)):
            continue
        if "forward" in vars(layer):
            raise ValueError(f"{name}.forward is replaced: take the quantised copy outside of the aligned() block")
        if isinstance(config, FakeQuantize):
            rollout_policy.module.set_submodule(name, EmulatedLinear(layer, config))
        else:
            layer.weight, layer.quantization = requantized(layer.weight, config), config
    return rollout_policy


@torch.no_grad()
def sync_weights(policy: Policy, rollout_policy: Policy) -> None:
    """Give the rollout policy the learner's weights, quantised afresh, in place: no storage moves."""
    if rollout_policy is not policy:
        source = dict(policy.module.named_parameters(remove_duplicate=False)) | dict(policy.module.named_buffers())
        for name, layer in rollout_policy.module.named_modules():
            if is_quantized(layer):
                load_weight_(layer, source[f"{name}.weight"])
            for kind, target in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                if not (is_quantized(layer) and kind in ("weight", "weight_scale")):
                    target.copy_(source[f"{name}.{kind}" if name else kind])
    rollout_policy.version = policy.version


def quantized_layers(rollout_policy: Policy) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every quantised linear layer."""
    return ((name, layer) for name, layer in rollout_policy.module.named_modules() if is_quantized(layer))


def is_quantized(layer: nn.Module) -> bool:
    return isinstance(layer, EmulatedLinear) or (isinstance(layer, nn.Linear) and hasattr(layer.weight, "qdata"))


def requantized(weight: Tensor, config) -> nn.Parameter:
    """A fresh quantisation of one linear weight under a torchao config."""
    from torchao.quantization import quantize_

    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    quantize_(layer, config)
    return layer.weight


@torch.no_grad()
def load_weight_(layer: nn.Linear, weight: Tensor) -> None:
    """Quantise `weight` into a quantised layer, in place."""
    if isinstance(layer, EmulatedLinear):
        layer.load_(weight)
    else:
        layer.weight.copy_(requantized(weight, layer.quantization))


def product(layer: nn.Linear, x: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The quantised layer's own product with the given bias, and what `dequantized_input` needs of the input."""
    return layer.product(x, bias) if isinstance(layer, EmulatedLinear) else (F.linear(x, layer.weight, bias), (x,))


def dequantized_weight(layer: nn.Linear) -> Tensor:
    return layer.dequantized() if isinstance(layer, EmulatedLinear) else layer.weight.dequantize()


def dequantized_input(layer: nn.Linear, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """The input as the quantised layer saw it: rounded where the layer rounds its input."""
    if scale is not None:
        return x * scale
    if getattr(layer.weight, "act_quant_kwargs", None) is None:
        return x
    from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor

    return _choose_quant_func_and_quantize_tensor(x, layer.weight.act_quant_kwargs).dequantize()


def operand_version(layer: nn.Linear) -> int:
    """Autograd's count of in-place writes to the quantised data."""
    return (layer.weight if isinstance(layer, EmulatedLinear) else layer.weight.qdata)._version
