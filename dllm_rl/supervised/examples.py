"""Supervised examples: convert rows of a data set to tokens, mask them at random, lay them out as a batch, and compute
their loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_rl.decoding.tokens import conversation_ids, text_ids
from dllm_rl.likelihoods.packed import packed_hidden
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import token_logprobs
from dllm_rl.supervised.sft import SFT
from dllm_rl.training.warmup import corrupted
from dllm_rl.types import SamplingParams

Piece = tuple[list[int], bool]  # token ids, and whether they are an answer


@dataclass(frozen=True)
class Example:
    """A row of the data set as tokens, and which of them the model learns."""

    tokens: Int[Tensor, " T"]
    learned: Bool[Tensor, " T"]


@dataclass(frozen=True)
class NoisyExample:
    """An example with noise: its tokens, the tokens that the model sees, and each token's weight in the loss."""

    tokens: Int[Tensor, " T"]
    seen: Int[Tensor, " T"]
    weight: Float[Tensor, " T"]


def read_examples(
    recipe: SFT, policy: Policy, dataset: Any, field: str, *, say: Callable[[str], None] = lambda text: None
) -> list[Example]:
    """Convert the rows of a data set to examples. Leave out rows longer than max_length, and report their number.

    Args:
        recipe: Recipe with the options for rows.
        policy: Policy with the tokenizer.
        dataset: Rows to convert.
        field: Name of the recipe's field with the rows, for messages.
        say: Function that reports the number of rows that are left out.

    Raises:
        ValueError: A row is invalid, or all rows are too long.
    """
    if policy.spec.attention == "encoder_decoder":
        check_denoising(recipe, policy)
    max_length = recipe.max_length
    if policy.spec.max_length is not None and max_length > policy.spec.max_length:
        raise ValueError(
            f"max_length={max_length} is more than the model's {policy.spec.max_length} positions; lower it"
        )
    examples: list[Example] = []
    for index in range(len(dataset)):
        try:
            read = example(recipe, policy, dataset[index])
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ) as error:  # a missing role, a number in place of text, no messages
            raise ValueError(f"{field}: row {index}: {error}") from None
        if len(read.tokens) <= max_length:  # not truncated, since the model would learn to stop in the middle
            examples.append(read)
    if not examples:
        raise ValueError(f"{field}: all of {len(dataset)} rows are longer than max_length={max_length}; raise it")
    if num_longer := len(dataset) - len(examples):
        say(f"{field}: {num_longer} of {len(dataset)} rows are longer than max_length={max_length} and left out")
    return examples


def check_denoising(recipe: SFT, policy: Policy) -> None:
    """Raise ValueError on a setting that does not apply to a model whose noise is random tokens."""
    for setting, reason in (
        ("packing", "its encoder reads one text"),
        ("completion_length", "end tokens fill its last canvas anyway"),
        ("corruption", "its noise is replaced tokens already, and it has no masks"),
    ):
        if value := getattr(recipe, setting):
            raise ValueError(f"{setting}={value} is not for {policy.spec.name!r}: {reason}; leave it out")


def prompt_and_answer(policy: Policy, item: Example) -> tuple[list[int], list[int]]:
    """Split an example into the tokens before the learned ones, and the learned tokens. Raises ValueError unless the
    learned tokens are one answer at the end.
    """
    first = int(item.learned.long().argmax())
    if not item.learned[first:].all():
        raise ValueError(
            f"has several answers, and {policy.spec.name!r} learns one, at the row's end: give prompt and completion, "
            "with earlier turns in the prompt"
        )
    return item.tokens[:first].tolist(), item.tokens[first:].tolist()


def example(recipe: SFT, policy: Policy, row: Mapping[str, Any]) -> Example:
    """Convert a row to an example, up to the end token of its last answer. A causal model does not learn the first
    token.
    """
    pieces, only_answers = _pieces(recipe, policy, row)
    # A diffusion model learns end tokens up to completion_length.
    fills_completion = policy.spec.attention not in (
        "causal",
        "encoder_decoder",
    )
    tokens, learned, has_end = _joined(pieces, policy.spec.eos_ids, only_answers=only_answers)
    if tokens:
        num_end_tokens = 0 if has_end else 1
        if recipe.completion_length is not None and fills_completion:
            # Length of the completion: the learned tokens at the end.
            num_learned = [*reversed(learned), False].index(False)
            num_end_tokens = recipe.completion_length - num_learned
            if num_end_tokens < 0:
                raise ValueError(
                    f"its completion has {num_learned} tokens, more than completion_length={recipe.completion_length}"
                )
        tokens += [policy.spec.eos_ids[0]] * num_end_tokens
        learned += [True] * num_end_tokens
        learned[0] = learned[0] and fills_completion  # a causal model or encoder has no state before the first token
    if not any(learned):
        raise ValueError("has nothing to learn: no assistant's message, or an empty text")
    result = Example(torch.tensor(tokens), torch.tensor(learned))
    if policy.spec.attention == "encoder_decoder":
        prompt_and_answer(policy, result)
    return result


def _pieces(recipe: SFT, policy: Policy, row: Mapping[str, Any]) -> tuple[list[Piece], bool]:
    # Files with different rows have None in missing columns.
    row = {name: value for name, value in row.items() if value is not None}
    if "messages" in row:
        return conversation_ids(policy, row["messages"]), recipe.assistant_only_loss
    if "prompt" in row and "completion" in row:
        return _pair(policy, row["prompt"], row["completion"]), recipe.completion_only_loss
    if "text" in row:
        return [(text_ids(policy, row["text"]), True)], True
    raise ValueError(f"has no columns messages, prompt and completion, or text, only {', '.join(sorted(row))}")


