"""Quantized copies of a policy for rollouts, and the sync of their weights with the learner's.

docs/papers.md explains the tag [digest].
"""

import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    PerRow,
    quantize_,
)
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor, QuantizeTensorToFloat8Kwargs

from dllm_rl.models.base import Module, Policy, gather_if_sharded
from dllm_rl.models.checkpoint.tensors import LazyTensor
from dllm_rl.models.lora import STACKS, base_of, has_adapted_or_low_bit, is_stacked, layers_of
from dllm_rl.models.low_bit import linear_of
from dllm_rl.models.merge import forget_quantizer, joined_weights, lazy_merged_tensors, merged_bias, merged_tensor
from dllm_rl.quantization.linear import (
    PlainLinear,
    UnstackedExperts,
    is_torchao_tensor,
    quantizable_layers,
    skip_reasons,
    stored_bytes,
)
from dllm_rl.quantization.schemes import (
    TINY,
    EmulatedLinear,
    FakeQuantize,
    Float8DynamicEmulated,
    Rounding,
    check_scheme,
)

log = logging.getLogger(__name__)
# (sum, count) by metric. codes_changed: (number of changed codes, number of codes). scale_change: (sum of
# |s' - s| / |s|, number of scales). The sums stay on their device.
SyncStats = dict[str, tuple[Tensor, int]]
# A sync quantizes at most this many bytes of weights at a time, in fp32, or one larger weight. More would not help: a
# GPU takes longer for them than the host takes to launch their kernels.
CHUNK_BYTES = 2**28
FiniteFlags = dict[str, Bool[Tensor, ""]]  # whether the weight of a layer is finite, by the layer's name


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
        ValueError: The device cannot run the scheme, a weight is NaN or infinite, no layer can be quantized, or the
            policy is in an aligned forward.
    """
    module = policy.module
    if getattr(module, "is_aligned", False):
        raise ValueError("this policy is aligned with a rollout: make the quantized copy outside of aligned_forward()")
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
        source, version = module.get_submodule(name), policy.weights_version
        memo_entry, layer_finite = quantize_layer(name, layer, source, layer_config, dtype, memo, version)
        memo |= memo_entry
        finite_flags |= layer_finite
    check_finite(finite_flags)
    quantized_names = tuple(finite_flags)
    rollout_policy = copy.copy(policy)
    rollout_policy.module = copy.deepcopy(layers, memo).requires_grad_(False)
    for name in quantized_names:
        quantized: Any = rollout_policy.module.get_submodule(name)
        quantized.quantization = config  # `load_weight_` reads it
        if is_torchao_tensor(quantized.weight) and type(quantized).forward is nn.Linear.forward:
            PlainLinear.of(quantized)
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
    name: str,
    layer: Any,
    source: Any,
    config: Any,
    dtype: torch.dtype | None,
    memo: dict[int, Any],
    version: int,
) -> tuple[dict[int, Any], FiniteFlags]:
    """Quantize one layer, with or without adapters.

    Args:
        name: Name of the layer.
        layer: The layer in the module that is deep-copied. The result replaces it.
        source: The layer with the weights. It differs from `layer` if the module is sharded.
        config: Config of the scheme. None: only merge adapters and dequantize bitsandbytes weights.
        dtype: Dtype of the weights before quantizing.
        memo: Memo for deepcopy, from earlier layers.
        version: Version of the weights.

    Returns:
        The layer's entry in the memo; whether its weights are finite.
    """
    finite: FiniteFlags = {}
    if is_stacked(layer):
        if config is None:
            return {id(layer): source.plain(memo).to(dtype)}, {}
        stacks: dict[str, list[nn.Linear]] = {stack: [] for stack in STACKS}
        for weight_name, weight in gathered_weights(name, source, dtype):
            expert, finite[weight_name] = quantized_linear(weight, None, config, weight_name, version)
            stacks[weight_name.split(".")[-2]].append(expert)
        return {id(layer): UnstackedExperts(**stacks, act_fn=base_of(source).act_fn)}, finite
    [(_, weight)] = gathered_weights(name, source, dtype)
    bias = merged_bias(layer, memo)
    if config is None:
        return {id(layer): linear_of(weight, bias)}, {}
    new_layer, finite[name] = quantized_linear(weight, bias, config, name, version)
    if has_adapted_or_low_bit(layer) or isinstance(new_layer, EmulatedLinear):
        return {id(layer): new_layer}, finite
    return {id(layer.weight): new_layer.weight}, finite  # only the weight, so that the layer keeps its class


@torch.no_grad()
def gathered_weights(name: str, layer: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a learner's layer, with their names in the rollout policy's module.

    The weights are gathered if sharded, merged with adapters, and split by expert.
    """
    if not is_stacked(layer):
        yield name, gather_if_sharded(merged_tensor(layer, "weight")).to(dtype)
        return
    for stack in STACKS:
        for expert, weight in enumerate(gather_if_sharded(merged_tensor(layer, stack)).unbind()):
            yield f"{name}.{stack}.{expert}", weight.to(dtype)


