"""Tiny checkpoints with random weights, in the layouts of published models, to rehearse a run on a laptop."""

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dllm_rl.models.base import FamilySpec
from dllm_rl.models.checkpoint.families import find_family
from dllm_rl.models.checkpoint.loading import class_and_config, family_spec, load_config, prepare_in_place, save_module
from dllm_rl.models.tiny import random_module
from dllm_rl.records import nearest_hint
from dllm_rl.tasks import GSM8K, Countdown, Sudoku

# The published model whose config.json gives the layout, and the fields that differ from it.
PARAGRAPH = (
    "Water never stays in one place for long. The sun warms the sea, and some of the water rises into the air as "
    "vapor, which nobody can see. High above the ground the air is cold, and there the vapor turns into small drops "
    "that form a cloud. The wind carries the cloud over the land. When the drops become too heavy, they fall as rain, "
    "or as snow if it is cold enough. Some of the rain flows down the hills into a river, and the river takes it back "
    "to the sea. The rest sinks into the ground, where the roots of trees and other plants drink it. In this way the "
    "same water has moved around the world for many millions of years, and the glass of water on your table may once "
    "have been part of a cloud."
)
CHAT = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris. It lies on the river Seine."},
)

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llada": ("GSAI-ML/LLaDA-8B-Instruct", {}),
    "llada_moe": ("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", {}),
    "llada2": ("inclusionAI/LLaDA2.0-mini", {}),
    "dream": ("Dream-org/Dream-v0-Instruct-7B", {}),
    "rnd1": ("radicalnumerics/RND1-Base-0910", {}),
    "a2d": ("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", {}),
    "sdar": ("Qwen/Qwen3-8B", {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "block_size": 4}),
    "stable_diffcoder": ("ByteDance-Seed/Stable-DiffCoder-8B-Instruct", {}),
    "nemotron": ("nvidia/Nemotron-Labs-Diffusion-8B", {}),
    "diffusion_gemma": ("google/diffusiongemma-26B-A4B-it", {}),
    "qwen3": ("Qwen/Qwen3-8B", {}),
}
# What replaces the sizes of a config, wherever it has such a field.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layers"), 2),
    **dict.fromkeys(("hidden_size", "d_model"), 64),
    **dict.fromkeys(("num_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "mlp_hidden_size", "dense_intermediate_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "topk_group"), 2),
    **{"num_experts": 8, "n_group": 4, "layer_types": ["sliding_attention", "full_attention"]},
    **{"patch_size": 2, "position_embedding_size": 8},  # of a model that also reads images
}
NUM_TOKENS = 1024
END, START, IMAGE = "<|endoftext|>", "<|start|>", "<|image|>"
# Each message begins with the token START and its role, and ends with the token that ends the model's turns.
TEMPLATE = (
    "{%% for message in messages %%}{{ '%(start)s' + message['role'] + '\n' + message['content'] + '%(end)s\n' }}"
    "{%% endfor %%}{%% if add_generation_prompt %%}{{ '%(start)sassistant\n' }}{%% endif %%}"
)


def tiny_checkpoint(layout: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny checkpoint with random weights in the layout of a published model, with a tokenizer and a template.

    Use it to rehearse a script for a large model on a laptop: `--model FOLDER`. The config, the names of the tensors,
    the mask token, the attention and the shift are those of the published model; sizes, token ids and the tokenizer,
    which has about 700 bytes and subwords of English, are not. It has 100,000 to 350,000 weights in bf16.

    Args:
        layout: "llada", "llada_moe", "llada2", "dream", "rnd1", "a2d" (Tiny-A2D), "sdar", "stable_diffcoder",
            "nemotron", "diffusion_gemma", or "qwen3", which is autoregressive.
        folder: Where to write the checkpoint. It is made, and must not have a checkpoint yet.
        seed: Seed of the weights.

    Returns:
        The folder.

    Raises:
        ValueError: The layout is unknown, or the folder is not empty.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}{nearest_hint(layout, LAYOUTS, '{!r}')}")
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder={str(folder)!r} exists and is not empty; give another one")
    hub_id, changes = LAYOUTS[layout]
    raw = load_config(hub_id) | changes
    family = find_family(raw)
    tokenizer = _tokenizer(family)
    raw = _shrunk(raw, tokenizer, family)
    cls, config = class_and_config(raw, family)
    module = prepare_in_place(random_module(cls, config, seed), family)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    spec = family_spec(module.config, tokenizer, raw=raw)
    save_module(module, tokenizer, spec, folder, stock=False, custom=False)
    return folder


def _tokenizer(family: FamilySpec) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and frequent subwords, with single digits, and the family's special tokens."""
    end, mask = _turn_end(family), _mask(family)
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        show_progress=False,
        special_tokens=[AddedToken(name, special=True) for name in dict.fromkeys([END, START, IMAGE, end, mask])],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = [PARAGRAPH, *(message["content"] for message in CHAT), Sudoku.text, Countdown.text, GSM8K.text]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=TEMPLATE % {"start": START, "end": end},
        clean_up_tokenization_spaces=False,
    )


def _turn_end(family: FamilySpec) -> str:
    return next(iter(family.files.end_tokens), END)


def _mask(family: FamilySpec) -> str:
    return next(iter(family.files.mask_names), "<|mask|>")


def _shrunk(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast, family: FamilySpec) -> dict[str, Any]:
    """Return a config with small sizes and the ids of the tokenizer, at any depth."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (END, IMAGE, _mask(family))}
    names = {"eos": END, "pad": END, "bos": END, "mask": _mask(family)}
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            small[name] = _shrunk(value, tokenizer, family)
        elif name.endswith("_token_id"):
            small[name] = ids[names.get(name.removesuffix("_token_id"), IMAGE)]
        elif name in ("vocab_size", "embedding_size"):  # larger than the tokenizer's, as the published ones are
            small[name] = 64 * math.ceil((len(tokenizer) + 1) / 64)
        else:
            small[name] = SIZES.get(name, value)
    return small
