"""Quantized copies of a policy for rollouts, and the sync of their weights with the learner's.

docs/methods.md explains the tag [digest].
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dllm_rl.models.base import Module, Policy, gather_if_sharded
from dllm_rl.models.lora import STACKS, LoraLinear, base_of, is_stacked, linear_of
from dllm_rl.models.merge import (
    forget_quantizer,
    has_adapted_or_low_bit,
    layers_of,
    merged_tensor,
    merged_tensors,
    plain_layers,
)
from dllm_rl.quantization.linear import (
    FiniteFlags,
    SyncStats,
    UnstackedExperts,
    check_finite,
    is_quantized,
    load_weight_,
    quantized_linear,
    stored_bytes,
    unsupported_reason,
)
from dllm_rl.quantization.schemes import EmulatedLinear, check_scheme

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantized_copy` quantized.

    Attributes:
        quantized: Names of the quantized layers.
        skipped: Names of the other layers that have a matrix, and why they were not quantized.
        bytes_before: Size of the policy's module.
        bytes_after: Size of the copy's module.
    """

    quantized: tuple[str, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        names_by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names_by_reason.setdefault(reason, []).append(name)
        skipped = "; ".join(
            f"{len(names)} skipped ({reason}): {', '.join(names[:3])}" for reason, names in names_by_reason.items()
        )
        size = f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB"
        return f"{len(self.quantized)} layers quantized, {size}; {skipped or 'nothing skipped'}"


@torch.no_grad()
def quantized_copy(
    policy: Policy,
    scheme: Any,
    *,
    skip: Callable[[nn.Module, str], bool] | None = None,
    dtype: torch.dtype | None = None,
) -> Policy:
    """Return a copy of the policy in which the linear layers of the blocks are quantized by a scheme.

    Call it once to sample with quantized weights, and `sync_weights` after each update; a run with
    `rollout_quantization` does both. Head, embeddings, norms, routers and layers tied to them are not quantized.
    Stacked experts are quantized one by one. Adapters are merged and sharded weights are gathered layer by layer, so
    that at most one layer is in memory twice.

    Args:
        policy: Policy to copy. It does not change.
        scheme: Scheme, such as Int8WeightOnly(), or a torchao config. None: copy without quantizing.
        skip: Function (module, name) -> True for other layers that are not quantized. None: no other layers.
        dtype: Dtype of the copy's weights before quantizing, for example bf16 if the learner computes under autocast.
            None: the policy's dtype.

    Returns:
        Policy with `quantization` and `quantization_report` set, without gradients.

    Raises:
        ValueError: The device cannot run the scheme, a weight is NaN or infinite, or no layer can be quantized.
    """
    module = policy.module
    layers = layers_of(module)  # the module; if it is sharded, the same layers with empty tensors
    skipped: dict[str, str] = {}
    config = None
    if scheme is not None:
        config = check_scheme(scheme, policy.device, dtype or next(module.parameters()).dtype)
        skipped = skip_reasons(module, config, skip)
    schemes = select_layers(module, config, skipped)
    matrices = {id(p) for name in schemes for p in layers.get_submodule(name).parameters() if p.dim() > 1}
    # deepcopy uses an object's entry in the memo instead of copying the object. So no weight that is quantized is also
    # copied without quantization.
    memo = copy_memo(module, layers, dtype, without=matrices, shared=config is not None)
    finite_flags: FiniteFlags = {}
    for name, layer_config in schemes.items():
        layer = layers.get_submodule(name)
        memo_entry, layer_finite = quantize_layer(name, layer, module.get_submodule(name), layer_config, dtype, memo)
        memo |= memo_entry
        finite_flags |= layer_finite
    check_finite(finite_flags)
    quantized_names = tuple(finite_flags)
    rollout_policy = copy.copy(policy)
    rollout_policy.module = copy.deepcopy(layers, memo).requires_grad_(False)
    for name in quantized_names:
        rollout_policy.module.get_submodule(name).quantization = config  # `load_weight_` reads it
    forget_quantizer(rollout_policy.module)  # the copy has no bitsandbytes weights
    rollout_policy.quantization = config
    rollout_policy.lora = None
    bytes_before, bytes_after = (
        sum(map(stored_bytes, [*m.parameters(), *m.buffers()])) for m in (module, rollout_policy.module)
    )
    report = QuantizationReport(quantized_names, skipped, bytes_before, bytes_after)
    rollout_policy.quantization_report = report
    if config is not None:
        log.info("%s: %s", type(config).__name__, report)
    return rollout_policy


def select_layers(module: Module, config: Any, skipped: dict[str, str]) -> dict[str, Any]:
    """Return the layers that a copy must replace, by name, and the scheme of each.

    The scheme is None for a layer that is not quantized, but has adapters to merge or bitsandbytes weights.
    """
    schemes = {}
    for name, layer in quantizable_layers(module):
        if "forward" in vars(layer):
            raise ValueError(f"{name}.forward is replaced: make the quantized copy outside of aligned_forward()")
        scheme = None if name in skipped else config
        if scheme is not None or has_adapted_or_low_bit(layer):
            schemes[name] = scheme
    if config is not None and all(scheme is None for scheme in schemes.values()):
        raise ValueError(f"{config!r} quantizes no layer of {type(module).__name__}; not quantized: {skipped}")
    return schemes


def copy_memo(
    module: Module, layers: Module, dtype: torch.dtype | None, *, without: set[int], shared: bool
) -> dict[int, Any]:
    """Return a memo for deepcopy: copies of the module's tensors, except those whose id is in `without`.

    The keys are the ids of the tensors in `layers` (see `layers_of`). With `shared`, which is for a copy with a scheme,
    a frozen tensor that keeps its dtype is not copied but shared, because nothing changes it.
    """
    memo: dict[int, Any] = {}
    for layer_tensor, tensor in zip(layers.parameters(), module.parameters(), strict=True):
        new_dtype = dtype if tensor.is_floating_point() else None  # integer codes keep their dtype
        if id(layer_tensor) in without:
            continue
        is_same_tensor = layer_tensor is tensor
        if shared and is_same_tensor and not tensor.requires_grad and new_dtype in (None, tensor.dtype):
            memo[id(layer_tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
        elif new_dtype or not is_same_tensor:
            value = gather_if_sharded(tensor.detach()).to(new_dtype, copy=is_same_tensor)
            memo[id(layer_tensor)] = nn.Parameter(value, requires_grad=False)
        # Other tensors need no entry: deepcopy copies them in their dtype.
    if layers is not module:  # the buffers of a sharded module
        memo |= {id(a): b.clone() for a, b in zip(layers.buffers(), module.buffers(), strict=True)}
    return memo


def quantize_layer(
    name: str, layer: Any, source: Any, config: Any, dtype: torch.dtype | None, memo: dict[int, Any]
) -> tuple[dict[int, Any], FiniteFlags]:
    """Quantize one layer, with or without adapters.

    Args:
        name: Name of the layer.
        layer: The layer in the module that is deep-copied. The result replaces it.
        source: The layer with the weights. It differs from `layer` if the module is sharded.
        config: Any. None: only merge adapters and dequantize bitsandbytes weights.
        dtype: Dtype of the weights before quantizing.
        memo: Memo for deepcopy, from earlier layers.

    Returns:
        The layer's entry in the memo; whether its weights are finite.
    """
    finite: FiniteFlags = {}
    if is_stacked(layer):
        if config is None:
            return {id(layer): source.plain(memo).to(dtype)}, {}
        stacks: dict[str, list[nn.Linear]] = {stack: [] for stack in STACKS}
        for weight_name, weight in gathered_weights(name, source, dtype):
            expert, finite[weight_name] = quantized_linear(weight, None, config)
            stacks[weight_name.split(".")[-2]].append(expert)
        return {id(layer): UnstackedExperts(**stacks, act_fn=base_of(source).act_fn)}, finite
    [(_, weight)] = gathered_weights(name, source, dtype)
    bias = copy.deepcopy(base_of(layer).bias, memo)
    if config is None:
        return {id(layer): linear_of(weight, bias)}, {}
    new_layer, finite[name] = quantized_linear(weight, bias, config)
    if has_adapted_or_low_bit(layer) or isinstance(new_layer, EmulatedLinear):
        return {id(layer): new_layer}, finite
    return {id(layer.weight): new_layer.weight}, finite  # only the weight, so that the layer keeps its class


@torch.no_grad()
def gathered_weights(name: str, layer: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a learner's layer, with their names in the rollout policy's module.

    The weights are gathered if sharded, merged with adapters, and split by expert.
    """
    if isinstance(layer, nn.Linear | LoraLinear):
        yield name, gather_if_sharded(merged_tensor(layer, "weight")).to(dtype)
        return
    for stack in STACKS:
        for expert, weight in enumerate(gather_if_sharded(merged_tensor(layer, stack)).unbind()):
            yield f"{name}.{stack}.{expert}", weight.to(dtype)


def requantize(name: str, layer: nn.Module, rollout_module: Module) -> Iterator[tuple[str, SyncStats, Tensor]]:
    """Quantize the weights of a learner's layer into the rollout policy's module, in place.

    Yields:
        Name of each weight; statistics of the sync; whether the weight is finite.
    """
    for weight_name, weight in gathered_weights(name, layer):
        stats, finite = load_weight_(rollout_module.get_submodule(weight_name), weight)
        yield weight_name, stats, finite


def skip_reasons(module: nn.Module, config: Any, skip: Callable[[nn.Module, str], bool] | None) -> dict[str, str]:
    """Return the names of layers with a matrix that is not quantized, and the reason."""
    layers_of_weight: dict[int, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        layers_of_weight.setdefault(id(weight), []).append(name.rpartition(".")[0].removesuffix(".base_layer"))
    skipped = {}
    for name, layer in plain_layers(module):
        layer = base_of(layer)
        matrices = [p for p in layer.parameters(recurse=False) if p.dim() > 1]
        if not matrices:
            continue
        # A layer with two names (an encoder and a decoder may share it) is not tied to itself.
        layers_with_weight = layers_of_weight[id(matrices[0])]
        tied = [other for other in layers_with_weight if base_of(module.get_submodule(other)) is not layer]
        unsupported = [reason for matrix in matrices if (reason := unsupported_reason(matrix, config))]
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
        if isinstance(layer, nn.Linear | LoraLinear) or is_stacked(layer):
            yield name, layer


def quantized_pairs(module: nn.Module, rollout_module: Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield the name, the learner's layer and the rollout policy's layer, for every quantized layer."""
    for name, layer in quantizable_layers(module):
        target = rollout_module.get_submodule(name)
        if is_quantized(target) or isinstance(target, UnstackedExperts):
            yield name, layer, target


@torch.no_grad()
def sync_weights(policy: Policy, rollout_policy: Policy) -> dict[str, float]:
    """Quantize the learner's weights into the rollout policy, in place, layer by layer. Tensors keep their storage.

    Call it after the updates of a step and before the next rollout; with a sharded learner, every process must call it.
    Adapters are merged. If both arguments are the same policy, nothing happens. With FP8 weights, each row has
    scale = max |w| / 448 and codes = w / scale, rounded to e4m3; products use code * scale.

    Args:
        policy: Learner.
        rollout_policy: Its `quantized_copy`, which receives the weights and their version.

    Returns:
        Metrics of the quantized layers. quantization/codes_changed is the share of all codes that this sync changed. A
        weight update smaller than the distance between two quantization levels changes no code (QuRL [digest]).
        quantization/scale_change is the mean of |s' - s| / s over all scales s. An aligned forward quantizes the
        weights into the rollout policy before each inner update, so both metrics then describe only the last one.
        Without quantized layers the result is empty.

    Raises:
        ValueError: A weight is NaN or infinite. The rollout policy's tensors have then been overwritten, but its
            version is unchanged.
    """
    if rollout_policy is policy:  # without `rollout_quantization`, a run samples from the learner itself
        return {}
    module = rollout_policy.module
    stats: list[SyncStats] = []
    finite: FiniteFlags = {}
    quantized_names: set[str] = set()
    for name, layer, _ in quantized_pairs(policy.module, module):
        for weight_name, weight_stats, weight_finite in requantize(name, layer, module):
            stats.append(weight_stats)
            finite[weight_name] = weight_finite
        quantized_names |= {f"{name}.{kind}" for kind in ("weight", *STACKS)}
    targets = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in merged_tensors(policy.module, skip=quantized_names):
        # `targets` lists a tied tensor once, under its first name.
        if name in targets and not is_shared(value, targets[name]):
            targets[name].copy_(gather_if_sharded(value))
    check_finite(finite)  # after all writes: a check per layer would make the CPU wait for the GPU
    rollout_policy.weights_version = policy.weights_version
    return sync_metrics(stats)


def is_shared(value: Tensor, target: Tensor) -> bool:
    """Return whether the rollout policy's tensor `target` shares the memory of the learner's frozen tensor."""
    return type(value) is type(target) is nn.Parameter and value.data_ptr() == target.data_ptr()


def sync_metrics(stats: list[SyncStats]) -> dict[str, float]:
    """Return each metric's mean over the codes or scales of all layers. All sums are moved to the CPU together."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for weight_stats in stats:
        for name, (value, count) in weight_stats.items():
            sums[name] = sums[name] + value if name in sums else value
            counts[name] = counts.get(name, 0) + count
    sums_on_host = torch.stack([value.double() for value in sums.values()]).tolist() if sums else []
    return {f"quantization/{name}": sums_on_host[i] / counts[name] for i, name in enumerate(sums)}


def quantized_layers(rollout_policy: Policy) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the name and the module of every quantized linear layer, including experts (`linear.locate_parameter`)."""
    return ((name, layer) for name, layer in rollout_policy.module.named_modules() if is_quantized(layer))
