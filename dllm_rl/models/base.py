"""The library's interface to a backbone, and the functions in which backbones differ."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Module = Any  # transformers' or custom; nn.Module would type every member as Tensor | Module
Tokenizer = Any  # transformers' or custom: `make_policy` lists what it needs
Attention = Literal["full", "block_causal", "causal", "encoder_decoder"]
Tokens = Int[Tensor, "B T"]
# Two axes: False on padding, over the cache's columns and then the T new ones. Four axes replace the family's own mask.
Mask = Bool[Tensor, "B S"] | Bool[Tensor, "B 1 T S"] | Float[Tensor, "B 1 T S"]
States = Float[Tensor, "B T D"]

# The keyword under which transformers' forwards take the keys and values of earlier columns; 5.24 renamed it.
CACHE = "cache" if tuple(map(int, version("transformers").split(".")[:2])) >= (5, 24) else "past_key_values"

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_LINEARS = ("query", "key", "value", "dense", "Wqkv", "Wo", "Wi")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """W + (alpha / r) B A on linear layers of the blocks: A is random, B zero, so that nothing changes at first.

    Args:
        r: Rank of the adapters.
        alpha: Their scale, times r.
        targets: Names of layers (`q_proj`), or full paths; None: the family's list. Routers, embeddings, heads have
            none.
        experts: Adapt each expert of a stack too.
        dropout: Share of the adapters' inputs that is dropped, in differentiated forwards only; 0 with `experts`.
        seed: Of A, and of dropout.

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
        if self.experts and self.dropout:  # merged weights see no single input that could be dropped
            raise ValueError(f"lora.dropout={self.dropout}: adapters on experts are merged in a forward; set it to 0")


