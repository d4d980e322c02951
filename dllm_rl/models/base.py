"""What the library must know of a backbone, and the few functions in which backbones differ when they run."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from dllm_rl.models.lora import Lora

Module = Any  # transformers' or a user's own; nn.Module would type all that it holds as Tensor | Module
Attention = Literal["full", "block_causal", "causal"]

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_LINEARS = ("query", "key", "value", "dense", "Wqkv", "Wo", "Wi")


def position_ids(attention_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Each token's place among the row's real ones, from 0; padding on the left is at 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def encode_base(
    module: Module,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B S"] | Bool[Tensor, "B 1 T S"] | Float[Tensor, "B 1 T S"],
    positions: Int[Tensor, "B T"],
    **cache: Any,
) -> Float[Tensor, "B T D"]:
    """The final hidden states of a stock module's backbone. `cache` may bring keys and values of other columns, which
    then come first among the S that a mask of four axes is about; without it no keys or values are kept."""
    given = {"attention_mask": attention_mask, "position_ids": positions, "use_cache": False} | cache
    outputs = module.base_model(input_ids=tokens, **given)
    return outputs.last_hidden_state


def encode_roberta(
    module: Module,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"] | Float[Tensor, "B 1 T S"],
    positions: Int[Tensor, "B T"],
    **cache: Any,
) -> Float[Tensor, "B T D"]:
    """RoBERTa counts positions from pad_token_id + 1."""
    return encode_base(module, tokens, attention_mask, positions + module.config.pad_token_id + 1, **cache)


def block_causal_mask(
    attention_mask: Bool[Tensor, "B T"], positions: Int[Tensor, "B T"], block_size: int
) -> Bool[Tensor, "B 1 T T"]:
    """Query q may see key k when k is no padding and floor(position_k / block) <= floor(position_q / block).

    Positions count the tokens that are no padding, so blocks start at the first token of a row wherever it is padded.
    """
    block = positions // block_size
    return (attention_mask[:, None, :] & (block[:, None, :] <= block[:, :, None]))[:, None]


def encode_block_causal(
    module: Module,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B S"] | Bool[Tensor, "B 1 T S"] | Float[Tensor, "B 1 T S"],
    positions: Int[Tensor, "B T"],
    *,
    block_size: int,
    **cache: Any,
) -> Float[Tensor, "B T D"]:
    """The final hidden states under the block-causal mask, or under a mask of four axes as it is given."""
    if attention_mask.dim() == 2:
        attention_mask = block_causal_mask(attention_mask, positions, block_size)
    return encode_base(module, tokens, attention_mask, positions, **cache)


def output_embeddings(module: Module) -> Any:
    """The layer that projects on the vocabulary; None where a module does not say which one that is."""
    return module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None


def linear_head(module: Module, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    return module.get_output_embeddings()(hidden)


def mlm_head(module: Module, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    """BERT-type heads transform before they project."""
    if hasattr(module, "decoder"):  # ModernBERT
        return module.decoder(module.head(hidden))
    return next(getattr(module, name) for name in ("cls", "lm_head", "predictions") if hasattr(module, name))(hidden)


@dataclass(frozen=True)
class FamilySpec:
    """One family of checkpoints. After loading, family differences are hidden behind the policy.

    attention    "full", "block_causal" (blocks of `block_size`, aligned to a row's first token) or "causal".
    shift        the state at t-1 predicts position t.
    mask_id      token id of the mask; None for causal models. In a family's table, the id in its own vocabulary, of
                 `mask_vocabulary` tokens; `mask_names` are what a tokenizer that declares no mask token may call it.
    eos_ids      ids that end a completion.
    max_length   longest sequence the model can take, in tokens; None if unknown.
    vocab_size   number of its logits; None: what the module's config says.
    encode, head module, tokens, attention mask, positions -> hidden states; module, hidden states -> logits.
    lora_targets names of the linear layers of a block that LoRA adapts unless told otherwise.

    How a checkpoint is recognised and read:
    architectures  values of the config's `architectures` field (a suffix, when it starts with "*").
    when           further test of the config's fields.
    native         config fields -> (stock class, its config); None when the checkpoint is a stock one.
    names          (original, stock) module or tensor names, `*` standing for a number; names not listed are the same.
    fused_qkv      original name of a projection that holds query, key and value rows one after the other.
    float32_rope   rotary embeddings are applied in fp32 whatever the weights' dtype.
    ignored        patterns of tensors in the checkpoint that the model has no use for.
    end_tokens     tokens that end a completion besides the config's eos, where the tokenizer has them.
    original       the checkpoint's own config fields, written back on saving; None for stock ones.
    source         folder that the checkpoint came from.
    """

    name: str
    attention: Attention
    shift: bool = False
    block_size: int | None = None
    mask_id: int | None = None
    mask_vocabulary: int | None = None
    mask_names: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] = ()
    max_length: int | None = None
    vocab_size: int | None = None
    encode: Callable = encode_base
    head: Callable = linear_head
    lora_targets: tuple[str, ...] = LLAMA_LINEARS
    architectures: tuple[str, ...] = ()
    when: Callable[[dict], bool] = lambda config: True
    native: Callable[[dict], tuple] | None = None
    names: tuple[tuple[str, str], ...] = ()
    fused_qkv: str | None = None
    float32_rope: bool = False
    ignored: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()
    original: dict | None = field(default=None, compare=False, repr=False)
    source: str | None = field(default=None, compare=False, repr=False)

    def recognises(self, config: dict) -> bool:
        """Whether a checkpoint with these config fields is of this family."""
        names = config.get("architectures") or [""]
        fits = lambda a: names[0].endswith(a[1:]) if a.startswith("*") else names[0] == a  # noqa: E731
        return any(map(fits, self.architectures)) and self.when(config)


@runtime_checkable
class Head(Protocol):
    """What makes logits of hidden states: all that scoring a token asks of a policy."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def head(self, hidden: Tensor) -> Tensor: ...


@runtime_checkable
class Policy(Head, Protocol):
    """A model, its tokenizer, and all that samplers, estimators, quantisation and the loop ask of it.

    version       counts weight updates.
    float32_head  logits of a model in 16 bits are computed in fp32.
    gradient_checkpointing  the backward runs each block again, in place of keeping what it needs.
    records_experts  samplers note which experts of its mixtures tokens went to (`Rollout.experts`).
    lora          the adapters that are trained in place of the weights, or None.
    quantization  config that a rollout's copy was made with, or None; quantization_report: what that did, or None.
    """

    module: Module
    spec: FamilySpec
    tokenizer: PreTrainedTokenizerBase
    version: int
    float32_head: bool
    gradient_checkpointing: bool
    records_experts: bool
    lora: "Lora | None"
    quantization: Any
    quantization_report: Any

    @property
    def pad_id(self) -> int: ...

    def encode(self, tokens: Tensor, attention_mask: Tensor, positions: Tensor, **cache: Any) -> Tensor: ...

    def hidden(self, tokens: Tensor, attention_mask: Tensor) -> Tensor: ...

    def logits(self, tokens: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> Tensor: ...

    def to(self, device: torch.device | str) -> "Policy": ...

    def save_pretrained(self, directory: str | Path, *, max_shard_size: int = ...) -> None: ...

    def reference(self) -> "Policy": ...


def whole(tensor: Tensor) -> Tensor:
    """The tensor; of one that several processes hold between them, all of it, gathered by all of them together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copied(policy: Policy) -> Policy:
    """The same policy over a copy of its module."""
    twin = copy.copy(policy)
    twin.module = copy.deepcopy(policy.module)
    return twin
