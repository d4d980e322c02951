"""LoRA: adapters on linear layers and on stacked experts, and their files in peft's format."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dllm_rl.models.base import Lora, Policy, gather_if_sharded, has_bf16_products, output_embeddings
from dllm_rl.models.checkpoint.tensors import mismatched_tensors, rename_tensor, stock_to_original
from dllm_rl.models.untrusted import read_adapter
from dllm_rl.rng import keep_mask

STACKS = ("gate_up_proj", "down_proj")  # weights (E, O, I) of all E experts of a stock module of experts
PREFIX = "base_model.model."  # prefix of every name in peft's files
# Settings of peft that change what is computed from the same tensors.
PEFT_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "use_bdlora",
)
# Attributes of a stock module of experts whose layout `LoraExperts` supports.
LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


def check_mergeable(lora: Lora) -> None:
    """Raise ValueError for dropout: merged adapters have no separate input that could be dropped."""
    if lora.dropout:
        raise ValueError(f"lora.dropout={lora.dropout}: an aligned forward merges adapters; set it to 0")


def from_peft(config: Any) -> Lora:
    """Convert a peft LoraConfig.

    Raise ValueError for a setting that is not supported here and changes what the adapters compute.
    """
    kind = type(config).__name__
    if kind != "LoraConfig":
        raise ValueError(f"lora={kind}(...) is not LoRA; give peft's LoraConfig, or Lora(r=16)")
    default = type(config)()
    used = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}
    ignored = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version", "runtime_config"}
    for name, value in vars(config).items():
        if name not in used | ignored and value != getattr(default, name, value):
            raise ValueError(f"lora=LoraConfig({name}={value!r}): this setting is not supported; leave it out")
    if config.inference_mode:
        raise ValueError("lora=LoraConfig(inference_mode=True) is not for training; leave it out")
    targets = config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(f"lora=LoraConfig(target_modules={targets!r}) is a pattern; give a list of layer names")
    scale = config.r**0.5 if config.use_rslora else 1.0  # peft divides alpha by the root of r
    return Lora(
        r=config.r,
        alpha=float(config.lora_alpha) * scale,
        dropout=float(config.lora_dropout),
        targets=None if targets in (None, "all-linear") else tuple(sorted(targets)),
    )


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
        """Return W + (alpha / r) B A, summed in fp32 and rounded once to W's dtype. It is differentiable in A and B."""
        weight = plain_weight(self.base_layer)
        added = gather_if_sharded(self.lora_B.weight).float() @ gather_if_sharded(self.lora_A.weight).float()
        scaled = added.mul_(self.lora.alpha / self.lora.r).float()  # under autocast the product is in 16 bits
        return scaled.add_(weight).to(weight.dtype)  # in place, to allocate only one fp32 tensor


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
        """Return W + (alpha / r) B A per expert, summed in fp32 and rounded once to W's dtype.

        It is differentiable in A and B.
        """
        weight = gather_if_sharded(getattr(self.base_layer, name).detach())
        added = gather_if_sharded(self.lora_B[name]).float() @ gather_if_sharded(self.lora_A[name]).float()
        return added.mul_(self.lora.alpha / self.lora.r).float().add_(weight).to(weight.dtype)

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


def add_lora(policy: Policy, lora: Lora) -> None:
    """Add adapters to the policy's module, in place. Freeze all other weights, and delete their gradients.

    Raises:
        ValueError: No linear layer has a target name, a target cannot be adapted (the output layer, or a layer whose
            weight MultiheadAttention reads), there are no stacked experts to adapt, or the policy already has adapters.
    """
    module = policy.module
    names = lora.targets or policy.spec.lora_targets
    if adapted_layers(module):
        raise ValueError("lora: the policy has adapters already; merge them first (merge_lora)")
    linear_layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    targets = {path: layer for path, layer in linear_layers.items() if is_target(path, names)}
    if not targets:
        kind = type(module).__name__
        raise ValueError(f"lora.targets={names} names no linear layer in a block of {kind}; name other layers")
    head = output_embeddings(module)
    for path, layer in targets.items():
        if layer is head:  # `head_in_float32` needs a layer without adapters
            raise ValueError(f"lora.targets names {path!r}, the output layer, which cannot have adapters; leave it out")
    for path, layer in targets.items():
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            raise ValueError(f"lora.targets names {path!r}, whose weight MultiheadAttention reads itself; leave it out")
    stacks = [path for path, layer in module.named_modules() if is_stacked(layer)] if lora.experts else []
    if lora.experts and not stacks:
        raise ValueError(f"lora.experts=True, but {type(module).__name__} has no stacked experts; leave it out")
    module.requires_grad_(False)
    module.zero_grad(set_to_none=True)  # old gradients would use memory and affect the gradient norm
    generator = Generator().manual_seed(lora.seed)
    for paths, adapted_class in ((targets, LoraLinear), (stacks, LoraExperts)):
        for path in paths:
            layer = module.get_submodule(path)
            replace_layer(module, layer, adapted_class(layer, lora, generator))
    policy.lora = lora


