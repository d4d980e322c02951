"""Batch-invariant arithmetic, with which rollout and learner agree bit for bit (VeXact, 2605.14220 [paper]).

Kernels depend on the batch's shape, so the same row is rounded differently in batches of different size. Usually
therefore even unquantized rollouts agree with the learner only up to rounding. Here matrix products run in tiles of a
fixed number of rows, and attention runs row by row.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS is deterministic only with one of two settings of this variable,
SETTINGS = (":4096:8", ":16:8")  # which torch reads once, at the first product of the process on a GPU
TILE = 64  # rows


def prepare_workspace() -> None:
    """Set the environment that deterministic products on a GPU need.

    Raises:
        ValueError: The process has already computed a matrix product on the GPU without it.
    """
    if not torch.cuda.is_available():
        return
    setting = os.environ.get(WORKSPACE)
    if setting not in SETTINGS:
        os.environ[WORKSPACE] = SETTINGS[0]
    operand = torch.ones(1, 1, device="cuda")
    try:
        with deterministic():
            operand @ operand
    except RuntimeError:  # raised by torch if the setting came too late; there is no other way to detect it
        problem = f"{WORKSPACE} was {setting!r} at this process's first product on the GPU"
        raise ValueError(f"zero_mismatch: {problem}: export {WORKSPACE}={SETTINGS[0]} before Python starts") from None


@contextmanager
def deterministic() -> Iterator[None]:
    """Use torch's deterministic algorithms in the block; an operation without one raises an error."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


# The functions that torch and transformers call to multiply rows, sorted by expert, by the experts' stacked weights.
GROUPED = [f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None]


# Functions of single elements that a CPU computes in vectors, and the last elements of a tensor in another way.
ELEMENTWISE = {
    *(F.silu, F.gelu, F.mish, F.softplus, F.elu),
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("exp", "log", "sigmoid", "tanh")),
}


class BatchInvariantOps(TorchFunctionMode):
    """Runs linear layers in tiles of TILE rows, the last tile filled with zeros, attention row by row, and functions of
    single elements on a number of elements that fills all vectors.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self.linear(*args, **kwargs)
        if func is torch.addmm and not kwargs:
            return self.linear(args[1], args[2].T, args[0])
        if func is torch.mm and kwargs:  # fp32 logits of a 16-bit head (out_dtype)
            return self.linear(args[0].float(), args[1].float().T)
        if func in GROUPED:
            return self.grouped(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is torch.matmul and args[0].dim() == args[1].dim() == 4:
            pairs = zip(args[0].split(1), args[1].split(1), strict=True)
            return torch.cat([torch.matmul(left, right) for left, right in pairs])
        if func is torch.matmul and args[1].dim() == 2:  # self-conditioning: probabilities times embeddings
            return self.linear(args[0], args[1].T)
        if func in ELEMENTWISE and not kwargs.get("inplace") and "out" not in kwargs:
            return self.elementwise(func, *args, **kwargs)
        return func(*args, **kwargs)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        filled = F.pad(rows, (0, 0, 0, -len(rows) % TILE))  # fill up the last tile
        out = torch.cat([F.linear(part, weight, bias) for part in filled.split(TILE)])
        return out[: len(rows)].unflatten(0, input.shape[:-1])

    def elementwise(self, func: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        elements = input.reshape(-1)
        filled = F.pad(elements, (0, -len(elements) % TILE))
        return func(filled, *args, **kwargs)[: len(elements)].view(input.shape)

    def grouped(
        self, input: Tensor, weight: Tensor, *, offs: Tensor, bias: None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Multiply stacked experts one by one: rows up to offs[0] with weight[0] (K, N), and so on."""
        counts = offs.diff(prepend=offs.new_zeros(1)).tolist()
        parts = input.split([*counts, len(input) - sum(counts)])
        # Not strict, because `parts` has one more item: rows after the last expert's rows, which have no product.
        out = torch.cat([self.linear(part, expert.T) for part, expert in zip(parts, weight, strict=False)])
        return out.to(out_dtype or out.dtype)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        masks = [None] * len(query) if attn_mask is None else attn_mask.expand(len(query), -1, -1, -1).split(1)
        out = []
        for row in zip(query.split(1), key.split(1), value.split(1), masks, strict=True):
            out.append(F.scaled_dot_product_attention(*row, *args, **kwargs))
        return torch.cat(out)


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Use batch-invariant, deterministic and slow arithmetic in the block: on a CPU it runs in one thread.

    Every setting is restored after the block. A key-value cache, and inputs with one scale per tensor, still differ.

    Raises:
        ValueError: As for `prepare_workspace`.
    """
    cudnn = torch.backends.cudnn
    switches = [
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        (cudnn, "allow_tf32", False),
        (cudnn, "benchmark", False),  # the autotuner chooses a kernel by its time, which varies
        (cudnn, "deterministic", True),
    ]
    previous_values = [getattr(owner, name) for owner, name, _ in switches]
    precision = torch.get_float32_matmul_precision()
    threads = torch.get_num_threads()
    # CUDA's plain attention.
    math_attention = sdpa_kernel(SDPBackend.MATH) if torch.cuda.is_available() else nullcontext()
    prepare_workspace()  # first: an error must come before any change
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        torch.set_float32_matmul_precision("highest")  # also turns TF32 products off
        torch.set_num_threads(1)  # the split of a kernel into threads, and its rounding, depend on the batch
        with deterministic(), BatchInvariantOps(), math_attention:
            yield
    finally:
        for (owner, name, _), value in zip(switches, previous_values, strict=True):
            setattr(owner, name, value)
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