def quantized_linear(
    weight: Tensor, bias: Tensor | None, config: Any, name: str, version: int
) -> tuple[nn.Linear, Bool[Tensor, ""]]:
    """Return a linear layer with the quantized weight, and whether the weight is finite."""
    if isinstance(config, FakeQuantize):
        layer = EmulatedLinear(weight, bias, config, name, version)
        return layer, layer.weight.isfinite().all()
    packed, finite = quantize_weight(weight, config)
    return linear_of(packed, bias), finite


@torch.no_grad()
def quantize_weight(weight: Tensor, config: Any, like: Tensor | None = None) -> tuple[Tensor, Bool[Tensor, ""]]:
    """Quantize one weight with a torchao config or `Float8DynamicEmulated`. Rows of zeros get the scale TINY.

    The result is that of torchao's `quantize_`, which takes several times as long for FP8.

    Args:
        weight: Weight.
        config: torchao config or `Float8DynamicEmulated`.
        like: An earlier result for this config, which saves time with FP8 products.

    Returns:
        The quantized weight; whether the weight is finite.
    """
    # With KernelPreference.AUTO, torchao searches the disk for the package mslk at every call.
    options: dict[str, Any] = {"kernel_preference": KernelPreference.TORCH}
    if isinstance(config, Float8DynamicEmulated):
        inputs = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow(), hp_value_lb=TINY, **options)
        options |= {"mm_config": Float8MMConfig(use_fast_accum=False), "act_quant_kwargs": inputs}
        packed = Float8Tensor.from_hp(weight, hp_value_lb=TINY, **options)
    elif isinstance(config, Float8WeightOnlyConfig):
        packed = Float8Tensor.from_hp(weight, config.weight_dtype, config.granularity, **options)
    elif isinstance(config, Float8DynamicActivationFloat8WeightConfig) and isinstance(like, Float8Tensor):
        options = {name: getattr(like, name) for name in ("mm_config", "kernel_preference", "act_quant_kwargs")}
        packed = Float8Tensor.from_hp(weight, config.weight_dtype, config.granularity[1], **options)
    else:
        layer = linear_of(weight.detach(), None)
        quantize_(layer, config)
        packed = layer.weight.data
    scale: Any = getattr(packed, "scale", None)
    # amax propagates NaN and infinity into the scale, so that a check of the scales checks every number.
    finite = (weight if scale is None else scale).isfinite().all()
    if isinstance(packed, Float8Tensor):
        is_zero = scale == 0  # without `any()`, which would make the CPU wait for the GPU
        code_groups = packed.qdata.view(torch.uint8).unflatten(-1, (scale.shape[-1], -1))
        code_groups.masked_fill_(is_zero.expand(packed.shape[0], -1)[..., None], 0)  # 0/0 made these codes NaN
        scale.masked_fill_(is_zero, TINY)
    return packed, finite


def check_finite(finite: FiniteFlags) -> None:
    """Raise ValueError with the name of the first layer whose weight is not finite.

    All flags are moved to the CPU together.
    """
    flags = torch.stack(list(finite.values())).tolist() if finite else []
    for name, is_finite in zip(finite, flags, strict=True):
        if not is_finite:
            raise ValueError(f"{name}.weight has NaN or infinity: it cannot be quantized; has training diverged?")


@torch.no_grad()
def load_weight_(layer: nn.Linear, weight: Tensor) -> tuple[SyncStats, Bool[Tensor, ""]]:
    """Quantize `weight` into a quantized layer, in place. Return `SyncStats`, and whether the weight is finite.

    The layer's tensors keep their storage.
    """
    stats, finite = load_weights_([layer], weight)
    return stats, finite[0]


