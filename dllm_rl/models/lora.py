"""LoRA: settings, adapters on linear layers and on stacked experts, and their files in peft's format."""

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

from dllm_rl.models.base import Lora, Policy, has_bf16_products, output_embeddings, whole
from dllm_rl.models.checkpoint.tensors import backwards, misfits, renamed
from dllm_rl.models.untrusted import read_adapter
from dllm_rl.rng import keep_mask

STACKS = ("gate_up_proj", "down_proj")
PREFIX = "base_model.model."  # peft's, of every name
# Settings under which peft computes something else from the same tensors.
PEFT_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "use_bdlora",
)
LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


def check_mergeable(lora: Lora) -> None:
    """Raise ValueError for dropout, which merged adapters cannot have."""
    if lora.dropout:
        raise ValueError(f"lora.dropout={lora.dropout}: an aligned forward merges adapters; set it to 0")


def lora_r16(*, r: int = 16, alpha: float = 32.0, dropout: float = 0.0, experts: bool = False) -> Lora:
    """Return settings of small adapters: r 16, alpha 32 and no dropout by default.

    Use it as `lora` of `load_policy` or a recipe; use `Lora` to choose the layers.

    Args:
        r: Rank of the adapters.
        alpha: Scale of the adapters, times r.
        dropout: Share of the adapters' inputs that is dropped, in differentiated forwards only.
        experts: Also adapt each expert of a mixture.
    """
    return Lora(r=r, alpha=alpha, dropout=dropout, experts=experts)


def from_peft(config: Any) -> Lora:
    """Return the adapters that a peft LoraConfig describes.

    Raise ValueError for a setting that changes what the adapters compute.
    """
    kind = type(config).__name__
    if kind != "LoraConfig":
        raise ValueError(f"lora={kind}(...) is of another kind than LoRA; give peft's LoraConfig, or lora_r16")
    blank = type(config)()
    taken = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}
    taken |= {"task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version", "runtime_config"}
    for name, value in vars(config).items():
        if name not in taken and value != getattr(blank, name, value):
            raise ValueError(f"lora=LoraConfig({name}={value!r}): adapters have no such setting here; leave it out")
    if config.inference_mode:
        raise ValueError("lora=LoraConfig(inference_mode=True) is not for training; leave it out")
    targets = config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(f"lora=LoraConfig(target_modules={targets!r}) is a pattern; give a list of layers' names")
    scale = config.r**0.5 if config.use_rslora else 1.0  # peft divides alpha by the root of r
    return Lora(
        r=config.r,
        alpha=float(config.lora_alpha) * scale,
        dropout=float(config.lora_dropout),
        targets=None if targets in (None, "all-linear") else tuple(sorted(targets)),
    )


