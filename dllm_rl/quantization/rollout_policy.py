"""Quantized copies of a policy for rollouts, and the sync of their weights."""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dllm_rl.models.base import Module, Policy, whole
from dllm_rl.models.lora import STACKS, LoraLinear, base_of, is_stacked, linear_of
from dllm_rl.models.merge import forget_quantizer, has_extras, layers_of, merged_state, merged_tensor, plain_layers
from dllm_rl.quantization.linear import (
    Changes,
    Experts,
    Finite,
    check_finite,
    is_quantized,
    load_weight_,
    quantized_linear,
    stored_bytes,
    unsupported_reason,
)
from dllm_rl.quantization.schemes import EmulatedLinear, Scheme, check_scheme

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationReport:
    """Quantized layers, matrices that keep their precision with the reason, and the modules' sizes in bytes."""

    quantized: tuple[str, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            reasons.setdefault(why, []).append(name)
        kept = "; ".join(f"{len(names)} kept ({why}): {', '.join(names[:3])}" for why, names in reasons.items())
        size = f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB"
        return f"{len(self.quantized)} layers quantised, {size}; {kept or 'nothing kept'}"


@torch.no_grad()
def quantized_copy(
    policy: Policy,
    config: Scheme,
    *,
    skip: Callable[[nn.Module, str], bool] | None = None,
    dtype: torch.dtype | None = None,
) -> Policy:
    """Return a second policy whose block linears are quantized by `config`.

    Call it once to sample with quantized weights, and `sync_weights` after each update; a run with
    `Recipe.quantization` does both. Head, embeddings, norms, routers and layers tied to them keep their precision.
    Stacked experts are quantized one by one. At most one layer is stored twice: adapters are merged and sharded weights
    gathered layer by layer.

    Args:
        policy: Policy to copy. It does not change.
        config: Scheme, as `int8_weight_only()` or another torchao config. None copies without quantizing.
        skip: Function (module, name) -> True for further layers that keep their precision. None: no further layers.
        dtype: Dtype of the copy's weights before quantizing. None: the policy's. A learner under autocast computes in
            bf16.

    Returns:
        Policy with `quantization` and `quantization_report` set, without gradients.

    Raises:
        ValueError: The device cannot run the config, a weight is NaN or infinite, or no layer can be quantized.
    """
    module = policy.module
    layers = layers_of(module)
    kept: dict[str, str] = {}
    if config is not None:
        config = check_scheme(config, policy.device, dtype or next(module.parameters()).dtype)
        kept = skip_reasons(module, config, skip)
    schemes = replaced_layers(module, config, kept)
    matrices = {id(p) for name in schemes for p in layers.get_submodule(name).parameters() if p.dim() > 1}
    # deepcopy uses an object's entry in the memo instead of copying the object: no plain copy of a weight is made.
    memo = copies(module, layers, dtype, without=matrices, shared=config is not None)
    finite: Finite = {}
    for name, scheme in schemes.items():
        layer = layers.get_submodule(name)
        entry, fine = replacement(name, layer, module.get_submodule(name), scheme, dtype, memo)
        memo |= entry
        finite |= fine
    check_finite(finite)
    rollout_policy = copy.copy(policy)
    rollout_policy.module = copy.deepcopy(layers, memo).requires_grad_(False)
    for name in finite:
        rollout_policy.module.get_submodule(name).quantization = config  # load_weight_ quantizes with it
    forget_quantizer(rollout_policy.module)
    rollout_policy.quantization = config
    rollout_policy.lora = None
    held = [sum(map(stored_bytes, [*m.parameters(), *m.buffers()])) for m in (module, rollout_policy.module)]
    report = QuantizationReport(tuple(finite), kept, *held)
    rollout_policy.quantization_report = report
    if config is not None:
        log.info("%s: %s", type(config).__name__, report)
    return rollout_policy


def replaced_layers(module: Module, config: Scheme, kept: dict[str, str]) -> dict[str, Scheme]:
    """Return the scheme of each layer that a copy replaces, by name; None only merges adapters or dequantizes."""
    schemes = {}
    for name, layer in quantizable_layers(module):
        if "forward" in vars(layer):
            raise ValueError(f"{name}.forward is replaced: take the quantised copy outside of aligned_forward()")
        scheme = None if name in kept else config
        if scheme is not None or has_extras(layer):
            schemes[name] = scheme
    if config is not None and all(scheme is None for scheme in schemes.values()):
        raise ValueError(f"{config!r} quantises no layer of {type(module).__name__}; not quantised: {kept}")
    return schemes


def copies(
    module: Module, layers: Module, dtype: torch.dtype | None, *, without: set[int], shared: bool
) -> dict[int, Any]:
    """Return deepcopy's memo: copies of a module's tensors, except `without`, by the id of the tensor in `layers`.

    With `shared`, a frozen tensor that keeps its dtype is shared with the module, because nothing changes it.
    """
    memo: dict[int, Any] = {}
    for place, tensor in zip(layers.parameters(), module.parameters(), strict=True):
        kind = dtype if tensor.is_floating_point() else None  # codes keep their integers
        # A trained tensor that keeps its dtype, and that deepcopy reaches by itself, needs no entry.
        if id(place) in without:
            continue
        if shared and place is tensor and not tensor.requires_grad and kind in (None, tensor.dtype):
            memo[id(place)] = nn.Parameter(tensor.detach(), requires_grad=False)
        elif kind or place is not tensor:
            value = whole(tensor.detach()).to(kind, copy=place is tensor)
            memo[id(place)] = nn.Parameter(value, requires_grad=False)
    if layers is not module:  # a sharded module: every tensor is gathered
        memo |= {id(a): b.clone() for a, b in zip(layers.buffers(), module.buffers(), strict=True)}
    return memo


def replacement(
    name: str, layer: Any, held: Any, config: Scheme, dtype: torch.dtype | None, memo: dict[int, Any]
) -> tuple[dict[int, Any], Finite]:
    """Return deepcopy's entry for a layer, with or without adapters, and which weights are finite.

    `held` is the layer with the weights.
    """
    finite: Finite = {}
    if is_stacked(layer):
        if config is None:
            return {id(layer): held.plain(memo).to(dtype)}, {}
        stacks: dict[str, list[nn.Linear]] = {stack: [] for stack in STACKS}
        for part, weight in rollout_weights(name, held, dtype):
            new, finite[part] = quantized_linear(weight, None, config)
            stacks[part.split(".")[-2]].append(new)
        return {id(layer): Experts(**stacks, act_fn=base_of(held).act_fn)}, finite
    [(_, weight)] = rollout_weights(name, held, dtype)
    bias = copy.deepcopy(base_of(layer).bias, memo)
    if config is None:
        return {id(layer): linear_of(weight, bias)}, {}
    new, finite[name] = quantized_linear(weight, bias, config)
    if has_extras(layer) or isinstance(new, EmulatedLinear):
        return {id(layer): new}, finite
    return {id(layer.weight): new.weight}, finite  # only the weight, so that the layer keeps its class


@torch.no_grad()
def rollout_weights(name: str, layer: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that a rollout quantizes of a learner's layer, by the rollout's names.

    The weights are gathered, merged with adapters, and split by expert.
    """
    if isinstance(layer, nn.Linear | LoraLinear):
        yield name, whole(merged_tensor(layer, "weight")).to(dtype)
        return
    for stack in STACKS:
        for expert, weight in enumerate(whole(merged_tensor(layer, stack)).unbind()):
            yield f"{name}.{stack}.{expert}", weight.to(dtype)


def requantize(name: str, layer: nn.Module, rollout_module: Module) -> Iterator[tuple[str, Changes, Tensor]]:
    """Quantize a learner's layer into the rollout's, in place. Yield name, changes and finiteness of each weight."""
    for part, weight in rollout_weights(name, layer):
        yield part, *load_weight_(rollout_module.get_submodule(part), weight)


def skip_reasons(module: nn.Module, config: Scheme, skip: Callable[[nn.Module, str], bool] | None) -> dict[str, str]:
    """Return the layers with a matrix that keeps its precision, and the reason."""
    owners: dict[int, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), []).append(name.rpartition(".")[0].removesuffix(".base_layer"))
    kept = {}
    for name, layer in plain_layers(module):
        layer = base_of(layer)
        matrices = [p for p in layer.parameters(recurse=False) if p.dim() > 1]
        if not matrices:
            continue
        # A layer that an encoder and a decoder share is not tied to another layer.
        tied = [other for other in owners[id(matrices[0])] if base_of(module.get_submodule(other)) is not layer]
        if reason := skip_reason(name, layer, matrices[0], tied):
            kept[name] = reason
        elif skip and skip(layer, name):
            kept[name] = "skip"
        elif misfit := next(filter(None, (unsupported_reason(matrix, config) for matrix in matrices)), None):
            kept[name] = misfit
    return kept


def skip_reason(name: str, layer: nn.Module, matrix: Tensor, tied: list[str]) -> str | None:
    """Return why a layer keeps its precision under every config, or None."""
    router = re.search(r"(router|\.gate)$", name)
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if not (isinstance(layer, nn.Linear) or is_stacked(layer) or router):
        fused = matrix.dim() == 3 and not type(layer).__module__.startswith("torch.nn")
        return "fused experts" if fused else f"{type(layer).__name__}, not nn.Linear"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "read by MultiheadAttention itself"
    if tied:
        return f"tied to {tied[0]}"
    if not re.search(r"\.\d+\.", name):
        return "outside the blocks"
    return "router" if router else None


def quantizable_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield linear layers and stacks of experts, with or without adapters."""
    for name, layer in plain_layers(module):
        if isinstance(layer, nn.Linear | LoraLinear) or is_stacked(layer):
            yield name, layer


def quantized_pairs(module: nn.Module, rollout_module: Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield name, learner layer and rollout layer of every layer that the rollout has quantized."""
    for name, layer in quantizable_layers(module):
        target = rollout_module.get_submodule(name)
        if is_quantized(target) or isinstance(target, Experts):
            yield name, layer, target


@torch.no_grad()
def sync_weights(policy: Policy, rollout_policy: Policy) -> dict[str, float]:
    """Quantize the learner's weights into the rollout policy, in place, layer by layer. No storage moves.

    Call it after the updates of a step and before the next rollout; with a sharded learner, every process must call it.
    Adapters are merged. If both arguments are one policy, nothing happens. FP8 weights: for each row
    scale = max |w| / 448, code = w / scale rounded to e4m3; products use code * scale.

    Args:
        policy: Learner.
        rollout_policy: Its `quantized_copy`, which receives the weights and their version.

    Returns:
        Metrics of the quantized layers, {} without any: quantization/codes_changed, the share of all codes that this
        sync changed (an update below the grid vanishes: QuRL [digest]), and quantization/scale_change, the mean of
        |s' - s| / s over all scales. After an aligned forward, both cover only the last inner update.

    Raises:
        ValueError: A weight is NaN or infinite. The rollout policy's tensors are overwritten by then; its version is
            not.
    """
    if rollout_policy is policy:  # without a scheme the learner samples
        return {}
    module = rollout_policy.module
    changes: list[Changes] = []
    finite: Finite = {}
    written: set[str] = set()
    for name, layer, _ in quantized_pairs(policy.module, module):
        for part, changed, fine in requantize(name, layer, module):
            changes.append(changed)
            finite[part] = fine
        written |= {f"{name}.{kind}" for kind in ("weight", *STACKS)}
    targets = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in merged_state(policy.module, skip=written):
        if name in targets and not is_same(value, targets[name]):  # a tied tensor is written under its first name
            targets[name].copy_(whole(value))
    check_finite(finite)  # after all writes: a check per layer would make the host wait
    rollout_policy.weights_version = policy.weights_version
    return change_metrics(changes)


def is_same(value: Tensor, target: Tensor) -> bool:
    """Return whether a learner's frozen tensor is shared with the copy."""
    return type(value) is type(target) is nn.Parameter and value.data_ptr() == target.data_ptr()


def change_metrics(changes: list[Changes]) -> dict[str, float]:
    """Return the sums of all layers over their counts, with one transfer."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, (total, count) in (item for changed in changes for item in changed.items()):
        totals[name] = totals[name] + total if name in totals else total
        counts[name] = counts.get(name, 0) + count
    sums = torch.stack([total.double() for total in totals.values()]).tolist() if totals else []
    return {f"quantization/{name}": sums[i] / counts[name] for i, name in enumerate(totals)}


def quantized_layers(rollout_policy: Policy) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and module of every quantized linear layer, including those of experts: see `linear.place`."""
    return ((name, layer) for name, layer in rollout_policy.module.named_modules() if is_quantized(layer))