@torch.no_grad()
def load_weights_(layers: list[Any], weight: Tensor) -> tuple[SyncStats, Bool[Tensor, " L"]]:
    """Quantize the weights of L layers, in place. The layers' tensors keep their storage.

    Args:
        layers: One layer, or several of one shape whose rows are quantized one by one (`has_own_rows`). Several layers
            are quantized as one tall matrix, with as many kernels as one layer.
        weight: The layers' weights, one below the other.

    Returns:
        `SyncStats` of all the layers; whether the weight of each is finite.
    """
    first = layers[0]
    new: Any = None
    scale: Any
    new_scale: Any
    if isinstance(first, EmulatedLinear):
        if first.config.weight is None:
            before = first.weight.clone() if isinstance(first.config, Rounding) else None
            first.load_(weight)
            changed = {} if before is None else {"codes_changed": ((first.weight != before).sum(), before.numel())}
            return changed, first.weight.isfinite().all()[None]
        codes = first.codes().clone()  # copies, because load_ overwrites both tensors
        scale, new_scale = first.weight_scale.clone(), first.weight_scale
        first.load_(weight)
        finite = first.weight.isfinite().all()[None]
        stats = {"codes_changed": ((first.codes() != codes).count_nonzero(), codes.numel())}
    else:
        current = [layer.weight for layer in layers]
        new, is_finite = quantize_weight(weight.to(first.weight.dtype), first.quantization, like=first.weight)
        stats = {"codes_changed": differing_codes(joined([c.qdata for c in current]), new.qdata, weight.numel())}
        if getattr(new, "scale_and_zero", None) is not None:
            scale, new_scale = first.weight.scale_and_zero[..., 0], new.scale_and_zero[..., 0]
        elif (new_scale := getattr(new, "scale", None)) is not None:  # None if the layout is unknown
            scale = joined([c.scale for c in current])
        finite = is_finite[None] if len(layers) == 1 else new_scale.isfinite().view(len(layers), -1).all(-1)
    if new_scale is not None:
        change = (new_scale.double() - scale.double()).abs() / scale.double().abs().clamp(min=TINY)
        stats["scale_change"] = change.sum(), scale.numel()
    if len(layers) > 1:
        for name in new.__tensor_flatten__()[0]:
            copy_all([getattr(c, name) for c in current], getattr(new, name).chunk(len(layers)))
    elif new is not None:
        first.weight.copy_(new)
    return stats, finite


def has_own_rows(layer: Any) -> bool:
    """Return whether a quantized layer holds codes and scales of torchao by row, so that a row's do not depend on the
    other rows. A scale of the whole weight, packed rows, and emulated formats are different.
    """
    weight, rows = layer.weight, layer.weight.shape[0]
    if rows == 1 or not is_torchao_tensor(weight):  # of one row, a scale of the whole weight looks like the row's
        return False
    return all(getattr(weight, name).shape[:1] == (rows,) for name in weight.__tensor_flatten__()[0])


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors, one below the other. A single tensor is returned without copying."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def copy_all(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its target, in one kernel on a GPU if the values have one dtype and the targets too."""
    if targets[0].dtype == values[0].dtype and targets[0].itemsize == 1:  # such as float8
        targets, values = ([t.view(torch.uint8) for t in tensors] for tensors in (targets, values))
    torch._foreach_copy_(list(targets), list(values))


def differing_codes(before: Tensor, after: Tensor, num_codes: int) -> tuple[Tensor, int]:
    """Return the number of codes that differ between two packed tensors, and the number of all codes.

    If there are fewer bytes than `num_codes`, a byte contains two codes of 4 bits.
    """
    a = before.view(torch.uint8)
    b = after.view(torch.uint8)
    if before.nbytes < num_codes:
        differing_bits = a ^ b
        return (differing_bits & 0xF).count_nonzero() + (differing_bits >> 4).count_nonzero(), 2 * a.numel()
    is_different = a != b
    if before.is_floating_point():
        is_different &= ((a | b) & 0x7F) != 0  # 0x80 is -0: a change between 0 and -0 does not count
    return is_different.count_nonzero(), a.numel()  # on a CPU, sum() of bools takes twenty times as long