def _pair(policy: Policy, prompt: Any, completion: Any) -> list[Piece]:
    """Return the pieces of a prompt and its completion, each text or messages. A text completion of chat messages
    becomes the assistant's message.
    """
    if isinstance(prompt, str):
        answer = completion if isinstance(completion, str) else completion[-1]["content"]
        return [(text_ids(policy, prompt), False), (text_ids(policy, answer), True)]
    turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return conversation_ids(policy, [*prompt, *turns], since=len(prompt))


def _joined(
    pieces: list[Piece], end_tokens: Sequence[int], *, only_answers: bool
) -> tuple[list[int], list[bool], bool]:
    """Join the pieces up to the end token of the last answer; return the tokens, which of them are learned, and whether
    there is such an end token.
    """
    while pieces and not pieces[-1][1]:
        pieces = pieces[:-1]  # drop what follows the last answer
    tokens: list[int] = []
    learned: list[bool] = []
    end_positions: list[int] = []
    num_after_end = 0
    for ids, is_answer in pieces:
        end_positions = [position for position, token in enumerate(ids, 1) if is_answer and token in end_tokens]
        # Tokens of the chat template after the end token, such as a line break.
        num_after_end = len(ids) - end_positions[0] if end_positions else 0
        tokens += ids
        learned += [is_answer or not only_answers] * (len(ids) - num_after_end) + [not only_answers] * num_after_end
    length = len(tokens) - num_after_end
    return tokens[:length], learned[:length], bool(end_positions)


def add_noise(
    policy: Policy,
    examples: Sequence[Example],
    levels: Float[Tensor, " B"],
    uniforms: Float[Tensor, "B L"],
    noise: Float[Tensor, "B L"],
    *,
    corruption: float = 0.0,
) -> tuple[list[NoisyExample], int]:
    """Replace tokens of the examples by masks (diffusion models) and by random tokens (`corruption`).

    Args:
        policy: Policy to train.
        examples: Examples to add noise to.
        levels: Probability of each example that a learned token is masked.
        uniforms: Uniform random numbers that decide which tokens are masked.
        noise: Uniform random numbers that choose the tokens to corrupt and their replacements.
        corruption: Share of the learned tokens to replace by random tokens. Default: 0.

    Returns:
        The noisy examples, and the number to divide the sum of their weighted losses by.
    """
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
            weight[item.learned] = torch.where(is_masked, 1 / (level * count), float(corruption > 0) / count)
        noisy_examples.append(NoisyExample(item.tokens, seen, weight))
        divisor += count if causal else 1  # a causal loss is a mean over tokens, as with transformers' `labels`
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
    """Rows of one or more sequences, padded on the right. `segment` is the number of the sequence in its row, from 1; 0
    is padding.
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
    examples: Sequence[NoisyExample], rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device
) -> Layout:
    """Concatenate the sequences of each row."""
    columns = {}
    for name, fill in (("tokens", pad_id), ("seen", pad_id), ("weight", 0.0)):
        packed_rows = [torch.cat([getattr(examples[i], name) for i in row]) for row in rows]
        columns[name] = pad_sequence(packed_rows, batch_first=True, padding_value=fill).to(device)
    segments = []
    for row in rows:
        lengths = torch.tensor([len(examples[i].tokens) for i in row])
        segments.append(torch.repeat_interleave(torch.arange(1, len(row) + 1), lengths))
    return Layout(segment=pad_sequence(segments, batch_first=True).to(device), **columns)


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
    states = hidden_states(policy, layout, packed=packed)
    scored = layout.weight != 0
    # The mask token has probability 0, as in the sampler, which never writes it.
    params = SamplingParams(suppress=() if policy.spec.mask_id is None else (policy.spec.mask_id,))
    logps = token_logprobs(policy, states[scored], layout.tokens[scored], params)
    return -(logps * layout.weight[scored]).sum()


@torch.no_grad()
def check_packing(policy: Policy) -> None:
    """Raise ValueError if a sequence's states depend on the other sequences of its row."""
    if policy.spec.attention == "block_causal":  # its rows have a clean and a noisy copy
        raise ValueError(
            f"packing=True cannot be combined with {policy.spec.name!r}, a block-causal model; leave packing off"
        )
    sequences = []
    for count in (5, 7):  # different lengths, so that a state at a wrong position is detected
        ids = (torch.arange(count) + count) % policy.vocab_size
        sequences.append(NoisyExample(ids, ids, torch.ones(count)))
    options: dict[str, Any] = {"pad_id": policy.pad_id, "device": policy.device}
    try:
        packed_states = hidden_states(policy, lay_out(sequences, [[0, 1]], **options), packed=True)[0].float()
    # Modules raise different errors on a 4-D mask.
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(f"packing=True: {type(policy.module).__name__} does not accept a 4-D mask: {error}") from error
    separate_states = [
        hidden_states(policy, lay_out([item], [[0]], **options), packed=False)[0].float() for item in sequences
    ]
    tolerance = 1e-4 if next(policy.module.parameters()).dtype == torch.float32 else 0.1
    if not torch.allclose(packed_states, torch.cat(separate_states), rtol=tolerance, atol=tolerance):
        name = type(policy.module).__name__
        raise ValueError(f"packing=True: sequences in one row of {name} see each other; leave packing off")
