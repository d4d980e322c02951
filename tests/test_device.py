"""What the host makes arrives on the device as it was, and the host does not wait for that."""

import torch
from simulated_cuda import SimulatedCuda

from dllm_rl.device import copy_to_device


def test_tensors_arrive_as_they_were_without_a_wait():
    made = [torch.arange(6).view(2, 3).T, torch.tensor(7), torch.empty(0, dtype=torch.long), torch.tensor([-1])]
    with SimulatedCuda() as cuda:
        with cuda.phase("sending"):
            there = copy_to_device(torch.device("cuda", 0), *made)
            (masks,) = copy_to_device(torch.device("cuda"), torch.tensor([True, False]))
        assert cuda.waits("sending") == 0
        assert all(x.is_cuda and torch.equal(x.cpu(), y) for x, y in zip(there, made, strict=True))
        assert masks.dtype == torch.bool and masks.cpu().tolist() == [True, False]


def test_on_the_cpu_they_are_the_tensors_themselves():
    made = [torch.arange(3), torch.ones(2, dtype=torch.long)]
    assert all(x is y for x, y in zip(copy_to_device(torch.device("cpu"), *made), made, strict=True))