@torch.no_grad()
def sync_weights(policy: Policy, rollout_policy: Policy) -> dict[str, float]:
    """Quantize the learner's weights into the rollout policy, in place. Tensors keep their storage.

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
    for _, layer in quantized_layers(rollout_policy):
        if isinstance(layer, EmulatedLinear):
            layer.version = policy.weights_version
    sums: dict[str, Tensor] = {}
    counts = Counter[str]()
    finite: FiniteFlags = {}
    values = lazy_merged_tensors(policy.module, persistent_only=False)
    for names, targets in sync_chunks(policy, rollout_policy, values):
        layer_names = [name.removesuffix(".weight") for name in names]
        loaded = []
        if isinstance(targets[0], Tensor):
            pairs = [(target, values[name].make()) for name, target in zip(names, targets, strict=True)]
            # A frozen tensor may be the learner's own.
            pairs = [(a, b) for a, b in pairs if type(a) is not type(b) or a.data_ptr() != b.data_ptr()]
            if pairs:
                copy_all([a for a, _ in pairs], [gather_if_sharded(b) for _, b in pairs])
        elif isinstance(targets[0], nn.ModuleList):  # experts, which the learner stacks
            experts = gather_if_sharded(values[names[0]].make()).unbind()
            loaded = [load_weights_([layer], weight) for layer, weight in zip(targets[0], experts, strict=True)]
            layer_names = [f"{layer_names[0]}.{expert}" for expert in range(len(experts))]
        else:
            loaded = [
                load_weights_(targets, joined_weights([policy.module.get_submodule(name) for name in layer_names]))
            ]
        finite |= zip(layer_names, chain.from_iterable(flags for _, flags in loaded), strict=False)
        for stats, _ in loaded:
            for metric, (change, count) in stats.items():
                sums[metric] = sums[metric] + change if metric in sums else change
                counts[metric] += count
    check_finite(finite)  # after all writes: a check per layer would make the CPU wait for the GPU
    rollout_policy.weights_version = policy.weights_version
    sums_on_host = torch.stack([value.double() for value in sums.values()]).tolist() if sums else []
    return {f"quantization/{name}": value / counts[name] for name, value in zip(sums, sums_on_host, strict=True)}


def sync_chunks(
    policy: Policy, rollout_policy: Policy, values: dict[str, LazyTensor]
) -> Iterator[tuple[list[str], list[Any]]]:
    """Yield the learner's tensors that a sync writes together, by name, and the layers or tensors that receive them.

    Together are quantized layers of one shape (`has_own_rows`), and other tensors of one dtype: at most CHUNK_BYTES in
    fp32, or one larger tensor. Experts, and the tensors of a sharded learner, which are gathered, are written one by
    one.
    """
    layers: dict[str, Any] = dict(rollout_policy.module.named_modules())
    tensors = dict(rollout_policy.module.named_parameters()) | dict(rollout_policy.module.named_buffers())
    learner = dict(policy.module.named_modules())
    is_sharded = any(hasattr(p, "full_tensor") for p in policy.module.parameters())
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for name, value in values.items():
        layer_name = name.removesuffix(".weight")
        target: Any = layers.get(layer_name)
        key: Any = name
        if isinstance(target, nn.ModuleList):
            pass
        elif hasattr(target, "quantization"):
            lora = getattr(learner[layer_name], "lora", None)  # the adapters' scale
            if has_own_rows(target):
                key = (value.shape, value.dtype, target.weight.device, lora)
        elif name in tensors:  # a tied tensor has only its first name
            target = tensors[name]
            key = (value.dtype, target.dtype, target.device)
        else:
            continue
        groups.setdefault(name if is_sharded else key, []).append((name, target))
    for group in groups.values():
        chunk: list[tuple[str, Any]] = []
        size = 0
        for name, target in group:
            size += 4 * values[name].numel()
            if chunk and size > CHUNK_BYTES:
                yield [name for name, _ in chunk], [target for _, target in chunk]
                chunk, size = [], 4 * values[name].numel()
            chunk.append((name, target))
        yield [name for name, _ in chunk], [target for _, target in chunk]


def quantized_layers(rollout_policy: Policy) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the name and the module of every quantized linear layer, including experts (`linear.locate_parameter`)."""
    return ((name, layer) for name, layer in rollout_policy.module.named_modules() if hasattr(layer, "quantization"))


def locate_parameter(name: str) -> tuple[str, int | None]:
    """Return the parameter of an unquantized module from which a quantized layer was made.

    Args:
        name: Name of the quantized layer.

    Returns:
        Name of the parameter; index of the expert in this parameter, or None if the layer is not an expert.
    """
    match = re.fullmatch(rf"(.*\.(?:{'|'.join(STACKS)}))\.(\d+)", name)
    return (match[1], int(match[2])) if match else (f"{name}.weight", None)
