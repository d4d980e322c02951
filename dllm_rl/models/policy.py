"""Policies: one interface to every backbone, and the functions that load or make a policy.

`Policy.logits` returns the logits for the token AT each position, also for families whose state at t-1 predicts t.
"""

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllm_rl import manifest
from dllm_rl.files import read_json
from dllm_rl.manifest import Check, verify_if_present
from dllm_rl.models.base import (
    FamilySpec,
    Mask,
    Module,
    Policy,
    States,
    Tokenizer,
    Tokens,
    encode_base,
    encode_block_causal,
    in_eval_mode,
    linear_head,
    mlm_head,
    position_ids,
    shift_states,
    with_new_layers,
)
from dllm_rl.models.cache import TokenCache
from dllm_rl.models.checkpoint.adapters import load_adapter, read_adapter_config
from dllm_rl.models.checkpoint.families import FAMILY_FIELD
from dllm_rl.models.checkpoint.loading import (
    LOAD_ADAPTER_HINT,
    adapter_folder,
    base_of_adapter,
    check_finite,
    checkpoint_folder,
    digest_of_checkpoint,
    family_spec,
    load_module,
    name_in_errors,
    newest_checkpoint,
    prepare_in_place,
    save_module,
)
from dllm_rl.models.checkpoint.tensors import check_regular, mismatched_tensors, read_tensors
from dllm_rl.models.forward.blocks import compiled_encode, recomputed_blocks
from dllm_rl.models.forward.float32_head import HALF, projected_in_float32
from dllm_rl.models.lora import (
    Lora,
    adapted_layers,
    call_without_adapters,
    eight_bit_product,
    has_adapted_or_low_bit,
    is_bitsandbytes,
    is_of_peft,
    merge_lora,
    merged_state_dict,
)

BASE_DTYPES = ("float32", "bfloat16", "float16", "float64")


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
        import dllm_rl  # the public face: samplers stand above policies

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
    policy = _wrapped(module, tokenizer, spec)
    policy.library_spec = library_spec
    return policy


def _wrapped(module: Module, tokenizer: Tokenizer, spec: FamilySpec) -> ModulePolicy:
    """A policy of a module whose weights may be quantized."""
    check_spec(module, spec, tokenizer)
    policy = ModulePolicy(module, spec, tokenizer)
    if not any(weight.is_meta for weight in module.parameters()):  # a dry run's module is on the meta device
        check_attention(policy)
        check_logits(policy)
    return policy


def load_policy(
    path_or_id: str | Path,
    *,
    into: ModulePolicy | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    block_size: int | None = None,
    quantization: str | None = None,
    verify_checkpoint: Check = "full",
) -> ModulePolicy:
    """Open a model: what a run, `save_pretrained`, peft or the hub has. `complete` and the commands call it.

    Use `make_policy` for a module that you built yourself. If the folder has only adapters (written by a run or by
    peft), it opens their base model and merges the adapters into it. The policy of a run completes as the run's
    evaluations do (`complete`).

    Args:
        path_or_id: Folder of a model or of a checkpoint, a run's folder for its newest checkpoint, or an id on the
            Hugging Face Hub.
        into: Policy of a module of yours, or with a spec of yours, whose weights the checkpoint has. It gets the
            weights, keeps its own block size, and is returned. None (default): a stock transformers class.
        dtype: Dtype of the weights: float32, bfloat16 or float16. "auto" keeps the checkpoint's dtype. None (default):
            float32, or that of `into`.
        device: Device of the weights. None (default): cpu, or that of `into`.
        block_size: Block size of a block-causal model. None: the checkpoint's block size.
        quantization: "nf4" or "int8" quantizes the weights with bitsandbytes, and freezes all of them: only adapters
            (`lora` of a recipe) can then be trained. None: no quantization.
        verify_checkpoint: "full" compares every byte with the manifest, "quick" compares sizes and each file's first
            MiB.

    Returns:
        Policy that computes logits in fp32; set `policy.float32_head = False` to compute them in 16 bits if the weights
        have 16.

    Raises:
        ValueError: A file differs from the manifest, the architecture is unknown, tensors are missing or unexpected,
            weights are not finite, the mask id is outside the vocabulary, or the attention differs from the family's.
    """
    folder = checkpoint_folder(path_or_id)
    if into is not None:
        if block_size is not None or quantization is not None:
            raise ValueError("into is a policy that exists: leave out block_size and quantization")
        load_weights(into, folder, verify_checkpoint=verify_checkpoint)
        if dtype not in (None, "auto"):
            into.module.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        policy = into if device is None else into.to(device)
        policy.eval_sampler = _stored_eval_sampler(folder)
        return policy
    verify_if_present(folder, verify_checkpoint)
    dtype, device = torch.float32 if dtype is None else dtype, "cpu" if device is None else device
    options: dict[str, Any] = {"dtype": dtype, "block_size": block_size, "quantization": quantization, "device": device}
    if (adapter := adapter_folder(folder)) is not None:
        policy = _load_merged(adapter, folder, options, verify_checkpoint)
    else:
        module, tokenizer, spec = load_module(folder, **options)
        check_finite(module, path_or_id)
        if quantization is not None:
            module.requires_grad_(False)  # else embeddings, norms and head would be trained alone
        # A config value of a wrong type may raise an error only in the first forward, which make_policy runs.
        with name_in_errors(folder):
            policy = make_policy(module, tokenizer, spec)
            policy.library_spec = spec
    policy.eval_sampler = _stored_eval_sampler(folder)
    return policy


