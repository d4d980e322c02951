"""Gradients are summed over processes in buckets: nothing is left out, and nothing of another dtype is mixed in."""

from datetime import timedelta
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from ranks import run_ranks

from dllm_rl.distributed import collectives as distributed
from dllm_rl.distributed.collectives import OneProcess, buckets, make_accelerator, reduce_metrics, sum_gradients


def test_buckets_keep_order_and_dtype_and_size():
    sizes = [(3, torch.float32), (4, torch.float32), (9, torch.float32), (2, torch.bfloat16), (2, torch.float32)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    found = [[tensor.numel() for tensor in bucket] for bucket in buckets(tensors, numbers=8)]
    assert found == [[3, 4], [9], [2], [2]], "one that is larger than a bucket stands alone"
    assert [tensor for bucket in buckets(tensors) for tensor in bucket] == tensors
    assert list(buckets([])) == []


def test_buckets_travel_one_behind_the_other_and_are_put_back_when_they_have_arrived(monkeypatch):
    """With a stand-in for the exchange, whose sums over three processes are there when they are waited for."""
    events = []

    class Work:
        def __init__(self, flat):
            self.flat = flat

        def wait(self):
            events.append(("arrived", self.flat.numel()))
            self.flat *= 5

    def all_reduce(flat, async_op):
        assert async_op
        events.append(("started", flat.numel()))
        return Work(flat)

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "buckets", partial(buckets, numbers=8))
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    module = torch.nn.ParameterList([torch.zeros(3), torch.zeros(2, 2), torch.zeros(9), torch.zeros(1)])
    for i, parameter in enumerate(module, start=1):
        parameter.grad = torch.arange(parameter.numel()).view_as(parameter) + 10.0 * i
    module[3].grad = None  # no token reached it
    sum_gradients(module, Accelerator(cpu=True))
    for i, parameter in enumerate(module, start=1):
        own = (torch.arange(parameter.numel()).view_as(parameter) + 10.0 * i) * (i < 4)
        assert torch.equal(parameter.grad, own * 5)
    assert events == [
        ("started", 7), ("started", 9), ("arrived", 7), ("started", 1), ("arrived", 9), ("arrived", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("seconds", [None, 7.0])
def test_an_exchange_waits_as_long_as_the_run_says(monkeypatch, seconds):
    """None: as long as torch does."""
    given = []

    def noted(*, kwargs_handlers, **options):
        given.extend(handler.timeout for handler in kwargs_handlers)
        return Accelerator(**options)

    monkeypatch.setattr(distributed, "Accelerator", noted)
    make_accelerator(timeout=seconds)
    assert given == ([] if seconds is None else [timedelta(seconds=seconds)])


def test_the_loss_is_a_sum_of_shares_and_every_other_metric_a_mean():
    pair = (torch.tensor(3.0), torch.tensor(4.0))
    assert reduce_metrics(
        {"loss": pair, "kl": pair, "none": (pair[0], torch.tensor(0.0))}, OneProcess(), shares=["loss"]
    ) == {
        "loss": 3.0,
        "kl": 0.75,
    }


ENTERED = """
import torch

from dllm_rl.distributed.collectives import from_main, gather_on_host, make_accelerator

torch.distributed.set_debug_level_from_env()  # torch read it when it was imported, before the fork
accelerator = make_accelerator()
print(from_main(lambda: "shared", accelerator))
try:
    if accelerator.is_main_process:
        from_main(lambda: "mine", accelerator)
    else:
        gather_on_host([torch.ones(2, 3)], accelerator)
except RuntimeError as error:
    print(error)
"""


def test_under_torchs_debugging_switch_processes_that_enter_different_collectives_say_which(monkeypatch):
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    names = "the processes entered different collectives: process 0: from_main, process 1: gather_on_host"
    assert [told.splitlines() for told in run_ranks(ENTERED, 2)] == [["shared", names]] * 2
