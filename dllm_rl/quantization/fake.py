"""Emulated quantisation for study, on any device: rounded values in the learner's dtype, at about a plain rollout's
time and memory."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Scheme = Any  # a torchao config, a FakeQuantize or a Float8DynamicEmulated
FLOATS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}  # mantissa bits, smallest normal exponent, largest value
LEVELS = {"int4": 7, "int3": 3, "five_level": 2}  # codes are the integers -n..n
SCHEMES = (*FLOATS, "int8", *LEVELS, "ternary")
TINY = 1e-12  # lower bound of the range, so that an all-zero row gives zeros and not 0/0


@dataclass(frozen=True)
class FakeQuantize:
    """A config for `quantized_copy`, like torchao's; `schemes.fake_quantize` explains the fields."""

    weight: str | None
    activation: str | None = None
    granularity: str = "row"

    def __post_init__(self) -> None:
        for field, value in (("weight", self.weight), ("activation", self.activation)):
            if value not in (None, *SCHEMES):
                raise ValueError(f"{field}={value!r} is not known; choose one of {', '.join(SCHEMES)}, or None")
        if self.granularity not in ("row", "tensor"):
            raise ValueError(f"granularity={self.granularity!r} must be 'row' or 'tensor'")


def round_to_float(x: Float[Tensor, "*S"], *, mantissa: int, exponent: int) -> Float[Tensor, "*S"]:
    """fp32 values rounded to `mantissa` explicit bits, ties to even, with subnormals below 2**exponent: in the type's
    range equal to a cast to float8 and back, which is slow on a CPU."""
    # 2**e of each value, at least the smallest normal's; then a sum whose last bit is worth 2**(e - mantissa).
    anchor = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**exponent)
    anchor.mul_(1.5 * 2.0 ** (23 - mantissa))
    return (x + anchor).sub_(anchor)


def codes_and_scale(
    x: Float[Tensor, "... K"], scheme: str, granularity: str
) -> tuple[Float[Tensor, "... K"], Float[Tensor, "*S"]]:
    """Integers (or float8 values) q held in fp32, and the fp32 scale s with x ~ q * s; a = max |x| over a row or all x.

    e4m3, e5m2   s = a / largest value, q = x/s rounded to the format (torchao's float8, bit for bit)
    int8         s = a / 127.5, q = round(x/s) in -128..127 (torchao's int8, bit for bit)
    int4, int3, five_level   s = a/7, a/3, a/2; q = round(x/s) in -7..7, -3..3, -2..2 [ours]
    ternary      s = mean |x|, q = round(x/s) in -1..1 (BitNet b1.58's rule [paper])
    """
    magnitude = x.abs()
    dims = -1 if granularity == "row" else tuple(range(x.dim()))
    top = magnitude.mean(dims, keepdim=True) if scheme == "ternary" else magnitude.amax(dims, keepdim=True)
    if scheme in FLOATS:
        mantissa, exponent, largest = FLOATS[scheme]
        scale = (top.clamp(min=TINY) / largest).float()
        # |x| / s exceeds the largest value by at most a rounding error, which rounds away: no clamp is needed.
        return round_to_float(x.float() / scale, mantissa=mantissa, exponent=exponent), scale
    if scheme == "int8":
        scale = (top / 127.5).clamp(min=torch.finfo(torch.float32).eps).float()
        return (x * (1.0 / scale)).round_().clamp_(-128, 127), scale  # torchao multiplies: x / scale rounds otherwise
    bound = 1 if scheme == "ternary" else LEVELS[scheme]
    scale = (top.float() if scheme == "ternary" else top.float() / bound).clamp(min=TINY)
    return (x.float() / scale).round_().clamp_(-bound, bound), scale


class EmulatedLinear(nn.Linear):
    """A linear layer with a rounded weight.

    y = (q_x q_w^T) s_x s_w + b for two integer operands, as in an integer kernel; else the product of the dequantised
    operands, as in a float8 kernel. With a rounded input the product is in fp32 and then cast: on a CPU bit for bit
    torchao's dynamic float8, and its dynamic int8 in fp32.
    """

    def __init__(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None, config: FakeQuantize) -> None:
        nn.Module.__init__(self)  # the parent's constructor would draw random weights
        self.out_features, self.in_features = weight.shape
        self.config = config
        self.source_dtype = weight.dtype  # a learner in fp32 is rounded to it first, in a sync as in the first copy
        dtype = weight.dtype if config.activation is None else torch.float32
        self.weight = nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False)
        self.bias = cast(Any, bias)  # nn.Linear's annotation excludes None
        self.register_buffer("weight_scale", None)
        if config.weight is not None:
            rows = self.out_features if config.granularity == "row" else 1
            self.weight_scale = torch.empty(rows, dtype=torch.float32, device=weight.device)
        self.load_(weight)

    @property
    def scales_product(self) -> bool:
        sides = (self.config.weight, self.config.activation)
        return None not in sides and not FLOATS.keys() & set(sides)

    @torch.no_grad()
    def load_(self, weight: Float[Tensor, "N K"]) -> None:
        """Round `weight` into this layer, in place: once per sync, and not in every product."""
        weight = weight.to(self.source_dtype)
        if self.config.weight is None:
            self.weight.copy_(weight)
            return
        codes, scale = codes_and_scale(weight, self.config.weight, self.config.granularity)
        self.weight.copy_(codes if self.scales_product else codes.mul_(scale))
        self.weight_scale.copy_(scale.flatten())

    def codes(self) -> Float[Tensor, "N K"]:
        """The weight's codes, recovered from rounded values, which equal code * scale to a bit."""
        if self.scales_product:
            return self.weight
        codes = self.weight.float() / self.weight_scale[:, None]
        if self.config.weight not in FLOATS:
            return codes.round_()
        mantissa, exponent, _ = FLOATS[self.config.weight]
        return round_to_float(codes, mantissa=mantissa, exponent=exponent)

    def forward(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... N"]:
        return self.quantized_forward(x, self.bias)[0]

    def quantized_forward(
        self, x: Float[Tensor, "... K"], bias: Float[Tensor, " N"] | None
    ) -> tuple[Float[Tensor, "... N"], tuple[Tensor, ...]]:
        """The layer's output with the given bias, and the input as the layer rounded it (codes and scale)."""
        if self.config.activation is None:
            return F.linear(x, self.weight, bias), (x,)
        codes, scale = codes_and_scale(x, self.config.activation, self.config.granularity)
        bias = None if bias is None else bias.float()
        if not self.scales_product:
            return F.linear(codes * scale, self.weight, bias).to(x.dtype), (codes, scale)
        y = F.linear(codes, self.weight).float().mul_(scale).mul_(self.weight_scale)  # exact below 2**24, as integers
        return (y if bias is None else y.add_(bias)).to(x.dtype), (codes, scale)

    def dequantized(self) -> Float[Tensor, "N K"]:
        """The rounded weight in the learner's units."""
        return self.weight * self.weight_scale[:, None] if self.scales_product else self.weight


@dataclass(frozen=True)
class Float8DynamicEmulated:
    """torchao's dynamic float8 tensors and torch's scaled product without float8 hardware: exact, slow."""
