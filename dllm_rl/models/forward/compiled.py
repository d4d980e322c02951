"""torch.compile of a policy's blocks, one by one: a few kernels for what a block does between its products.

Eager FP8 on a GPU is slower than bf16, for each product rounds its input in six passes of its own; compiled it is
faster (benchmarks/README.md). Numbers differ from the eager ones by rounding.
"""

from dllm_rl.models.base import Policy
from dllm_rl.models.forward.recompute import blocks_of


def compile_blocks(policy: Policy, *, mode: str = "default") -> None:
    """Every block of the policy's module runs compiled from now on; compiling takes place at the first forward, and
    again for shapes of another kind. The weights stay where they are, and a sync writes them as before.

    mode  torch.compile's. "default": once for all shapes. "reduce-overhead", "max-autotune": for each shape anew, for
          eight of them at most, so that CUDA graphs can be replayed; torch goes on uncompiled after that.

    For policies that are sampled from without a cache, and not trained: a block that is compiled is not differentiated
    with adapters or recomputed, and a cache's growing state would be compiled anew at every step.
    Raises ValueError where the module has no list of blocks.
    """
    for block in blocks_of(policy.module, "torch_compile"):
        block.compile(mode=mode, dynamic=mode == "default")
