"""Backbones that are nobody's but their author's: one of plain torch, and one of a class that transformers lacks."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dllm_rl.models.base import FamilySpec
from dllm_rl.models.policy import make_policy
from dllm_rl.models.tiny import char_tokenizer, tiny_llama


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, mask):
        q, k, v = rearrange(self.qkv(self.norms[0](x)), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        x = x + self.out(rearrange(F.scaled_dot_product_attention(q, k, v, mask), "b h t d -> b t (h d)"))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Own(nn.Module):
    causal = False

    def __init__(self, vocab_size: int, *, width: int = 32, heads: int = 2, layers: int = 2, length: int = 40) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.vocabulary = nn.LayerNorm(width), nn.Linear(width, vocab_size)

    def sight(self, attention_mask):
        """Who sees whom (B, 1, T, T); padding sees itself, so that no row of the softmax is empty."""
        eye = torch.eye(attention_mask.shape[1], dtype=torch.bool, device=attention_mask.device)
        seen = attention_mask[:, None, None, :] | eye
        return seen.tril() if self.causal else seen

    def states(self, tokens, attention_mask, positions):
        x = self.embed(tokens) + self.place(positions)
        for block in self.blocks:
            x = block(x, self.sight(attention_mask))
        return self.norm(x)


class OwnConfig(PretrainedConfig):
    model_type = "own-of-the-tests"

    def __init__(self, vocab_size: int = 8, **fields) -> None:
        super().__init__(**fields)
        self.vocab_size = vocab_size


class OwnPretrained(PreTrainedModel):
    """A class that is not in transformers, with a config. The tied output layer is saved as the embedding, which is the
    second of its names here."""

    config_class = OwnConfig
    _tied_weights_keys: ClassVar = {"vocabulary.weight": "net.embed.weight"}
    causal = False

    def __init__(self, config) -> None:
        super().__init__(config)
        self.vocabulary, self.net = nn.Linear(32, config.vocab_size, bias=False), Own(config.vocab_size)
        self.vocabulary.weight = self.net.embed.weight
        self.net.vocabulary = None
        self.post_init()

    def get_input_embeddings(self):
        return self.net.embed

    def get_output_embeddings(self):
        return self.vocabulary

    def states(self, tokens, attention_mask, positions):
        return self.net.states(tokens, attention_mask, positions)


def pretrained(vocab_size: int) -> OwnPretrained:
    return OwnPretrained(OwnConfig(vocab_size, tie_word_embeddings=True))


def with_remote_code(vocab_size: int) -> OwnPretrained:
    """As a module of a checkpoint whose config names the file of its class."""
    module = pretrained(vocab_size)
    module.config.auto_map = {"AutoModel": "modeling_own.OwnPretrained"}
    return module


def own_policy(*, seed: int = 0, characters: str = "1234.=", kind: Callable = Own, **spec):
    tokenizer = char_tokenizer(characters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind(len(tokenizer))
    fields = {
        "name": "own",
        "attention": "causal" if module.causal else "full",
        "shift": module.causal,
        "mask_id": None if module.causal else tokenizer.mask_token_id,
        "eos_ids": (tokenizer.eos_token_id,),
        "max_length": 40,
        "vocab_size": len(tokenizer),
        "encode": lambda module, tokens, attention_mask, positions: module.states(tokens, attention_mask, positions),
        "head": lambda module, hidden: module.vocabulary(hidden),
        "lora_targets": ("qkv", "out", "up", "down"),
    }
    return make_policy(module, tokenizer, FamilySpec(**fields | spec))


def pretrained_policy(*, seed: int = 0):
    return own_policy(seed=seed, kind=pretrained)


def with_spec(policy, **spec):
    """A policy of the same module, with a spec of the caller's own."""
    return make_policy(policy.module, policy.tokenizer, replace(policy.spec, **spec))


def shifted_llama(*, seed: int = 0):
    """A class of transformers, whose family has neither this shift nor this length."""
    sizes = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return with_spec(tiny_llama(characters="1234.=", causal=False, seed=seed, **sizes), shift=True, max_length=40)
