"""Quantization schemes by name: torchao's configs, and emulated formats (`FakeQuantize`).

docs/papers.md explains the tag [ours].
"""

import copy
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dllm_rl.records import FunctionRecord, Record, option
from dllm_rl.rng import generator_for

# Mantissa bits, smallest normal exponent, largest value.
FLOAT_FORMATS = {
    "e4m3": (3, -6, 448.0),
    "e5m2": (2, -14, 57344.0),
    "nvfp4": (1, 0, 6.0),  # e2m1, as mxfp4
    "mxfp4": (1, 0, 6.0),
}
BLOCKS = {"nvfp4": 16, "mxfp4": 32}  # numbers of neighboring inputs that share a scale
INT4_LARGEST = 7  # codes are the integers -7..7
Format = Literal["e4m3", "e5m2", "int8", "int4", "nvfp4", "mxfp4"]
TINY = 1e-12  # lower limit of a row's max |x|, so that a row of zeros gives zeros and not 0/0
E4M3_ADVICE = "FakeQuantize with weight=e4m3 and activation=e4m3"  # in error messages


class Scheme(Record):
    """A quantization scheme of the policy that samples.

    Where a scheme is expected, a function that returns a torchao config is one too.
    """

    def config(self) -> Any:
        """Return the config for `quantized_copy`: torchao's, or the scheme itself if this library computes it."""
        return self


class FunctionScheme(FunctionRecord, Scheme):
    """A scheme of torchao that a function makes.

    Args:
        function: Function that returns a torchao config.
    """

    def config(self) -> Any:
        return self.function()


class FakeQuantize(Scheme):
    """Emulate any pair of formats: e4m3, e5m2, int8, int4, nvfp4, mxfp4, or None. `Rounding` takes others.

    Use it for formats that the device does not support. With an `activation` format it is slower than bf16. With e4m3
    for both, it computes the same as dynamic FP8, on any device.

    Args:
        weight: Format of the weights. None: they are not quantized. Default: int8.
        activation: Format of the linear layers' inputs. None (default): they are not quantized.
        granularity: "row" (default) for a scale per output row of a weight and per token of an input; "tensor" for one
            scale. nvfp4 and mxfp4 do not read it, as they have a scale per block, see `NVFP4` and `MXFP4`.
    """

    weight: Format | None = "int8"
    activation: Format | None = None
    granularity: Literal["row", "tensor"] = "row"

    @property
    def group_size(self) -> int:
        """The number that a layer's number of inputs must be a multiple of, so that blocks are whole."""
        return max(BLOCKS.get(name or "", 1) for name in (self.weight, self.activation))


class Rounding(FakeQuantize):
    """A format of your own for the weights, emulated: override `rounded`, which may draw random numbers.

    Args:
        weight: None; `rounded` takes its place.
        activation: Format of the linear layers' inputs, as of `FakeQuantize`. None (default): they are not quantized.
        granularity: As of `FakeQuantize`, for the inputs.
    """

    weight: None = None

    def config(self) -> Any:
        if type(self).rounded is Rounding.rounded:
            raise ValueError(f"{type(self).__name__} has no format: write a subclass that defines rounded")
        return self

    def rounded(self, weight: Float[Tensor, "N K"], generator: torch.Generator) -> Float[Tensor, "N K"]:
        """Return the numbers that stand for a layer's weight, in fp32; the copy stores them in the weights' dtype.

        Args:
            weight: The learner's weight, in fp32.
            generator: On the weight's device. Its seed is a function of the version of the weights and of the layer's
                name, so that all processes, and a resumed run, draw the same numbers.
        """
        raise NotImplementedError


class Float8DynamicEmulated(Scheme):
    """Compute the same as `Float8Dynamic` on a CPU, with torchao's tensors and torch's scaled product.

    Use it in tests; it is slower than bf16.
    """


def _torchao() -> Any:
    from torchao import quantization  # not at the top: the import takes seconds, and an invalid recipe fails without it

    return quantization


class Float8WeightOnly(Scheme):
    """Quantize weights to e4m3 per row, with products in the learner's dtype.

    Use it to save memory; it saves no time. It runs on any device, including CPUs.

    Args:
        dequantized: Quantize and dequantize weights once per sync instead of in every product. The results are the
            same, and time and memory are those of an unquantized copy. Default: False.
    """

    dequantized: bool = False

    def config(self) -> Any:
        return FakeQuantize(weight="e4m3") if self.dequantized else _torchao().Float8WeightOnlyConfig()


