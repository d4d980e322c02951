"""LoRA: adding adapters, disabling them for the reference policy, merging them for the rollout, saving in peft's
format.

Adapters live inside the stock module, so that every other room goes on as before; they are what is trained.
The base may be in bitsandbytes' 4 or 8 bits.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from dllm_rl.models.base import Module, Policy, whole
from dllm_rl.models.experts import STACKS, LoraExperts, is_stacked
from dllm_rl.models.untrusted import read_adapter
from dllm_rl.models.weights import misfits, renamed
from dllm_rl.rng import keep_mask


@dataclass(frozen=True, kw_only=True)
class Lora:
    """W + (alpha / r) B A on linear layers of the blocks: A is random, B zero, so that nothing changes at first.

    r        rank of the adapters
    alpha    their scale, times r
    targets  names of layers (`q_proj`), or full paths; None takes the family's own list. Routers, embeddings and heads
             are not adapted.
    experts  a pair for each expert that is stacked in one tensor, too (`models.experts.LoraExperts`).
    dropout  share of the adapters' inputs that is dropped, in forwards that are differentiated only; 0 with `experts`.
    seed     of A, and of dropout.
    Source: LoRA, arXiv 2106.09685 [paper]; A uniform in +-1/sqrt(in_features), as peft does.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    experts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r={self.r} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must lie in [0, 1)")
        if self.experts and self.dropout:
            raise ValueError(f"lora.dropout={self.dropout}: adapters on experts are merged in a forward; set it to 0")


def check_mergeable(lora: Lora) -> None:
    """Raise ValueError for dropout, which an aligned forward, whose operand holds the adapters merged, cannot have."""
    if lora.dropout:
        raise ValueError(f"lora.dropout={lora.dropout}: an aligned forward merges adapters; set it to 0")


def lora_r16(*, r: int = 16, alpha: float = 32.0, dropout: float = 0.0, experts: bool = False) -> Lora:
    """Small adapters: r 16, alpha 32, no dropout, unless told otherwise.

    r        rank of the adapters
    alpha    their scale, times r
    dropout  share of the adapters' inputs that is dropped, in forwards that are differentiated only
    experts  adapt the experts of a mixture too, each
    """
    return Lora(r=r, alpha=alpha, dropout=dropout, experts=experts)


def lora_d1(*, r: int = 128, alpha: float = 64.0, dropout: float = 0.05) -> Lora:
    """d1's adapters (arXiv 2504.12216): r 128, alpha 64, dropout 0.05, unless told otherwise.

    r        rank of the adapters
    alpha    their scale, times r
    dropout  share of the adapters' inputs that is dropped, in forwards that are differentiated only
    """
    return Lora(r=r, alpha=alpha, dropout=dropout)


class LoraLinear(nn.Module):
    """A linear layer and its fp32 adapter, whose products are in the input's dtype, as the layer's own are.

    calls  counts dropout masks: each is a function of (seed, its number) alone, so runs repeat, on every device, and a
           block that a backward runs again drops what it dropped before (`recompute`).
    """

    def __init__(self, base_layer: nn.Linear, lora: Lora, generator: Generator) -> None:
        super().__init__()
        self.base_layer, self.lora, self.active, self.calls = base_layer, lora, True, 0
        self.seed = int(torch.randint(2**40, (), generator=generator))
        device = base_layer.weight.device
        bound = base_layer.in_features**-0.5
        a = (torch.rand(lora.r, base_layer.in_features, generator=generator) * 2 - 1) * bound
        self.lora_A = nn.Linear(base_layer.in_features, lora.r, bias=False, device="meta")
        self.lora_B = nn.Linear(lora.r, base_layer.out_features, bias=False, device="meta")
        self.lora_A.weight = nn.Parameter(a.to(device))
        self.lora_B.weight = nn.Parameter(torch.zeros(base_layer.out_features, lora.r, device=device))

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        out = self.base_layer(x)
        if not self.active:
            return out
        small = F.linear(self.dropped(x), self.lora_A.weight.to(x.dtype))
        added = F.linear(small, self.lora_B.weight.to(x.dtype)) * (self.lora.alpha / self.lora.r)
        return (out + added).to(out.dtype)

    def dropped(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... I"]:
        if not self.lora.dropout or not torch.is_grad_enabled():
            return x
        self.calls += 1
        keep = keep_mask(x.shape, seed=self.seed, step=self.calls, drop=self.lora.dropout, device=x.device)
        return x * keep / (1 - self.lora.dropout)

    def merged(self) -> Float[Tensor, "O I"]:
        """W + (alpha / r) B A, summed in fp32 and rounded once to the dtype of W; differentiable in A and B."""
        weight = plain_weight(self.base_layer)
        added = whole(self.lora_B.weight).float() @ whole(self.lora_A.weight).float()
        return (weight.float() + added * (self.lora.alpha / self.lora.r)).to(weight.dtype)


def add_lora(policy: Policy, lora: Lora) -> None:
    """Put adapters on the policy's module, in place, and freeze everything else, gradients freed.

    Raises ValueError when no layer has one of the target names, none has experts that are to be adapted, or adapters
    are there already.
    """
    module, names = policy.module, lora.targets or policy.spec.lora_targets
    if adapted_layers(module):
        raise ValueError("lora: the policy has adapters already; merge them first (merge_lora)")
    chosen = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and (path in names or (re.search(r"\.\d+\.", path) and path.rpartition(".")[2] in names))
    }
    if not chosen:
        raise ValueError(
            f"lora.targets={names} names no linear layer in a block of {type(module).__name__}; name other layers"
        )
    stacks = {path: layer for path, layer in module.named_modules() if lora.experts and is_stacked(layer)}
    if lora.experts and not stacks:
        raise ValueError(f"lora.experts=True, but {type(module).__name__} has no stacked experts; leave it out")
    module.requires_grad_(False)
    module.zero_grad(set_to_none=True)  # what an earlier training left would be a copy of the base, and be clipped with
    generator = Generator().manual_seed(lora.seed)
    for path, layer in chosen.items():
        module.set_submodule(path, LoraLinear(layer, lora, generator))
    for path, layer in stacks.items():
        module.set_submodule(path, LoraExperts(layer, lora, generator))
    policy.lora = lora


