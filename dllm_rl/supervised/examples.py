"""Supervised examples: rows of a data set as tokens, hidden at random, laid out as a batch, and their loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.likelihoods.packed import packed_hidden
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import token_logprobs
from dllm_rl.models.tokens import conversation_ids, text_ids
from dllm_rl.supervised.recipe import SFT
from dllm_rl.types import SamplingParams


@dataclass(frozen=True)
class Example:
    """A row as tokens (T,), and the tokens that are learned."""

    tokens: Int[Tensor, " T"]
    learned: Bool[Tensor, " T"]


@dataclass(frozen=True)
class Shown:
    """An example as the model sees it: with `hidden` tokens masked, each with its `weight` in the loss."""

    tokens: Int[Tensor, " T"]
    hidden: Bool[Tensor, " T"]
    weight: Float[Tensor, " T"]


def read_examples(
    recipe: SFT, policy: Policy, dataset: Any, field: str, *, say: Callable[[str], None] = lambda text: None
) -> list[Example]:
    """The rows as examples; `say` gets the number of rows longer than max_length, which are left out. Raises ValueError
    on a row that has no known columns or nothing to learn, and if no row is left."""
    most = recipe.max_length
    if policy.spec.max_length is not None and most > policy.spec.max_length:
        raise ValueError(f"max_length={most} is more than the model's {policy.spec.max_length} positions; lower it")
    found = []
    for index in range(len(dataset)):
        try:
            found.append(example(recipe, policy, dataset[index]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{field}: row {index}: {error}") from None
    kept = [each for each in found if len(each.tokens) <= most]
    if not kept:
        raise ValueError(f"{field}: all of {len(found)} rows are longer than max_length={most}; raise it")
    if longer := len(found) - len(kept):
        say(f"{field}: {longer} of {len(found)} rows are longer than max_length={most} and left out")
    return kept


def example(recipe: SFT, policy: Policy, row: Mapping[str, Any]) -> Example:
    """One row, up to the end token of what is learned; a causal model learns no first token."""
    row = {name: value for name, value in row.items() if value is not None}
    if "messages" in row:
        pieces, only = conversation_ids(policy, row["messages"]), recipe.assistant_only_loss
    elif "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            answer = completion if isinstance(completion, str) else completion[-1]["content"]
            pieces = [(text_ids(policy, prompt), False), (text_ids(policy, answer), True)]
        else:
            said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            pieces = conversation_ids(policy, [*prompt, *said], since=len(prompt))
        only = recipe.completion_only_loss
    elif "text" in row:
        pieces, only = [(text_ids(policy, row["text"]), True)], True
    else:
        raise ValueError(f"has no columns messages, prompt and completion, or text, only {', '.join(sorted(row))}")
    ends, causal = policy.spec.eos_ids, policy.spec.attention == "causal"
    tokens, learned = list[int](), list[bool]()
    last, ended = max((i for i, (_, mine) in enumerate(pieces) if mine), default=-1), False
    for i, (ids, mine) in enumerate(pieces[: last + 1]):
        end = next((j + 1 for j, token in enumerate(ids) if token in ends), None) if mine else None
        kept = ids[:end] if i == last else ids
        tokens += kept
        learned += [not only or (mine and (end is None or j < end)) for j in range(len(kept))]
        ended = end is not None
    spare = 0 if ended or not tokens else 1
    if not causal and recipe.completion_length is not None:
        tail = next((i for i, mine in enumerate(reversed(learned)) if not mine), len(learned))
        spare = recipe.completion_length - tail
        if spare < 0:
            raise ValueError(f"its completion has {tail} tokens, more than completion_length={tail + spare}")
    tokens += [ends[0]] * spare
    learned += [True] * spare
    if causal and learned:
        learned[0] = False
    if not any(learned):
        raise ValueError("has nothing to learn: no assistant's message, or an empty text")
    return Example(torch.tensor(tokens), torch.tensor(learned))


def show(
    examples: Sequence[Example], levels: Float[Tensor, " B"], uniforms: Float[Tensor, "B L"], *, causal: bool
) -> tuple[list[Shown], int]:
    """The examples with weights, and the divisor of the sum of their weighted losses.

    causal     every learned token counts 1; tokens divide: the mean over tokens, as transformers' `labels=`.
    diffusion  each learned token of row b is hidden with probability t_b and counts 1 / (t_b n_b), n_b learned tokens
               of row b; rows divide (LLaDA's SFT loss, eq. 5 [paper]).
    """
    shown = []
    for one, t, row in zip(examples, levels, uniforms, strict=True):
        if causal:
            shown.append(Shown(one.tokens, torch.zeros_like(one.learned), one.learned.float()))
            continue
        count = int(one.learned.sum())
        hidden = one.learned.clone()
        hidden[one.learned] = row[:count] < t
        shown.append(Shown(one.tokens, hidden, hidden / (t * count)))
    return shown, sum(int(one.learned.sum()) for one in examples) if causal else len(examples)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sequences per row of at most `capacity` tokens: each, the longest first, goes to the first row with room."""
    rows, room = list[list[int]](), list[int]()
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((k for k, left in enumerate(room) if left >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(i)
        room[place] -= lengths[i]
    return rows


@dataclass(frozen=True)
class Layout:
    """Rows of sequences, padded on the right; `segment` counts a row's sequences from 1, 0 is padding."""

    tokens: Int[Tensor, "B T"]
    segment: Int[Tensor, "B T"]
    hidden: Bool[Tensor, "B T"]
    weight: Float[Tensor, "B T"]

    @property
    def positions(self) -> Int[Tensor, "B T"]:
        """Each token's place in its own sequence, from 0; padding counts as a sequence."""
        places = torch.arange(self.segment.shape[1], device=self.segment.device).expand_as(self.segment)
        begins = torch.ones_like(self.segment, dtype=torch.bool)
        begins[:, 1:] = self.segment[:, 1:] != self.segment[:, :-1]
        return places - torch.where(begins, places, 0).cummax(-1).values


def lay_out(shown: Sequence[Shown], rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device) -> Layout:
    """The sequences of each row, one after the other."""
    columns = []
    for name, fill in (("tokens", pad_id), ("hidden", False), ("weight", 0.0)):
        joined = [torch.cat([getattr(shown[i], name) for i in row]) for row in rows]
        columns.append(torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=fill))
    numbers = [torch.cat([torch.full_like(shown[i].tokens, k) for k, i in enumerate(row, 1)]) for row in rows]
    columns.insert(1, torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True))
    return Layout(*(column.to(device) for column in columns))


def hidden_states(policy: Policy, layout: Layout, *, packed: bool) -> Float[Tensor, "B T D"]:
    """Final states whose head gives the logits AT each position; block-causal models see earlier blocks without masks.
    packed: a mask of four axes, by which a token attends to its own sequence alone."""
    spec, segment = policy.spec, layout.segment
    if spec.attention == "block_causal":
        return packed_hidden(policy, layout.tokens, layout.hidden, segment > 0)
    tokens = layout.tokens if spec.mask_id is None else layout.tokens.masked_fill(layout.hidden, spec.mask_id)
    if not packed:
        return policy.hidden(tokens, segment > 0)
    seen, positions = segment[:, :, None] == segment[:, None, :], layout.positions
    if spec.attention == "causal":
        seen = seen.tril()
    dtype = next(policy.module.parameters()).dtype
    barred = torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill(~seen, torch.finfo(dtype).min)
    states = policy.encode(tokens, barred[:, None], positions)
    return torch.where((positions > 0)[..., None], states.roll(1, dims=1), states) if spec.shift else states


def weighted_loss(policy: Policy, layout: Layout, *, packed: bool = False) -> Float[Tensor, ""]:
    """-sum weight * log p(token), nats, over the positions with a weight."""
    states, scored = hidden_states(policy, layout, packed=packed), layout.weight != 0
    params = SamplingParams(suppress=() if policy.spec.mask_id is None else (policy.spec.mask_id,))
    logps = token_logprobs(policy, states[scored], layout.tokens[scored], params)
    return -(logps * layout.weight[scored]).sum()


@torch.no_grad()
def check_packing(policy: Policy) -> None:
    """Raise ValueError if a sequence's states depend on the other sequences of its row."""
    if policy.spec.attention == "block_causal":
        raise ValueError(
            f"packing=True does not go with {policy.spec.name!r}, a block-causal model, whose rows are scored in a "
            "clean and a noisy copy; leave packing off"
        )
    tokens = [(torch.arange(n) + n) % policy.vocab_size for n in (5, 7)]
    alone = [Shown(ids, torch.zeros_like(ids, dtype=torch.bool), torch.ones(len(ids))) for ids in tokens]
    options: dict[str, Any] = {"pad_id": policy.pad_id, "device": policy.device}
    try:
        together = hidden_states(policy, lay_out(alone, [[0, 1]], **options), packed=True)[0].float()
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(f"packing=True: {type(policy.module).__name__} takes no mask of four axes: {error}") from error
    apart = [hidden_states(policy, lay_out(alone, [[i]], **options), packed=False)[0].float() for i in (0, 1)]
    tolerance = 1e-4 if next(policy.module.parameters()).dtype == torch.float32 else 0.1
    if not torch.allclose(together, torch.cat(apart), rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"packing=True: sequences in one row of {type(policy.module).__name__} see each other; leave packing off"
        )