class Float8Dynamic(Scheme):
    """Quantize weights to e4m3 per row and inputs to e4m3 per token.

    Use it on float8 hardware: it needs CUDA capability 8.9 or more, and weights in bf16, or in fp32 with a recipe's
    `bf16`. `FakeQuantize` emulates it on other devices.
    """

    def config(self) -> Any:
        from torchao.quantization.quantize_.common import KernelPreference

        torchao = _torchao()
        return torchao.Float8DynamicActivationFloat8WeightConfig(
            granularity=torchao.PerRow(),
            activation_value_lb=TINY,
            kernel_preference=KernelPreference.TORCH,  # AUTO searches the disk for the package mslk in every product
        )


class Float8ByGPU(Scheme):
    """`Float8Dynamic` on an H100, an H200 or a newer GPU where a step samples many rows, and else no quantization.

    Use it in a recipe for a large model; a run says at its start what it takes.

    Args:
        min_rows: Completions of a step of one process from which on FP8 is taken. Default: 24.
    """

    min_rows: int = option(default=24, at_least=1)

    def config(self) -> Any:
        raise ValueError("Float8ByGPU is for a run, which knows its rows; use Float8Dynamic, or no quantization")


class Int8WeightOnly(Scheme):
    """Quantize weights to int8 per row, with products in the learner's dtype.

    Use it to save memory on any device, including CPUs.
    """

    def config(self) -> Any:
        return _torchao().Int8WeightOnlyConfig()


class Int8Dynamic(Scheme):
    """Quantize weights to int8 per row and inputs to int8 per token, with integer products.

    Use it on devices without float8 products. It runs on any device. In all measurements it was slower than bf16.
    """

    def config(self) -> Any:
        return _torchao().Int8DynamicActivationInt8WeightConfig()


class Int4WeightOnly(Scheme):
    """Quantize weights to 4 bits in groups, stored in bytes, with products in the learner's dtype.

    Use it to study 4-bit rollouts on any device, including CPUs; `Int4Packed` saves more memory on CUDA.

    Args:
        group_size: Number of inputs per scale, at least 1. A layer whose number of inputs is not a multiple of it is
            not quantized. Default: 32.
    """

    group_size: int = option(default=32, at_least=1)

    def config(self) -> Any:
        torchao = _torchao()
        return torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(self.group_size))  # type: ignore[attr-defined]


class Int4Packed(Scheme):
    """Quantize weights to 4 bits in groups, packed for a CUDA kernel of torch.

    Use it on CUDA with capability 8.0 or more and bf16 weights. Its speed is not measured.

    Args:
        group_size: Number of inputs per scale: 32, 64, 128 (default) or 256.
    """

    group_size: Literal[32, 64, 128, 256] = 128

    def config(self) -> Any:
        return _torchao().Int4WeightOnlyConfig(group_size=self.group_size, int4_packing_format="tile_packed_to_4d")


class NVFP4(Scheme):
    """Emulate NVFP4: e2m1 in blocks of 16, with an e4m3 scale per block and one fp32 scale per tensor.

    Use it to study 4-bit floating-point rollouts on any device; it saves neither time nor memory. The numbers are those
    of torchao's `NVFP4Tensor`, bit for bit. A layer whose number of inputs is not a multiple of 16 is not quantized.

    Args:
        inputs: Whether the inputs of linear layers are quantized too (W4A4). They have one fp32 scale per token: with
            one per tensor, the tokens of a row would depend on the other rows of its batch. Default: False.

    Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149.
    """

    inputs: bool = False

    def config(self) -> Any:
        return FakeQuantize(weight="nvfp4", activation="nvfp4" if self.inputs else None)


