"""The supervised loss: hide or replace tokens of examples at random, lay them out as rows, and score them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_rl.decoding.vocabulary import ordinary_ids
from dllm_rl.likelihoods.packed import packed_hidden
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import token_logprobs
from dllm_rl.supervised.examples import Example
from dllm_rl.types.rollouts import SamplingParams


@dataclass(frozen=True)
class NoisyExample:
    """An example with noise: its tokens, the tokens that the model sees, and each token's weight in the loss."""

    tokens: Int[Tensor, " T"]
    seen: Int[Tensor, " T"]
    weight: Float[Tensor, " T"]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def draw_levels(
    generator: Generator, num_rows: int, length: int, *, min_t: float = 0.02
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Draw the random numbers of a batch of examples.

    Returns:
        A mask ratio t ~ U[min_t, 1) per row, stratified over the rows; uniforms (a token is masked if its uniform is
        below t); and uniforms for `corrupted`.
    """
    # Stratified: the rows draw from different parts of the interval, so that every batch has low and high mask ratios,
    # and the loss varies less.
    strata = (torch.randperm(num_rows, generator=generator) + torch.rand(num_rows, generator=generator)) / num_rows
    uniforms = torch.rand(num_rows, length, generator=generator)
    return min_t + (1 - min_t) * strata, uniforms, torch.rand(num_rows, length, generator=generator)


def corrupted(
    policy: Policy, tokens: Int[Tensor, "*K"], noise: Float[Tensor, "*K"], *, share: float
) -> Int[Tensor, "*K"]:
    """Replace each token with probability `share` by another token, uniform over the vocabulary without special tokens.
    `noise` has uniforms in [0, 1).

    Raises:
        ValueError: The model is causal.
    """
    if not share:
        return tokens
    if policy.spec.attention == "causal":
        raise ValueError(f"corruption={share} replaces visible tokens of a diffusion model; use 0 for a causal model")
    ordinary = ordinary_ids(policy).to(tokens.device)
    index = torch.searchsorted(ordinary, tokens.contiguous())
    # 0 for a special token, which any ordinary id may replace; an ordinary token is replaced by another id.
    is_ordinary = (ordinary[index % len(ordinary)] == tokens).long()
    # Noise below `share`, divided by `share`, is uniform in [0, 1). In fp64, so that no device rounds the product up to
    # the next id.
    shift = (noise.double() / share * (len(ordinary) - is_ordinary)).long()
    return torch.where(noise.double() < share, ordinary[(index + is_ordinary + shift) % len(ordinary)], tokens)


def add_noise(
    policy: Policy,
    examples: Sequence[Example],
    draws: tuple[Float[Tensor, " B"], Float[Tensor, "B L"], Float[Tensor, "B L"]],
    *,
    corruption: float = 0.0,
    per_token: bool = False,
) -> tuple[list[NoisyExample], int]:
    """Replace tokens of the examples by masks (diffusion models) and by random tokens (`corruption`).

    Args:
        policy: Policy to train.
        examples: Examples to add noise to.
        draws: What `draw_levels` returns for these examples.
        corruption: Share of the learned tokens to replace by random tokens. Default: 0.
        per_token: Whether every learned token counts alike in a diffusion model's loss. False (default): every example
            does.

    Returns:
        The noisy examples, and the number to divide the sum of their weighted losses by.
    """
    levels, uniforms, noise = draws
    causal = policy.spec.attention == "causal"
    noisy_examples = []
    divisor = 0
    counts = [int(item.learned.sum()) for item in examples]
    learned = torch.cat([item.tokens[item.learned] for item in examples])
    learned_noise = torch.cat([row[:count] for row, count in zip(noise, counts, strict=True)])
    # In one call, so that the vocabulary is read once.
    corrupted_tokens = corrupted(policy, learned, learned_noise, share=corruption).split(counts)
    for item, level, row, tokens, count in zip(examples, levels, uniforms, corrupted_tokens, counts, strict=True):
        seen = item.tokens.clone()
        seen[item.learned] = tokens
        weight = item.learned.float()
        if not causal:
            # The k-th learned token uses the k-th uniform, so that the masks do not depend on the prompt's length.
            is_masked = row[:count] < level
            assert policy.spec.mask_id is not None, "a diffusion model has a mask token"
            seen[item.learned] = torch.where(is_masked, policy.spec.mask_id, seen[item.learned])
            # 1 / (t_b n_b): LLaDA's SFT loss, eq. 5 [paper]. A visible token counts 1 / n_b [ours].
            num_tokens = 1 if per_token else count
            weight[item.learned] = torch.where(is_masked, 1 / (level * num_tokens), float(corruption > 0) / num_tokens)
        noisy_examples.append(NoisyExample(item.tokens, seen, weight))
        # A causal loss is a mean over tokens, as with transformers' `labels`.
        divisor += count if causal or per_token else 1
    return noisy_examples, divisor


@dataclass(frozen=True)
class Layout:
    """Examples as rows of one length. `attention_mask` is False on padding."""

    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    seen: Int[Tensor, "B T"]
    weight: Float[Tensor, "B T"]


def lay_out(
    examples: Sequence[NoisyExample], *, pad_id: int, device: torch.device, like_rollouts: bool = False
) -> Layout:
    """Pad the examples to one length. With `like_rollouts`, they are padded on the left, and those that nothing is
    learned of are left out after that.
    """
    pad = partial(pad_sequence, batch_first=True, padding_side="left" if like_rollouts else "right")
    columns = {"attention_mask": pad([torch.ones(item.num_tokens, dtype=torch.bool) for item in examples])}
    for name, fill in (("tokens", pad_id), ("seen", pad_id), ("weight", 0.0)):
        columns[name] = pad([getattr(item, name) for item in examples], padding_value=fill)
    kept = (columns["weight"] != 0).any(-1) if like_rollouts else slice(None)
    return Layout(**{name: column[kept].to(device) for name, column in columns.items()})


def weighted_loss(policy: Policy, layout: Layout) -> Float[Tensor, ""]:
    """Return -sum weight * log p(token), in nats, over the positions with a nonzero weight."""
    if not len(layout.tokens):  # no token of any row was masked
        return torch.zeros((), device=policy.device)
    scored = layout.weight != 0
    if policy.spec.attention == "block_causal":  # earlier blocks are read without masks
        states = packed_hidden(policy, layout.seen, layout.attention_mask, layout.tokens, scored)
    else:
        states = policy.hidden(layout.seen, layout.attention_mask)
    # The mask token has probability 0, as in the sampler, which never writes it.
    params = SamplingParams(suppress=() if policy.spec.mask_id is None else (policy.spec.mask_id,))
    logps = token_logprobs(policy, states[scored], layout.tokens[scored], params)
    return -(logps * layout.weight[scored]).sum()
