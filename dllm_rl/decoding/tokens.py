"""Texts to token ids, and token ids that somebody has to rollouts that can be scored."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch

from dllm_rl.decoding.vocabulary import any_of, never_text, special_texts, symbol_pattern, text_beginnings, text_tokens
from dllm_rl.models.base import Policy
from dllm_rl.tasks import Task
from dllm_rl.tasks.base import Problem
from dllm_rl.types.rollouts import Prompts, Rollout

# A piece of a prompt: its text, and how `text_ids` reads it. BLANK becomes a mask token.
Piece = tuple[str | None, Mapping[str, bool]]
BLANK: Piece = (None, {})
_GAP = re.compile(r"(?<=[0-9A-Za-z])\s+(?=[0-9A-Za-z])")  # without it, two numbers or words are one
# Unicode's decompositions that change a character's print alone. Others, such as "<super>", change numbers.
FORMS = ("<wide>", "<narrow>", "<noBreak>", "<vertical>", "<initial>", "<medial>", "<final>", "<isolated>")


def quoted(prompt: Any) -> str:
    """Return a prompt for an error message, shortened to 200 characters."""
    text = repr(prompt)
    return text if len(text) <= 200 else f"{text[:197]}..."


def text_ids(
    policy: Policy, text: str, *, special: bool = False, spelled: bool = False, continues: bool = False
) -> list[int]:
    """Return the token ids of a text.

    Args:
        policy: Policy with the tokenizer.
        text: Text, or a piece of one.
        special: Whether the text of every special token becomes that token. Otherwise only `text_tokens` do.
        spelled: Whether all texts of special tokens are ordinary text.
        continues: Whether the text comes after other tokens, as a completion does. Then nothing is added before it,
            such as the mark with which many tokenizers begin a text.

    Raises:
        ValueError: The tokens do not hold every character of the text (except whitespace and case) or hold the mask, or
            an id is outside the model's vocabulary.
    """
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"text {text[:80]!r} has half a character, the lone surrogate {half[0]!r} at character {half.start()}; cut "
            "texts between whole characters"
        )
    tokenizer = policy.tokenizer
    beginnings = text_beginnings(tokenizer)
    tokens = any_of([*text_tokens(policy).values()])
    if not spelled and tokens.search(text) and tokens.fullmatch(text) is None:
        others = any_of(special_texts(tokenizer))
        has_others = not special and any(map(others.search, tokens.split(text)))
        if beginnings or has_others:  # a mark may follow each special token
            ids: list[int] = []
            for part in re.split(f"({tokens.pattern})", text):
                is_token = tokens.fullmatch(part) is not None
                reading = {"special": is_token or special, "spelled": not is_token and not special}
                ids += text_ids(policy, part, **reading, continues=continues or bool(ids))
            return ids
    special = special or (not spelled and tokens.search(text) is not None)
    symbols = symbol_pattern(tokenizer)
    written = text if symbols is None else " ".join(filter(str.strip, symbols.split(text)))
    read = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=not special)
    if continues and beginnings:
        read = partial(_read_behind, beginnings, read)
    try:
        ids = read(written)
    except BaseException as error:  # the tokenizers library raises a bare Exception, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"text {text!r} cannot be tokenized by this model: {error}") from error
    if ids and not 0 <= min(ids) <= max(ids) < policy.vocab_size:
        outside = next(token for token in ids if not 0 <= token < policy.vocab_size)
        raise ValueError(
            f"text {text[:80]!r}: the tokenizer gives the id {outside}, outside the vocabulary of {policy.vocab_size} "
            "tokens; correct tokenizer.json"
        )
    if policy.spec.mask_id is not None and policy.spec.mask_id in ids:
        raise ValueError(
            f"text {quoted(text)}: the tokenizer reads the mask token in it, which samplers fill in; leave it out, or "
            "give it as blank"
        )
    if not special and (found := sorted(never_text(policy).intersection(ids))):
        raise ValueError(
            f"text {quoted(text)}: the tokenizer reads the special token {tokenizer.decode(found[:1])} in it, and not "
            "its letters; leave it out"
        )
    tokenized_text = tokenizer.decode(ids, skip_special_tokens=False)
    pairs = zip_longest(_comparable(text), _comparable(tokenized_text))
    lost = next((character for character, tokenized in pairs if character != tokenized), None)
    if lost is not None:
        raise ValueError(
            f"text {quoted(text)} cannot be tokenized by this model: {lost!r} is lost, and the tokens "
            f"read {quoted(tokenized_text)}; write the text with characters that the tokenizer has"
        )
    joined = _GAP.sub("", text)
    may_be_joined = symbols is None and joined != text and not _GAP.search(tokenized_text)
    if may_be_joined and ids == read(joined):
        raise ValueError(
            f"text {quoted(text)} cannot be tokenized by this model: the tokenizer drops its spaces, and reads "
            f"{quoted(joined)}; write the text without them, or with another separator"
        )
    return ids


def _comparable(text: str) -> str:
    """Return a text without what tokenizers may change: whitespace, case, and the form of a character.

    A character of another meaning, such as an exponent or a letter of another alphabet, is not a form.
    """
    if not text.isascii():
        characters = unicodedata.normalize("NFC", text)
        text = "".join(unicodedata.normalize("NFKC", each) if _is_form(each) else each for each in characters)
    return unicodedata.normalize("NFC", "".join(text.split()).casefold())


def _is_form(character: str) -> bool:
    """Return whether a character, such as a wide digit, a ligature or an ellipsis, is one or more others in print."""
    kind = unicodedata.decomposition(character).partition(" ")[0]
    return kind in FORMS or (kind == "<compat>" and not character.isnumeric())


def _read_behind(beginnings: Sequence[tuple[str, list[int]]], read: Callable[[str], list[int]], text: str) -> list[int]:
    """Return the ids of a text behind the first of `beginnings` with which it does not make up a token."""
    for beginning, ids in beginnings:
        both = read(beginning + text)
        if both[: len(ids)] == ids:
            return both[len(ids) :]
    raise ValueError("behind every other text it makes up tokens with it; begin it with another character")


def default_max_new_tokens(policy: Policy, problems: Task | Sequence[Problem]) -> int:
    """Return the default number of new tokens: the longest solution of the first 100 problems, or 256 if unknown.

    It is 256 for chat prompts, and 0 for problems with blanks, where only the blanks are filled in.
    """
    problem = problems[0]
    if problem.blank is not None:
        return 0
    if not isinstance(problem.prompt, str):
        return 256
    solutions = [problems[index].solution for index in range(min(100, len(problems)))]
    lengths = (len(text_ids(policy, text, continues=problem.prompt != "")) for text in solutions if text is not None)
    return max(lengths, default=256)


def as_rollout(policy: Policy, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Rollout:
    """Make a rollout of texts that were not sampled, so that an estimator can score them.

    The estimator must not replay the sampler, because the rollout records no steps and no log-probs.

    Args:
        policy: Policy that will score them.
        pairs: Token ids of each prompt (`prompt_ids`) and of its continuation (`text_ids`).

    Raises:
        ValueError: A pair is longer than the model allows.
    """
    ids = [[*context, *continuation] for context, continuation in pairs]
    is_continuation = [[False] * len(context) + [True] * len(continuation) for context, continuation in pairs]
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, open_positions=is_continuation)
    width = max(map(len, ids))
    limit = policy.spec.max_length
    if limit is not None and width > limit:
        raise ValueError(f"a context and continuation of {width} tokens exceed the model's {limit} positions")
    tokens = prompts.tokens
    completion_mask = prompts.infill_mask
    if completion_mask is None:
        completion_mask = torch.zeros(tokens.shape, dtype=torch.bool)
    steps = torch.full_like(tokens, -1)
    logprobs = torch.zeros(tokens.shape)
    return Rollout(tokens, prompts.attention_mask, completion_mask, steps, logprobs, prompts.group).to(policy.device)
