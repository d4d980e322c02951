"""Policies made of other policies: autoregressive ones of diffusion models, and the other way around."""

from dataclasses import replace
from pathlib import Path

import torch

from dllm_rl.models.base import (
    Module,
    Policy,
    encode_base,
    with_new_layers,
)
from dllm_rl.models.checkpoint.families import FAMILY_FIELD
from dllm_rl.models.load import load_policy
from dllm_rl.models.policy import ModulePolicy, make_policy, wrap_checked


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
    causal = wrap_checked(module, policy.tokenizer, spec)
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
