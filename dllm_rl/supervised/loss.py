"""The supervised loss: hide or replace tokens of examples at random, lay them out as rows, and score them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from dllm_rl.decoding.tokens import ordinary_ids
from dllm_rl.likelihoods.packed import packed_hidden
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import token_logprobs
from dllm_rl.supervised.examples import Example
from dllm_rl.types import SamplingParams


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


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack sequences into rows of at most `capacity` tokens: each, the longest first, goes to the first row with enough
    space.
    """
    rows: list[list[int]] = []
    remaining: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = 0
        while row < len(rows) and remaining[row] < lengths[i]:
            row += 1
        if row == len(rows):
            rows.append([])
            remaining.append(capacity)
        rows[row].append(i)
        remaining[row] -= lengths[i]
    return rows


@dataclass(frozen=True)
class Layout:
    """Rows of one or more sequences, and padding. `segment` is the number of the sequence in its row, from 1; 0 is
    padding.
    """

    tokens: Int[Tensor, "B T"]
    segment: Int[Tensor, "B T"]
    seen: Int[Tensor, "B T"]
    weight: Float[Tensor, "B T"]

    @property
    def positions(self) -> Int[Tensor, "B T"]:
        """Position of each token in its sequence, from 0. Padding counts as a sequence."""
        columns = torch.arange(self.segment.shape[1], device=self.segment.device).expand_as(self.segment)
        is_first = torch.ones_like(self.segment, dtype=torch.bool)
        is_first[:, 1:] = self.segment[:, 1:] != self.segment[:, :-1]
        return columns - torch.where(is_first, columns, 0).cummax(-1).values


def lay_out(
    rows: Sequence[Sequence[NoisyExample]], *, pad_id: int, device: torch.device, like_rollouts: bool = False
) -> Layout:
    """Concatenate the sequences of each row. With `like_rollouts`, rows are padded on the left, and rows that nothing
    is learned of are left out after that.
    """
    pad = partial(pad_sequence, batch_first=True, padding_side="left" if like_rollouts else "right")
    columns = {}
    for name, fill in (("tokens", pad_id), ("seen", pad_id), ("weight", 0.0)):
        packed_rows = [torch.cat([getattr(item, name) for item in row]) for row in rows]
        columns[name] = pad(packed_rows, padding_value=fill)
    segments = []
    for row in rows:
        lengths = torch.tensor([len(item.tokens) for item in row])
        segments.append(torch.repeat_interleave(torch.arange(1, len(row) + 1), lengths))
    columns["segment"] = pad(segments)
    kept = (columns["weight"] != 0).any(-1) if like_rollouts else slice(None)
    return Layout(**{name: column[kept].to(device) for name, column in columns.items()})


def hidden_states(policy: Policy, layout: Layout, *, packed: bool) -> Float[Tensor, "B T D"]:
    """Return the states whose logits predict the token AT each position. With `packed`, tokens attend only to their own
    sequence.
    """
    spec = policy.spec
    segment = layout.segment
    if spec.attention == "block_causal":  # earlier blocks are read without masks
        return packed_hidden(policy, layout.seen, segment > 0, layout.tokens, layout.weight != 0)
    if not packed:
        return policy.hidden(layout.seen, segment > 0)
    can_attend = segment[:, :, None] == segment[:, None, :]
    positions = layout.positions
    if spec.attention == "causal":
        can_attend = can_attend.tril()
    dtype = next(policy.module.parameters()).dtype
    # The lowest finite number, because the softmax of a row of -inf is NaN.
    attention_bias = torch.zeros(can_attend.shape, dtype=dtype, device=layout.seen.device).masked_fill(
        ~can_attend, torch.finfo(dtype).min
    )
    states = policy.encode(layout.seen, attention_bias[:, None], positions)
    # The first token of a sequence keeps its own state, because the state before it belongs to another sequence.
    return torch.where((positions > 0)[..., None], states.roll(1, dims=1), states) if spec.shift else states


def weighted_loss(policy: Policy, layout: Layout, *, packed: bool = False) -> Float[Tensor, ""]:
    """Return -sum weight * log p(token), in nats, over the positions with a nonzero weight."""
    if not len(layout.tokens):  # no token of any row was masked
        return torch.zeros((), device=policy.device)
    states = hidden_states(policy, layout, packed=packed)
    scored = layout.weight != 0
    # The mask token has probability 0, as in the sampler, which never writes it.
    params = SamplingParams(suppress=() if policy.spec.mask_id is None else (policy.spec.mask_id,))
    logps = token_logprobs(policy, states[scored], layout.tokens[scored], params)
    return -(logps * layout.weight[scored]).sum()


@torch.no_grad()
def check_packing(policy: Policy, length: int) -> None:
    """Raise ValueError if a sequence's states depend on the other sequences of its row, or if layers have a sliding
    window, which the mask of packed rows leaves out, shorter than `length` tokens.
    """
    if policy.spec.attention == "block_causal":  # its rows have a clean and a noisy copy
        raise ValueError(
            f"packing=True cannot be combined with {policy.spec.name!r}, a block-causal model; leave packing off"
        )
    name = type(policy.module).__name__
    layers = DynamicCache(config=policy.module.config).layers if isinstance(policy.module, PreTrainedModel) else []
    window = min((getattr(layer, "sliding_window", None) or length for layer in layers), default=length)
    if window < length:
        raise ValueError(
            f"packing=True: layers of {name} have a sliding window of {window} tokens, which packed rows leave out; "
            f"use max_length={window}, or leave packing off"
        )
    sequences = []
    for count in (5, 7):  # different lengths, so that a state at a wrong position is detected
        ids = (torch.arange(count) + count) % policy.vocab_size
        sequences.append(NoisyExample(ids, ids, torch.ones(count)))
    options: dict[str, Any] = {"pad_id": policy.pad_id, "device": policy.device}
    try:
        packed_states = hidden_states(policy, lay_out([sequences], **options), packed=True)[0].float()
    # Modules raise different errors on a 4-D mask.
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(f"packing=True: {name} does not accept a 4-D mask: {error}") from error
    separate_states = [
        hidden_states(policy, lay_out([[item]], **options), packed=False)[0].float() for item in sequences
    ]
    tolerance = 1e-4 if next(policy.module.parameters()).dtype == torch.float32 else 0.1
    if not torch.allclose(packed_states, torch.cat(separate_states), rtol=tolerance, atol=tolerance):
        raise ValueError(f"packing=True: sequences in one row of {name} see each other; leave packing off")
