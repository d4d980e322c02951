"""Quantised rollout copies and their refresh."""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from dllm_rl.models.adapters.experts import STACKS, LoraExperts, is_stacked, stack_of
from dllm_rl.models.adapters.linear import LoraLinear, adapted_layers, is_bitsandbytes, plain_weight
from dllm_rl.models.adapters.merge import forget_quantizer, merged_state
from dllm_rl.models.base import Module, Policy, whole
from dllm_rl.quantization.experts import Experts
from dllm_rl.quantization.fake import EmulatedLinear, FakeQuantize, Scheme
from dllm_rl.quantization.linear import (
    check_finite,
    is_quantized,
    load_weight_,
    quantized,
    stored_bytes,
    unsupported_reason,
)
from dllm_rl.quantization.schemes import check_scheme

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationReport:
    """Names of quantised layers, matrices that keep their precision and why, and the modules' bytes."""

    quantized: tuple[str, ...]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, why in self.kept.items():
            reasons.setdefault(why, []).append(name)
        kept = "; ".join(f"{len(names)} kept ({why}): {', '.join(names[:3])}" for why, names in reasons.items())
        return (
            f"{len(self.quantized)} layers quantised, {self.bytes_before / 2**20:.1f} -> "
            f"{self.bytes_after / 2**20:.1f} MiB; {kept or 'nothing kept'}"
        )


@torch.no_grad()
def quantized_copy(
    policy: Policy,
    config: Scheme,
    *,
    skip: Callable[[nn.Module, str], bool] | None = None,
    dtype: torch.dtype | None = None,
) -> Policy:
    """A second policy whose block linears are quantised by `config`; None copies without quantising.

    skip   (module, name) -> True for further layers that keep their precision.
    dtype  of the copy's weights before quantising; None: the policy's own. A learner under autocast computes in bf16.

    Head, embeddings, norms, routers and layers tied to them keep their precision; stacked experts are quantised one by
    one (see `quantization_report`). Adapters are merged, bitsandbytes weights dequantised and sharded ones gathered
    layer by layer: at most one layer is held twice in addition to the unsharded copy. Raises ValueError for a config
    that the device cannot run, a weight with NaN or infinity, or when nothing can be quantised.
    """
    module, rollout_policy = policy.module, copy.copy(policy)
    layers = (
        module.sharding.plain if hasattr(module, "sharding") else module
    )  # what is copied: without weights if sharded
    kept: dict[str, str] = {}
    finite: dict[str, torch.Tensor] = {}
    if config is not None:
        config = check_scheme(config, policy.device, dtype or next(module.parameters()).dtype)
        kept = skip_reasons(module, config, skip)
    stacked = [] if config is None else [(n, m) for n, m in plain_layers(layers) if is_stacked(m) and n not in kept]
    chosen = [] if config is None else [name for name, _ in linear_layers(module) if name not in kept]
    if config is not None and not chosen and not stacked:
        raise ValueError(f"{config!r} quantises no layer of {type(module).__name__}; not quantised: {kept}")
    memo = copies(module, layers, dtype, lambda p: p.dim() == 1)  # norms, and biases for what follows
    for name, layer in linear_layers(layers):
        # deepcopy takes an object's entry in the memo instead of copying the object: no plain copy of a weight is made.
        quantise, base = name in chosen, layer.base_layer if isinstance(layer, LoraLinear) else layer
        if not quantise and base is layer and not is_bitsandbytes(layer):
            continue
        held = module.get_submodule(name)
        weight = (held.merged() if isinstance(held, LoraLinear) else plain_weight(held)).to(dtype)
        if quantise and isinstance(config, FakeQuantize):
            memo[id(layer)] = EmulatedLinear(weight, copy.deepcopy(base.bias, memo), config)
            finite[name] = memo[id(layer)].weight.isfinite().all()
            continue
        if quantise:
            weight, finite[name] = quantized(weight, config)
        if base is not layer or is_bitsandbytes(layer):
            memo[id(layer)] = plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), copy.deepcopy(base.bias, memo)
        else:
            memo[id(layer.weight)] = nn.Parameter(weight, requires_grad=False)
    for name, experts in stacked:
        memo[id(experts)], fine = quantized_experts(module.get_submodule(name), config, dtype)
        finite |= {f"{name}.{part}": value for part, value in fine.items()}
        chosen += [f"{name}.{part}" for part in fine]
    for name, adapted in adapted_layers(layers).items():
        if isinstance(adapted, LoraExperts) and id(adapted) not in memo:
            memo[id(adapted)] = merged = cast(LoraExperts, module.get_submodule(name)).plain(memo)
            if dtype is not None:
                merged.to(dtype)
    replaced = {id(p) for layer in layers.modules() if id(layer) in memo for p in layer.parameters()}
    memo |= copies(module, layers, dtype, lambda p: id(p) not in memo.keys() | replaced)
    check_finite(finite)
    rollout_policy.module = copy.deepcopy(layers, memo).requires_grad_(False)
    for name in chosen:
        rollout_policy.module.get_submodule(name).quantization = config
    forget_quantizer(rollout_policy.module)
    rollout_policy.quantization, rollout_policy.lora = config, None
    report = QuantizationReport(tuple(chosen), kept, held_bytes(module), held_bytes(rollout_policy.module))
    rollout_policy.quantization_report = report
    if config is not None:
        log.info("%s: %s", type(config).__name__, report)
    return rollout_policy


