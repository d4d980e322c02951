"""A block-causal module of your own as a policy, and two exact likelihoods of what it samples.

python recipes/examples/own_block_module.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from dllm_rl import MaxProb, Prompts, Trajectory, Unmask, make_policy
from dllm_rl.models.base import FamilySpec, block_causal_mask, block_ranks
from dllm_rl.models.tiny import char_tokenizer
from dllm_rl.testing import check_policy


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask):  # mask: (B, T, T); True, or 0, where the row's token may see the column's
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, mask))


class Blocks(nn.Module):
    def __init__(self, vocab_size, width=32):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab_size, width), nn.Embedding(64, width)
        self.blocks, self.head = nn.ModuleList(Layer(width) for _ in range(2)), nn.Linear(width, vocab_size)

    def get_output_embeddings(self):
        return self.head


tokenizer = char_tokenizer("1234.=")


def encode(module, tokens, attention_mask, positions):  # (B, T), the mask, (B, T) -> states (B, T, D)
    if attention_mask.dim() == 2:  # an ordinary forward: (B, T), False on padding
        attention_mask = block_causal_mask(attention_mask, *block_ranks(spec, tokens, positions))  # (B, 1, T, T)
    x = module.embed(tokens) + module.place(positions)
    for layer in module.blocks:
        x = layer(x, attention_mask[:, 0])  # a mask of four axes is whole: a packed forward's, used as it is
    return x


spec = FamilySpec(
    name="blocks",
    attention="block_causal",
    block_size=4,
    vocab_size=len(tokenizer),
    mask_id=tokenizer.mask_token_id,
    eos_ids=(tokenizer.eos_token_id,),
    max_length=64,
    encode=encode,
    head=lambda module, states: module.head(states),
    lora_targets=("qkv", "out"),
)
torch.manual_seed(0)
policy = make_policy(Blocks(len(tokenizer)), tokenizer, spec)
check_policy(policy)  # a token sees its own block and earlier ones, and no later one

prompts = Prompts.from_ids([[3, 4, 5, 6]], pad_id=policy.pad_id, num_generations=4, seeds=range(4))
options = {"max_new_tokens": 8, "diffusion_steps": 4, "temperature": 1.0, "rank": MaxProb()}  # blocks are the policy's
rollout = Unmask(**options)(policy, prompts, torch.Generator())
for likelihood in (Trajectory(), Trajectory(block_size=4)):  # four forwards; two packed ones
    views = likelihood.draw_views(rollout, torch.Generator())
    log_p = likelihood.logprobs(policy, rollout, views)
    print(len(views.coefficients), "views:", float((log_p - rollout.logprobs).abs().max()), "nats from the record")
