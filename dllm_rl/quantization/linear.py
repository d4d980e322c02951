"""Linear layers of a quantized copy: which are quantized, their products, and their dequantized operands.

Also mixture-of-experts modules, split into one linear layer per expert.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8DynamicActivationInt8WeightConfig
from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor

from dllm_rl.models.lora import base_of, is_stacked, plain_layers
from dllm_rl.models.low_bit import is_bitsandbytes
from dllm_rl.quantization.schemes import EmulatedLinear


def is_torchao_tensor(weight: Tensor) -> bool:
    """Return whether a tensor is a quantized tensor of torchao."""
    return hasattr(weight, "qdata")


def unsupported_reason(weight: Tensor, config: Any) -> str | None:
    """Return why a torchao config cannot quantize a weight (..., O, I), or None if it can.

    For such a weight, torchao itself would do nothing, or raise an AssertionError.
    """
    rows, columns = weight.shape[-2:]
    granularity = getattr(config, "granularity", None)
    group_size = getattr(granularity, "group_size", None) or getattr(config, "group_size", None)
    if group_size and columns % group_size:
        return f"{rows}x{columns}: {columns} is not a multiple of the group size {group_size}"
    # torch._scaled_mm needs multiples of 16.
    multiple = 16 if isinstance(config, Float8DynamicActivationFloat8WeightConfig) else 1
    if isinstance(config, Int8DynamicActivationInt8WeightConfig) and weight.is_cuda:
        multiple = 8  # for other sizes torchao would multiply on the CPU
    if rows % multiple or columns % multiple:
        return f"{rows}x{columns}: not multiples of {multiple}"
    return None


def quantized_forward(layer: nn.Linear, x: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the quantized layer's output with this bias, and the arguments for `dequantized_input`."""
    if isinstance(layer, EmulatedLinear):
        return layer.quantized_forward(x, bias)
    return F.linear(x, layer.weight, bias), (x,)


class PlainLinear(nn.Linear):
    """A linear layer with a quantized weight of torchao, which enters a compiled graph as plain tensors.

    Before each run of a graph, the host would check each quantized tensor and take it apart, which takes longer than to
    start the graph's kernels. The product is torchao's: the graph puts the quantized tensor together again. The plain
    tensors are those of the weight, so that a sync writes them too.
    """

    plain: tuple[Tensor, ...]
    product: Callable[..., Tensor]

    @classmethod
    def of(cls, layer: nn.Linear) -> None:
        """Let a layer whose forward is that of nn.Linear become one of this class."""
        layer.__class__ = cls
        layer.take_apart()  # type: ignore[operator]

    def take_apart(self) -> None:
        weight: Any = self.weight
        names, attributes = weight.__tensor_flatten__()
        self.plain = tuple(getattr(weight, name) for name in names)
        self.product = graph_product(type(weight), names, attributes)

    @no_type_check  # torch.compile cannot trace the tests' type checks
    def forward(self, x):
        if torch.compiler.is_compiling():
            return self.product(x, self.bias, *self.plain)
        return F.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable, recurse: bool = True) -> "PlainLinear":
        super()._apply(fn, recurse)  # such as a move to another device, after which the weight has other tensors
        self.take_apart()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("plain", "product")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.take_apart()


_graph_products: dict[tuple[type, str], Callable[..., Tensor]] = {}


def graph_product(cls: type, names: list[str], attributes: dict[str, Any]) -> Callable[..., Tensor]:
    """Return the function (x, bias, plain tensors of a weight) -> product, as one operation of a graph.

    Layers of the same kind get the same function, so that they can share a graph.
    """

    def product(x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        weight = cls.__tensor_unflatten__(dict(zip(names, tensors, strict=True)), attributes, None, None)  # type: ignore[attr-defined]
        return F.linear(x, weight, bias)

    kind = (cls, repr((names, attributes)))
    if kind not in _graph_products:
        _graph_products[kind] = torch.compiler.allow_in_graph(product)
    return _graph_products[kind]


def dequantized_weight(layer: nn.Linear) -> Tensor:
    """Return the layer's weight as floating-point numbers that approximate the learner's weight."""
    return layer.dequantized() if isinstance(layer, EmulatedLinear) else dequantize_packed(layer.weight)


def dequantize_packed(weight: Tensor) -> Tensor:
    """Return a quantized weight (O, I) of torchao as floating-point numbers."""
    if type(weight).dequantize is Tensor.dequantize:  # int4_packed, whose layout only its kernel can read
        return F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).T.contiguous()
    return weight.dequantize()


def dequantized_input(layer: nn.Linear, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the input as the layer rounded it. `x` and `scale` are the second result of `quantized_forward`."""
    if scale is not None:
        return x * scale
    kwargs = getattr(layer.weight, "act_quant_kwargs", None)
    return x if kwargs is None else _choose_quant_func_and_quantize_tensor(x, kwargs).dequantize()


def write_count(layer: nn.Linear) -> int:
    """Return autograd's count of in-place writes to the quantized data."""
    weight: Any = layer.weight
    return (weight if isinstance(layer, EmulatedLinear) else weight.qdata)._version


def stored_bytes(tensor: Any) -> int:
    """Return the size in bytes of a tensor, or of a quantized tensor's codes and scales."""
    if not is_torchao_tensor(tensor):
        return tensor.nbytes
    return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])


