"""fp32 weights with bf16 products (dtype float32, bf16): updates of 1e-6 arrive, which bf16 weights round away."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import quantized_copy, train
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.merge import merged_copy
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization.rollout_policy import sync_weights
from dllm_rl.quantization.schemes import FakeQuantize, Float8DynamicEmulated, Float8WeightOnly
from dllm_rl.records import describe
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.policies import make_optimizer

pytestmark = pytest.mark.usefixtures("no_rehearsal")

STEPS, RATE = 5, 1e-6


def moved(tmp_path, *, dtype: torch.dtype, bf16: bool) -> tuple[float, float]:
    """The share of weights that five updates moved, and the mean distance over what AdamW's steps add up to at most."""
    recipe = tiny_recipe(tmp_path, learning_rate=RATE, bf16=bf16)
    policy = tiny_llama(causal=False, **SIZES)
    policy.module.to(dtype)
    optimizer = make_optimizer(recipe, policy)
    before = [p.detach().clone() for p in policy.module.parameters()]
    tokens = torch.randint(3, 9, (4, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = policy.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    after = list(policy.module.parameters())
    far = torch.cat([(a.double() - b.double()).abs().flatten() for a, b in zip(after, before, strict=True)])
    used = torch.cat([(p.grad != 0).flatten() for p in after])
    return (far[used] > 0).double().mean().item(), (far[used].mean() / (STEPS * RATE)).item()


def test_small_updates_arrive_in_fp32_weights_alone(tmp_path):
    share, distance = moved(tmp_path, dtype=torch.float32, bf16=True)
    assert share > 0.99 and 0.8 < distance < 1.05  # steps of a constant sign: each of about the learning rate
    share, _ = moved(tmp_path, dtype=torch.bfloat16, bf16=False)
    assert share < 0.05
    share, exact = moved(tmp_path, dtype=torch.float32, bf16=False)
    assert share > 0.99 and distance == pytest.approx(exact, rel=0.1)  # bf16 products take little away


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize(
    "scheme",
    [
        Float8WeightOnly(),
        Float8WeightOnly(dequantized=True),
        FakeQuantize(weight="int4"),
        pytest.param(Float8DynamicEmulated(), marks=pytest.mark.float8_rows),
    ],
    ids=describe,
)
def test_the_rollouts_copy_is_in_bf16(scheme, lora):
    """As if the learner's weights were bf16, which dynamic FP8 needs; a sync keeps it so."""
    policy = tiny_masked_lm(**SIZES)  # with biases
    if lora is not None:
        add_lora(policy, lora)
    copied = quantized_copy(policy, scheme, dtype=torch.bfloat16)
    for parameter in policy.module.parameters():
        parameter.data.mul_(1.01).add_(0.001)
    sync_weights(policy, copied)
    assert all(p.dtype == torch.float32 for p in policy.module.parameters())
    rounded = tiny_masked_lm(**SIZES)
    rounded.module = merged_copy(policy.module).to(torch.bfloat16)
    expected = quantized_copy(rounded, scheme)
    layers = zip(copied.module.modules(), expected.module.modules(), strict=True)
    assert sum(hasattr(a, "quantization") for a, _ in layers) == 6
    for (name, a), b in zip(copied.module.named_parameters(), expected.module.parameters(), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16, name
        assert torch.equal(*(x.dequantize() if hasattr(x, "qdata") else x for x in (a, b))), name


@pytest.mark.float8_rows
def test_a_run_with_it(tmp_path):
    """Weights are fp32 in the checkpoint, the rollout's copy follows them."""
    model = partial(tiny_llama, causal=False, **SIZES)
    changes = {"rollout_quantization": Float8DynamicEmulated(), "eval_task": Sudoku(split="test", size=1)}
    train(tiny_recipe(tmp_path, model=model, bf16=True, **changes))
    state = load_file(tmp_path / "checkpoints/step-000002/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(row["rollout_corr/kl"]) < 0.05 for row in rows)
