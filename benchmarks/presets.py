"""Models and batches of known shapes, with random weights: time and memory do not depend on what a model knows."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dllm_rl.models.policy import ModulePolicy, make_policy
from dllm_rl.models.tiny import char_tokenizer
from dllm_rl.types.rollouts import Rollout, SamplingParams


@dataclass(frozen=True)
class Shape:
    """A LLaDA-like model (un-causaled Llama blocks) and a batch of completions."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocabulary: int
    num_rows: int
    prompt_length: int
    completion_length: int


PRESETS = {
    "smoke": Shape(32, 1, 2, 64, 1_000, 4, 8, 8),
    "tiny": Shape(96, 3, 4, 256, 32, 256, 17, 16),
    "medium": Shape(256, 4, 8, 704, 16_384, 16, 64, 128),
    "small": Shape(512, 4, 8, 1408, 126_464, 8, 64, 128),
    "8b-slice": Shape(4096, 4, 32, 12_288, 126_464, 8, 128, 256),  # 4 of the 32 layers of an 8B model
    "8b": Shape(4096, 32, 32, 12_288, 126_464, 8, 128, 256),
}


def make(shape: Shape, device: str, dtype: torch.dtype) -> tuple[ModulePolicy, Rollout]:
    """A policy with random weights and a rollout of random tokens: half of each completion committed at step 0."""
    tokenizer = char_tokenizer("abcdefgh")
    length = shape.prompt_length + shape.completion_length
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        is_causal=False,
        mask_token_id=tokenizer.mask_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        module = LlamaForCausalLM(config).to(dtype)
    module.config.architectures = ["LlamaForCausalLM"]
    policy = make_policy(module, tokenizer)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, shape.vocabulary, (shape.num_rows, length), generator=generator)
    completion = torch.zeros(tokens.shape, dtype=torch.bool)
    completion[:, shape.prompt_length :] = True
    steps = torch.where(completion, torch.arange(length) % 2, -1)
    rollout = Rollout(
        tokens=tokens,
        attention_mask=torch.ones_like(completion),
        completion_mask=completion,
        unmask_step=steps,
        logprobs=torch.zeros(tokens.shape),
        group=torch.arange(shape.num_rows),
        sampling_params=SamplingParams(suppress=(policy.spec.mask_id,)),
    )
    return policy, rollout.to(device)