def position_ids(attention_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Each token's place among the row's unpadded tokens, from 0; padding on the left is at 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def encode_base(
    module: Module,
    tokens: Tokens,
    attention_mask: Mask,
    positions: Tokens,
    *,
    cache: Any = None,
    use_cache: bool = False,
) -> States:
    """The final hidden states of a stock module's backbone; the cache's columns come first among the mask's S.

    Args:
        cache: Transformers' Cache of the keys and values of earlier columns, to which those of `tokens` are added.
        use_cache: Whether the module may keep keys and values at all; samplers with a cache say True.
    """
    given = {"attention_mask": attention_mask, "position_ids": positions, "use_cache": use_cache}
    if cache is not None:
        given[CACHE] = cache
    return module.base_model(input_ids=tokens, **given).last_hidden_state


def encode_roberta(module: Module, tokens: Tokens, attention_mask: Mask, positions: Tokens, **kept: Any) -> States:
    """RoBERTa counts positions from pad_token_id + 1. kept: `cache` and `use_cache`, as for `encode_base`."""
    return encode_base(module, tokens, attention_mask, positions + module.config.pad_token_id + 1, **kept)


def block_ranks(spec: "FamilySpec", tokens: Tokens, positions: Tokens) -> tuple[Tokens, Tokens]:
    """Each token's rank as a key and as a query, which sees the keys of at most its rank: floor(position / block). With
    `causal_context` the rank is the position, but the block's first one for a key whose block holds a mask.
    """
    assert spec.block_size is not None, "a block-causal family has a block size"
    block = positions // spec.block_size
    if not spec.causal_context or spec.mask_id is None:
        return block, block
    closed = torch.zeros_like(block).scatter_add(1, block, tokens.eq(spec.mask_id).long()).gather(1, block) == 0
    return torch.where(closed, positions, block * spec.block_size), positions


def block_causal_mask(attention_mask: Bool[Tensor, "B T"], key: Tokens, query: Tokens) -> Bool[Tensor, "B 1 T T"]:
    """Query q may see key k when k is no padding and rank_k <= rank_q (`block_ranks`)."""
    return (attention_mask[:, None, :] & (key[:, None, :] <= query[:, :, None]))[:, None]


def encode_block_causal(
    module: Module, tokens: Tokens, attention_mask: Mask, positions: Tokens, *, spec: "FamilySpec", **kept: Any
) -> States:
    """The final hidden states under the block-causal mask, or under a given mask of four axes. kept: `cache` and
    `use_cache`, as for `encode_base`.
    """
    if attention_mask.dim() == 2:  # a mask of four axes is whole: a cache's, or a packed forward's
        attention_mask = block_causal_mask(attention_mask, *block_ranks(spec, tokens, positions))
    return encode_base(module, tokens, attention_mask, positions, **kept)


def output_embeddings(module: Module) -> Any:
    """The layer that projects on the vocabulary; None where a module does not name it."""
    return module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None


def linear_head(module: Module, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    return module.get_output_embeddings()(hidden)


def mlm_head(module: Module, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    """BERT-type heads transform before they project."""
    if hasattr(module, "decoder"):  # ModernBERT
        return module.decoder(module.head(hidden))
    name = next(name for name in ("cls", "lm_head", "predictions") if hasattr(module, name))  # BERT, RoBERTa, ALBERT
    return getattr(module, name)(hidden)


@dataclass(frozen=True)
class FamilySpec:
    """One family of checkpoints."""

    name: str
    # "block_causal": blocks of `block_size`, aligned to a row's first token. "encoder_decoder": blocks behind an
    # encoder's cache, whose noise is random tokens (`models.denoiser`).
    attention: Attention
    shift: bool = False  # the state at t-1 predicts position t
    block_size: int | None = None  # positions of a block; None where there are no blocks
    causal_context: bool = False  # "block_causal": a block without a mask is causal
    mask_id: int | None = None  # token id of the mask; None for causal models, and where noise is random tokens
    mask_vocabulary: int | None = None  # a family's mask_id is for so many tokens
    mask_names: tuple[str, ...] = ()  # the mask's texts, for a tokenizer that declares no mask token
    eos_ids: tuple[int, ...] = ()  # ids that end a completion
    max_length: int | None = None  # longest sequence in tokens; None if unknown
    vocab_size: int | None = None  # number of logits; None: the module's config has it
    encode: Callable = encode_base  # module, tokens, attention mask, positions -> hidden states
    head: Callable = linear_head  # module, hidden states -> logits
    lora_targets: tuple[str, ...] = LLAMA_LINEARS  # linear layers of a block that LoRA adapts by default
    architectures: tuple[str, ...] = ()  # values of the config's `architectures` field; `*` for any text
    config_test: Callable[[dict], bool] = lambda config: True  # further test of the config's fields
    stock_model: Callable[[dict], tuple] | None = (
        None  # config fields -> (stock class, its config); None: already stock
    )
    tensor_names: tuple[tuple[str, str], ...] = ()  # (original, stock) where they differ; `*` for a number
    fused_qkv: str | None = None  # a projection with query, key and value rows in this order
    float32_rope: bool = False  # rotary embeddings are applied in fp32 whatever the weights' dtype
    ignored_tensors: tuple[str, ...] = ()  # patterns of the checkpoint's unused tensors
    end_tokens: tuple[str, ...] = ()  # further tokens that end a completion, where the tokenizer has them
    original_config: dict | None = field(default=None, compare=False, repr=False)  # config written back; None: stock
    checkpoint_folder: str | None = field(default=None, compare=False, repr=False)  # folder of the checkpoint

    def matches(self, config: dict) -> bool:
        name = (config.get("architectures") or [""])[0]
        return any(fnmatchcase(name, pattern) for pattern in self.architectures) and self.config_test(config)


@runtime_checkable
class Head(Protocol):
    """Hidden states -> logits: all that scoring a token needs of a policy."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def head(self, hidden: Tensor) -> Tensor: ...


@runtime_checkable
class Policy(Head, Protocol):
    """A model, its tokenizer, and all that samplers, estimators, quantisation and the loop need of it."""

    module: Module
    spec: FamilySpec
    tokenizer: Tokenizer
    weights_version: int  # counts weight updates
    float32_head: bool  # logits of a model in 16 bits (or under autocast) are in fp32
    gradient_checkpointing: bool  # blocks run twice: a third more work, far less memory, same gradients
    records_experts: bool  # samplers record the experts of each token (`Rollout.experts`)
    lora: Lora | None  # the adapters that are trained instead of the weights
    quantization: Any  # config of a rollout's copy, or None
    quantization_report: Any  # its effect, or None

    @property
    def pad_id(self) -> int: ...
    def encode(self, tokens: Tensor, attention_mask: Tensor, positions: Tensor, **kept: Any) -> Tensor: ...
    def hidden(self, tokens: Tensor, attention_mask: Tensor) -> Tensor: ...
    def logits(self, tokens: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> Tensor: ...
    def to(self, device: torch.device | str) -> "Policy": ...
    def save_pretrained(self, directory: str | Path, *, max_shard_size: int = ...) -> None: ...
    def reference(self) -> "Policy": ...


def trained_of(module: Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def has_bf16_products() -> bool:
    """Whether this machine's CPU multiplies in bf16; else torch emulates it, some products at a 60th of fp32's rate."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers are finite. Makes no copy of the tensor: a NaN is both of its extremes."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def frozen_of(module: Module) -> list[str]:
    """Names of the weights that are not trained."""
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; all processes gather a sharded one together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copied(policy: Policy) -> Policy:
    """The same policy over a copy of its module."""
    twin = copy.copy(policy)
    twin.module = copy.deepcopy(policy.module)
    return twin