def copies(
    module: Module, layers: Module, dtype: torch.dtype | None, wanted: Callable[[torch.Tensor], bool]
) -> dict[int, Any]:
    """deepcopy's memo: copies of a module's `wanted` tensors, by the id of the tensor in `layers`. Floating parameters
    are in `dtype`; if `layers` is not the module itself, every tensor is gathered."""
    found: dict[int, Any] = {}
    for place, tensor in zip(layers.parameters(), module.parameters(), strict=True):
        kind = dtype if tensor.is_floating_point() else None
        if wanted(place) and (kind or place is not tensor):
            found[id(place)] = nn.Parameter(whole(tensor.detach()).to(kind, copy=place is tensor), requires_grad=False)
    if layers is not module:
        found |= {id(a): b.clone() for a, b in zip(layers.buffers(), module.buffers(), strict=True)}
    return found


def quantized_experts(
    layer: nn.Module, config: Scheme, dtype: torch.dtype | None
) -> tuple[Experts, dict[str, torch.Tensor]]:
    """A stock module's experts, each quantised, and whether each weight is finite, by name."""
    finite = {}
    stacks: list[list[nn.Linear]] = []
    for stack in STACKS:
        stacks.append([])
        for expert, weight in enumerate(whole(stack_of(layer, stack).detach()).unbind()):
            weight = weight.to(dtype)
            if isinstance(config, FakeQuantize):
                one: nn.Linear = EmulatedLinear(weight, None, config)
                fine = one.weight.isfinite().all()
            else:
                one = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                packed, fine = quantized(weight, config)
                one.weight = nn.Parameter(packed, requires_grad=False)
            stacks[-1].append(one)
            finite[f"{stack}.{expert}"] = fine
    return Experts(stacks[0], stacks[1], cast(nn.Module, getattr(layer, "base_layer", layer).act_fn)), finite


def skip_reasons(module: nn.Module, config: Scheme, skip: Callable[[nn.Module, str], bool] | None) -> dict[str, str]:
    """Layers with a matrix that keeps its precision, and the reason."""
    owners: dict[int, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), []).append(name.rpartition(".")[0].removesuffix(".base_layer"))
    kept = {}
    for name, layer in plain_layers(module):
        layer = getattr(layer, "base_layer", layer)
        matrices = [p for p in layer.parameters(recurse=False) if p.dim() > 1]
        if not matrices:
            continue
        others = [other for other in owners[id(matrices[0])] if other != name]
        router = re.search(r"(router|\.gate)$", name)
        if isinstance(layer, nn.Embedding):
            kept[name] = "embedding"
        elif not (isinstance(layer, nn.Linear) or is_stacked(layer) or router):
            fused = matrices[0].dim() == 3 and not type(layer).__module__.startswith("torch.nn")
            kept[name] = "fused experts" if fused else f"{type(layer).__name__}, not nn.Linear"
        elif others:
            kept[name] = f"tied to {others[0]}"
        elif not re.search(r"\.\d+\.", name):
            kept[name] = "outside the blocks"
        elif router:
            kept[name] = "router"
        elif skip and skip(layer, name):
            kept[name] = "skip"
        elif misfits := [why for matrix in matrices if (why := unsupported_reason(matrix, config))]:
            kept[name] = misfits[0]
    return kept


def plain_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers, without the parts of adapted layers."""
    return ((n, m) for n, m in module.named_modules() if not re.search(r"\.(base_layer|lora_A|lora_B)$", n))


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear | LoraLinear]]:
    """Linear layers, with or without an adapter. Raises ValueError inside an aligned_forward() block."""
    for name, layer in plain_layers(module):
        if isinstance(layer, (nn.Linear, LoraLinear)):
            if "forward" in vars(layer):
                raise ValueError(f"{name}.forward is replaced: take the quantised copy outside of aligned_forward()")
            yield name, layer


def held_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones counted once."""
    return sum(map(stored_bytes, [*module.parameters(), *module.buffers()]))


@torch.no_grad()
def sync_weights(policy: Policy, rollout_policy: Policy) -> dict[str, float]:
    """Quantise the learner's weights into the rollout policy, in place, layer by layer: no storage moves.

    Returns for quantised layers quantization/codes_changed, the share of all codes that this sync changed (an update
    below the grid vanishes: QuRL [digest]), and quantization/scale_change, the mean of |s' - s| / s over all scales.
    An aligned forward writes the same storage, so after it they cover the last inner update alone. Raises ValueError
    for a weight with NaN or infinity, once all are written: a check per layer would make the host wait.
    """
    totals: dict[str, tuple[torch.Tensor, int]] = {}
    finite: dict[str, torch.Tensor] = {}
    if rollout_policy is not policy:
        targets = dict(rollout_policy.module.named_parameters()) | dict(rollout_policy.module.named_buffers())
        for name, value in merged_state(policy.module):
            layer_name, _, kind = name.rpartition(".")
            layer = rollout_policy.module.get_submodule(layer_name)
            value = whole(value)
            written = {layer_name: (layer, value)} if kind == "weight" and is_quantized(layer) else {}
            if isinstance(layer, Experts):
                experts = zip(getattr(layer, kind), value, strict=True)
                written = {f"{name}.{expert}": one for expert, one in enumerate(experts)}
            for part, (one, weight) in written.items():
                changes, finite[part] = load_weight_(one, weight)
                for change, (total, count) in changes.items():
                    before, counted = totals.get(change, (torch.zeros_like(total), 0))
                    totals[change] = (before + total, counted + count)
            if not written and name in targets:  # a tied tensor is written under its first name
                targets[name].copy_(value)
    check_finite(finite)
    rollout_policy.version = policy.version
    sums = torch.stack([total.double() for total, _ in totals.values()]).tolist() if totals else []
    return {f"quantization/{change}": sums[i] / count for i, (change, (_, count)) in enumerate(totals.items())}


def quantized_layers(rollout_policy: Policy) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every quantised linear layer, those of experts among them: see `experts.place`."""
    return ((name, layer) for name, layer in rollout_policy.module.named_modules() if is_quantized(layer))