def skip_reasons(module: nn.Module, config: Any, skip: Callable[[nn.Module, str], bool] | None) -> dict[str, str]:
    """Return the names of layers with a matrix that is not quantized, and the reason."""
    layers_of_weight: dict[int, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        layers_of_weight.setdefault(id(weight), []).append(name.rpartition(".")[0].removesuffix(".base_layer"))
    skipped = {}
    for name, layer in plain_layers(module):
        layer = base_of(layer)
        if isinstance(layer, nn.Linear) and "weight" not in layer._parameters:  # weight_norm, spectral_norm
            skipped[name] = "the weight is computed from other tensors"
            continue
        matrices = [p for p in layer.parameters(recurse=False) if p.dim() > 1]
        if not matrices:
            continue
        # A layer with two names (an encoder and a decoder may share it) is not tied to itself.
        layers_with_weight = layers_of_weight[id(matrices[0])]
        tied = [other for other in layers_with_weight if base_of(module.get_submodule(other)) is not layer]
        shapes = matrices
        if isinstance(layer, nn.Linear) and is_bitsandbytes(layer):  # whose codes are packed
            shapes = [torch.empty(1, device=matrices[0].device).expand(layer.out_features, layer.in_features)]
        unsupported = [reason for matrix in shapes if (reason := unsupported_reason(matrix, config))]
        if reason := skip_reason(name, layer, matrices[0], tied):
            skipped[name] = reason
        elif skip and skip(layer, name):
            skipped[name] = "skip"
        elif unsupported:
            skipped[name] = unsupported[0]
    return skipped


def skip_reason(name: str, layer: nn.Module, matrix: Tensor, tied: list[str]) -> str | None:
    """Return why no scheme can quantize a layer, or None if a scheme may.

    `tied` contains the names of other layers with the same matrix.
    """
    is_router = re.search(r"(router|\.gate)$", name)
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if not (isinstance(layer, nn.Linear) or is_stacked(layer) or is_router):
        is_fused = matrix.dim() == 3 and not type(layer).__module__.startswith("torch.nn")
        return "fused experts of an unknown layout" if is_fused else f"{type(layer).__name__}, not nn.Linear"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads the weight without calling the layer"
    if tied:
        return f"tied to {tied[0]}"
    if not re.search(r"\.\d+\.", name):
        return "outside the blocks"
    return "router" if is_router else None


def quantizable_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and layers: linear layers and stacks of experts, with or without adapters."""
    for name, layer in plain_layers(module):
        if isinstance(base_of(layer), nn.Linear) or is_stacked(layer):
            yield name, layer


class UnstackedExperts(nn.Module):
    """Replacement for transformers' mixture-of-experts module, with one linear layer per expert.

    transformers stacks the weights of all experts, but quantized tensors must be two-dimensional.
    """

    def __init__(self, gate_up_proj: list[nn.Linear], down_proj: list[nn.Linear], act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = nn.ModuleList(gate_up_proj)
        self.down_proj = nn.ModuleList(down_proj)
        self.act_fn = act_fn

    @torch.compiler.disable  # the number of rows of an expert differs in every step, and must be known on the CPU
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Float[Tensor, "S D"]:
        return moe_forward(x, index, weights, list(self.gate_up_proj), list(self.down_proj), act_fn=self.act_fn)


def moe_forward(
    hidden_states: Float[Tensor, "S D"],
    top_k_index: Int[Tensor, "S K"],
    top_k_weights: Float[Tensor, "S K"],
    gate_up_proj: Sequence[Callable[[Tensor], Tensor]],
    down_proj: Sequence[Callable[[Tensor], Tensor]],
    *,
    act_fn: Callable[[Tensor], Tensor],
) -> Float[Tensor, "S D"]:
    """Return sum_k weight_k down_e(act(gate_e(x)) * up_e(x)) with e = index_k.

    It computes the same as transformers' mixture-of-experts module.
    """
    expert_ids = top_k_index.flatten()
    order = expert_ids.argsort(stable=True)  # sorted by expert
    counts = expert_ids.bincount(minlength=len(gate_up_proj)).tolist()  # the CPU waits for the GPU only here
    outputs = []
    for expert, rows in enumerate(hidden_states[order // top_k_index.shape[1]].split(counts)):
        if len(rows):
            gate, up = gate_up_proj[expert](rows).chunk(2, dim=-1)
            outputs.append(down_proj[expert](act_fn(gate) * up))
    weighted = torch.cat(outputs) * top_k_weights.flatten()[order][:, None]
    inverse_order = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[inverse_order].unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)
