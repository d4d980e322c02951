"""LoRA: adapters on linear layers and on stacked experts."""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dllm_rl.models.base import Module, Policy, gather_if_sharded, has_bf16_products
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.low_bit import is_bitsandbytes, linear_of, plain_weight
from dllm_rl.rng import keep_mask

STACKS = ("gate_up_proj", "down_proj")  # weights (E, O, I) of all E experts of a stock module of experts
# Attributes of a stock module of experts whose layout `LoraExperts` supports.
LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


def check_mergeable(lora: Lora) -> None:
    """Raise ValueError for dropout: merged adapters have no separate input that could be dropped."""
    if lora.dropout:
        raise ValueError(f"lora.dropout={lora.dropout}: an aligned forward merges adapters; set it to 0")


class LoraLinear(nn.Module):
    """A linear layer with an fp32 adapter. Its products are computed in the input's dtype."""

    def __init__(self, base_layer: nn.Linear, lora: Lora, generator: Generator) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora = lora
        self.active = True
        self.calls = 0  # number of dropout masks so far: a mask depends only on (seed, calls), so it can be redrawn
        self.seed = int(torch.randint(2**40, (), generator=generator))
        device = base_layer.weight.device
        # Drawn on the CPU, so that the initial weights are the same for every device.
        a = (torch.rand(lora.r, base_layer.in_features, generator=generator) * 2 - 1) * base_layer.in_features**-0.5
        self.lora_A = linear_of(a.to(device), None).requires_grad_()
        self.lora_B = linear_of(torch.zeros(base_layer.out_features, lora.r, device=device), None).requires_grad_()

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        out = base_product(self.base_layer, x)
        if not self.active:
            return out
        low_rank = F.linear(self.apply_dropout(x), self.lora_A.weight.to(x.dtype))
        added = F.linear(low_rank, self.lora_B.weight.to(x.dtype)) * (self.lora.alpha / self.lora.r)
        return (out + added).to(out.dtype)

    def apply_dropout(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... I"]:
        """Apply dropout to the adapter's input, in forwards with gradients only."""
        if not self.lora.dropout or not torch.is_grad_enabled():  # not `self.training`, which is always False
            return x
        self.calls += 1
        keep = keep_mask(x.shape, seed=self.seed, step=self.calls, drop=self.lora.dropout, device=x.device)
        return x * keep / (1 - self.lora.dropout)

    def merged(self) -> Float[Tensor, "O I"]:
        """Return the weight with the adapter merged. It is differentiable in A and B."""
        return _merged(plain_weight(self.base_layer), self.lora_A.weight, self.lora_B.weight, self.lora)


def restart_dropout(module: nn.Module, step: int) -> None:
    """Let the dropout masks of a training step depend only on the seed and the step, also after a resume."""
    for layer in adapted_layers(module).values():
        layer.calls = step << 20  # far more forwards than a step has


class _Float32Backward(torch.autograd.Function):
    """The bf16 product of a frozen layer, with a backward that is computed in fp32 and then rounded.

    On a CPU that emulates bf16, torch's bf16 backward would take 60 times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        (grad_output,) = grad_outputs
        return (grad_output.float() @ weight.float()).to(grad_output.dtype), None, None


def base_product(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the output of the layer to which an adapter is added."""
    weight = layer.weight
    is_emulated = x.device.type == "cpu" and x.dtype == torch.bfloat16 == weight.dtype and not has_bf16_products()
    if is_emulated and type(layer) is nn.Linear and not weight.requires_grad and not torch.is_autocast_enabled("cpu"):
        return _Float32Backward.apply(x, weight, layer.bias)
    return layer(x)


class LoraExperts(nn.Module):
    """A stock module of experts with an fp32 adapter for every expert of both stacks."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module, lora: Lora, generator: Generator) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora = lora
        self.active = True
        self.calls = 0  # as in `LoraLinear`; always 0, because adapters on experts have no dropout
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        for name in STACKS:
            weight = getattr(base_layer, name)
            experts, outputs, inputs = weight.shape
            a = (torch.rand(experts, lora.r, inputs, generator=generator) * 2 - 1) * inputs**-0.5
            self.lora_A[name] = nn.Parameter(a.to(weight.device))
            self.lora_B[name] = nn.Parameter(torch.zeros(experts, outputs, lora.r, device=weight.device))

    def forward(self, *args: Any) -> Tensor:
        if not self.active:
            return self.base_layer(*args)
        # The stock module computes a grouped product of merged weights. Without gradient checkpointing the merged
        # weights stay in memory until the backward.
        return functional_call(self.base_layer, {name: self.merged(name) for name in STACKS}, args)

    def merged(self, name: str) -> Float[Tensor, "E O I"]:
        """Return a stack of weights with the adapters merged. It is differentiable in A and B."""
        weight = gather_if_sharded(getattr(self.base_layer, name).detach())
        return _merged(weight, self.lora_A[name], self.lora_B[name], self.lora)

    @torch.no_grad()
    def plain(self, memo: dict[int, Any]) -> nn.Module:
        """Return the stock module with merged adapters. `memo` is a memo of deepcopy."""
        stacks = {id(getattr(self.base_layer, name)): nn.Parameter(self.merged(name), False) for name in STACKS}
        return copy.deepcopy(self.base_layer, memo | stacks)

    def peft_state(self) -> dict[str, Tensor]:
        """Return the adapters under peft's names.

        peft wraps the module once per stack, and its wrapper of the second stack contains that of the first.
        """
        state = {}
        for wrapper, name in zip((".base_layer", ""), STACKS, strict=True):
            state[f"{wrapper}.lora_A.weight"] = self.lora_A[name].detach().flatten(0, 1)  # (E r, in)
            state[f"{wrapper}.lora_B.weight"] = self.lora_B[name].detach().permute(1, 2, 0).flatten(1)  # (out, r E)
        return state

    @torch.no_grad()
    def load_peft_state(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of `peft_state` into the adapters."""
        for wrapper, name in zip((".base_layer", ""), STACKS, strict=True):
            self.lora_A[name].copy_(state[f"{wrapper}.lora_A.weight"].view_as(self.lora_A[name]))
            stacked = state[f"{wrapper}.lora_B.weight"].unflatten(1, (self.lora.r, -1))  # (out, r, E)
            self.lora_B[name].copy_(stacked.permute(2, 0, 1))


def _merged(weight: Tensor, a: Tensor, b: Tensor, lora: Lora) -> Tensor:
    """Return W + (alpha / r) B A, summed in fp32 and rounded once to W's dtype."""
    return with_product(weight, gather_if_sharded(b).float() @ gather_if_sharded(a).float(), lora)


def with_product(weight: Tensor, product: Tensor, lora: Lora) -> Tensor:
    """Return `_merged` of a layer or of several, whose product B A is known."""
    scaled = product.mul_(lora.alpha / lora.r).float()  # under autocast the product is in 16 bits
    return scaled.add_(weight).to(weight.dtype)  # in place, to allocate only one fp32 tensor


def add_lora(policy: Policy, lora: Lora) -> None:
    """Add adapters to the policy's module, in place. Freeze all other weights, and delete their gradients.

    Raises:
        ValueError: A target names no linear layer, a target cannot be adapted (the output layer, a layer whose weight
            MultiheadAttention reads, or one whose weight is computed), there are no stacked experts to adapt, or the
            policy already has adapters.
    """
    module = policy.module
    names = lora.targets or policy.spec.lora_targets
    if adapted_layers(module):
        raise ValueError("lora: the policy has adapters already; merge them first (dllm_rl.models.merge.merge_lora)")
    linear_layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    targets = {path: layer for path, layer in linear_layers.items() if is_target(path, names)}
    # A family's list may name layers that a model lacks.
    unmatched = tuple(name for name in lora.targets or () if not any(is_target(path, [name]) for path in targets))
    if unmatched or not targets:
        raise ValueError(
            f"lora.targets={unmatched or names} names no linear layer in a block of {type(module).__name__}; name "
            "other layers, by the last part of their path or by their full path"
        )
    head = getattr(module, "get_output_embeddings", lambda: None)()
    for path, layer in targets.items():
        if layer is head:  # `float32_head` needs a layer without adapters
            raise ValueError(f"lora.targets names {path!r}, the output layer, which cannot have adapters; leave it out")
        if "weight" not in layer._parameters:  # weight_norm, spectral_norm: a merged weight has no place in the module
            raise ValueError(f"lora.targets names {path!r}, whose weight is computed from other tensors; leave it out")
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            raise ValueError(f"lora.targets names {path!r}, whose weight MultiheadAttention reads itself; leave it out")
    stacks = [path for path, layer in module.named_modules() if is_stacked(layer)] if lora.experts else []
    if lora.experts and not stacks:
        raise ValueError(f"lora.experts=True, but {type(module).__name__} has no stacked experts; leave it out")
    module.requires_grad_(False)
    module.zero_grad(set_to_none=True)  # old gradients would use memory and affect the gradient norm
    paths_of = all_paths(module)
    generator = Generator().manual_seed(lora.seed)
    for paths, adapted_class in ((targets, LoraLinear), (stacks, LoraExperts)):
        for path in paths:
            layer = module.get_submodule(path)
            adapted = adapted_class(layer, lora, generator)
            for each in paths_of[layer]:
                module.set_submodule(each, adapted)
    policy.lora = lora


def all_paths(module: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the paths of each layer: an encoder and a decoder may share it."""
    found = defaultdict(list)
    for path, layer in module.named_modules(remove_duplicate=False):
        found[layer].append(path)
    return found


def is_target(path: str, names: Sequence[str]) -> bool:
    """Return whether `names` contains the layer's path or, for a layer inside a block, the last part of its path."""
    return path in names or (re.search(r"\.\d+\.", path) is not None and path.rpartition(".")[2] in names)


def adapted_layers(module: nn.Module) -> dict[str, LoraLinear | LoraExperts]:
    """Return the layers with adapters, by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, LoraLinear | LoraExperts)}


def is_of_peft(layer: Any) -> bool:
    """Return whether peft put the module into a model."""
    return type(layer).__module__.startswith("peft.")


def base_of(layer: Any) -> Any:
    """Return the layer to which adapters were added, here or by peft, or the layer itself if it has no adapters."""
    if isinstance(layer, LoraLinear | LoraExperts):
        return layer.base_layer
    return getattr(layer, "base_layer", layer) if is_of_peft(layer) else layer


def is_adapted_or_low_bit(layer: nn.Module) -> bool:
    """Return whether a layer has adapters or bitsandbytes weights."""
    return base_of(layer) is not layer or is_bitsandbytes(layer)


def is_stacked(layer: nn.Module) -> bool:
    """Return whether a module, with or without adapters, has gated experts without biases, stored as STACKS."""
    layer = base_of(layer)
    stacks = [getattr(layer, name, None) for name in STACKS]
    return (
        all(isinstance(stack, nn.Parameter) and stack.dim() == 3 for stack in stacks)
        and len(list(layer.parameters(recurse=False))) == len(STACKS)
        and isinstance(getattr(layer, "act_fn", None), nn.Module)
        and all(getattr(layer, name, value) == value for name, value in LAYOUT.items())
    )


def moe_layers(module: Module) -> list[Any]:
    """Return the layers that route tokens to experts (MoE layers), in the order of the blocks; [] for a dense model."""
    return [layer for layer in module.modules() if hasattr(base_of(getattr(layer, "experts", None)), "gate_up_proj")]


def call_without_adapters(f: Callable[..., Tensor], module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Call the function f(module, ...) with the module's adapters off."""
    layers = adapted_layers(module).values()
    for layer in layers:
        layer.active = False
    try:
        return f(module, *args, **kwargs)
    finally:
        for layer in layers:
            layer.active = True


def has_adapted_or_low_bit(module: nn.Module) -> bool:
    """Return whether a layer of the module has adapters or bitsandbytes weights."""
    return any(map(is_adapted_or_low_bit, module.modules()))


def plain_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and layers. A layer with adapters appears once, without its inner layers.

    Raise ValueError for a part of peft that is not an adapter on a plain linear layer.
    """
    inner = None  # start of the names inside the last layer with adapters, which come right after it
    for name, layer in module.named_modules():
        if inner is None or not name.startswith(inner):
            if is_of_peft(layer) and type(base_of(layer)) is not nn.Linear:
                raise ValueError(
                    f"{name or type(module).__name__} is peft's {type(layer).__name__}, not an adapter on a plain "
                    "nn.Linear, so that it cannot be merged here; use model.merge_and_unload()"
                )
            yield name, layer
            if base_of(layer) is not layer:
                inner = f"{name}." if name else ""


def layers_of(module: Module) -> Module:
    """Return the module or, if it is sharded, a module with the same layers and without weights."""
    return module.sharding.plain if hasattr(module, "sharding") else module
