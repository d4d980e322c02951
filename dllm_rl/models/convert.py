"""Conversion of a causal language model to a masked-diffusion one: the same weights, un-causaled, and a mask token."""

import copy
from pathlib import Path

import torch

from dllm_rl.models.policy import AutoregressivePolicy, DiffusionPolicy, load_policy, make_policy

MASK = "<|mask|>"


def to_diffusion(policy: AutoregressivePolicy | DiffusionPolicy) -> DiffusionPolicy:
    """A masked-diffusion policy on a copy of a causal policy's weights, to be trained further by a warm-up.

    The head stays shifted, as in Dream: the state at t-1 predicts position t. The mask token's embedding starts as the
    mean of all others. `save_pretrained` writes a stock folder for `load_policy`. Raises ValueError for other policies.
    """
    if policy.spec.attention != "causal":
        raise ValueError(f"policy is a diffusion model already ({type(policy.module).__name__}); use it as it is")
    module = copy.deepcopy(policy.module)
    tokenizer = copy.deepcopy(policy.tokenizer)
    old = module.config.vocab_size
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    mask_id = tokenizer.mask_token_id
    if mask_id >= old:  # many vocabularies are padded, and have a row for it already
        with torch.random.fork_rng(devices=[]):  # transformers fills new rows from the global RNG
            module.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    with torch.no_grad():
        for table in (module.get_input_embeddings(), module.get_output_embeddings()):  # tied tables get the same row
            table.weight[min(old, mask_id) :] = table.weight[: min(old, mask_id)].mean(0)
    module.config.is_causal = False
    module.config.shifted_head = True  # so that `find_family` knows a saved copy
    module.config.mask_token_id = mask_id
    converted = make_policy(module, tokenizer)
    assert isinstance(converted, DiffusionPolicy), "its config says so"
    return converted


def diffusion_from_causal(path_or_id: str | Path, *, dtype: torch.dtype | str = torch.float32) -> DiffusionPolicy:
    """`to_diffusion` of a checkpoint, as a recipe's model.

    dtype  of the weights
    """
    return to_diffusion(load_policy(path_or_id, dtype=dtype))
