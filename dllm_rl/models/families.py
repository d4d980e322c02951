"""Which family a config belongs to, and the few facts in which families differ."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

Attention = Literal["full", "block_causal", "causal"]


def encode_base(
    module: nn.Module, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], positions: Int[Tensor, "B T"]
) -> Float[Tensor, "B T D"]:
    """The final hidden states of a stock module's backbone."""
    outputs = module.base_model(input_ids=tokens, attention_mask=attention_mask, position_ids=positions)
    return outputs.last_hidden_state


def encode_roberta(
    module: nn.Module, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], positions: Int[Tensor, "B T"]
) -> Float[Tensor, "B T D"]:
    """RoBERTa counts positions from pad_token_id + 1."""
    return encode_base(module, tokens, attention_mask, positions + module.config.pad_token_id + 1)


def linear_head(module: nn.Module, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    return module.get_output_embeddings()(hidden)


def mlm_head(module: nn.Module, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
    """BERT-type heads transform before they project."""
    return (module.cls if hasattr(module, "cls") else module.lm_head)(hidden)


@dataclass(frozen=True)
class FamilySpec:
    """What the library must know of a backbone; after loading nobody asks what it is again.

    attention   "full", "block_causal" (blocks of `block_size`, aligned to the first position) or "causal".
    shift       the state at t-1 predicts position t.
    mask_id     token id of the mask; None for causal models.
    eos_ids     ids that end a completion.
    max_length  longest sequence the model can take, in tokens; None if unknown.
    encode, head  module, tokens, attention mask, positions -> hidden states; module, hidden states -> logits.
    """

    name: str
    attention: Attention
    shift: bool = False
    block_size: int | None = None
    mask_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    max_length: int | None = None
    encode: Callable = encode_base
    head: Callable = linear_head


MASKED_LM = FamilySpec("masked_lm", "full", head=mlm_head)
ROBERTA = replace(MASKED_LM, name="roberta", encode=encode_roberta)
DIFFUSION_LM = FamilySpec("diffusion_lm", "full")  # a causal class with config.is_causal=False
CAUSAL_LM = FamilySpec("causal_lm", "causal", shift=True)


def family_of(config) -> FamilySpec:
    """The family that a config describes. Raises ValueError for an architecture that is not known."""
    architecture = (getattr(config, "architectures", None) or ["?"])[0]
    if "Roberta" in architecture and architecture.endswith("ForMaskedLM"):
        return ROBERTA
    if architecture.endswith("ForMaskedLM"):
        return MASKED_LM
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return CAUSAL_LM if getattr(config, "is_causal", True) else DIFFUSION_LM
    raise ValueError(f"architectures={architecture!r} is not known; known are ...ForMaskedLM and ...ForCausalLM classes")


def spec_of(config, tokenizer: PreTrainedTokenizerBase) -> FamilySpec:
    """The family's spec, with the ids and limits of this checkpoint filled in.

    Raises ValueError when a diffusion model has no mask token or one outside its vocabulary.
    """
    spec = family_of(config)
    eos = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    mask_id = None
    if spec.attention != "causal":
        mask_id = getattr(config, "mask_token_id", None)
        mask_id = tokenizer.mask_token_id if mask_id is None else mask_id
        if mask_id is None:
            raise ValueError("mask_token_id is neither in the config nor in the tokenizer; set config.mask_token_id")
        if not 0 <= mask_id < config.vocab_size:
            raise ValueError(f"mask_token_id={mask_id} is outside the vocabulary of {config.vocab_size} tokens")
    return replace(spec, eos_ids=eos_ids, mask_id=mask_id, max_length=getattr(config, "max_position_embeddings", None))


def load_module(path_or_id: str | Path, *, dtype: torch.dtype) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The stock module and tokenizer of a checkpoint, with every tensor accounted for.

    Raises ValueError when tensors are missing from the checkpoint or have no place in the module.
    """
    config = AutoConfig.from_pretrained(path_or_id)
    family = family_of(config)
    auto = AutoModelForMaskedLM if family.head is mlm_head else AutoModelForCausalLM
    module, report = auto.from_pretrained(path_or_id, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"{path_or_id}: {kind} {sorted(map(str, report[kind]))[:5]}; the checkpoint is not a {family.name}")
    return module, AutoTokenizer.from_pretrained(path_or_id)