def replace_layer(module: nn.Module, layer: nn.Module, new_layer: nn.Module) -> None:
    """Replace a layer wherever it occurs: an encoder and a decoder may share it."""
    paths = [path for path, submodule in module.named_modules(remove_duplicate=False) if submodule is layer]
    for path in paths:
        module.set_submodule(path, new_layer)


def is_target(path: str, names: Sequence[str]) -> bool:
    """Return whether `names` contains the layer's path or, for a layer inside a block, the last part of its path."""
    return path in names or (re.search(r"\.\d+\.", path) is not None and path.rpartition(".")[2] in names)


def adapted_layers(module: nn.Module) -> dict[str, LoraLinear | LoraExperts]:
    """Return the layers with adapters, by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, LoraLinear | LoraExperts)}


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """In this context, run forwards without the adapters."""
    layers = adapted_layers(module).values()
    was_active = [layer.active for layer in layers]  # an outer context may already have disabled some
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer, active in zip(layers, was_active, strict=True):
            layer.active = active


def without_adapters(policy: Policy) -> Policy:
    """Return a policy that shares the weights, and whose forwards do not use the adapters.

    Raise ValueError for a policy without adapters, because training would then change the shared weights.
    """
    if not adapted_layers(policy.module):
        raise ValueError(f"{type(policy.module).__name__} has no adapters to leave out; keep a copy as the reference")
    spec = policy.spec
    reference = copy.copy(policy)
    reference.spec = replace(
        spec,
        encode=partial(_call_without_adapters, spec.encode),
        head=partial(_call_without_adapters, spec.head),
    )
    return reference


def _call_without_adapters(f: Callable[..., Tensor], module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with disable_adapters(module):
        return f(module, *args, **kwargs)


def base_of(layer: Any) -> Any:
    """Return the layer to which adapters were added, or the layer itself if it has no adapters."""
    return layer.base_layer if isinstance(layer, LoraLinear | LoraExperts) else layer


def is_adapted_or_low_bit(layer: nn.Module) -> bool:
    """Return whether a layer has adapters or bitsandbytes weights."""
    return base_of(layer) is not layer or is_bitsandbytes(layer)


def linear_of(weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None) -> nn.Linear:
    """Return a linear layer with these tensors, without copying them. The weight is frozen."""
    # The meta device, so that no random weights are drawn.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = cast(Any, bias)
    return layer


def is_bitsandbytes(layer: nn.Module) -> bool:
    """Return whether a layer has bitsandbytes weights."""
    return isinstance(layer, nn.Linear) and type(layer.weight).__module__.startswith("bitsandbytes")


@torch.no_grad()
def plain_weight(layer: nn.Linear) -> Float[Tensor, "O I"]:
    """Return a linear layer's weight, dequantized from bitsandbytes and gathered if sharded."""
    if not is_bitsandbytes(layer):
        return gather_if_sharded(layer.weight.detach())
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit  # an optional dependency

        return dequantize_4bit(weight.data, weight.quant_state)
    # At its first forward, an 8-bit layer moves its codes and its scales (each row's largest |w|, code 127) to `state`.
    holder: Any = layer.state if weight.SCB is None else weight
    return holder.CB * (holder.SCB.float() / 127)[:, None]


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


def adapter_state(policy: Policy) -> dict[str, Tensor]:
    """Return the adapters' tensors under peft's names, which contain the module names of the original checkpoint."""
    state: dict[str, Tensor] = {}
    names = stock_to_original(policy.spec)
    for path, layer in adapted_layers(policy.module).items():
        if isinstance(layer, LoraExperts):  # under the stock class's path: original checkpoints have no stacks
            state |= {f"{PREFIX}{path}{name}": tensor for name, tensor in layer.peft_state().items()}
            continue
        original_path = rename_tensor(f"{path}.weight", names).removesuffix(".weight")
        for matrix in ("lora_A", "lora_B"):
            state[f"{PREFIX}{original_path}.{matrix}.weight"] = getattr(layer, matrix).weight.detach()
    return state


