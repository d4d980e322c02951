"""Gradients are summed over processes in buckets: nothing is left out, and nothing of another dtype is mixed in."""

import torch

from dllm_rl.distributed import buckets


def test_buckets_keep_order_and_dtype_and_size():
    sizes = [(3, torch.float32), (4, torch.float32), (9, torch.float32), (2, torch.bfloat16), (2, torch.float32)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    found = [[tensor.numel() for tensor in bucket] for bucket in buckets(tensors, numbers=8)]
    assert found == [[3, 4], [9], [2], [2]], "one that is larger than a bucket stands alone"
    assert [tensor for bucket in buckets(tensors) for tensor in bucket] == tensors
    assert list(buckets([])) == []
