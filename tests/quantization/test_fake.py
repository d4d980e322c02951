"""Emulated quantizers against a cast to float8, against torchao's tensors, and against values worked by hand."""

from typing import get_args

import pytest
import torch
from torch import nn
from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, PerTensor, quantize_

from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import (
    FLOAT_FORMATS,
    MXFP4,
    NVFP4,
    EmulatedLinear,
    FakeQuantize,
    Format,
    codes_and_scale,
    round_to_float,
)

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def rounded(x, scheme, granularity):
    codes, scale = codes_and_scale(x, scheme, granularity)
    return codes * scale


def weight(rows=48, columns=32, dtype=torch.float32):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.3).to(dtype)


@pytest.mark.parametrize("scheme", FLOAT8)
def test_round_to_float_is_the_cast_for_every_code_midpoint_and_neighbor(scheme):
    dtype, (mantissa, exponent, largest) = FLOAT8[scheme], FLOAT_FORMATS[scheme]
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].sort().values
    assert largest == codes.max() == torch.finfo(dtype).max
    middle = (codes[1:] + codes[:-1]) / 2
    points = torch.cat([codes, middle])
    points = torch.cat([points, points.nextafter(torch.tensor(9e9)), points.nextafter(torch.tensor(-9e9))])
    points = points.clamp(codes.min(), codes.max())
    assert torch.equal(round_to_float(points, mantissa=mantissa, exponent=exponent), points.to(dtype).float())
    assert len(points) > 700


@pytest.mark.parametrize(
    ("scheme", "codes", "scale"),
    [
        ("int4", [7, -3, 1, 0], 0.7 / 7),  # -0.26/0.1 = -2.6, 0.1/0.1 = 1, 0.04/0.1 = 0.4
        ("int8", [127, -47, 18, 7], 0.7 / 127.5),  # 127.5 -> 128 -> 127; -47.36; 18.2; 7.3
        ("e5m2", [57344, -20480, 8192, 3072], 0.7 / 57344),  # -21299: step 4096; 8192; 3276.8: step 512 in [2048, 4096)
        ("e4m3", [448, -160, 64, 26], 0.7 / 448),  # -166.4: step 16 in [128, 256); 25.6: step 2 in [16, 32)
    ],
)
def test_codes_worked_by_hand(scheme, codes, scale):
    got, s = codes_and_scale(torch.tensor([[0.7, -0.26, 0.1, 0.04]]), scheme, "row")
    assert got.tolist() == [codes]
    assert s.item() == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(
    ("scheme", "row", "codes"),
    [
        # Scale 1. Below the smallest normal, 2^-6 and 2^-14, steps are 2^-9 and 2^-16: 1.4 of them round to one.
        ("e4m3", [448.0, 1.4 * 2**-9, 2.6 * 2**-9], [448.0, 2**-9, 3 * 2**-9]),
        ("e5m2", [57344.0, 1.4 * 2**-16, 2.6 * 2**-16], [57344.0, 2**-16, 3 * 2**-16]),
        ("e5m2", [57344.0, -1.4, 1.1], [57344.0, -1.5, 1.0]),  # steps of 1/4 in [1, 2)
        ("int8", [-127.5, 63.4, 127.5], [-128.0, 63.0, 127.0]),
        ("int4", [-7.0, 6.6, 2.5], [-7.0, 7.0, 2.0]),  # ties to even
    ],
)
def test_codes_at_the_edges(scheme, row, codes):
    got, _ = codes_and_scale(torch.tensor([row]), scheme, "row")
    assert got.tolist() == [codes]


def test_products_by_hand():
    """w = [[7, 1.1]] in int4 (scale 1) is [7, 1], x = [[3.5, 0.6]] is [7, 1] of scale 0.5; bias 0.5."""
    weight, bias, x = torch.tensor([[7.0, 1.1], [14.0, 2.2]]), torch.tensor([0.5, -0.5]), torch.tensor([[3.5, 0.6]])
    both = EmulatedLinear(weight, bias, FakeQuantize(weight="int4", activation="int4"))
    torch.testing.assert_close(both(x), torch.tensor([[50 * 0.5 + 0.5, 50 * 2 * 0.5 - 0.5]]))
    torch.testing.assert_close(both.dequantized(), torch.tensor([[7.0, 1.0], [14.0, 2.0]]))
    # Weights only: 3.5 * 7 + 0.6 * 1. Inputs only: 3.5 * 7 + 0.5 * 1.1.
    weights = EmulatedLinear(weight, bias, FakeQuantize(weight="int4"))
    torch.testing.assert_close(weights(x)[0, 0], torch.tensor(24.5 + 0.6 + 0.5))
    inputs = EmulatedLinear(weight, bias, FakeQuantize(weight=None, activation="int4"))
    torch.testing.assert_close(inputs(x)[0, 0], torch.tensor(24.5 + 0.55 + 0.5))


