"""Small models made from scratch: stock transformers classes with a character-level tokenizer."""

import math
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Generator, nn

from dllm_rl.models.base import Policy
from dllm_rl.records import nearest_hint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD = "<pad>"
MASK = "<mask>"
EOS = "<eos>"
NUM_HEADS = 4  # default number of attention heads of a block
# Fields of a config that the arguments and the tokenizer of a tiny model determine.
TOKENS = ("vocab_size", "pad_token_id", "eos_token_id", "mask_token_id")
ARGUMENTS = (*TOKENS, "hidden_size", "num_hidden_layers", "max_position_embeddings")
_REPLACING = Lock()  # two threads would put back each other's functions
GAIN = 0.7  # initial standard deviation of a block's weights, times sqrt(inputs)


def char_tokenizer(characters: str) -> "PreTrainedTokenizerBase":
    """Return a tokenizer with one token per character, after <pad> 0, <mask> 1, <eos> 2.

    Encoding an unknown character raises an exception. Decoding is exact.
    """
    import transformers  # not at the top: the import takes half a second

    vocabulary = {token: i for i, token in enumerate([PAD, MASK, EOS, *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")  # `.` does not match newlines
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, mask_token=MASK, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def tiny_masked_lm(
    *,
    characters: str,
    seed: int = 0,
    hidden_size: int = 96,
    num_layers: int = 3,
    max_length: int = 64,
    head_std: float = 0.02,
    **config: Any,
) -> Policy:
    """Make a small masked-diffusion policy with random weights: a pre-norm RoBERTa.

    Use it for tests and for training in minutes. It learns grids such as Sudoku fastest, thanks to its learned position
    embeddings. Use `tiny_llama` for a model with the architecture of LLaDA; the other arguments are the same there.

    Args:
        config: Further fields of transformers' RobertaPreLayerNormConfig. Defaults: num_attention_heads=4,
            intermediate_size=384, no dropout.
    """
    tokenizer = char_tokenizer(characters)
    positions = max_length + 1  # RoBERTa counts positions from pad_token_id + 1
    fields = _common_fields(tokenizer, False, hidden_size, num_layers, positions)
    fields |= {"intermediate_size": 384, "type_vocab_size": 1}
    fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model_config = _make_config("RobertaPreLayerNormConfig", fields, config)
    return _make_policy("RobertaPreLayerNormForMaskedLM", model_config, tokenizer, seed, head_std)


def tiny_llama(
    *,
    characters: str,
    causal: bool,
    seed: int = 0,
    hidden_size: int = 96,
    num_layers: int = 3,
    max_length: int = 64,
    head_std: float = 0.02,
    **config: Any,
) -> Policy:
    """Make a small Llama policy with random weights: causal, or bidirectional like LLaDA.

    Use it to test code for causal models, or for models with rotary positions.

    Args:
        characters: All characters of prompts and completions, one token each.
        causal: True for an autoregressive model, False for a masked-diffusion one.
        seed: Seed of the weights.
        hidden_size: Width of the model.
        num_layers: Number of blocks.
        max_length: Longest prompt plus completion, in tokens.
        head_std: Initial standard deviation of the head.
        config: Further fields of transformers' LlamaConfig. Defaults: num_attention_heads=4, intermediate_size=256,
            rope_theta=100.
    """
    tokenizer = char_tokenizer(characters)
    fields = _common_fields(tokenizer, causal, hidden_size, num_layers, max_length)
    fields |= {"intermediate_size": 256, "rope_theta": 100.0, "is_causal": causal}  # transformers >= 5.2 honors it
    model_config = _make_config("LlamaConfig", fields, config)
    return _make_policy("LlamaForCausalLM", model_config, tokenizer, seed, head_std)


def tiny_moe(
    *,
    characters: str,
    causal: bool = False,
    seed: int = 0,
    hidden_size: int = 96,
    num_layers: int = 3,
    max_length: int = 64,
    head_std: float = 0.02,
    **config: Any,
) -> Policy:
    """Make a small Qwen3-MoE policy with random weights: bidirectional like LLaDA-MoE, or causal.

    Use it to test code for mixtures of experts. Every block has experts. The other arguments are those of `tiny_llama`.

    Args:
        config: Further fields of transformers' Qwen3MoeConfig. Defaults: num_attention_heads=4, num_experts=8,
            num_experts_per_tok=2, moe_intermediate_size=128 (width between an expert's layers), rope_theta=100.
    """
    tokenizer = char_tokenizer(characters)
    heads = _num_heads(config, hidden_size)
    fields = _common_fields(tokenizer, causal, hidden_size, num_layers, max_length)
    fields |= {"num_key_value_heads": heads, "head_dim": hidden_size // heads, "is_causal": causal}
    fields |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
    model_config = _make_config("Qwen3MoeConfig", fields | {"rope_theta": 100.0}, config)
    return _make_policy("Qwen3MoeForCausalLM", model_config, tokenizer, seed, head_std)


def tiny_diffusion_gemma(
    *,
    characters: str,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    canvas_length: int = 16,
    max_length: int = 128,
    embedding_std: float = 0.1,
    **config: Any,
) -> Policy:
    """Make a small DiffusionGemma policy with random weights: an encoder of the text, and a decoder of a noisy canvas.

    Use it to test `Renoise`. The other arguments are those of `tiny_llama`.

    Args:
        num_layers: Number of blocks. The last has full attention, the others a sliding window.
        canvas_length: Number of tokens that are denoised together.
        embedding_std: Initial standard deviation of the embeddings, which are also the head's weights.
        config: Further fields of the text model's config in transformers. Defaults: num_attention_heads=4,
            intermediate_size=128, num_experts=2, top_k_experts=1, moe_intermediate_size=64, sliding_window=64,
            final_logit_softcapping=30.
    """
    tokenizer = char_tokenizer(characters)
    heads = _num_heads(config, hidden_size)
    rope = {"rope_type": "default", "rope_theta": 100.0}
    text_fields = {
        **_common_fields(tokenizer, True, hidden_size, num_layers, max_length),
        "intermediate_size": 128,
        "num_key_value_heads": heads,
        "head_dim": hidden_size // heads,
        "global_head_dim": hidden_size // heads,
        "num_experts": 2,
        "top_k_experts": 1,
        "moe_intermediate_size": 64,
        "sliding_window": 64,
        "layer_types": ["sliding_attention"] * (num_layers - 1) + ["full_attention"],
        "rope_parameters": {"sliding_attention": rope, "full_attention": rope},
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    }
    # The class always has a vision model, which would have 167 million weights by default.
    vision_fields: dict[str, Any] = {
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
    text_config = _make_config("DiffusionGemmaTextConfig", text_fields, config)
    parts = {"text_config": text_config, "vision_config": vision_fields, "canvas_length": canvas_length}
    model_config = _make_config("DiffusionGemmaConfig", parts, {})
    return _make_policy("DiffusionGemmaForBlockDiffusion", model_config, tokenizer, seed, embedding_std, embedding_std)


def _common_fields(
    tokenizer: "PreTrainedTokenizerBase", causal: bool, hidden_size: int, num_layers: int, max_length: int
) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "max_position_embeddings": max_length,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,  # the classes' default ids belong to other vocabularies
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": None if causal else tokenizer.mask_token_id,
    }


def _num_heads(config: dict[str, Any], hidden_size: int) -> int:
    """Return the number of attention heads. Raise ValueError if it does not divide `hidden_size`."""
    heads = config.get("num_attention_heads", NUM_HEADS)
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"num_attention_heads={heads} must divide hidden_size={hidden_size}")
    return heads


def _make_config(class_name: str, fields: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """Return transformers' config with `fields`, some of them replaced by the user's `overrides`.

    Raises:
        ValueError: The config has no field of this name (transformers itself would accept any name), or the field
            follows from other arguments.
    """
    import transformers  # not at the top: the import takes half a second

    config_class = getattr(transformers, class_name)
    names = config_class().to_dict().keys() | fields.keys()
    for name in overrides:
        if name in ARGUMENTS:
            raise ValueError(f"{name}={overrides[name]!r} follows from the other arguments; leave it out")
        if name not in names:
            hint = nearest_hint(name, names, "{!r}")
            raise ValueError(f"{name}={overrides[name]!r} is not a field of {class_name}{hint}")
    if "hidden_size" in fields:
        _num_heads(overrides, fields["hidden_size"])
    return config_class(**fields | overrides)


def _make_policy(
    model_class: str,
    config: Any,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    head_std: float,
    embedding_std: float = 0.3,
) -> Any:
    """Return the policy of a new module."""
    import transformers  # not at the top: both imports take seconds

    from dllm_rl.models.policy import make_policy

    module = random_module(getattr(transformers, model_class), config, seed, head_std, embedding_std)
    return make_policy(module, tokenizer)


@torch.no_grad()
def random_module(cls: Any, config: Any, seed: int, head_std: float = 0.02, embedding_std: float = 0.3) -> Any:
    """Make a module of a class of transformers, and initialize it: matrices in blocks have std GAIN / sqrt(fan_in)."""
    from transformers.initialization import no_init_weights  # not at the top: the import takes seconds

    # transformers would draw all weights, with the global RNG. It replaces functions of torch to leave that out.
    with _REPLACING, no_init_weights():
        module = cls(config)
    module.tie_weights()
    generator = Generator().manual_seed(seed)
    # With transformers' default, a std of 0.02 everywhere, a model of this size would not learn Sudoku in minutes.
    head = module.get_output_embeddings()
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            layer.weight.normal_(0, embedding_std, generator=generator)
        elif isinstance(layer, nn.Linear):
            std = head_std if layer is head else GAIN / math.sqrt(layer.in_features)
            layer.weight.normal_(0, std, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
        else:  # routers, and experts in stacks
            for weight in layer.parameters(recurse=False):
                if weight.dim() > 1:
                    weight.normal_(0, GAIN / math.sqrt(weight.shape[-1]), generator=generator)
    return module
