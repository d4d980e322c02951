"""The supervised loss: hide tokens of examples at random, lay them out as rows, and score them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

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
        below t); and more uniforms, for `denoising_examples`.
    """
    # Stratified: the rows draw from different parts of the interval, so that every batch has low and high mask ratios,
    # and the loss varies less.
    strata = (torch.randperm(num_rows, generator=generator) + torch.rand(num_rows, generator=generator)) / num_rows
    uniforms = torch.rand(num_rows, length, generator=generator)
    return min_t + (1 - min_t) * strata, uniforms, torch.rand(num_rows, length, generator=generator)


def add_noise(
    policy: Policy,
    examples: Sequence[Example],
    levels: Float[Tensor, " B"],
    uniforms: Float[Tensor, "B L"],
    *,
    per_token: bool = False,
) -> tuple[list[NoisyExample], int]:
    """Replace tokens of the examples by masks, for a diffusion model.

    Args:
        policy: Policy to train.
        examples: Examples to add noise to.
        levels: Mask ratio of each example (`draw_levels`).
        uniforms: A learned token is masked if its uniform is below the level.
        per_token: Whether every learned token counts alike in a diffusion model's loss. False (default): every example
            does.

    Returns:
        The noisy examples, and the number to divide the sum of their weighted losses by.
    """
    causal = policy.spec.attention == "causal"
    noisy_examples = []
    divisor = 0
    for item, level, row in zip(examples, levels, uniforms, strict=True):
        seen, weight, count = item.tokens.clone(), item.learned.float(), int(item.learned.sum())
        if not causal:
            # The k-th learned token uses the k-th uniform, so that the masks do not depend on the prompt's length.
            is_masked = row[:count] < level
            assert policy.spec.mask_id is not None, "a diffusion model has a mask token"
            seen[item.learned] = torch.where(is_masked, policy.spec.mask_id, seen[item.learned])
            # 1 / (t_b n_b): LLaDA's SFT loss, eq. 5 [paper].
            num_tokens = 1 if per_token else count
            weight[item.learned] = torch.where(is_masked, 1 / (level * num_tokens), 0.0)
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
