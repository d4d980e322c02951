"""Rollouts to texts: for graders, logs and people."""

import math
from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_rl.decoding.vocabulary import (
    drops_spaces,
    never_text,
    prefix_in_words,
    symbol_pattern,
    text_beginnings,
    text_tokens,
)
from dllm_rl.models.base import Policy
from dllm_rl.tasks.base import Cost, Problem
from dllm_rl.types.rollouts import Rollout


def text_of(policy: Policy, ids: Sequence[int], *, continues: bool = True) -> str:
    """Return the text of token ids, without special tokens but `text_tokens`, and without the spaces between symbols
    (`symbol_pattern`).

    With `continues`, the ids come after other tokens, as a completion's do; then a space before them is a part of the
    text. Otherwise they begin a text.
    """
    tokenizer = policy.tokenizer
    if kept := text_tokens(policy):
        hidden = {*never_text(policy), tokenizer.unk_token_id}
        ids = [token for token in ids if token not in hidden]
    beginnings = text_beginnings(tokenizer) if continues else []
    beginning = beginnings[0][1] if beginnings else []
    # A space before a comma is one that the model wrote.
    options = {"clean_up_tokenization_spaces": False} if drops_spaces(tokenizer) else {}
    text = tokenizer.decode([*beginning, *ids], skip_special_tokens=not kept, **options)
    if symbol_pattern(tokenizer) is not None:
        return "".join(text.split())
    if continues and ids and (prefix := prefix_in_words(tokenizer)) and text.startswith(prefix):
        is_in_word = tokenizer.convert_ids_to_tokens([ids[0]])[0].startswith(prefix)
        text = text.removeprefix(prefix) if is_in_word else text
    return text[len(tokenizer.decode(beginning)) :] if beginning else text


def decode(policy: Policy, rollout: Rollout) -> list[str]:
    """Return each row's completion as text: the tokens up to the first end token, without special tokens."""
    ids = completion_token_ids(rollout)
    return [text_of(policy, before_end(policy, row_ids)) for row_ids in ids]


def texts_to_grade(
    policy: Policy, rollout: Rollout, problems: Sequence[Problem], completion_ids: list[list[int]]
) -> list[str]:
    """Return the text of each row that a task grades: the completion, or, for a problem with blanks, the full text.
    `problems` has the problem of each row.
    """
    has_blanks = any(problem.blank is not None for problem in problems)
    texts = full_texts(policy, rollout) if has_blanks else [""] * len(problems)
    for row, problem in enumerate(problems):
        if problem.blank is None:
            texts[row] = text_of(policy, before_end(policy, completion_ids[row]), continues=problem.prompt != "")
    return texts


def full_texts(policy: Policy, rollout: Rollout) -> list[str]:
    """Return each row's full text, prompt and completion, without special tokens."""
    tokens = rollout.tokens.tolist()
    attention_mask = rollout.attention_mask.tolist()
    completion_mask = rollout.completion_mask.tolist()
    texts = []
    for row_tokens, is_token, is_completion in zip(tokens, attention_mask, completion_mask, strict=True):
        ids = list(compress(row_tokens, is_token))
        in_completion = list(compress(is_completion, is_token))
        # An end token in a blank does not end the text, which continues at least to the prompt's last token.
        after_prompt = len(ids) - in_completion[::-1].index(False) if False in in_completion else 0
        full_ids = [*ids[:after_prompt], *before_end(policy, ids[after_prompt:])]
        texts.append(text_of(policy, full_ids, continues=False))
    return texts


def completion_token_ids(rollout: Rollout) -> list[list[int]]:
    """Return the token ids of each row's completion."""
    tokens = rollout.tokens.masked_fill(~rollout.completion_mask, -1)  # so that only one tensor moves to the CPU
    return [[token for token in row if token >= 0] for row in tokens.tolist()]


def before_end(policy: Policy, ids: list[int]) -> list[int]:
    """Return the ids before the first end token."""
    end = next((i for i, token in enumerate(ids) if token in policy.spec.eos_ids), len(ids))
    return ids[:end]


def costs_of(policy: Policy, rollout: Rollout, completion_ids: list[list[int]]) -> list[Cost]:
    """Return each row's cost: its numbers of steps and tokens. `completion_token_ids` returns `completion_ids`."""
    num_steps = (rollout.unmask_step.amax(-1) + 1).tolist()
    return [Cost(steps, len(before_end(policy, ids))) for steps, ids in zip(num_steps, completion_ids, strict=True)]


def written_tokens(policy: Policy, rollout: Rollout) -> list[list[dict[str, Any]]]:
    """Return every token of each row's completion as JSON data.

    A token has its id, its text, the step that wrote it (-1: still masked), and the probability with which it was
    sampled (null if it is not finite, or the token was not sampled).
    """
    has_completion = rollout.completion_mask.any(0)
    start = int(has_completion.nonzero()[0]) if has_completion.any() else len(has_completion)
    tokens = rollout.tokens[:, start:].tolist()
    steps = rollout.unmask_step[:, start:].tolist()
    probabilities = written_logprobs(rollout)[:, start:].exp().tolist()
    rows = []
    for row in zip(tokens, steps, probabilities, strict=True):
        row_tokens = []
        for token, step, probability in zip(*row, strict=True):
            if step >= 0 or token == policy.spec.mask_id:  # otherwise padding, or a token of the prompt
                json_probability = probability if math.isfinite(probability) else None  # JSON has no NaN or infinity
                text = policy.tokenizer.decode([token], skip_special_tokens=False)
                row_tokens.append({"id": token, "text": text, "step": step, "probability": json_probability})
        rows.append(row_tokens)
    return rows


def written_logprobs(rollout: Rollout) -> Float[Tensor, "B T"]:
    """Return the log-prob of each token when it was written, in nats.

    Under `Renoise` it is that of the position's last accepted draw, and NaN where the answer is another token (with
    answer="argmax"); `Rollout.logprobs` has sums over draws.
    """
    renoised = rollout.renoised
    if renoised is None:
        return rollout.logprobs
    steps = torch.arange(renoised.drawn.shape[-1], device=renoised.drawn.device)
    last = torch.where(renoised.drawn >= 0, steps, -1).amax(-1)
    place = last.clamp(min=0)[..., None]
    drawn, logprobs = (values.gather(-1, place)[..., 0] for values in (renoised.drawn, renoised.logprobs))
    return torch.where((last >= 0) & (drawn == rollout.tokens), logprobs, torch.nan)
