"""Quantisation schemes by name: each function builds a torchao config, a FakeQuantize or a Float8DynamicEmulated."""

import copy
from functools import cache

import torch
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
)

from dllm_rl.quantization.fake import TINY, FakeQuantize, Float8DynamicEmulated, Scheme

E4M3 = "fake_quantize with weight=e4m3 and activation=e4m3"


def float8_weight_only(*, dequantised: bool = False) -> Float8WeightOnlyConfig | FakeQuantize:
    """e4m3 weights per row, products in the learner's dtype. Saves memory, not time; runs anywhere, CPU included.

    dequantised  round and dequantise weights once per sync instead of in every product: the same numbers in the time
                 and memory of a plain copy
    """
    return FakeQuantize("e4m3") if dequantised else Float8WeightOnlyConfig(set_inductor_config=False)


def float8_dynamic() -> Float8DynamicActivationFloat8WeightConfig:
    """e4m3 weights per row, e4m3 inputs per token, on float8 hardware: CUDA capability 8.9 or more, bf16 weights."""
    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), activation_value_lb=TINY, set_inductor_config=False
    )


def float8_dynamic_emulated() -> Float8DynamicEmulated:
    """The same arithmetic as float8_dynamic on a CPU, through torchao's own tensors. For tests: slower than bf16."""
    return Float8DynamicEmulated()


def int8_weight_only() -> Int8WeightOnlyConfig:
    """int8 weights per row, products in the learner's dtype. Runs anywhere, CPU included."""
    return Int8WeightOnlyConfig(set_inductor_config=False)


def int8_dynamic() -> Int8DynamicActivationInt8WeightConfig:
    """int8 weights per row, int8 inputs per token, integer products. Runs anywhere; faster than bf16 on many CPUs."""
    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def int4_weight_only(*, group_size: int = 32) -> IntxWeightOnlyConfig:
    """4-bit weights in groups, held in bytes, products in the learner's dtype. Runs anywhere, CPU included.

    group_size  inputs per scale; layers whose inputs are not a multiple are not quantised
    """
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1")
    int4 = torch.int4  # type: ignore[attr-defined]  # torch's stubs leave it out
    return IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(group_size))


def int4_packed(*, group_size: int = 128) -> Int4WeightOnlyConfig:
    """4-bit weights in groups, packed for a CUDA kernel (bf16). Saves memory and, in small batches, time.

    group_size  inputs per scale: 32, 64, 128 or 256
    """
    if group_size not in (32, 64, 128, 256):
        raise ValueError(f"group_size={group_size} must be 32, 64, 128 or 256")
    return Int4WeightOnlyConfig(
        group_size=group_size, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


def fake_quantize(
    *, weight: str | None = "int8", activation: str | None = None, granularity: str = "row"
) -> FakeQuantize:
    """Emulation of any pair of schemes: e4m3, e5m2, int8, int4, int3, five_level, ternary, or None.

    weight       scheme of the weights, or none
    activation   scheme of the linear layers' inputs, or none
    granularity  row: a scale per output row of a weight and per token of an input; tensor: one scale
    Rounded inputs make it slower than bf16. e4m3 for both is what dynamic FP8 does, on any device.
    """
    return FakeQuantize(weight=weight, activation=activation, granularity=granularity)


@cache
def has_float8_rows() -> bool:
    """Whether the CPU multiplies float8 numbers with a scale per row: some kernels of torch 2.11 do not."""
    ones = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1)
    try:
        torch._scaled_mm(ones, ones.t(), scale, scale.t(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def check_scheme(config: Scheme, device: torch.device, dtype: torch.dtype) -> Scheme:
    """The config without side effects on torch's global settings, and safe on all-zero inputs. Raises ValueError when
    `device` cannot run the config, naming an alternative."""
    ours = isinstance(config, FakeQuantize | Float8DynamicEmulated)
    if not ours and not any("torchao" in cls.__module__ for cls in type(config).__mro__):
        raise ValueError(f"config={config!r} is neither a torchao config nor a FakeQuantize")
    if why := _refusal(config, device, dtype):
        raise ValueError(why)
    if ours:
        return config
    config = copy.copy(config)
    if hasattr(config, "set_inductor_config"):
        config.set_inductor_config = False  # torchao would change torch's global settings
    if isinstance(config, Float8DynamicActivationFloat8WeightConfig) and config.activation_value_lb is None:
        # An all-zero input would give 0/0; torchao's MSLK kernels take no bound.
        config.activation_value_lb = None if "MSLK" in str(config.kernel_preference) else TINY
    return config


def _refusal(config: Scheme, device: torch.device, dtype: torch.dtype) -> str:
    """Why the device cannot run a config, and what to use instead; else ""."""
    if isinstance(config, Float8DynamicEmulated):
        if device.type != "cpu":
            return f"device={device}: float8_dynamic_emulated is for CPUs; use float8_dynamic"
        if not has_float8_rows():
            return (
                f"torch {torch.__version__} has no float8 products with a scale a row on this CPU, which "
                f"float8_dynamic_emulated needs; use {E4M3}, the same arithmetic, or torch 2.13"
            )
    if isinstance(config, Float8DynamicActivationFloat8WeightConfig):
        if device.type != "cuda":
            return (
                f"device={device} has no float8 products, which dynamic FP8 needs (CUDA capability 8.9 or more); use "
                f"float8_dynamic_emulated or {E4M3} (the same arithmetic, slower), or float8_weight_only"
            )
        # ROCm counts capabilities in its own way.
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 9):
            return (
                f"device={torch.cuda.get_device_name(device)} is below CUDA capability 8.9, which dynamic FP8 needs; "
                "use int8_dynamic or float8_weight_only"
            )
        if dtype != torch.bfloat16 and isinstance(config.granularity[0], PerRow):
            return f"dtype={dtype}: dynamic FP8 per row needs weights in bfloat16; load the policy in it"
    if isinstance(config, Int4WeightOnlyConfig):
        if device.type != "cuda":
            return f"device={device} has no packed int4 kernel; use int4_weight_only"
        if dtype != torch.bfloat16:
            return f"dtype={dtype}: packed int4 needs weights in bfloat16; load the policy in it"
    return ""
