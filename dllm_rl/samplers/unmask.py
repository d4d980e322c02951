"""Iterative unmasking, as LLaDA's: blocks from left to right, in each block a few positions a step."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dllm_rl.head import chunked, process, sample
from dllm_rl.policies import Policy
from dllm_rl.samplers.rules import block_bounds, confidence, quotas, schedule, steps_per_block
from dllm_rl.types import Processors, Prompts, Rollout, row_seeds


@torch.no_grad()
def unmask(
    policy: Policy,
    prompts: Prompts,
    generator: Generator,
    *,
    max_new_tokens: int,
    num_steps: int,
    block_size: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: tuple[int, ...] = (),
    rank: Callable = confidence,
    commit: Callable = schedule,
) -> Rollout:
    """Complete every prompt `group_size` times by iterative unmasking (LLaDA, arXiv 2502.09992, algorithm 5 [paper]).

    max_new_tokens  masked positions appended to each prompt.
    num_steps       unmasking steps over the whole completion, shared out equally to the blocks.
    block_size      positions that are open at once; None opens all. The last block may be shorter.
    temperature     of the categorical distribution; 0 takes the likeliest token.
    rank, commit    see `rules`; ranking is on untempered fp32 log-probabilities.
    suppress        token ids that are never sampled; the mask token never is.

    A row depends on its prompt, its seed and the weights only, not on its neighbours. Raises ValueError for a causal
    policy, or a completion that does not fit the model.
    """
    length, block_size = max_new_tokens, block_size or max_new_tokens
    _check(policy, prompts, length, block_size)
    processors = Processors(temperature, top_k, top_p, (*suppress, policy.spec.mask_id))
    device, group = policy.device, prompts.group_size
    seeds = row_seeds(generator, prompts.num_rows) if prompts.seeds is None else prompts.seeds

    start = prompts.tokens.shape[1]
    repeat = lambda x: x.to(device).repeat_interleave(group, dim=0)  # noqa: E731
    blank = torch.ones(prompts.num_rows, length, dtype=torch.long, device=device)
    tokens = torch.cat([repeat(prompts.tokens), blank * policy.spec.mask_id], dim=1)
    attention_mask = torch.cat([repeat(prompts.attention_mask), blank.bool()], dim=1)
    unmask_step = torch.full_like(tokens, -1)
    logprobs = torch.zeros(tokens.shape, device=device)

    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    bounds, step = block_bounds(length, block_size), 0
    for (begin, end), num in zip(bounds, steps_per_block(num_steps, len(bounds)), strict=True):
        block = slice(start + begin, start + end)
        masked = torch.ones(len(tokens), end - begin, dtype=torch.bool, device=device)
        for quota in quotas(end - begin, num):
            # The first state of all is the same for every completion of a prompt: one forward serves the group.
            share = group if step == 0 else 1
            hidden = policy.hidden(tokens[::share], attention_mask[::share])[:, block].repeat_interleave(share, dim=0)
            uniforms = torch.stack([torch.rand(2, end - begin, generator=g, dtype=torch.float64) for g in generators], 1)
            drawn, scored, logp = propose(policy, hidden[masked], uniforms.to(device)[:, masked], processors, rank)

            scores = torch.full(masked.shape, -torch.inf, device=device).masked_scatter(masked, scored)
            chosen = commit(scores, masked, quota)
            tokens[:, block] = torch.where(chosen, blank[:, begin:end].masked_scatter(masked, drawn), tokens[:, block])
            logprobs[:, block] = torch.where(chosen, scores.masked_scatter(masked, logp), logprobs[:, block])
            unmask_step[:, block] = unmask_step[:, block].masked_fill(chosen, step)
            masked &= ~chosen
            step += 1

    return Rollout(
        tokens=tokens,
        attention_mask=attention_mask,
        completion_mask=torch.cat([torch.zeros_like(tokens[:, :start], dtype=torch.bool), blank.bool()], dim=1),
        unmask_step=unmask_step,
        logprobs=logprobs,
        group_size=group,
        weights_version=policy.version,
        processors=processors,
        forwards=step,
    )


def propose(
    policy: Policy,
    hidden: Float[Tensor, "K D"],
    uniforms: Float[Tensor, "2 K"],
    processors: Processors,
    rank: Callable,
) -> tuple[Int[Tensor, " K"], Float[Tensor, " K"], Float[Tensor, " K"]]:
    """For K masked positions: a sampled token, its rank score, and its log-probability (nats) as sampled."""
    untempered = Processors(suppress=processors.suppress)

    def one(h: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw = policy.head(h)
        logits = process(raw, processors)
        drawn = logits.argmax(-1) if processors.temperature == 0 else sample(logits, u)
        logp = logits.gather(-1, drawn[:, None])[:, 0] - logits.logsumexp(-1)
        return drawn, rank(process(raw, untempered).log_softmax(-1), drawn, v), logp

    return chunked(one, hidden, *uniforms, vocabulary=policy.vocab_size)


def _check(policy: Policy, prompts: Prompts, length: int, block_size: int) -> None:
    if policy.spec.attention == "causal":
        raise ValueError(f"policy is causal ({type(policy.module).__name__}); unmask needs a diffusion model: use autoregress")
    if length < 1 or block_size < 1:
        raise ValueError(f"max_new_tokens={length} and block_size={block_size} must both be at least 1")
    check_fits(policy, prompts, length)


def check_fits(policy: Policy, prompts: Prompts, max_new_tokens: int) -> None:
    """Raise ValueError when the longest prompt and its completion exceed what the model can take."""
    longest, limit = int(prompts.attention_mask.sum(-1).max()), policy.spec.max_length
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens exceeds the model's {limit} positions; "
            f"use at most {limit - longest}"
        )
