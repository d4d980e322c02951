"""Checks of a module and its tokenizer, before a policy of them is used."""

import math

import torch
from transformers import PreTrainedModel

from dllm_rl.models.base import (
    FamilySpec,
    Module,
    Policy,
    Tokenizer,
    linear_head,
    mlm_head,
)


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
def check_attention(policy: Policy) -> None:
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
def check_logits(policy: Policy) -> None:
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
