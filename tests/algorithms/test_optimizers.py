"""AdamW and its schedule against hand-written updates."""

import pytest
import torch

from dllm_rl.algorithms.optimizers import (
    AdamW,
    AdamW8bit,
    CosineWithWarmup,
    FunctionOptimizer,
    LinearDecay,
    LinearWithWarmup,
)

LR, BETAS, DECAY = 0.1, (0.8, 0.5), 0.25
SETTINGS = {"beta1": 0.8, "beta2": 0.5, "weight_decay": 0.25}


def by_hand(start: float, gradients: list[float]) -> float:
    """w <- w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + 1e-8)."""
    w, m, v = start, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        w = w * (1 - LR * DECAY)
        w -= LR * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)) ** 0.5 + 1e-8)
    return w


def test_adamw_takes_its_betas_and_decay():
    # First step: m/(1-b1) = g, v/(1-b2) = g^2: 2 * 0.975 - 0.1 = 1.85. The second depends on both betas.
    assert by_hand(2.0, [3.0]) == pytest.approx(1.85)
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = AdamW(**SETTINGS)([("weight", weight)], lr=LR)
    for gradient in (3.0, -1.0, 0.5):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    assert weight.item() == pytest.approx(by_hand(2.0, [3.0, -1.0, 0.5]), rel=1e-12)


def test_adamw_8bit_is_told_the_same():
    pytest.importorskip("bitsandbytes")
    optimizer = AdamW8bit(**SETTINGS)([("weight", torch.nn.Parameter(torch.zeros(2)))], lr=LR)
    (group,) = optimizer.param_groups
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (LR, BETAS, DECAY)


@pytest.mark.parametrize("function", [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
def test_a_function_has_its_own_settings(function):
    weights = [torch.nn.Parameter(torch.zeros(2))]
    made, plain = FunctionOptimizer(function=function)(weights, LR), function(weights, lr=LR)
    assert made.param_groups == plain.param_groups


def test_schedule_by_hand():
    # A rise over 5 steps, 1 until step 60 of 100, then down to 0.1 at step 100: at 80 half of the way, 0.55.
    factors = [LinearDecay()(step, 100) for step in (0, 1, 4, 5, 60, 80, 100, 150)]
    assert factors == pytest.approx([0.2, 0.4, 1.0, 1.0, 1.0, 0.55, 0.1, 0.1])
    # No plateau: step 2 of 4 is half of the way to 0.5, and the rise of 10 steps multiplies it by 3/10.
    assert LinearDecay(warmup_steps=10, constant_until=0.0, final=0.5)(2, 4) == pytest.approx(0.3 * 0.75)
    assert LinearDecay(warmup_steps=0)(0, 0) == 1.0


def test_a_rate_that_has_fallen_to_0_stays_there():
    for schedule in (LinearWithWarmup(warmup_steps=2), CosineWithWarmup(warmup_steps=2)):
        assert [schedule(step, 4) for step in (1, 2, 4, 7)] == pytest.approx([0.5, 1.0, 0.0, 0.0])
