"""A module with a cache of its own: it stores one short vector per token and layer, from which it computes keys and
values. A run with this cache samples the tokens of a run without one.

python recipes/examples/own_cache.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from dllm_rl import BlockCache, MaxProb, Prompts, Unmask, make_policy
from dllm_rl.models.base import FamilySpec, block_causal_mask, block_ranks
from dllm_rl.models.tiny import char_tokenizer

WIDTH, LATENT = 32, 8


class LatentCache:  # what samplers need of a cache is in dllm_rl/models/cache.py: `ColumnCache`
    def __init__(self, module):
        self.latents = [None] * len(module.layers)  # of each layer, (B, columns, LATENT)

    def append(self, layer, latent):
        stored = self.latents[layer]
        self.latents[layer] = latent if stored is None else torch.cat([stored, latent], dim=1)
        return self.latents[layer]

    def tensors(self):
        return [latent for latent in self.latents if latent is not None]

    def set_tensors(self, tensors):
        self.latents = list(tensors)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.query, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.latent, self.keys_and_values = nn.Linear(WIDTH, LATENT), nn.Linear(LATENT, 2 * WIDTH)

    def forward(self, x, mask, append):
        normed = self.norm(x)
        keys, values = self.keys_and_values(append(self.latent(normed))).chunk(2, dim=-1)  # of all columns
        return x + self.out(F.scaled_dot_product_attention(self.query(normed), keys, values, mask))


class Blocks(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab_size, WIDTH), nn.Embedding(64, WIDTH)
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(WIDTH, vocab_size)

    def get_output_embeddings(self):
        return self.head


tokenizer = char_tokenizer("1234.=")
columns = []  # number of columns of each forward


def encode(module, tokens, attention_mask, positions, *, cache=None):
    columns.append(tokens.shape[1])
    if attention_mask.dim() == 2:  # with a cache, the mask is whole: (B, 1, new columns, all columns)
        attention_mask = block_causal_mask(attention_mask, *block_ranks(spec, tokens, positions))
    x = module.embed(tokens) + module.place(positions)
    for number, layer in enumerate(module.layers):
        append = (lambda latent: latent) if cache is None else (lambda latent, n=number: cache.append(n, latent))
        x = layer(x, attention_mask[:, 0], append)
    return x


spec = FamilySpec(
    name="latent",
    attention="block_causal",
    block_size=4,
    vocab_size=len(tokenizer),
    mask_id=tokenizer.mask_token_id,
    eos_ids=(tokenizer.eos_token_id,),
    max_length=64,
    encode=encode,
    head=lambda module, states: module.head(states),
    new_cache=LatentCache,
)
torch.manual_seed(0)
policy = make_policy(Blocks(len(tokenizer)), tokenizer, spec)


def sample(**options):
    prompts = Prompts.from_ids([[3, 4, 5, 6], [7, 5]], pad_id=policy.pad_id, num_generations=4, seeds=range(8))
    sampler = Unmask(max_new_tokens=16, diffusion_steps=8, temperature=1.0, rank=MaxProb(), **options)
    columns.clear()
    return sampler(policy, prompts, torch.Generator())


if __name__ == "__main__":
    whole, whole_columns = sample(), sum(columns)
    cached, cached_columns = sample(cache=BlockCache()), sum(columns)
    print("the same tokens:", torch.equal(whole.tokens, cached.tokens))
    print(f"columns that ran: {whole_columns} without a cache, {cached_columns} with it")
