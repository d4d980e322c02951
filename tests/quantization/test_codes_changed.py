"""What a sync changed: by hand on one layer, and against codes counted in full for every scheme."""

import copy

import pytest
import torch
from emulated import CPU_SCHEMES, int4_emulated
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe
from torch import nn, tensor

from dllm_rl import MXFP4, NVFP4, TIS, Aligned, LeftToRight
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization import schemes
from dllm_rl.quantization.rollout_policy import (
    differing_codes,
    load_weight_,
    quantize_weight,
    quantized_copy,
    quantized_layers,
    sync_weights,
)
from dllm_rl.quantization.schemes import EmulatedLinear, FakeQuantize, codes_and_scale
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def changes(layer, weight):
    return {name: (float(total), count) for name, (total, count) in load_weight_(layer, weight)[0].items()}


@pytest.mark.parametrize("activation", [None, "int8", "e4m3"])
def test_codes_and_scales_by_hand(activation):
    # int4: scale = max |w| / 7 = 1 in both rows, codes the nearest integers.
    weight = tensor([[7.0, 1.0, -2.0, 0.0], [-7.0, 0.4, 0.0, 2.0]])
    layer = EmulatedLinear(weight, None, FakeQuantize(weight="int4", activation=activation))
    assert changes(layer, weight) == {"codes_changed": (0, 8), "scale_change": (0, 2)}
    weight[0, 1], weight[1, 1] = 1.4, 0.6  # 1 stays 1, 0 becomes 1
    assert changes(layer, weight) == {"codes_changed": (1, 8), "scale_change": (0, 2)}
    weight[0, 0] = 14.0  # the row's scale doubles: 7 0.7 -1 0
    assert changes(layer, weight) == {"codes_changed": (1, 8), "scale_change": (1, 2)}
    assert layer.codes().tolist() == [[7, 1, -1, 0], [-7, 1, 0, 2]]


def test_a_zero_that_changes_its_sign_is_no_change():
    with torch.device("meta"):
        layer = nn.Linear(16, 16, bias=False)
    weight = torch.ones(16, 16)
    weight[:, 1] = 1e-30
    config = schemes.Float8WeightOnly().config()
    layer.weight = nn.Parameter(quantize_weight(weight, config)[0], requires_grad=False)
    layer.quantization = config
    moved = weight.clone()
    moved[:, 1] = -1e-30
    assert changes(layer, moved) == {"codes_changed": (0, 256), "scale_change": (0, 16)}
    moved[3, 2] = -1.0
    assert changes(layer, moved) == {"codes_changed": (1, 256), "scale_change": (0, 16)}


def test_two_codes_in_a_byte():
    before, after = tensor([0x12, 0x34, 0x56], dtype=torch.uint8), tensor([0x13, 0x54, 0x65], dtype=torch.uint8)
    changed, codes = differing_codes(before, after, 6)  # 2 -> 3; 3 -> 5; both of the last
    assert (int(changed), codes) == (4, 6)
    assert int(differing_codes(before, after, 3)[0]) == 3


SCHEMES = ["Float8WeightOnly", "Float8DynamicEmulated", "Int8WeightOnly", "Int8Dynamic", "Int4WeightOnly"]
SCHEMES += ["e4m3_emulated", "e5m2_emulated", "int8_emulated", "int4_emulated", "NVFP4", "MXFP4", "nvfp4_emulated"]


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in SCHEMES), *((name, torch.bfloat16) for name in SCHEMES[::5])],
)
def test_a_sync_counts_what_a_full_comparison_counts(name, dtype):
    policy = tiny_masked_lm(
        characters="1234.=", hidden_size=32, num_layers=2, num_attention_heads=2, intermediate_size=32
    )
    policy.module.to(dtype)
    rollout_policy = quantized_copy(policy, CPU_SCHEMES[name])
    assert sync_weights(policy, rollout_policy) == {"quantization/codes_changed": 0, "quantization/scale_change": 0}
    before = held(policy, rollout_policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter += (0.003 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    found = sync_weights(policy, rollout_policy)
    pairs = list(zip(before, held(policy, rollout_policy), strict=True))
    changed = sum((a != b).sum().item() for (a, _), (b, _) in pairs)
    scales = torch.cat([((t - s).abs() / s).flatten().double() for (_, s), (_, t) in pairs])
    assert 0 < changed == round(found["quantization/codes_changed"] * sum(a.numel() for (a, _), _ in pairs))
    assert found["quantization/scale_change"] == pytest.approx(scales.mean().item(), rel=1e-5)
    assert scales.mean() > 0


def held(policy, rollout_policy):
    """(codes as numbers, scales) of every quantized layer; an emulated layer's from the learner's weight itself."""
    found, sources = [], dict(policy.module.named_modules())
    for name, layer in quantized_layers(rollout_policy):
        if isinstance(layer, EmulatedLinear):
            config = layer.config
            codes, scale = codes_and_scale(sources[name].weight.detach(), config.weight, layer.granularity)
        else:
            codes, scale = layer.weight.qdata.float(), layer.weight.scale.float()
        found.append((copy.deepcopy(codes), copy.deepcopy(scale)))
    return found


def test_the_loop_logs_whether_updates_reach_the_rollout(tmp_path):
    coarse = {
        "rollout_quantization": int4_emulated,
        "num_steps": 2,
        "train_batch_size": 2,
        "validation_task": Sudoku(split="validation", size=1),
        "eval_task": Sudoku(split="test", size=1),
        "learning_rate": 1e-2,
        "lr_schedule": lambda step, num_steps: 1e-7 if step == 0 else 1.0,
    }
    train(tiny_recipe(tmp_path, **coarse))
    vanishing, felt = metrics_of(tmp_path)
    assert vanishing["quantization/codes_changed"] == 0 and vanishing["grad_norm"] > 0
    assert felt["quantization/codes_changed"] > 0.01 and felt["quantization/scale_change"] > 1e-3


@pytest.mark.slow
def test_a_run_with_four_bit_rollouts_learns_and_weighs_their_tokens(tmp_path):
    """Left to right, whose order both policies have: weights alone with TIS, and with inputs and an aligned forward."""
    sampler = tiny_recipe(tmp_path).sampler.replace(rank=LeftToRight())
    for scheme, corrector in ((MXFP4(), TIS()), (NVFP4(inputs=True), Aligned())):
        folder = tmp_path / type(scheme).__name__
        train(tiny_recipe(folder, sampler=sampler, rollout_quantization=scheme, corrector=corrector, num_steps=1))
        (row,) = metrics_of(folder)
        assert row["grad_norm"] > 0 and row["quantization/codes_changed"] > 0
        assert (
            row["rollout_corr/ess"] == pytest.approx(1, abs=1e-6)
            if isinstance(corrector, Aligned)
            else (0.5 < row["rollout_corr/ess"] < 1 - 1e-6)
        )


def test_an_unquantized_copy_has_no_codes_to_count():
    policy = tiny_masked_lm(characters="1234.=", hidden_size=32, num_layers=1, num_attention_heads=2)
    assert sync_weights(policy, quantized_copy(policy, None)) == {}


def test_a_layer_whose_weight_is_not_quantized_has_no_codes():
    weight = torch.ones(2, 2)
    assert changes(EmulatedLinear(weight, None, FakeQuantize(weight=None, activation="int8")), weight) == {}
