"""Another CPU, simulated: `pytest --other-cpu`.

A matrix product's last bits depend on the kernel that a library picks, and it picks by the processor and by the number
of rows. So a row may round differently in a batch of 4 than in a batch of 32; on some processors it does not, and a test
that compares such bits passes there and fails elsewhere. Under this mode every product rounds by its number of rows:
the same call gives the same bits, the same row in another batch does not.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Products, and which argument's rows are counted. Attention on the CPU is a pair of products with a softmax between.
PRODUCTS = {
    aten.mm: 0,
    aten.addmm: 1,
    aten.bmm: 0,
    aten.baddbmm: 1,
    aten._scaled_dot_product_flash_attention_for_cpu: 0,
}
INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class OtherCPU(TorchDispatchMode):
    """Moves elements of every product away from zero by one unit in the last place, or not, by a fixed pattern of
    their column and the number of rows of the product."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        which = PRODUCTS.get(func.overloadpacket)
        if which is None or args[which].device.type != "cpu":  # a simulated GPU has its own rounding
            return out
        rows = args[which].numel() // max(args[which].shape[-1], 1)
        if isinstance(out, tuple):  # attention also returns what its backward needs
            return (nudged(out[0], rows), *out[1:])
        return nudged(out, rows)


def nudged(out: Tensor, rows: int) -> Tensor:
    """`out` with one unit in the last place more, in magnitude, where the pattern says so; zeros, infinities and NaN
    stay. Storage stays too: an `out=` argument sees the change."""
    if out.dtype not in INTEGERS or not out.numel():
        return out
    column = torch.arange(out.shape[-1], device=out.device)
    moved = (((column + 1) * 2654435761 + rows * 40503) >> 7) % 2 == 1  # a hash: any fixed pattern that mixes both
    moved = moved & (out != 0) & out.isfinite()
    bits = out.detach().view(INTEGERS[out.dtype])
    bits += moved
    return out