class LoraLinear(nn.Module):
    """A linear layer and its fp32 adapter, whose products are in the input's dtype."""

    def __init__(self, base_layer: nn.Linear, lora: Lora, generator: Generator) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora = lora
        self.active = True
        self.calls = 0  # of dropout: a mask depends only on (seed, calls), so that recomputed blocks repeat it
        self.seed = int(torch.randint(2**40, (), generator=generator))
        device = base_layer.weight.device
        # Drawn on the host, so that every device starts from the same numbers.
        a = (torch.rand(lora.r, base_layer.in_features, generator=generator) * 2 - 1) * base_layer.in_features**-0.5
        self.lora_A = linear_of(a.to(device), None).requires_grad_()
        self.lora_B = linear_of(torch.zeros(base_layer.out_features, lora.r, device=device), None).requires_grad_()

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        out = base_product(self.base_layer, x)
        if not self.active:
            return out
        small = F.linear(self.dropped(x), self.lora_A.weight.to(x.dtype))
        added = F.linear(small, self.lora_B.weight.to(x.dtype)) * (self.lora.alpha / self.lora.r)
        return (out + added).to(out.dtype)

    def dropped(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... I"]:
        if not self.lora.dropout or not torch.is_grad_enabled():  # always in eval mode: `training` is False
            return x
        self.calls += 1
        keep = keep_mask(x.shape, seed=self.seed, step=self.calls, drop=self.lora.dropout, device=x.device)
        return x * keep / (1 - self.lora.dropout)

    def merged(self) -> Float[Tensor, "O I"]:
        """Return W + (alpha / r) B A, summed in fp32 and rounded once to W's dtype. It is differentiable in A and B."""
        weight = plain_weight(self.base_layer)
        added = whole(self.lora_B.weight).float() @ whole(self.lora_A.weight).float()
        scaled = added.mul_(self.lora.alpha / self.lora.r).float()  # under autocast the product is in 16 bits
        return scaled.add_(weight).to(weight.dtype)  # in place: one fp32 copy


class _Float32Backward(torch.autograd.Function):
    """A frozen layer's bf16 product whose backward is computed in fp32 and rounded.

    On a CPU without bf16 products torch takes 60 times as long for the transposed product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (gradients[0].float() @ weight.float()).to(gradients[0].dtype), None, None


def base_product(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a frozen layer's output for x."""
    weight = layer.weight
    emulated = x.device.type == "cpu" and x.dtype == torch.bfloat16 == weight.dtype and not has_bf16_products()
    if emulated and type(layer) is nn.Linear and not weight.requires_grad and not torch.is_autocast_enabled("cpu"):
        return _Float32Backward.apply(x, weight, layer.bias)
    return layer(x)


class LoraExperts(nn.Module):
    """A stock module of experts with a pair of fp32 adapters for every expert of both stacks."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module, lora: Lora, generator: Generator) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora = lora
        self.active = True
        self.calls = 0  # of dropout, which experts do not have; saved with the adapters
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
        # Merged for the stock grouped product; without gradient checkpointing the merged copy stays until backward.
        return functional_call(self.base_layer, dict(zip(STACKS, map(self.merged, STACKS), strict=True)), args)

    def merged(self, name: str) -> Float[Tensor, "E O I"]:
        """Return W + (alpha / r) B A per expert, summed in fp32 and rounded once to W's dtype.

        It is differentiable in A and B.
        """
        weight = whole(getattr(self.base_layer, name).detach())
        added = whole(self.lora_B[name]).float() @ whole(self.lora_A[name]).float()
        return added.mul_(self.lora.alpha / self.lora.r).float().add_(weight).to(weight.dtype)

    @torch.no_grad()
    def plain(self, memo: dict[int, Any]) -> nn.Module:
        """Return the stock module with the adapters merged. `memo` is deepcopy's."""
        stacks = {id(getattr(self.base_layer, name)): nn.Parameter(self.merged(name), False) for name in STACKS}
        return copy.deepcopy(self.base_layer, memo | stacks)

    def saved(self) -> dict[str, Tensor]:
        """Return the adapters under peft's names: its wrapper of the second stack contains its wrapper of the first."""
        found = {}
        for place, name in zip((".base_layer", ""), STACKS, strict=True):
            found[f"{place}.lora_A.weight"] = self.lora_A[name].detach().flatten(0, 1)  # (E r, in)
            found[f"{place}.lora_B.weight"] = self.lora_B[name].detach().permute(1, 2, 0).flatten(1)  # (out, r E)
        return found

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copy tensors that `saved` returned into the adapters."""
        for place, name in zip((".base_layer", ""), STACKS, strict=True):
            self.lora_A[name].copy_(state[f"{place}.lora_A.weight"].view_as(self.lora_A[name]))
            stacked = state[f"{place}.lora_B.weight"].unflatten(1, (self.lora.r, -1))  # (out, r, E)
            self.lora_B[name].copy_(stacked.permute(2, 0, 1))


def add_lora(policy: Policy, lora: Lora) -> None:
    """Add adapters to the policy's module, in place. Freeze everything else and free its gradients.

    Raise ValueError if no layer has a target name, for the output layer, without stacked experts to adapt, or if the
    policy already has adapters.
    """
    module = policy.module
    names = lora.targets or policy.spec.lora_targets
    if adapted_layers(module):
        raise ValueError("lora: the policy has adapters already; merge them first (merge_lora)")
    chosen = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear) and is_target(path, names)]
    if not chosen:
        kind = type(module).__name__
        raise ValueError(f"lora.targets={names} names no linear layer in a block of {kind}; name other layers")
    head = output_embeddings(module)
    if odd := [path for path in chosen if module.get_submodule(path) is head]:  # its fp32 product takes a plain layer
        raise ValueError(f"lora.targets names {odd[0]!r}, the output layer, which takes no adapters; leave it out")
    if inner := [path for path in chosen if isinstance(module.get_submodule(path), NonDynamicallyQuantizableLinear)]:
        raise ValueError(f"lora.targets names {inner[0]!r}, whose weight MultiheadAttention reads itself; leave it out")
    stacks = [path for path, layer in module.named_modules() if is_stacked(layer)] if lora.experts else []
    if lora.experts and not stacks:
        raise ValueError(f"lora.experts=True, but {type(module).__name__} has no stacked experts; leave it out")
    module.requires_grad_(False)
    module.zero_grad(set_to_none=True)  # old gradients would take memory and count in clipping
    generator = Generator().manual_seed(lora.seed)
    for paths, adapted in ((chosen, LoraLinear), (stacks, LoraExperts)):
        for path in paths:
            layer = module.get_submodule(path)
            put(module, layer, adapted(layer, lora, generator))
    policy.lora = lora


def put(module: nn.Module, layer: nn.Module, other: nn.Module) -> None:
    """Replace a layer by another one everywhere: encoder and decoder may share it."""
    for path in [path for path, each in module.named_modules(remove_duplicate=False) if each is layer]:
        module.set_submodule(path, other)


def is_target(path: str, names: Sequence[str]) -> bool:
    """Return whether `names` has the layer's full path, or, inside a block, its last name."""
    return path in names or (re.search(r"\.\d+\.", path) is not None and path.rpartition(".")[2] in names)


def adapted_layers(module: nn.Module) -> dict[str, LoraLinear | LoraExperts]:
    """Return the layers with adapters, by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, LoraLinear | LoraExperts)}


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """Leave the adapters out of the forwards in the block."""
    layers = adapted_layers(module).values()
    before = [layer.active for layer in layers]  # an outer block may already have disabled some
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.active = was


def without_adapters(policy: Policy) -> Policy:
    """Return a policy on the same weights without adapters.

    Raise ValueError for a policy without adapters, because training would change the reference.
    """
    if not adapted_layers(policy.module):
        raise ValueError(f"{type(policy.module).__name__} has no adapters to leave out; keep a copy as the reference")
    spec = policy.spec
    reference = copy.copy(policy)
    reference.spec = replace(spec, encode=partial(_without, spec.encode), head=partial(_without, spec.head))
    return reference


def _without(f: Callable[..., Tensor], module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with disable_adapters(module):
        return f(module, *args, **kwargs)


def base_of(layer: Any) -> Any:
    """Return the layer below the adapters, or the layer itself without any."""
    return layer.base_layer if isinstance(layer, LoraLinear | LoraExperts) else layer


def is_extra(layer: nn.Module) -> bool:
    """Return whether a layer has adapters or bitsandbytes weights."""
    return base_of(layer) is not layer or is_bitsandbytes(layer)


def linear_of(weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None) -> nn.Linear:
    """Return a layer with these tensors, not copied. The weight is frozen."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")  # meta: draws no random weights
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
        return whole(layer.weight.detach())
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit  # an optional dependency

        return dequantize_4bit(weight.data, weight.quant_state)
    # An 8-bit layer moves its rows and scales (absolute maxima, 127 steps) to `state` at its first forward.
    kept: Any = layer.state if weight.SCB is None else weight
    return kept.CB * (kept.SCB.float() / 127)[:, None]