def _stored_eval_sampler(folder: Path) -> dict[str, Any] | None:
    """Return, as JSON, the sampler of the evaluations of the run that wrote a checkpoint; None for another folder."""
    if not all((folder / name).is_file() for name in ("state.json", manifest.NAME)):  # another program's state.json
        return None
    match read_json(folder / "state.json"):
        case {"recipe": {"eval_sampler": dict(stored)}}:
            return stored
    return None


def _load_merged(adapter: Path, folder: Path, options: dict[str, Any], verify_checkpoint: Check) -> ModulePolicy:
    """Load the base model of saved adapters, and merge the adapters into it."""
    if options["quantization"] is not None:
        raise ValueError(
            f"quantization={options['quantization']!r} needs a base without adapters, and {folder} has adapters; merge "
            f"them with load_policy({str(folder)!r}).save_pretrained(NEW), and load NEW"
        )
    dtype = options["dtype"]
    read_adapter_config(adapter)  # raises ValueError for adapters that are not read, before the base is loaded
    with name_in_errors(adapter), safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata() or {}
    # The base is loaded in the dtype in which the adapters were trained, and converted after the merge.
    base_dtype = metadata["dtype"] if metadata.get("dtype") in BASE_DTYPES else "auto"
    options = options | {"dtype": base_dtype, "quantization": metadata.get("quantization")}
    base = base_of_adapter(adapter)
    if verify_checkpoint == "full" and metadata.get("base_digest") not in (None, digest_of_checkpoint(base)):
        raise ValueError(
            f"{base}: its weights, config or tokenizer are not those on which the adapters of {adapter} were trained; "
            f"put those back, or {LOAD_ADAPTER_HINT}"
        )
    policy = load_policy(base, **options, verify_checkpoint=verify_checkpoint)
    load_adapter(policy, adapter)
    merge_lora(policy)
    if dtype != "auto":
        for parameter in policy.module.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return policy


@torch.no_grad()
def load_weights(policy: Policy, directory: str | Path, *, verify_checkpoint: Check = "full") -> Policy:
    """Load into a policy's module the weights that `save_pretrained` wrote: `load_policy(directory, into=policy)`.

    Args:
        policy: Policy whose module receives the tensors. It must have no adapters.
        directory: Folder that `save_pretrained` wrote, or a run's folder, for its newest checkpoint.
        verify_checkpoint: "full" or "quick" check of the manifest, as in `load_policy`.

    Returns:
        The policy.

    Raises:
        ValueError: The names or shapes of the tensors differ, the policy has adapters or low-bit layers, or a file
            differs from the manifest.
    """
    if has_adapted_or_low_bit(policy.module):
        raise ValueError("the policy has adapters or low-bit layers; load the weights first, then add_lora")
    directory = newest_checkpoint(Path(directory).expanduser())
    verify_if_present(directory, verify_checkpoint)
    check_regular(directory)
    module_tensors = merged_state_dict(policy.module)
    # transformers chooses under which of its names a tied tensor is saved; `module_tensors` has the first.
    names = {id(tensor): name for name, tensor in module_tensors.items()}
    tensors = dict(policy.module.named_parameters(remove_duplicate=False))
    state = {names.get(id(tensors.get(name)), name): value for name, value in read_tensors(directory).items()}
    if mismatched := mismatched_tensors(state, module_tensors):
        name = type(policy.module).__name__
        raise ValueError(
            f"{directory}: tensors {mismatched[:3]} do not fit {name}; build the module that they were saved from"
        )
    for name, tensor in module_tensors.items():
        tensor.copy_(state[name])
    return policy


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


