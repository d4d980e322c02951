"""A module, its tokenizer and its spec as a policy, the one interface to every backbone.

`Policy.logits` returns the logits for the token AT each position, also for families whose state at t-1 predicts t.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllm_rl import manifest
from dllm_rl.files import read_json
from dllm_rl.models.base import (
    FamilySpec,
    Mask,
    Module,
    Policy,
    States,
    Tokenizer,
    Tokens,
    encode_block_causal,
    in_eval_mode,
    position_ids,
    shift_states,
)
from dllm_rl.models.cache import TokenCache
from dllm_rl.models.checkpoint.loading import (
    family_spec,
    prepare_in_place,
    save_module,
)
from dllm_rl.models.checks import check_attention, check_logits, check_spec, check_tokenizer, check_weights
from dllm_rl.models.forward.blocks import compiled_encode, recomputed_blocks
from dllm_rl.models.forward.float32_head import HALF, projected_in_float32
from dllm_rl.models.lora import adapted_layers, call_without_adapters, is_of_peft
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.low_bit import eight_bit_product, is_bitsandbytes


class ModulePolicy:
    """A policy of a transformers module or a custom one. `load_policy` and `make_policy` create it.

    It is a diffusion model or an autoregressive one, as `spec.attention` says.
    """

    gradient_checkpointing: bool = False
    compiled: Any = None  # the compiled function of `compile_blocks`, which runs forwards without gradients
    lora: Lora | None = None
    quantization: Any = None
    quantization_report: Any = None
    # Sampler of the evaluations of the run that trained the policy, for `complete`; of a checkpoint, as JSON.
    eval_sampler: Any = None
    library_spec: FamilySpec | None = None  # the spec that the library found for the module; None: the caller gave one

    def __init__(self, module: Module, spec: FamilySpec, tokenizer: Tokenizer) -> None:
        # In eval mode: with dropout, two forwards of the same tokens would differ. A user's loop may change the mode of
        # the module; forwards without gradients then still drop nothing (`_without_dropout`).
        self.module = module.eval()
        for layer in module.modules():
            # torch's fused forwards read weights directly, and would bypass adapted or quantized layers. Turn them off.
            if isinstance(layer, nn.TransformerEncoderLayer):
                layer.activation_relu_or_gelu = 0
            elif isinstance(layer, nn.TransformerEncoder):
                layer.use_nested_tensor = False
            elif is_bitsandbytes(layer):  # 8-bit layers do not know the dtype of the weights that they were made from
                layer.plain_dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
                if not hasattr(layer.weight, "quant_state"):
                    layer.forward = partial(eight_bit_product, layer)
        self.spec = spec
        self.tokenizer = tokenizer
        self.vocab_size: int = spec.vocab_size or module.config.vocab_size
        self.weights_version = 0
        self.float32_head = True  # copies inherit it, so that learner and rollout policy compute logits in the same way

    def __repr__(self) -> str:
        num_parameters = sum(parameter.numel() for parameter in self.module.parameters())
        parts = [type(self.module).__name__, f"{num_parameters:,} parameters", f"family {self.spec.name}"]
        for name in ("lora", "quantization"):
            if getattr(self, name) is not None:
                parts.append(f"{name}={getattr(self, name)}")
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def pad_id(self) -> int:
        pad_token_id = getattr(self.tokenizer, "pad_token_id", None)
        return self.spec.eos_ids[0] if pad_token_id is None else pad_token_id

    def encode(self, tokens: Tokens, attention_mask: Mask, positions: Tokens, **cache_kwargs: Any) -> States:
        """Return the backbone's states at each token, not shifted.

        `positions` are the position ids of the tokens; in `logits`, `positions` is a boolean mask. `cache_kwargs` has
        `cache`, of `spec.new_cache`, to which the family's `encode` appends the columns. A `TokenCache` is not passed
        on: it stores the tokens, and the whole row runs again.

        Raises:
            ValueError: A sampler's cache needs the keys and values of such a module.
        """
        if isinstance(cache := cache_kwargs.get("cache"), TokenCache):
            if attention_mask.dim() != 2:
                raise ValueError(f"policy {self.spec.name!r} keeps no keys and values: set the sampler's cache=None")
            row = cache.append(tokens)
            return self.encode(row, attention_mask, position_ids(attention_mask))[:, -tokens.shape[1] :]
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        with recomputed_blocks(self.module) if recompute else self._without_dropout():
            # The family makes its attention mask from a padding mask (B, T). A mask with four axes is passed unchanged.
            if self.compiled and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
                return compiled_encode(self, tokens, attention_mask, positions, **cache_kwargs)
            return self.spec.encode(self.module, tokens, attention_mask, positions, **cache_kwargs)

    def hidden(self, tokens: Tokens, attention_mask: Bool[Tensor, "B T"]) -> States:
        """Return the final hidden states. `head` of the state at t gives the logits for the token at t."""
        states = self.encode(tokens, attention_mask, position_ids(attention_mask))
        return shift_states(states, attention_mask) if self.spec.shift else states

    def _without_dropout(self) -> AbstractContextManager[None]:
        """Return the context of a forward: without gradients in eval mode, with gradients in the module's mode.

        A compiled step sets the mode itself, around its graph.
        """
        leaves_mode = torch.is_grad_enabled() or torch.compiler.is_compiling()
        return nullcontext() if leaves_mode else in_eval_mode(self.module)

    def head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Return the logits of hidden states: in fp32 with `float32_head`, else in the module's or autocast's dtype.

        With `float32_head`, raise ValueError for a 16-bit module that does not name its output layer, or whose output
        layer has a product of its own.
        """
        with self._without_dropout():
            return self._head(hidden)

    def _head(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        if not self.float32_head:
            return self.spec.head(self.module, hidden)
        output = getattr(self.module, "get_output_embeddings", lambda: None)()
        kind = type(self.module).__name__
        if output is None and next(self.module.parameters()).dtype in HALF:
            raise ValueError(
                f"float32_head=True needs to know the output layer of {kind}, which is in 16 bits; give it a method "
                "get_output_embeddings(), or set policy.float32_head = False"
            )
        if output is not None and output.weight.dtype in HALF:
            with projected_in_float32(output):  # layers of the head before the projection stay in 16 bits
                logits = self.spec.head(self.module, hidden)
            if logits.dtype in HALF:
                raise ValueError(
                    f"the output layer of {kind} does not compute torch.nn.functional.linear(x, weight), which "
                    "float32_head=True replaces; set policy.float32_head = False"
                )
            return logits
        if hidden.dtype in HALF or torch.is_autocast_enabled(hidden.device.type):
            with torch.autocast(hidden.device.type, enabled=False):  # fp32 weights: the full head runs in fp32
                return self.spec.head(self.module, hidden.float())
        return self.spec.head(self.module, hidden)

    def logits(
        self, tokens: Tokens, attention_mask: Bool[Tensor, "B T"], positions: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T V"] | Float[Tensor, "K V"]:
        """Return the logits for the token AT each position (B, T, V).

        `positions` is a boolean mask (B, T), unlike in `encode`, where it has position ids. With it, return the logits
        (K, V) of the K positions where it is True.
        """
        hidden = self.hidden(tokens, attention_mask)
        return self.head(hidden if positions is None else hidden[positions])

    def save_pretrained(self, directory: str | Path, *, stock: bool = False) -> None:
        """Write weights (adapters merged), config and tokenizer in the layout of the checkpoint that was loaded.

        With `stock`, write the layout of the module's transformers class, which transformers opens without remote code.
        `load_policy` opens both. For a custom module, only weights and tokenizer are written, and
        `load_policy(directory, into=policy)` reads the weights. So it does what a policy writes whose spec is not its
        family's, in the layout of the module's class. Raise ValueError for a quantized copy.
        """
        if self.quantization is not None:
            raise ValueError(
                f"quantization={self.quantization!r}: a quantized copy's weights are rounded; save the policy that it "
                "was made from"
            )
        custom = self.spec is not self.library_spec and _is_custom(self.module, self.spec, self.tokenizer)
        save_module(self.module, self.tokenizer, self.spec, directory, stock=stock, custom=custom)

    def complete(self, prompts: Any, **options: Any) -> Any:
        """Return `dllm_rl.complete(self, prompts, **options)`: `policy.complete("37=", temperature=1)`."""
        import dllm_rl  # the public face: samplers are above policies

        return dllm_rl.complete(self, prompts, **options)

    def reference(self) -> Policy:
        """Return a policy that shares the weights, and whose forwards do not use the adapters: the one before training.

        Raise ValueError for a policy without adapters, because training would then change the shared weights.
        """
        if not adapted_layers(self.module):
            raise ValueError(f"{type(self.module).__name__} has no adapters to leave out; keep a copy as the reference")
        encode, head = (partial(call_without_adapters, f) for f in (self.spec.encode, self.spec.head))
        reference = copy.copy(self)
        reference.spec = replace(self.spec, encode=encode, head=head)
        return reference

    def to(self, device: torch.device | str) -> "ModulePolicy":
        """Move the module to a device and return the policy."""
        self.module.to(device)
        return self


def make_policy(module: Module, tokenizer: Tokenizer, spec: FamilySpec | None = None) -> ModulePolicy:
    """Wrap a module and its tokenizer as a policy.

    Call it for a model that you built or loaded yourself; use `load_policy` for a checkpoint. It puts the module into
    eval mode. It also runs one or two short forwards to check the attention, because training with a wrong attention
    mask raises no error. A module on the meta device is not run.

    Args:
        module: transformers model, or any nn.Module together with `spec`.
        tokenizer: Tokenizer of transformers, or any object with encode(text, add_special_tokens=False,
            split_special_tokens=True) -> list of ids, decode(ids, skip_special_tokens=True) -> text, and
            save_pretrained(folder).
        spec: FamilySpec of a custom module, with `attention`, `encode`, `head`, `vocab_size`, `eos_ids` and, unless the
            attention is "causal" or "encoder_decoder", `mask_id`. None: the spec that the library has for the
            transformers class.

    Raises:
        ValueError: The tokenizer lacks a method, an id is outside the vocabulary, a needed field of the spec is
            missing, the module's attention differs from the spec's, or a language model of transformers has
            another output layer, or counts positions in another way, than the spec.
    """
    if any(is_of_peft(layer) for layer in module.modules()):
        raise ValueError(
            f"{type(module).__name__} has peft's adapters; pass model.merge_and_unload() instead of the model. To "
            "train new adapters, set lora in the recipe or in grpo"
        )
    return wrap_module(module, tokenizer, spec)


def wrap_module(module: Module, tokenizer: Tokenizer, spec: FamilySpec | None = None) -> ModulePolicy:
    """Wrap a module, which may have peft's adapters, and its tokenizer as a policy; otherwise as `make_policy`.

    Call it if peft's own code saves the adapters, as in TRL's trainer: `save_pretrained` would merge them.
    """
    check_tokenizer(tokenizer, stock=spec is None)
    check_weights(module)
    library_spec = None
    if spec is None:
        spec = library_spec = _stock_spec(module, tokenizer)
    policy = wrap_checked(module, tokenizer, spec)
    policy.library_spec = library_spec
    return policy


def wrap_checked(module: Module, tokenizer: Tokenizer, spec: FamilySpec) -> ModulePolicy:
    """A policy of a module whose weights may be quantized."""
    check_spec(module, spec, tokenizer)
    policy = ModulePolicy(module, spec, tokenizer)
    if not any(weight.is_meta for weight in module.parameters()):  # a dry run's module is on the meta device
        check_attention(policy)
        check_logits(policy)
    return policy


def _stored_eval_sampler(folder: Path) -> dict[str, Any] | None:
    """Return, as JSON, the sampler of the evaluations of the run that wrote a checkpoint; None for another folder."""
    if not all((folder / name).is_file() for name in ("state.json", manifest.NAME)):  # another program's state.json
        return None
    match read_json(folder / "state.json"):
        case {"recipe": {"eval_sampler": dict(stored)}}:
            return stored
    return None


def _stock_spec(module: Module, tokenizer: Tokenizer) -> FamilySpec:
    """Return the spec of a transformers module's family. Raise ValueError for a class that is not in transformers."""
    class_name = type(module).__name__
    if not hasattr(module, "config"):
        raise ValueError(f"spec=None, and {class_name} has no config that names its family: pass a FamilySpec")
    config = module.config.to_dict()
    # A model that was never saved has no architectures.
    config["architectures"] = config.get("architectures") or [class_name]
    spec = family_spec(module.config, tokenizer, raw=config, generation=getattr(module, "generation_config", None))
    if spec.files.stock_model is not None:  # a class of a checkpoint's code, which `load_policy` converts
        raise ValueError(
            f"{class_name} is defined by code that comes with its checkpoint; pass the checkpoint's folder or id "
            "instead of the module, so that a stock transformers class is used"
        )
    prepare_in_place(module, spec)
    return spec


# Fields of a spec that its policy uses. The others are its name, and how a checkpoint is recognized and read.
POLICY_FIELDS = [field.name for field in fields(FamilySpec) if field.name not in ("name", "files")]


def _is_custom(module: Module, spec: FamilySpec, tokenizer: Tokenizer) -> bool:
    """Return whether a policy's saved config would be opened with another spec than its own."""
    if not isinstance(module, PreTrainedModel):
        return False  # no config is saved
    raw = module.config.to_dict() | {"architectures": [type(module).__name__]}
    folder = Path(spec.files.folder) if spec.files.folder else None
    try:
        check_tokenizer(tokenizer, stock=True)
        generation = getattr(module, "generation_config", None)
        family = family_spec(module.config, tokenizer, raw=raw, folder=folder, generation=generation)
    except (ValueError, AttributeError):  # no family, or the config lacks what its family reads: a mask, a length
        return True
    own, opened = (
        replace(
            each,
            vocab_size=each.vocab_size or module.config.vocab_size,
            # The encoder of a block-causal family is a `partial` with the family's spec.
            encode=encode_block_causal if getattr(each.encode, "func", None) is encode_block_causal else each.encode,
        )
        for each in (spec, family)
    )
    return any(getattr(own, name) != getattr(opened, name) for name in POLICY_FIELDS)