def is_stacked(layer: nn.Module) -> bool:
    """Return whether a module, with or without adapters, stores gated experts as two stacks (E, out, in).

    The experts have no biases.
    """
    layer = base_of(layer)
    stacks = [getattr(layer, name, None) for name in STACKS]
    return (
        all(isinstance(stack, nn.Parameter) and stack.dim() == 3 for stack in stacks)
        and len(list(layer.parameters(recurse=False))) == len(STACKS)
        and isinstance(getattr(layer, "act_fn", None), nn.Module)
        and all(getattr(layer, name, value) == value for name, value in LAYOUT.items())
    )


def adapter_state(policy: Policy) -> dict[str, Tensor]:
    """Return the adapters' tensors under peft's names, built from the authors' module names."""
    out: dict[str, Tensor] = {}
    names = backwards(policy.spec)
    for path, layer in adapted_layers(policy.module).items():
        if isinstance(layer, LoraExperts):  # the stock class's names: the authors have no stacks
            out |= {f"{PREFIX}{path}{name}": tensor for name, tensor in layer.saved().items()}
            continue
        stem = renamed(f"{path}.weight", names).removesuffix(".weight")
        for part in ("lora_A", "lora_B"):
            out[f"{PREFIX}{stem}.{part}.weight"] = getattr(layer, part).weight.detach()
    return out


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
    calls = next(iter(adapted_layers(policy.module).values())).calls  # all layers have the same count of dropout masks
    metadata = {"format": "pt", "seed": str(lora.seed), "dropout_calls": str(calls)} | base_form(policy.module)
    stored = {name: tensor.cpu().clone() for name, tensor in state.items()}
    save_file(stored, directory / "adapter_model.safetensors", metadata)
    linear, experts = _paths(state)
    config = {
        "peft_type": "LORA",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": linear,
        **({"target_parameters": [f"{path}.{name}" for path in experts for name in STACKS]} if experts else {}),
        "base_model_name_or_path": base or policy.spec.checkpoint_folder,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def base_form(module: nn.Module) -> dict[str, str]:
    """Return the form of the adapters' base: its dtype, and bitsandbytes' kind."""
    form = {"dtype": str(next(module.parameters()).dtype).removeprefix("torch.")}
    packed = next((layer for layer in map(base_of, module.modules()) if is_bitsandbytes(layer)), None)
    return (
        form if packed is None else form | {"quantization": "nf4" if hasattr(packed.weight, "quant_state") else "int8"}
    )


def load_adapter(policy: Policy, directory: str | Path) -> None:
    """Load saved adapters, of this library or of peft, into the policy in place.

    Raise ValueError for other methods or tensors that do not fit.
    """
    directory = Path(directory)
    config, state, metadata = read_adapter(directory)
    plain: dict[str, Any] = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none"}
    plain |= {"modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
    plain |= dict.fromkeys(PEFT_VARIANTS)
    for field, value in plain.items():
        if config.get(field) not in (value, None):
            raise ValueError(f"{directory}: {field}={config[field]!r} is not supported; only {field}={value!r} is")
    start = config.get("init_lora_weights")
    if start not in (None, True, False, "gaussian", "eva", "orthogonal"):
        # PiSSA, OLoRA and similar methods subtract the first adapters from the base; the base here is unchanged.
        raise ValueError(
            f"{directory}: init_lora_weights={start!r} changed the base too, which is not supported; save the adapters "
            "as plain LoRA (peft's path_initial_model_for_weight_conversion)"
        )
    linear, experts = _paths(state)
    paths = tuple(
        sorted(renamed(f"{stem}.weight", policy.spec.tensor_names).removesuffix(".weight") for stem in linear)
    )
    # Checked before an adapter is made, because only r sets its size.
    if (needed := config["r"] * _width(policy.module, paths, experts)) > sum(map(Tensor.numel, state.values())):
        raise ValueError(
            f"{directory}: r={config['r']} needs {needed:,} numbers, and fewer are there; give other adapters"
        )
    settings = {"r": config["r"], "alpha": float(config["lora_alpha"]), "dropout": float(config["lora_dropout"])}
    # peft's files have no seed: it matters only for dropout, since A and B are overwritten.
    add_lora(policy, Lora(**settings, targets=paths, experts=bool(experts), seed=int(metadata.get("seed", 0))))
    have = adapter_state(policy)
    if odd := misfits(state, have):
        kind = type(policy.module).__name__
        raise ValueError(f"{directory}: adapter tensors {odd[:3]} do not fit {kind}; give their own base")
    for name, tensor in state.items():
        have[name].copy_(tensor)
    for path, layer in adapted_layers(policy.module).items():
        layer.calls = int(metadata.get("dropout_calls", 0))
        if isinstance(layer, LoraExperts):
            layer.load({part: state[f"{PREFIX}{path}{part}"] for part in layer.saved()})


def _width(module: nn.Module, linear: Sequence[str], experts: Sequence[str]) -> int:
    """Return how many numbers adapters of rank 1 have on those of these layers that the module has."""
    layers = dict(module.named_modules())
    found = [layers[path] for path in linear if isinstance(layers.get(path), nn.Linear)]
    mixed = [layers[path] for path in experts if path in layers and is_stacked(layers[path])]
    stacks = [getattr(each, name) for each in mixed for name in STACKS]
    return sum(x.in_features + x.out_features for x in found) + sum(len(x) * sum(x.shape[1:]) for x in stacks)


def _paths(state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the paths of linear layers and of experts, which are two parameters of one module.

    peft wraps one inside the other.
    """
    stems = {name.split(".lora_")[0].removeprefix(PREFIX) for name in state}
    experts = sorted(stem for stem in stems if f"{stem}.base_layer" in stems)
    return sorted(stems - {f"{path}{part}" for path in experts for part in ("", ".base_layer")}), experts