def check_tokenizer(tokenizer: Tokenizer, *, stock: bool = False) -> None:
    """Raise ValueError for a tokenizer without the methods that `make_policy` lists.

    With `stock`, also require the members from which `make_policy` reads the token ids of a transformers model:
    `get_vocab`, `eos_token_id` and `mask_token_id`.
    """
    kind = type(tokenizer).__name__
    required = ["encode", "decode", "save_pretrained"]
    if stock:
        required += ["get_vocab", "eos_token_id", "mask_token_id"]
    if getattr(tokenizer, "chat_template", None):
        required += ["apply_chat_template", "added_tokens_decoder", "all_special_tokens"]
    if missing := [name for name in required if not hasattr(tokenizer, name)]:
        raise ValueError(f"tokenizer {kind} has no {', '.join(missing)}; help(make_policy) lists what it needs")
    try:
        ids = tokenizer.encode("", add_special_tokens=False, split_special_tokens=True)
        text = tokenizer.decode([], skip_special_tokens=True)
    except TypeError as error:
        raise ValueError(f"tokenizer {kind}: {error}; help(make_policy) shows how it is called") from error
    if not isinstance(ids, list) or not isinstance(text, str):
        raise ValueError(
            f"tokenizer {kind}: encode returned {ids!r} and decode {text!r}; they must return a list and text"
        )


def check_weights(module: Module) -> None:
    """Raise ValueError for weights that were quantized by another tool than bitsandbytes: they cannot be trained,
    merged, synced or saved.
    """
    method = getattr(getattr(module, "quantization_method", None), "value", None)
    for name, weight in module.named_parameters():
        tool = type(weight).__module__.partition(".")[0]
        if tool == "torchao" or (tool != "bitsandbytes" and weight.dtype.itemsize == 1):
            method = f"{name} is of {'torchao' if tool == 'torchao' else weight.dtype}"
    if method not in (None, "bitsandbytes"):
        raise ValueError(
            f"{type(module).__name__} has quantized weights ({method}); give the module in 16 or 32 bits, and "
            "quantize rollouts with rollout_quantization or a base of adapters with base_quantization"
        )


DROPOUT = "needs training=module.training, and in a module's forward training=self.training"


