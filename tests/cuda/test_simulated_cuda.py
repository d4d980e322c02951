"""The simulated device refuses what CUDA refuses, counts what waits, and computes what the CPU computes."""

import copy

import pytest
import torch
from simulated_cuda import SimulatedCuda
from torch import nn


@pytest.fixture
def cuda():
    with SimulatedCuda() as simulation:
        yield simulation


def ones(*shape, **options):
    return torch.ones(*shape, device="cuda", **options)


REFUSED = {
    "operands on two devices": lambda: ones(2) + torch.ones(2),
    "a number of the host joined": lambda: torch.stack([ones(()), torch.ones(())]),
    "a generator of the host": lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
    "drawn in place by a generator of the host": lambda: ones(2).normal_(generator=torch.Generator()),
    "an index of the device into the host": lambda: torch.ones(2)[torch.zeros(1, dtype=torch.long, device="cuda")],
    "a value of the host written by index": lambda: ones(2).index_put_((ones(1).long(),), torch.ones(1)),
    "numpy": lambda: ones(2).numpy(),
    "a product of integers": lambda: ones(2, 2).long() @ ones(2, 2).long(),
    "a layer on the host": lambda: nn.Linear(2, 2)(ones(1, 2)),
    "a layer on the device": lambda: nn.Linear(2, 2).to("cuda")(torch.ones(1, 2)),
    "written through a view": lambda: ones(3)[:2].add_(torch.ones(2)),
}


@pytest.mark.parametrize("act", REFUSED)
def test_it_refuses(cuda, act):
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        REFUSED[act]()


ALLOWED = {
    "a number of the host": lambda: ones(2) * torch.tensor(2.0),
    "an index of the host": lambda: ones(2)[torch.zeros(1, dtype=torch.long)],
    "a copy between devices": lambda: ones(2).copy_(torch.ones(2)),
    "like another": lambda: torch.zeros_like(ones(2)) + ones(2),
    "to another's device": lambda: torch.ones(2).to(ones(1)) + ones(2),
    "a copy of a layer": lambda: copy.deepcopy(nn.Linear(2, 2).to("cuda"))(ones(1, 2)),
}


@pytest.mark.parametrize("act", ALLOWED)
def test_it_allows(cuda, act):
    assert ALLOWED[act]().is_cuda


WAITS = {
    "a number": (lambda: ones(1).item(), 1),
    "a truth": (lambda: bool(ones(1).all()), 1),
    "a list": (lambda: ones(3).tolist(), 1),
    "to the host": (lambda: ones(3).cpu(), 1),
    "to the device": (lambda: torch.ones(3).to("cuda"), 1),
    "made of a list": (lambda: torch.tensor([1, 2], device="cuda"), 1),
    "pageable memory": (lambda: torch.ones(3).to("cuda", non_blocking=True), 1),
    "pinned memory": (lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True), 0),
    "a mask as an index": (lambda: ones(3)[ones(3) > 0], 1),
    "places of a mask": (lambda: ones(3).nonzero(), 1),
    "so many places of a mask": (lambda: ones(3).nonzero_static(size=3), 0),
    "numbers as an index": (lambda: ones(3)[torch.arange(2, device="cuda")], 0),
    "a fill by mask": (lambda: ones(3).masked_fill_(ones(3) > 0, 2.0), 0),
    "equality": (lambda: torch.equal(ones(3), ones(3)), 1),
    "a product": (lambda: ones(2, 2) @ ones(2, 2), 0),
}


@pytest.mark.parametrize("act", WAITS)
def test_it_counts_waits(cuda, act):
    work, waits = WAITS[act]
    with cuda.phase("act"):
        work()
    assert cuda.waits("act") == waits == cuda.waits(), cuda.report()


def test_gradients_cross_and_equal_the_cpus(cuda):
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.arange(6.0).view(2, 3)
    there, x = copy.deepcopy(layer).to("cuda"), torch.linspace(0, 1, 6).view(2, 3).requires_grad_()
    y = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    there(y.to("cuda")).square().sum().backward()
    assert torch.equal(y.grad, x.grad) and there.weight.grad.is_cuda
    assert torch.equal(there.weight.grad.cpu(), layer.weight.grad)


def test_nothing_is_left_of_it():
    with SimulatedCuda():
        pass
    assert not torch.cuda.is_available() and torch.ones(1).to("cpu").device.type == "cpu"
    assert torch.overrides._get_current_function_mode_stack() == []
