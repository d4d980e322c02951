"""Another CPU, simulated: `pytest --other-cpu`.

The last bits of a matrix product depend on the kernel that a library picks, by the processor and by the number of rows.
A row may therefore round differently in a batch of 4 than in a batch of 32. On some processors it does not, and a test
that compares such bits passes there and fails elsewhere. Under this mode every product rounds by its number of rows:
the same call gives the same bits, the same row in another batch does not.
"""

from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Products, and the argument whose rows are counted. Attention on the CPU is two products with a softmax in between.
PRODUCTS = {
    aten.mm: 0,
    aten.addmm: 1,
    aten.bmm: 0,
    aten.baddbmm: 1,
    aten._scaled_dot_product_flash_attention_for_cpu: 0,
}


class OtherCPU(TorchDispatchMode):
    """Moves elements of every product by one or two units in the last place, or not, by a fixed pattern of their column
    and the number of rows of the product. Zeros, infinities and NaN stay."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        which = PRODUCTS.get(func.overloadpacket)
        if which is None or args[which].device.type != "cpu":  # a simulated GPU has its own rounding
            return out
        product = out[0] if isinstance(out, tuple) else out  # attention also returns what its backward needs
        if product.is_floating_point() and product.numel() and args[which].shape[-1]:
            rows = args[which].numel() // args[which].shape[-1]
            product.mul_(factors(product.shape[-1], rows, product.dtype))
        return out


@cache
def factors(columns: int, rows: int, dtype: torch.dtype) -> Tensor:
    """1, or 1 and one unit in the last place, for each column: a hash of the column and the number of rows decides."""
    moved = (((torch.arange(columns) + 1) * 2654435761 + rows * 40503) >> 7) % 2
    return 1 + moved.to(dtype) * torch.finfo(dtype).eps