def test_fake_quantize_rounds_weights_to_int8_rows_by_default():
    assert FakeQuantize() == FakeQuantize(weight="int8", activation=None, granularity="row")


def test_one_scale_per_row_or_per_tensor():
    x = torch.tensor([[7.0, 3.4], [28.0, 3.0]])
    assert torch.equal(rounded(x, "int4", "row"), torch.tensor([[7.0, 3.0], [28.0, 4.0]]))  # scales 1 and 4
    assert torch.equal(rounded(x, "int4", "tensor"), torch.tensor([[8.0, 4.0], [28.0, 4.0]]))


@pytest.mark.parametrize("scheme", get_args(Format))
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_zero_rows_give_zeros(scheme, granularity):
    x = weight(3)
    x[1] = 0
    assert torch.equal(rounded(x, scheme, granularity)[1], torch.zeros(32))
    assert torch.equal(rounded(torch.zeros(3, 32), scheme, granularity), torch.zeros(3, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("scheme", FLOAT8)
def test_float8_weights_equal_torchao_bitwise(scheme, granularity, dtype):
    """The weights bit for bit; their products to rounding, since the two reach the product by other calls."""
    plain, x = nn.Linear(32, 48, dtype=dtype), weight(7, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(weight(dtype=dtype))
    emulated = EmulatedLinear(
        plain.weight.detach(), plain.bias, FakeQuantize(weight=scheme, activation=None, granularity=granularity)
    )
    config = Float8WeightOnlyConfig(weight_dtype=FLOAT8[scheme])
    config.granularity = PerTensor() if granularity == "tensor" else config.granularity
    quantize_(plain, config)
    assert torch.equal(emulated.weight, plain.weight.dequantize())
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(emulated(x), plain(x), rtol=bound, atol=bound)


def test_dynamic_int8_equals_torchao():
    plain, x = nn.Linear(32, 48), weight(7)
    emulated = EmulatedLinear(plain.weight.detach(), plain.bias, FakeQuantize(weight="int8", activation="int8"))
    quantize_(plain, Int8DynamicActivationInt8WeightConfig())
    assert torch.equal(emulated.weight.to(torch.int8), plain.weight.qdata)
    torch.testing.assert_close(emulated(x), plain(x))


def test_unknown_names_are_refused_by_field_and_value():
    with pytest.raises(ValueError, match="activation='fp8' must be one of 'e4m3'"):
        FakeQuantize(weight="int8", activation="fp8")
    with pytest.raises(ValueError, match="granularity='column'"):
        FakeQuantize(weight="int8", granularity="column")


@pytest.mark.parametrize("scheme", FLOAT8)
def test_subnormals_of_a_wide_row_are_the_casts(scheme):
    """A row whose values span the format: below the smallest normal (2^-6, 2^-14) the steps are equal and then 0."""
    dtype, (mantissa, exponent, largest) = FLOAT8[scheme], FLOAT_FORMATS[scheme]
    step = 2.0 ** (exponent - mantissa)
    x = torch.tensor([[largest, 2.0**exponent, 2.6 * step, 1.5 * step, 0.5 * step, 0.51 * step, -0.4 * step]])
    codes, scale = codes_and_scale(x, scheme, "row")
    assert scale.item() == 1 and torch.equal(codes, x.to(dtype).float())
    assert codes.tolist() == [[largest, 2.0**exponent, 3 * step, 2 * step, 0, step, 0]]


@pytest.mark.parametrize(
    ("scheme", "row", "codes", "scales"),
    [
        # max |x| is 12, so that t = 12 / 2688, and the first block's scale is 448 t = 2: 12 / 2, 5 / 2 to 2.
        # The second block's is a / 6 / t = 0.375 / 6 / (12 / 2688) = 14: s = 14 t = 0.0625. 0.25 / s = 4.
        ("nvfp4", [12.0, 5.0, 1.4] + 13 * [0.0] + [0.375, -0.25] + 14 * [0.0], [6, 2, 0.5, 6, -4], [2, 0.0625]),
        # The largest power of two <= 7 is 4, and s = 1: 7 becomes 6, 5 ties to even, 0.25 to 0, 0.75 to 1.
        ("mxfp4", [7.0, 5.0, 0.25] + 13 * [0.0] + [0.75, -3.4] + 14 * [0.0], [6, 4, 0, 1, -3], [1, 1]),
    ],
)
def test_blocks_worked_by_hand(scheme, row, codes, scales):
    got, scale = codes_and_scale(torch.tensor([row]), scheme, "tensor")
    assert got[0, [0, 1, 2, 16, 17]].tolist() == codes
    torch.testing.assert_close(scale[0, [0, 16]], torch.tensor(scales).float())


def tensors_of_all_kinds():
    """Numbers of every size, with outliers, rows of very different sizes, ties, and blocks and rows of zeros."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(24, 96, generator=generator)
    zeros = normal.clone()
    zeros[:, :32], zeros[3] = 0, 0
    sizes = {f"normal {size}": size * normal for size in (1e-6, 0.02, 1.0, 300.0)}
    apart = {"outliers": normal**5, "rows": normal * torch.logspace(-8, 8, 24)[:, None], "zeros": zeros}
    return sizes | apart | {"ties": torch.randint(-28, 29, (24, 96), generator=generator) / 4}


def e2m1(packed):
    return f4_unpacked_to_f32(unpack_uint4(packed.contiguous().view(torch.uint8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", tensors_of_all_kinds())
def test_four_bits_equal_torchao_bitwise(kind, dtype):
    x = tensors_of_all_kinds()[kind].to(dtype)
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax()))
    codes, scale = codes_and_scale(x, "nvfp4", "tensor")
    assert torch.equal(codes, e2m1(theirs.qdata)) and torch.equal(scale[:, ::16], theirs.get_hp_scales())
    assert torch.equal(codes * scale, theirs.dequantize(torch.float32))
    for row in x[:4].split(1):  # of inputs, each row has its own fp32 scale
        if row.any():  # torchao gives NaN for zeros
            alone = NVFP4Tensor.to_nvfp4(row, per_tensor_scale=per_tensor_amax_to_scale(row.abs().amax()))
            assert torch.equal(rounded(row, "nvfp4", "row"), alone.dequantize(torch.float32))
    theirs = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32)
    codes, scale = codes_and_scale(x, "mxfp4", "row")
    assert torch.equal(codes, e2m1(theirs.qdata)) and torch.equal(codes * scale, theirs.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_nvfp4_weights_is_torchaos(dtype):
    plain, x = nn.Linear(32, 48, dtype=dtype), weight(7, dtype=dtype)
    emulated = EmulatedLinear(plain.weight.detach(), plain.bias, NVFP4().config())
    quantize_(plain, NVFP4WeightOnlyConfig())
    assert torch.equal(emulated.weight, plain.weight.dequantize())
    torch.testing.assert_close(emulated(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", [NVFP4(inputs=True), MXFP4(inputs=True)], ids=str)
def test_quantized_inputs_of_a_row_do_not_depend_on_its_batch(scheme):
    layer = EmulatedLinear(weight(), None, scheme.config())
    x = weight(5) * torch.logspace(-2, 2, 5)[:, None]
    _, seen = layer.quantized_forward(x, None)
    for i in range(5):
        _, alone = layer.quantized_forward(x[i : i + 1], None)
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, seen, strict=True))
    expected = (x - seen[0] * seen[1]).norm() / x.norm()
    assert 0.05 < expected < 0.2, "inputs are rounded to four bits"


@pytest.mark.parametrize(
    ("scheme", "block"),
    [
        (NVFP4(), 16),
        (MXFP4(inputs=True), 32),
        (FakeQuantize(weight="int8", activation="mxfp4"), 32),
        (FakeQuantize(weight="nvfp4", activation="mxfp4"), 32),
    ],
    ids=str,
)
def test_a_layer_whose_inputs_are_no_multiple_of_the_block_is_named(scheme, block):
    sizes = {"hidden_size": 64, "num_layers": 1, "num_attention_heads": 2}
    report = quantized_copy(tiny_masked_lm(characters="12", intermediate_size=72, **sizes), scheme).quantization_report
    (name,) = (name for name, reason in report.skipped.items() if "multiple" in reason)
    assert name.endswith("output.dense")
    assert report.skipped[name] == f"64x72: 72 is not a multiple of the group size {block}"
    sizes["hidden_size"] = 40
    with pytest.raises(ValueError, match=f"no layer .*output.dense': '40x72: 72 is not a multiple .* {block}'"):
        quantized_copy(tiny_masked_lm(characters="12", intermediate_size=72, **sizes), scheme)