class MXFP4(Scheme):
    """Emulate MXFP4: e2m1 in blocks of 32, with an e8m0 scale (a power of two) per block.

    Use it to study 4-bit floating-point rollouts on any device; it saves neither time nor memory. The scale is the
    largest power of two that is at most max |x| of the block, divided by 4, so that numbers above 6 scales become 6:
    the specification's rule, and torchao's `ScaleCalculationMode.FLOOR`, whose `MXTensor` has the same numbers bit for
    bit. A layer whose number of inputs is not a multiple of 32 is not quantized.

    Args:
        inputs: Whether the inputs of linear layers are quantized too (W4A4). Default: False.

    Source: OCP, "Microscaling Formats (MX) Specification", version 1.0.
    """

    inputs: bool = False

    def config(self) -> Any:
        return FakeQuantize(weight="mxfp4", activation="mxfp4" if self.inputs else None)


@cache
def has_float8_rows() -> bool:
    """Return whether the CPU multiplies float8 numbers with a scale per row; some kernels of torch 2.11 do not."""
    ones = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1)
    try:
        torch._scaled_mm(ones, ones.t(), scale, scale.t(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def check_scheme(scheme: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the config of a scheme, or a torchao config, changed so that it does not set torch's global settings and
    supports inputs of zeros.

    Raise ValueError if `device` cannot run it.
    """
    config = scheme.config() if isinstance(scheme, Scheme) else scheme
    is_emulated = isinstance(config, FakeQuantize | Float8DynamicEmulated)
    if not is_emulated and not any("torchao" in cls.__module__ for cls in type(config).__mro__):
        raise ValueError(f"config={config!r} is neither a torchao config nor a FakeQuantize")
    if reason := _unsupported_reason(config, device, dtype):
        raise ValueError(reason)
    if is_emulated:
        return config
    config = copy.copy(config)
    if hasattr(config, "set_inductor_config"):
        config.set_inductor_config = False  # torchao would change torch's global settings
    if isinstance(config, _torchao().Float8DynamicActivationFloat8WeightConfig) and config.activation_value_lb is None:
        # An input of zeros would give 0/0. torchao's MSLK kernels do not accept the bound.
        config.activation_value_lb = None if "MSLK" in str(config.kernel_preference) else TINY
    return config


def _unsupported_reason(config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Return why the device cannot run a config and what to use instead, or "" if it can."""
    if isinstance(config, Float8DynamicEmulated):
        if device.type != "cpu":
            return f"device={device}: Float8DynamicEmulated is for CPUs; use Float8Dynamic"
        if not has_float8_rows():
            return (
                f"torch {torch.__version__} has no float8 products with a scale per row on this CPU, which "
                f"Float8DynamicEmulated needs; use {E4M3_ADVICE}, or torch 2.13"
            )
    if isinstance(config, _torchao().Float8DynamicActivationFloat8WeightConfig):
        if device.type != "cuda":
            return (
                f"device={device} has no float8 products; use Float8WeightOnly, or, slower, Float8DynamicEmulated "
                f"or {E4M3_ADVICE}"
            )
        # ROCm numbers capabilities differently.
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 9):
            return (
                f"device={torch.cuda.get_device_name(device)} is below CUDA capability 8.9, which dynamic FP8 needs; "
                "use no quantization, or, for memory alone, Int8Dynamic or Float8WeightOnly"
            )
        if dtype != torch.bfloat16 and isinstance(config.granularity[0], _torchao().PerRow):
            return f"dtype={dtype}: dynamic FP8 per row needs weights in bfloat16; load the policy in it"
    if isinstance(config, _torchao().Int4WeightOnlyConfig):
        if device.type != "cuda":
            return f"device={device} has no packed int4 kernel; use Int4WeightOnly"
        if dtype != torch.bfloat16:
            return f"dtype={dtype}: packed int4 needs weights in bfloat16; load the policy in it"
    return ""


def round_to_float(x: Float[Tensor, "*S"], *, mantissa: int, exponent: int) -> Float[Tensor, "*S"]:
    """Round fp32 to `mantissa` explicit bits as a float8 cast does: ties to even, subnormals below 2**exponent."""
    # `anchor` is 2**e, with e the exponent of each value, or of the smallest normal number if that is larger. It is
    # then scaled so that the last bit of x + anchor is worth 2**(e - mantissa): the sum rounds x to `mantissa` bits.
    anchor = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**exponent)
    anchor.mul_(1.5 * 2.0 ** (23 - mantissa))
    return (x + anchor).sub_(anchor)


def codes_and_scale(
    x: Float[Tensor, "... K"], scheme: str, granularity: str
) -> tuple[Float[Tensor, "... K"], Float[Tensor, "*S"]]:
    """Return integers (or float8 values) q, stored in fp32, and the fp32 scale s, with x ~ q * s.

    With a = max |x| over a row or over all of x, by `scheme`:
    e4m3, e5m2   s = a / largest value, q = x/s rounded to the format (torchao's float8, bit for bit)
    int8         s = a / 127.5, q = round(x/s) in -128..127 (torchao's int8, bit for bit)
    int4         s = a / 7, q = round(x/s) in -7..7 [ours]
    With a = max |x| over a block of `BLOCKS` neighbors, and s of the shape of x (torchao's, bit for bit):
    nvfp4        t = max |x| over a row or over all of x, / (6 * 448); s = t * (a / 6 / t rounded to e4m3); q = x/s
                 rounded to e2m1
    mxfp4        s = the largest power of two <= a, / 4; q = x/s rounded to e2m1, at most 6
    """
    if scheme in BLOCKS:
        return _block_codes_and_scale(x.float(), scheme, granularity)
    abs_x = x.abs()
    dims = -1 if granularity == "row" else tuple(range(x.dim()))
    magnitude = abs_x.amax(dims, keepdim=True)
    if scheme in FLOAT_FORMATS:
        mantissa, exponent, largest = FLOAT_FORMATS[scheme]
        scale = (magnitude.clamp(min=TINY) / largest).float()
        # No clamp is needed: |x| / s exceeds the largest value by a rounding error at most, which rounds away.
        return round_to_float(x.float() / scale, mantissa=mantissa, exponent=exponent), scale
    if scheme == "int8":
        scale = (magnitude / 127.5).clamp(min=torch.finfo(torch.float32).eps).float()
        return (x * (1.0 / scale)).round_().clamp_(-128, 127), scale  # as in torchao: x / scale would round differently
    scale = (magnitude.float() / INT4_LARGEST).clamp(min=TINY)
    return (x.float() / scale).round_().clamp_(-INT4_LARGEST, INT4_LARGEST), scale


def _block_codes_and_scale(
    x: Float[Tensor, "... K"], scheme: str, granularity: str
) -> tuple[Float[Tensor, "... K"], Float[Tensor, "... K"]]:
    """Return `codes_and_scale` of a format of `BLOCKS`. Products and quotients are in torchao's order."""
    blocks = x.unflatten(-1, (-1, BLOCKS[scheme]))
    magnitude = blocks.abs().amax(-1, keepdim=True)
    mantissa, exponent, largest = FLOAT_FORMATS[scheme]
    if scheme == "mxfp4":
        power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)
        scale = power.clamp_(min=2.0**-124) / 4  # a normal number, also of a block of zeros
        inverse = 1 / scale
    else:
        e4m3_mantissa, e4m3_exponent, e4m3_largest = FLOAT_FORMATS["e4m3"]
        dims = -2 if granularity == "row" else tuple(range(blocks.dim()))
        whole = magnitude.amax(dims, keepdim=True).clamp(min=TINY) / (e4m3_largest * largest)
        local = (magnitude / largest / whole).clamp(2.0**e4m3_exponent, e4m3_largest)
        local = round_to_float(local, mantissa=e4m3_mantissa, exponent=e4m3_exponent)
        scale = whole * local
        inverse = 1 / whole / local
    codes = round_to_float((blocks * inverse).clamp_(-largest, largest), mantissa=mantissa, exponent=exponent)
    return codes.flatten(-2), scale.expand_as(blocks).flatten(-2)


