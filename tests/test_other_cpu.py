"""The simulated processor of `pytest --other-cpu`: it fails a test that compares what processors round differently."""

import pytest
import torch
import torch.nn.functional as F
from other_cpu import OtherCPU

from dllm_rl.models.forward.batch_invariance import batch_invariant


def made(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


CALLS = {
    "linear": lambda x: F.linear(x, made(9, 8), made(9)),
    "matmul": lambda x: x @ made(8, 9),
    "batched": lambda x: torch.matmul(x[:, None], made(len(x), 8, 9)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(-1, 1, 4, 8)] * 3).flatten(0, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_row_in_another_batch_rounds_otherwise_and_the_same_call_does_not(name):
    run, x = CALLS[name], made(16, 8)
    plain = run(x)
    with OtherCPU():
        whole = run(x)
        assert torch.equal(run(x), whole)
        assert not torch.equal(run(x[:8]), whole[:8]), "a test that compares these bits must fail"
    assert not torch.equal(whole, plain)
    torch.testing.assert_close(whole, plain, rtol=4e-7, atol=0)  # attention has two products


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_exact_arithmetic_rounds_alike_under_it(name):
    run, x = CALLS[name], made(16, 8)
    with OtherCPU(), batch_invariant():
        assert torch.equal(run(x[:8]), run(x)[:8])


def test_gradients_are_products_too_and_zeros_stay():
    weight = made(9, 8).requires_grad_()
    with OtherCPU():
        (gradient,) = torch.autograd.grad(F.linear(made(16, 8), weight)[:, :4].sum(), weight)
    (plain,) = torch.autograd.grad(F.linear(made(16, 8), weight)[:, :4].sum(), weight)
    assert not torch.equal(gradient, plain) and (gradient[4:] == 0).all()
