"""Small models made from scratch: stock transformers classes with a character-level tokenizer."""

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers  # whose classes are imported on first use, which takes seconds
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Generator, nn
from transformers import PreTrainedTokenizerBase

from dllm_rl.models.base import Policy

PAD = "<pad>"
MASK = "<mask>"
EOS = "<eos>"


def char_tokenizer(characters: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token per character, after <pad> 0, <mask> 1, <eos> 2.

    Encoding an unknown character raises an exception. Decoding is exact.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, MASK, EOS, *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")  # `.` does not match newlines
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, mask_token=MASK, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def tiny_masked_lm(  # noqa: PLR0913
    *,
    characters: str,
    seed: int = 0,
    hidden_size: int = 96,
    num_layers: int = 3,
    num_heads: int = 4,
    intermediate_size: int = 384,
    max_length: int = 64,
    embedding_std: float = 0.3,
    head_std: float = 0.02,
    gain: float = 0.7,
) -> Policy:
    """Make a small masked-diffusion policy with random weights: a pre-norm RoBERTa.

    Use it for tests and for training in minutes: with its learned position embeddings it learns grids fastest. Use
    `tiny_llama` for a model in the layout of LLaDA.

    Args:
        characters: All characters of prompts and completions, one token each.
        seed: Seed of the weights.
        hidden_size: Width of the model.
        num_layers: Number of blocks.
        num_heads: Number of attention heads of a block.
        intermediate_size: Width between a block's two feed-forward layers.
        max_length: Longest prompt plus completion, in tokens.
        embedding_std: Initial standard deviation of the embeddings.
        head_std: Initial standard deviation of the head.
        gain: Initial standard deviation of the other weights, times sqrt(inputs).
    """
    tokenizer = char_tokenizer(characters)
    positions = max_length + 1  # counted from pad_token_id + 1
    config = transformers.RobertaPreLayerNormConfig(
        **_common_fields(tokenizer, False, hidden_size, num_layers, num_heads, positions),
        intermediate_size=intermediate_size,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _make_policy(
        transformers.RobertaPreLayerNormForMaskedLM, config, tokenizer, seed, embedding_std, head_std, gain
    )


def tiny_llama(  # noqa: PLR0913
    *,
    characters: str,
    causal: bool,
    seed: int = 0,
    hidden_size: int = 96,
    num_layers: int = 3,
    num_heads: int = 4,
    intermediate_size: int = 256,
    max_length: int = 64,
    rope_theta: float = 100.0,
    embedding_std: float = 0.3,
    head_std: float = 0.02,
    gain: float = 0.7,
) -> Policy:
    """Make a small Llama policy with random weights: causal, or bidirectional in the layout of LLaDA.

    Use it to test code for causal models, or for models with rotary positions.

    Args:
        characters: All characters of prompts and completions, one token each.
        causal: True for an autoregressive model, False for a masked-diffusion one.
        seed: Seed of the weights.
        hidden_size: Width of the model.
        num_layers: Number of blocks.
        num_heads: Number of attention heads of a block.
        intermediate_size: Width between a block's two feed-forward layers.
        max_length: Longest prompt plus completion, in tokens.
        rope_theta: Base of the rotary positions' wavelengths.
        embedding_std: Initial standard deviation of the embeddings.
        head_std: Initial standard deviation of the head.
        gain: Initial standard deviation of the other weights, times sqrt(inputs).
    """
    tokenizer = char_tokenizer(characters)
    fields = _common_fields(tokenizer, causal, hidden_size, num_layers, num_heads, max_length)
    fields |= {"rope_theta": rope_theta, "is_causal": causal}  # transformers >= 5.2 honors is_causal
    config = transformers.LlamaConfig(**fields, intermediate_size=intermediate_size)
    return _make_policy(transformers.LlamaForCausalLM, config, tokenizer, seed, embedding_std, head_std, gain)


def tiny_moe(  # noqa: PLR0913
    *,
    characters: str,
    causal: bool = False,
    seed: int = 0,
    hidden_size: int = 96,
    num_layers: int = 3,
    num_heads: int = 4,
    intermediate_size: int = 128,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    max_length: int = 64,
    rope_theta: float = 100.0,
    embedding_std: float = 0.3,
    head_std: float = 0.02,
    gain: float = 0.7,
) -> Policy:
    """Make a small Qwen3-MoE policy with random weights: bidirectional in the layout of LLaDA-MoE, or causal.

    Use it to test code for mixtures of experts; every block has experts.

    Args:
        characters: All characters of prompts and completions, one token each.
        causal: True for an autoregressive model, False for a masked-diffusion one.
        seed: Seed of the weights.
        hidden_size: Width of the model.
        num_layers: Number of blocks.
        num_heads: Number of attention heads of a block.
        intermediate_size: Width between an expert's layers.
        num_experts: Number of experts of a block.
        num_experts_per_tok: Number of experts of a token.
        max_length: Longest prompt plus completion, in tokens.
        rope_theta: Base of the rotary positions' wavelengths.
        embedding_std: Initial standard deviation of the embeddings.
        head_std: Initial standard deviation of the head.
        gain: Initial standard deviation of the other weights, times sqrt(inputs).
    """
    tokenizer = char_tokenizer(characters)
    fields = _common_fields(tokenizer, causal, hidden_size, num_layers, num_heads, max_length)
    fields |= {"rope_theta": rope_theta, "head_dim": hidden_size // num_heads, "is_causal": causal}
    config = transformers.Qwen3MoeConfig(
        **fields,
        num_key_value_heads=num_heads,
        moe_intermediate_size=intermediate_size,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=True,
    )
    return _make_policy(transformers.Qwen3MoeForCausalLM, config, tokenizer, seed, embedding_std, head_std, gain)


def tiny_diffusion_gemma(  # noqa: PLR0913
    *,
    characters: str,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int = 128,
    num_experts: int = 2,
    num_experts_per_tok: int = 1,
    expert_size: int = 64,
    canvas_length: int = 16,
    sliding_window: int = 64,
    softcap: float = 30.0,
    max_length: int = 128,
    rope_theta: float = 100.0,
    embedding_std: float = 0.1,
    gain: float = 0.7,
) -> Policy:
    """Make a small DiffusionGemma policy with random weights: an encoder of the text, and a decoder of a noisy canvas.

    Use it to test `renoise`.

    Args:
        characters: All characters of prompts and completions, one token each.
        seed: Seed of the weights.
        hidden_size: Width of the model.
        num_layers: Number of blocks. The last has full attention, the others a sliding window.
        num_heads: Number of attention heads of a block.
        intermediate_size: Width between a block's two feed-forward layers.
        num_experts: Number of experts of a block, in addition to the feed-forward layers.
        num_experts_per_tok: Number of experts of a token.
        expert_size: Width between an expert's layers.
        canvas_length: Number of tokens that are denoised together.
        sliding_window: Number of tokens that a sliding layer's encoder sees.
        softcap: Largest absolute value of the logits.
        max_length: Longest prompt plus completion, in tokens.
        rope_theta: Base of the rotary positions' wavelengths.
        embedding_std: Initial standard deviation of the embeddings, which are also the head's weights.
        gain: Initial standard deviation of the other weights, times sqrt(inputs).
    """
    tokenizer = char_tokenizer(characters)
    head_dim = hidden_size // num_heads
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    text = {
        **_common_fields(tokenizer, True, hidden_size, num_layers, num_heads, max_length),
        "intermediate_size": intermediate_size,
        "num_key_value_heads": num_heads,
        "head_dim": head_dim,
        "global_head_dim": head_dim,
        "num_experts": num_experts,
        "top_k_experts": num_experts_per_tok,
        "moe_intermediate_size": expert_size,
        "sliding_window": sliding_window,
        "layer_types": ["sliding_attention"] * (num_layers - 1) + ["full_attention"],
        "rope_parameters": {"sliding_attention": rope, "full_attention": rope},
        "final_logit_softcapping": softcap,
        "tie_word_embeddings": True,
    }
    # The class has a vision model, whose default has 167 million weights.
    vision: dict[str, Any] = {
        "model_type": "gemma4_vision",
        "hidden_size": 8,
        "intermediate_size": 8,
        "head_dim": 8,
        "position_embedding_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "patch_size": 2,
    }
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=canvas_length)
    make = transformers.DiffusionGemmaForBlockDiffusion
    return _make_policy(make, config, tokenizer, seed, embedding_std, embedding_std, gain)


def _common_fields(
    tokenizer: PreTrainedTokenizerBase, causal: bool, hidden_size: int, num_layers: int, num_heads: int, max_length: int
) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,  # the classes' default ids belong to other vocabularies
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": None if causal else tokenizer.mask_token_id,
    }


@torch.no_grad()
def _make_policy(make: Callable, config: Any, tokenizer: PreTrainedTokenizerBase, seed: int, *scales: float) -> Any:
    """Return the policy of a module with random weights.

    `scales` are embedding_std, head_std and gain. Matrices in blocks have the standard deviation gain / sqrt(fan_in).
    """
    from dllm_rl.models.policy import make_policy  # not at the top: the import takes seconds

    with torch.random.fork_rng(devices=[]):  # transformers initializes from the global RNG
        module = make(config)
    generator = Generator().manual_seed(seed)
    embedding_std, head_std, gain = scales
    # With the default of the classes, a std of 0.02 everywhere, a model of this size does not learn Sudoku in minutes.
    head = module.get_output_embeddings()
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            layer.weight.normal_(0, embedding_std, generator=generator)
        elif isinstance(layer, nn.Linear):
            std = head_std if layer is head else gain / math.sqrt(layer.in_features)
            layer.weight.normal_(0, std, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
        else:  # routers, and experts in stacks
            for weight in layer.parameters(recurse=False):
                if weight.dim() > 1:
                    weight.normal_(0, gain / math.sqrt(weight.shape[-1]), generator=generator)
    return make_policy(module, tokenizer)