def adapted_layers(module: nn.Module) -> dict[str, LoraLinear | LoraExperts]:
    """The layers that carry adapters, by name."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, LoraLinear | LoraExperts)}


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """The module without its adapters."""
    layers = adapted_layers(module).values()
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.active = was


def without_adapters(policy: Policy) -> Policy:
    """A second policy on the same weights, adapters left out: the reference that RL started from, without a copy.

    Raises ValueError when there are no adapters: the policy itself would move.
    """
    if not adapted_layers(policy.module):
        raise ValueError(
            f"{type(policy.module).__name__} has no adapters to leave out; keep a copy of it as the reference"
        )
    reference, spec = copy.copy(policy), policy.spec
    reference.spec = replace(spec, encode=partial(_without, spec.encode), head=partial(_without, spec.head))
    return reference


def _without(f: Callable[..., Tensor], module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with disable_adapters(module):
        return f(module, *args, **kwargs)


def is_bitsandbytes(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and type(layer.weight).__module__.startswith("bitsandbytes")


def has_extras(module: nn.Module) -> bool:
    """Whether the module holds anything but ordinary layers: adapters, or bitsandbytes weights."""
    return bool(adapted_layers(module)) or any(is_bitsandbytes(layer) for layer in module.modules())


@torch.no_grad()
def plain_weight(layer: nn.Linear) -> Float[Tensor, "O I"]:
    """The weight of a linear layer: a bitsandbytes one's dequantised, a sharded one's whole."""
    if not is_bitsandbytes(layer):
        return whole(layer.weight.detach())
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    # An 8-bit layer hands its rows and scales (absolute maxima, 127 steps) over to `state` at its first forward.
    kept: Any = layer.state if weight.SCB is None else weight
    return kept.CB * (kept.SCB.float() / 127)[:, None]


@torch.no_grad()
def merged_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all parameters and buffers under the names that they have without adapters, one at a time.

    Adapters are merged and bitsandbytes weights dequantised; everything else is the module's own tensor, not a copy.
    """
    for path, layer in module.named_modules():
        if re.search(r"\.(base_layer|lora_A|lora_B)$", path):
            continue
        own = layer.base_layer if isinstance(layer, LoraLinear | LoraExperts) else layer
        for kind, tensor in [*own.named_parameters(recurse=False), *own.named_buffers(recurse=False)]:
            if isinstance(layer, LoraExperts):
                tensor = layer.merged(kind)
            elif kind == "weight" and own is not layer:
                tensor = layer.merged()
            elif kind == "weight" and is_bitsandbytes(own):
                tensor = plain_weight(own)
            yield f"{path}.{kind}" if path else kind, tensor


@torch.no_grad()
def merged_copy(module: Module, *, device: torch.device | str | None = None) -> Module:
    """A copy of the module, on another device where one is given, that holds `merged_state` in ordinary layers.

    One layer after the other: its own device holds at most one of them a second time.
    """
    memo: dict[int, Any] = {}
    for path, layer in module.named_modules():
        if re.search(r"\.(base_layer|lora_A|lora_B)$", path):
            continue
        if isinstance(layer, LoraLinear) or is_bitsandbytes(layer):
            memo[id(layer)] = copy.deepcopy(_plain(layer).to(device))
            continue
        if isinstance(layer, LoraExperts):
            memo[id(layer)] = layer.plain(memo).to(device)
            continue
        # deepcopy takes what the memo holds for an object instead of copying it.
        for parameter in layer.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(_copied(parameter, device), requires_grad=parameter.requires_grad)
        for buffer in layer.buffers(recurse=False):
            memo[id(buffer)] = _copied(buffer, device)
    twin = copy.deepcopy(module, memo)
    forget_quantizer(twin)
    return twin


