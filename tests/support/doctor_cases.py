"""What a doctor's tests diagnose: a small model, three prompts, a sampler."""

import torch

from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts

sampler = Unmask(max_new_tokens=8, diffusion_steps=2, temperature=1.0, rank=MaxProb())


def make(causal=False):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return tiny_llama(characters="123456789", causal=causal, head_std=0.5, **sizes)


def prompts():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 12, (n,), generator=generator).tolist() for n in (5, 9, 3)]
    return Prompts.from_ids(ids, pad_id=0, num_generations=4)