class EmulatedLinear(nn.Linear):
    """A linear layer with a rounded weight. If its input is also rounded, it computes in fp32 and casts the result."""

    def __init__(
        self,
        weight: Float[Tensor, "N K"],
        bias: Float[Tensor, " N"] | None,
        config: FakeQuantize,
        name: str = "",
        version: int = 0,
    ) -> None:
        nn.Module.__init__(self)  # the parent's constructor would draw random weights
        self.name, self.version = name, version  # of the layer, and of the weights: what `Rounding` draws depends on
        self.out_features, self.in_features = weight.shape
        self.config = config
        self.source_dtype = weight.dtype  # `load_` first casts an fp32 learner's weight to it, as the first copy did
        # fp32 gives the same bits as torchao on a CPU.
        dtype = weight.dtype if config.activation is None else torch.float32
        self.weight = nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False)
        self.bias = cast(Any, bias)  # nn.Linear's annotation excludes None
        self.register_buffer("weight_scale", None)
        # How many inputs share a scale of the weight, and the granularity of the weight's scales.
        self.block = BLOCKS.get(config.weight or "", self.in_features)
        self.granularity = "tensor" if config.weight in BLOCKS else config.granularity
        if config.weight is not None:
            rows = self.out_features if config.granularity == "row" or config.weight in BLOCKS else 1
            shape = (rows, self.in_features // self.block)
            self.weight_scale = torch.empty(shape, dtype=torch.float32, device=weight.device)
        self.load_(weight)

    @property
    def scales_product(self) -> bool:
        """Whether the product is that of the codes, which the scales then multiply, as in an integer kernel.

        This is so if both operands are integers. Otherwise the operands are multiplied by their scales first.
        """
        formats = (self.config.weight, self.config.activation)
        return None not in formats and not FLOAT_FORMATS.keys() & set(formats)

    @torch.no_grad()
    def load_(self, weight: Float[Tensor, "N K"]) -> None:
        """Quantize `weight` into this layer, in place. It runs once per sync, so products need not round the weight."""
        weight = weight.to(self.source_dtype)
        if self.config.weight is None:
            self.weight.copy_(self._rounded(weight) if isinstance(self.config, Rounding) else weight)
            return
        codes, scale = codes_and_scale(weight, self.config.weight, self.granularity)
        self.weight.copy_(codes if self.scales_product else codes.mul_(scale))
        self.weight_scale.copy_(scale[:, :: self.block])

    def _rounded(self, weight: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        """Return the weight as a `Rounding` rounds it. Raise ValueError for a result of another shape."""
        assert isinstance(self.config, Rounding), "`load_` calls it for one"
        seed = generator_for("rounding", self.version, self.name).initial_seed()
        generator = torch.Generator(weight.device).manual_seed(seed)
        rounded = self.config.rounded(weight.detach().float().clone(), generator)
        if getattr(rounded, "shape", None) != weight.shape:
            raise ValueError(
                f"{type(self.config).__name__}.rounded returned {getattr(rounded, 'shape', rounded)!r} for the weight "
                f"of {self.name}; return a tensor of its shape, {tuple(weight.shape)}"
            )
        return rounded

    def codes(self) -> Float[Tensor, "N K"]:
        """Return the weight's codes, computed from the rounded values, which equal code * scale bit for bit."""
        if self.scales_product:
            return self.weight
        codes = self.weight.float() / self.weight_scale.repeat_interleave(self.block, -1)
        if self.config.weight not in FLOAT_FORMATS:
            return codes.round_()
        mantissa, exponent, _ = FLOAT_FORMATS[self.config.weight]
        return round_to_float(codes, mantissa=mantissa, exponent=exponent)

    def forward(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... N"]:
        return self.quantized_forward(x, self.bias)[0]

    def quantized_forward(
        self, x: Float[Tensor, "... K"], bias: Float[Tensor, " N"] | None
    ) -> tuple[Float[Tensor, "... N"], tuple[Tensor, ...]]:
        """Return the layer's output with this bias, and the input as the layer rounded it (codes and scale)."""
        if self.config.activation is None:
            return F.linear(x, self.weight, bias), (x,)
        granularity = "row" if self.config.activation in BLOCKS else self.config.granularity
        codes, scale = codes_and_scale(x, self.config.activation, granularity)
        bias = None if bias is None else bias.float()
        if not self.scales_product:
            return F.linear(codes * scale, self.weight, bias).to(x.dtype), (codes, scale)
        # fp32 sums of integers are exact below 2**24, as in an integer kernel.
        y = F.linear(codes, self.weight).float().mul_(scale).mul_(self.weight_scale[:, 0])
        return (y if bias is None else y.add_(bias)).to(x.dtype), (codes, scale)

    def dequantized(self) -> Float[Tensor, "N K"]:
        """Return the rounded weight, which approximates the learner's."""
        return self.weight * self.weight_scale if self.scales_product else self.weight