def save_adapter(policy: Policy, directory: str | Path, *, base: str | None = None) -> None:
    """Write the adapters as peft's adapter_model.safetensors and adapter_config.json.

    Call it to save adapters without their base; `load_policy` opens the folder together with the base.

    Args:
        policy: Policy with adapters.
        directory: Folder to write, created if missing.
        base: Folder or hub id of the base's weights. None: the folder that the policy was loaded from.

    Raises:
        ValueError: The policy has no adapters.
    """
    lora = policy.lora
    if lora is None:
        raise ValueError(f"{type(policy.module).__name__} has no adapters; save_pretrained writes its weights")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = adapter_state(policy)
    calls = next(iter(adapted_layers(policy.module).values())).calls  # all layers have the same count
    metadata = {"format": "pt", "seed": str(lora.seed), "dropout_calls": str(calls)} | base_metadata(policy.module)
    tensors = {name: tensor.cpu().clone() for name, tensor in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata)
    linear, experts = _adapted_paths(state)
    config = {
        "peft_type": "LORA",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": linear,
    }
    if experts:
        config["target_parameters"] = [f"{path}.{name}" for path in experts for name in STACKS]
    config |= {"base_model_name_or_path": base or policy.spec.checkpoint_folder, "inference_mode": True}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def base_metadata(module: nn.Module) -> dict[str, str]:
    """Return the metadata about the adapters' base: its dtype and, with bitsandbytes, its quantization."""
    metadata = {"dtype": str(next(module.parameters()).dtype).removeprefix("torch.")}
    low_bit = next((layer for layer in map(base_of, module.modules()) if is_bitsandbytes(layer)), None)
    if low_bit is not None:
        metadata["quantization"] = "nf4" if hasattr(low_bit.weight, "quant_state") else "int8"
    return metadata


def load_adapter(policy: Policy, directory: str | Path) -> None:
    """Add adapters to the policy, in place, and load their weights, which this library or peft saved.

    Raise ValueError for a method other than LoRA, or for tensors that do not fit.
    """
    directory = Path(directory)
    config, state, metadata = read_adapter(directory)
    supported: dict[str, Any] = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none"}
    supported |= {"modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
    supported |= dict.fromkeys(PEFT_VARIANTS)
    for field, value in supported.items():
        if config.get(field) not in (value, None):
            raise ValueError(f"{directory}: {field}={config[field]!r} is not supported; only {field}={value!r} is")
    init = config.get("init_lora_weights")
    if init not in (None, True, False, "gaussian", "eva", "orthogonal"):
        # PiSSA, OLoRA and similar methods subtract the initial adapters from the base's weights, which this does not.
        raise ValueError(
            f"{directory}: init_lora_weights={init!r} also changed the base, which is not supported; save the adapters "
            "as plain LoRA (peft's path_initial_model_for_weight_conversion)"
        )
    linear, experts = _adapted_paths(state)
    stock_paths = [rename_tensor(f"{path}.weight", policy.spec.tensor_names).removesuffix(".weight") for path in linear]
    paths = tuple(sorted(stock_paths))
    # Checked before the adapters are allocated: a wrong r in the file could need any amount of memory.
    required = config["r"] * _rank_one_size(policy.module, paths, experts)
    if required > sum(map(Tensor.numel, state.values())):
        raise ValueError(
            f"{directory}: r={config['r']} needs {required:,} numbers, and the file has fewer; give other adapters"
        )
    settings = {"r": config["r"], "alpha": float(config["lora_alpha"]), "dropout": float(config["lora_dropout"])}
    # peft's files have no seed. A seed matters only for dropout, because A and B are overwritten.
    add_lora(policy, Lora(**settings, targets=paths, experts=bool(experts), seed=int(metadata.get("seed", 0))))
    policy_tensors = adapter_state(policy)
    if mismatched := mismatched_tensors(state, policy_tensors):
        kind = type(policy.module).__name__
        raise ValueError(
            f"{directory}: adapter tensors {mismatched[:3]} do not fit {kind}; use the base that they were trained on"
        )
    for name, tensor in state.items():
        policy_tensors[name].copy_(tensor)
    for path, layer in adapted_layers(policy.module).items():
        layer.calls = int(metadata.get("dropout_calls", 0))
        if isinstance(layer, LoraExperts):
            layer.load_peft_state({name: state[f"{PREFIX}{path}{name}"] for name in layer.peft_state()})


def _rank_one_size(module: nn.Module, linear: Sequence[str], experts: Sequence[str]) -> int:
    """Return the number of elements of rank-1 adapters on these layers. Layers that the module lacks are left out."""
    layers = dict(module.named_modules())
    linear_layers = [layers[path] for path in linear if isinstance(layers.get(path), nn.Linear)]
    expert_layers = [layers[path] for path in experts if path in layers and is_stacked(layers[path])]
    stacks = [getattr(layer, name) for layer in expert_layers for name in STACKS]
    linear_size = sum(layer.in_features + layer.out_features for layer in linear_layers)
    return linear_size + sum(len(stack) * sum(stack.shape[1:]) for stack in stacks)


def _adapted_paths(state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the paths of adapted linear layers, and of adapted modules of experts.

    peft wraps a module of experts twice, once per stack, so that its adapters have two paths: one ends in
    `.base_layer`.
    """
    paths = {name.split(".lora_")[0].removeprefix(PREFIX) for name in state}
    experts = sorted(path for path in paths if f"{path}.base_layer" in paths)
    expert_paths = {f"{path}{wrapper}" for path in experts for wrapper in ("", ".base_layer")}
    return sorted(paths - expert_paths), experts
