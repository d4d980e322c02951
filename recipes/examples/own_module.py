"""A module of your own as a policy: the spec says how to run it. `check_policy` tests it; then it trains by RL.

python recipes/examples/own_module.py
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from dllm_rl import load_policy, make_policy, train
from dllm_rl.models.base import FamilySpec
from dllm_rl.models.tiny import char_tokenizer
from dllm_rl.testing import check_policy
from recipes.sudoku_unique import recipe as base


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask[:, None, :]))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Mine(nn.Module):
    def __init__(self, vocab_size, width=64):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab_size, width), nn.Embedding(64, width)
        self.blocks, self.head = nn.ModuleList(Block(width) for _ in range(2)), nn.Linear(width, vocab_size)

    def states(self, tokens, attention_mask, positions):  # attention_mask is False on padding, which nothing may see
        x = self.embed(tokens) + self.place(positions)
        for block in self.blocks:
            x = block(x, attention_mask)
        return x

    def get_output_embeddings(self):  # of float32_head
        return self.head


def mine(seed=0):
    tokenizer = char_tokenizer("1234.=")
    torch.manual_seed(seed)
    spec = FamilySpec(
        name="mine",
        attention="full",
        vocab_size=len(tokenizer),
        mask_id=tokenizer.mask_token_id,
        eos_ids=(tokenizer.eos_token_id,),
        max_length=64,  # the positions of `place`
        encode=lambda module, tokens, attention_mask, positions: module.states(tokens, attention_mask, positions),
        head=lambda module, states: module.head(states),
        lora_targets=("qkv", "out", "up", "down"),
    )
    return make_policy(Mine(len(tokenizer)), tokenizer, spec)


if __name__ == "__main__":
    check_policy(mine())
    summary = train(replace(base, name="mine", model=mine, num_steps=60))
    policy = load_policy(summary["checkpoint"], into=mine())
