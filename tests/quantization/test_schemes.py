"""Schemes by name: each is found, none changes a global setting, what a device cannot run is refused."""

from functools import partial

import pytest
import torch
from emulated import NAMED
from torch._inductor import config as inductor
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    PerRow,
)

from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization import rollout_policy
from dllm_rl.quantization import schemes as quantize
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.records import from_json


def llada():
    return tiny_llama(
        characters="abcdefgh", hidden_size=32, num_layers=2, num_attention_heads=2, intermediate_size=64, causal=False
    )


@pytest.mark.parametrize("config", [Float8WeightOnlyConfig(), Int8WeightOnlyConfig()], ids=["float8", "int8"])
def test_global_settings_and_the_users_config_are_left_alone(config):
    before = torch.get_float32_matmul_precision()
    assert before == "highest" and config.set_inductor_config
    with inductor.patch(coordinate_descent_tuning=False):
        quantized_copy(llada(), config)
        assert not inductor.coordinate_descent_tuning
    assert torch.get_float32_matmul_precision() == before
    assert config.set_inductor_config


def test_what_a_cpu_cannot_run_is_refused_with_the_alternative():
    with pytest.raises(
        ValueError, match=r"device=cpu has no float8 products; use Float8WeightOnly.*Float8DynamicEmulated"
    ):
        quantized_copy(llada(), quantize.Float8Dynamic())
    with pytest.raises(ValueError, match="device=cpu has no packed int4 kernel; use Int4WeightOnly"):
        quantized_copy(llada(), quantize.Int4Packed())
    with pytest.raises(ValueError, match="'int8' is neither a torchao config nor a FakeQuantize"):
        quantized_copy(llada(), "int8")


def test_refusals_name_what_does_run(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"device=NVIDIA A100 is below .* 8.9.*use no quantization, or"):
        quantize.check_scheme(quantize.Float8Dynamic(), cuda, torch.bfloat16)
    monkeypatch.setattr(quantize, "has_float8_rows", lambda: False)
    with pytest.raises(ValueError, match="with a scale per row on this CPU, which Float8DynamicEmulated needs; use"):
        quantized_copy(llada(), quantize.Float8DynamicEmulated())


def test_a_learner_in_fp32_may_have_a_copy_in_the_dtype_that_a_kernel_needs(monkeypatch):
    """What counts is the dtype of the copy's weights, which the learner's are rounded to."""
    asked = []

    def check(scheme, device, dtype):
        asked.append(dtype)
        return scheme.config()

    monkeypatch.setattr(rollout_policy, "check_scheme", check)
    for dtype in (None, torch.bfloat16):
        quantized_copy(llada(), quantize.Int8WeightOnly(), dtype=dtype)
    assert asked == [torch.float32, torch.bfloat16]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for scheme in (quantize.Float8Dynamic(), quantize.Int4Packed()):
        run = partial(quantize.check_scheme, scheme, torch.device("cuda"))
        assert run(torch.bfloat16) is not None
        with pytest.raises(ValueError, match=r"dtype=torch.float32: .* needs weights in bfloat16"):
            run(torch.float32)


@pytest.mark.parametrize(("given", "bound"), [(None, quantize.TINY), (0.25, 0.25)])
def test_zero_inputs_get_a_smallest_scale_unless_the_user_has_set_one(monkeypatch, given, bound):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), activation_value_lb=given)
    checked = quantize.check_scheme(config, torch.device("cuda"), torch.bfloat16)
    assert checked.activation_value_lb == bound and config.activation_value_lb == given


def test_every_scheme_is_found_under_its_own_name():
    assert len(NAMED) == 10
    for name, scheme in NAMED.items():
        assert from_json(quantize.Scheme, name, "rollout_quantization") == scheme
        assert type(scheme).__name__ == name and scheme.config() is not None
