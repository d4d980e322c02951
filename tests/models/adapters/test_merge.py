"""Adapters compute in the dtype of the layer beside them; what is trained stays in fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dllm_rl.models.adapters.linear import LoraLinear
from dllm_rl.models.lora import Lora


class Products(TorchFunctionMode):
    """Keeps the dtypes of the operands of every linear layer."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.seen.append((args[0].dtype, args[1].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_the_inputs_dtype_gradients_in_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 4, bias=False)
    base.weight.data = torch.randn(4, 6, generator=generator).to(dtype)
    layer = LoraLinear(base, Lora(r=2, alpha=4.0), generator)
    layer.lora_B.weight.data = torch.randn(4, 2, generator=generator)
    x = torch.randn(5, 6, generator=generator).to(dtype)
    with Products() as products:
        y = layer(x)
    assert products.seen == [(dtype, dtype)] * 3 and y.dtype == dtype
    a, b = layer.lora_A.weight, layer.lora_B.weight
    by_hand = x.double() @ (base.weight.double() + 2 * b.double() @ a.double()).T  # alpha / r = 2
    torch.testing.assert_close(y.double(), by_hand, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    y.float().sum().backward()
    assert a.dtype == b.dtype == a.grad.dtype == b.grad.dtype == torch.float32
    expected = 2 * (x.double() @ a.double().T).sum(0).expand(4, 2)  # d sum(y) / dB
    torch.testing.assert_close(b.grad.double(), expected, rtol=1e-5 if dtype == torch.float32 else 0.03, atol=0.05)