def check_spec(module: Module, spec: FamilySpec, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a spec without a needed field, or ids that do not fit the vocabulary or each other."""
    name = f"the spec {spec.name!r}"
    size = spec.vocab_size or getattr(getattr(module, "config", None), "vocab_size", None)
    if size is None:
        raise ValueError(f"vocab_size=None in {name}, and {type(module).__name__} has no config: set vocab_size")
    if spec.attention == "block_causal" and spec.block_size is None:
        raise ValueError(f"block_size=None in {name}: 'block_causal' attention needs the positions of a block; set it")
    if spec.attention == "encoder_decoder" and spec.block_size is None:
        raise ValueError(
            f"block_size=None in {name}: set it to the number of tokens that the decoder generates at once"
        )
    if spec.attention in ("full", "block_causal") and spec.mask_id is None:
        raise ValueError(f"mask_id=None in {name}: {spec.attention!r} attention needs a mask token; set its id")
    if not spec.eos_ids:
        raise ValueError(f"eos_ids=() in {name}: name at least one id that ends a completion")
    for token in (spec.mask_id, *spec.eos_ids):
        if token is not None and not 0 <= token < size:
            raise ValueError(f"{name} has the id {token}, but its vocabulary has {size} tokens: correct the id")
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is not None and not 0 <= pad < size:
        raise ValueError(
            f"{type(module).__name__}: the tokenizer's pad_token_id={pad} is outside the vocabulary of {size} tokens; "
            "set its pad_token to another token"
        )
    if spec.mask_id is not None and spec.mask_id in spec.eos_ids:  # never sampled, so that no completion could end
        raise ValueError(
            f"mask_id={spec.mask_id} in {name} is also one of eos_ids={spec.eos_ids}; give the mask a separate token"
        )
    if spec.mask_id is not None and spec.mask_id == pad:  # padding would count as a position to fill in
        raise ValueError(
            f"mask_id={spec.mask_id} in {name} is also the tokenizer's pad_token_id; set its pad_token to another token"
        )


@torch.no_grad()
def check_attention(policy: ModulePolicy) -> None:
    """Raise ValueError if the module's attention differs from the spec's.

    The check changes one token. The state of the first position must then change if and only if the first position
    should attend to this token.
    """
    attention = policy.spec.attention
    num_positions = math.inf if policy.spec.max_length is None else policy.spec.max_length
    # Position of the changed token -> whether the first position should attend to it.
    attends_to = {int(min(7, num_positions - 1)): attention == "full"}
    if attention == "block_causal" and (block := policy.spec.block_size) is not None:
        # With blocks of one token, only the next block can be tested.
        attends_to = {block - 1: True, block: False} if block > 1 else {block: False}
    size = policy.vocab_size
    for position, expected in attends_to.items():
        if position >= num_positions:  # the model has one block
            continue
        tokens = (torch.arange(position + 1, device=policy.device) % max(1, size - 1))[None].repeat(2, 1)
        if policy.spec.causal_context and policy.spec.mask_id is not None:
            # With `causal_context`, attention within a block is full only if the block has a mask token.
            tokens[:, 0] = policy.spec.mask_id
        tokens[1, -1] = (tokens[0, -1] + 1) % size
        mask = torch.ones_like(tokens[:1], dtype=torch.bool)
        # A forward for each row, because the rows of one batch may round differently. SmolLM2-135M, whose first
        # position is an attention sink, changes by only 3e-5 of its norm where its attention is made full.
        states, other_states = (policy.hidden(row[None], mask)[0].float() for row in tokens)
        first, other = states[0], other_states[0]
        if not policy.spec.encode.__module__.startswith("dllm_rl."):
            again = policy.hidden(tokens[:1], mask)[0].float()
            apart = torch.where(states == again, 0.0, states - again)  # equal infinities are not apart
            if not apart.norm() <= 1e-3 * states.norm():  # kernels may add in another order
                raise ValueError(
                    f"encode of the spec {policy.spec.name!r} returns other states when it is called again: is there "
                    f"dropout in it? F.dropout {DROPOUT}"
                )
        # A few numbers that are far above the others would hide a change of these: a log-prob of -1e6, or -inf.
        usual = first.abs() <= 1000 * first.abs()[first != 0].nanmedian()
        is_equal = bool((first - other)[usual].norm() <= 3e-6 * first[usual].norm())
        if is_equal == expected:  # unchanged although it should attend to the token, or changed although it should not
            remedy = "set the spec's attention to what its encode computes, or correct encode"
            if type(policy.module).__module__.startswith("transformers."):
                upgrade = "upgrade transformers (>= 5.2 honors config.is_causal=False)"
                remedy = upgrade if expected else "load it as a diffusion model"
            raise ValueError(
                f"attention={attention!r} is what {type(policy.module).__name__} should have, but changing token "
                f"{position} {'did not change' if expected else 'changed'} the first position's state; {remedy}"
            )


@torch.no_grad()
def check_logits(policy: ModulePolicy) -> None:
    """Raise ValueError if the policy of a masked or causal language model of transformers computes other logits than
    its class.

    The classes of one family share an output layer and the way to count positions, which training would not reveal, and
    some causal classes scale or cap their logits.
    """
    module, spec = policy.module, policy.spec
    is_stock = type(module).__module__.startswith("transformers.")  # a class of one's own may return anything
    is_causal = spec.attention == "causal" and spec.head is linear_head and is_stock
    if (spec.head is not mlm_head and not is_causal) or not isinstance(module, PreTrainedModel):
        return
    # In RoBERTa's classes, a padding token has no position.
    ids = [token for token in range(policy.vocab_size) if token not in (policy.pad_id, spec.mask_id)]
    tokens = torch.tensor([[policy.pad_id] * 2 + ids[: min(8, spec.max_length or 8)]], device=policy.device)
    mask = torch.arange(tokens.shape[1], device=policy.device)[None] >= 2
    expected = module(input_ids=tokens[:, 2:], attention_mask=mask[:, 2:].long()).logits.float()
    found = policy.logits(tokens, mask)[:, 2:].float()
    if is_causal:  # the state before a token predicts it
        found, expected = found[:, 1:], expected[:, :-1]
    if not (found - expected).norm() <= 0.02 * expected.norm():  # 16 bits round; other positions change more
        raise ValueError(
            f"{type(module).__name__} computes other logits than its family {spec.name!r}: another output layer, "
            "scaled or capped logits, other positions, or padding that is not masked; pass make_policy a FamilySpec "
            "with its encode and head"
        )


def as_causal(policy: Policy) -> ModulePolicy:
    """Return an autoregressive policy that shares the weights of a diffusion model.

    Call it to decode from left to right with a model that was converted from an autoregressive one, or that was trained
    both ways (Nemotron-Labs-Diffusion). Only the attention changes: it is causal, and the state at t-1 predicts
    position t.

    Args:
        policy: Diffusion policy of a family with `is_also_causal`.

    Returns:
        Policy with causal attention. Training one of the two changes both.

    Raises:
        ValueError: The family's weights cannot be used as an autoregressive model.
    """
    if not policy.spec.is_also_causal:
        raise ValueError(
            f"{policy.spec.name!r} models do not decode from left to right; use a model made by "
            "diffusion_from_causal, or a Nemotron-Labs-Diffusion model"
        )
    module = module_with_attention(policy, causal=True)
    spec = replace(policy.spec, attention="causal", shift=True, block_size=None, causal_context=False)
    # It is a stock causal model, but for `mask_id`, which `Autoregress` never draws.
    spec = replace(spec, is_also_causal=False, encode=encode_base, files=spec.files.of_stock_class())
    causal = _wrapped(module, policy.tokenizer, spec)
    causal.library_spec = spec  # `load_policy` opens it as a causal model, which has no mask
    for name in ("weights_version", "float32_head", "lora", "quantization", "quantization_report"):
        setattr(causal, name, getattr(policy, name))
    return causal


def module_with_attention(policy: Policy, *, causal: bool) -> Module:
    """Return a module of new layers with the policy's tensors, whose attention is causal or full."""
    module = with_new_layers(policy).module
    module.config.is_causal = causal
    vars(module.config).pop(FAMILY_FIELD, None)
    for layer in module.modules():
        if hasattr(layer, "is_causal"):
            layer.is_causal = causal
    return module


def diffusion_from_causal(path_or_id: str | Path, *, dtype: torch.dtype | str = torch.float32) -> ModulePolicy:
    """Make a masked-diffusion policy from the weights of a causal checkpoint.

    Use it to start from an autoregressive model, and train the result further with supervised steps before RL. The head
    stays shifted, as in Dream: the state at t-1 predicts position t. The mask token's embedding starts as the mean
    of all others. Attention is full. `load_policy` opens what `save_pretrained` writes.

    Args:
        path_or_id: Folder or id of a causal checkpoint.
        dtype: Dtype of the weights.

    Returns:
        Policy whose spec has shift=True.

    Raises:
        ValueError: The checkpoint is not causal.
    """
    policy = load_policy(path_or_id, dtype=dtype)
    module = policy.module
    tokenizer = policy.tokenizer
    if policy.spec.attention != "causal":
        raise ValueError(f"{path_or_id} is a diffusion model already ({type(module).__name__}); use it unchanged")
    old_size = module.config.vocab_size
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    mask_id = tokenizer.mask_token_id
    if mask_id >= old_size:  # many vocabularies are padded, and already have a row for the mask token
        with torch.random.fork_rng(devices=[]):  # transformers initializes new rows with the global RNG
            module.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    # The rows of the embedding that belong to a token other than the mask. The other rows (the mask token's, and the
    # rows after the last token, which only pad the table) are initialized with the mean of these rows.
    has_token = torch.arange(module.config.vocab_size) < min(old_size, 1 + max(tokenizer.get_vocab().values()))
    has_token[mask_id] = False
    with torch.no_grad():  # if the two tables are tied, both passes write the same row
        for table in (module.get_input_embeddings(), module.get_output_embeddings()):
            table.weight[~has_token] = table.weight[has_token].mean(0)
    module.config.is_causal = False
    vars(module.config).pop(FAMILY_FIELD, None)
    module.config.shifted_head = True  # so that `find_family` recognizes a saved copy
    module.config.mask_token_id = mask_id
    return make_policy(module, tokenizer)