def _copied(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    return tensor.detach().to(device or tensor.device, copy=True)


def merge_lora(policy: Policy) -> None:
    """Turn the policy's adapters into part of its weights, in place; all of them are trainable again."""
    _merge(policy.module)
    policy.module.requires_grad_(True)
    policy.lora = None


@torch.no_grad()
def _merge(module: Module) -> None:
    for path, layer in list(module.named_modules()):
        if isinstance(layer, LoraExperts):
            module.set_submodule(path, layer.plain({}))
        elif not path.endswith(".base_layer") and (isinstance(layer, LoraLinear) or is_bitsandbytes(layer)):
            module.set_submodule(path, _plain(layer))
    forget_quantizer(module)


def _plain(layer: Any) -> nn.Linear:
    """An ordinary layer in place of one with an adapter or in few bits; the bias is the layer's own."""
    base = getattr(layer, "base_layer", layer)
    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    plain.weight = nn.Parameter(layer.merged() if base is not layer else plain_weight(layer), requires_grad=False)
    plain.bias = base.bias
    return plain


def forget_quantizer(module: nn.Module) -> None:
    """Drop what transformers sets on a module that bitsandbytes quantised: its weights are ordinary ones."""
    for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        vars(module).pop(name, None)
    vars(getattr(module, "config", module)).pop("quantization_config", None)


def adapter_state(policy: Policy) -> dict[str, Tensor]:
    """The adapters' tensors as peft names them, after the authors' own module names."""
    backwards = tuple((b, a) for a, b in policy.spec.names)
    out: dict[str, Tensor] = {}
    for path, layer in adapted_layers(policy.module).items():
        if isinstance(layer, LoraExperts):  # a stock class's own names: the authors have no stacks
            out |= {f"base_model.model.{path}{name}": tensor for name, tensor in layer.saved().items()}
            continue
        stem = renamed(f"{path}.weight", backwards).removesuffix(".weight")
        for part in ("lora_A", "lora_B"):
            out[f"base_model.model.{stem}.{part}.weight"] = getattr(layer, part).weight.detach()
    return out


def save_adapter(policy: Policy, directory: str | Path) -> None:
    """Write the adapters alone, in peft's format: adapter_model.safetensors and adapter_config.json.

    Raises ValueError when the policy has none.
    """
    state, lora = adapter_state(policy), policy.lora
    if lora is None:
        raise ValueError(f"{type(policy.module).__name__} has no adapters; save_pretrained writes its weights")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    calls = next(iter(adapted_layers(policy.module).values())).calls
    metadata = {"format": "pt", "seed": str(lora.seed), "dropout_calls": str(calls)}
    save_file(
        {name: tensor.cpu().clone() for name, tensor in state.items()},
        directory / "adapter_model.safetensors",
        metadata,
    )
    stems = _stems(state)
    experts = _of_experts(stems)
    config = {
        "peft_type": "LORA",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted(stems - {f"{path}{part}" for path in experts for part in ("", ".base_layer")}),
        **({"target_parameters": [f"{path}.{name}" for path in experts for name in STACKS]} if experts else {}),
        "base_model_name_or_path": policy.spec.source,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(policy: Policy, directory: str | Path) -> None:
    """Put saved adapters, ours or peft's, on the policy, in place, with every tensor accounted for.

    Raises ValueError on another method than plain LoRA, or on tensors that do not fit the module.
    """
    directory = Path(directory)
    config, state, metadata = read_adapter(directory)
    plain = {
        "peft_type": "LORA",
        "use_dora": False,
        "use_rslora": False,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
    }
    for field, value in plain.items():
        if config.get(field) not in (value, None):
            raise ValueError(
                f"{directory}: {field}={config[field]!r} is not supported; only plain LoRA ({field}={value!r}) is"
            )
    stems = _stems(state)
    experts = _of_experts(stems)
    linear = stems - {f"{path}{part}" for path in experts for part in ("", ".base_layer")}
    paths = tuple(sorted(renamed(f"{stem}.weight", policy.spec.names).removesuffix(".weight") for stem in linear))
    settings = {"r": config["r"], "alpha": config["lora_alpha"], "dropout": config["lora_dropout"]}
    add_lora(policy, Lora(**settings, targets=paths, experts=bool(experts), seed=int(metadata.get("seed", 0))))
    have = adapter_state(policy)
    if odd := misfits(state, have):
        raise ValueError(
            f"{directory}: adapter tensors {odd[:3]} do not fit {type(policy.module).__name__}; give their own base"
        )
    for name, tensor in state.items():
        have[name].copy_(tensor)
    for path, layer in adapted_layers(policy.module).items():
        layer.calls = int(metadata.get("dropout_calls", 0))
        if isinstance(layer, LoraExperts):
            layer.load({part: state[f"base_model.model.{path}{part}"] for part in layer.saved()})


def _stems(state: dict[str, Tensor]) -> set[str]:
    return {name.split(".lora_")[0].removeprefix("base_model.model.") for name in state}


def _of_experts(stems: set[str]) -> list[str]:
    """Paths of modules with adapters on two parameters: peft wraps one wrapper in another."""
    return sorted(stem for stem in stems if f"{stem}.base_layer" in stems)
