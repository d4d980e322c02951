"""torch.compile of a policy's blocks, one by one; numbers differ from eager ones by rounding.

Eager FP8 on a GPU is slower than bf16, because each product rounds its input in six passes (benchmarks/README.md).
"""

from dllm_rl.models.base import Policy
from dllm_rl.models.forward.recompute import blocks_of


def compile_blocks(policy: Policy, *, mode: str = "default") -> None:
    """Compile every block of the policy's module in place, at its first forward. Raises ValueError without blocks.

    mode  torch.compile's. "default": one compilation for all shapes. "reduce-overhead", "max-autotune": one per shape
          for CUDA graphs, for at most eight shapes; torch runs further shapes uncompiled.

    Only for sampling without a cache: a compiled block is neither differentiated with adapters nor recomputed, and a
    growing cache would be compiled again at every step.
    """
    for block in blocks_of(policy.module, "torch_compile"):
        block.compile(mode=mode, dynamic=mode == "default")
