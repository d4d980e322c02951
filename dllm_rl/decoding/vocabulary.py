"""What the tokens of a tokenizer are: text, special tokens, the beginning of a row."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import islice
from typing import Any

from dllm_rl.decoding.chat_template import TEMPLATE_ERRORS, fixed_template
from dllm_rl.models.base import Policy, Tokenizer

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def begin_ids(policy: Policy) -> list[int]:
    """Return the ids that the tokenizer adds before a text, such as BOS or [CLS]; [] if it adds none.

    Call it for a row that begins with plain text. What the tokenizer adds after a text, such as [SEP] or <eos>, is
    never added: there the completion begins, and this token ends it. A masked language model thus sees [CLS] prompt
    completion [SEP], as in its training; a text whose blanks are filled in has no end token. A tokenizer that is not of
    transformers adds nothing.

    Raises:
        ValueError: The tokenizer adds the mask, or an id outside the model's vocabulary.
    """
    tokenizer = policy.tokenizer
    text = _ordinary_text(tokenizer) if hasattr(tokenizer, "all_special_ids") else None
    if text is None:
        return []
    plain, full = (tokenizer.encode(text, add_special_tokens=added) for added in (False, True))
    start = next(start for start in range(len(full)) if full[start : start + len(plain)] == plain)
    for token in full[:start]:
        if token == policy.spec.mask_id or not 0 <= token < policy.vocab_size:
            kind = "its mask" if token == policy.spec.mask_id else f"outside the vocabulary of {policy.vocab_size}"
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__} begins a text with the id {token}, which for this model is "
                f"{kind}; correct its bos_token, or let it add none"
            )
    return full[:start]


@lru_cache(maxsize=16)
def _ordinary_text(tokenizer: Any) -> str | None:
    """Return a text whose tokens are not special; None if the vocabulary has no such text."""
    special_ids = {*tokenizer.all_special_ids}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token], skip_special_tokens=True)
        if text.strip() and "\ufffd" not in text:  # that is part of a character
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and special_ids.isdisjoint(ids):
                return str(text)
    return None


def symbol_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern that matches each token of a vocabulary of symbols, such as residues; None for other tokenizers.

    Such a tokenizer writes spaces between its tokens, and they mean nothing: every token is a single character, or the
    tokenizer reads its tokens without spaces too, as one of 6-mers does.
    """
    # Another tokenizer may have no hash. The class is asked, because transformers computes the property at each access.
    is_of_transformers = hasattr(type(tokenizer), "all_special_ids")
    return _symbols_of(tokenizer) if is_of_transformers else None


@lru_cache(maxsize=16)
def _symbols_of(tokenizer: Any) -> re.Pattern[str] | None:
    special_ids = {*tokenizer.all_special_ids}
    ids = [token for token in range(len(tokenizer)) if token not in special_ids]
    pair = [tokenizer.decode([token]) for token in ids[:2]]
    if len(pair) < 2 or tokenizer.decode(ids[:2]) != " ".join(pair):
        return None
    texts = [tokenizer.decode([token]) for token in ids]
    is_read = all(len(text) == 1 for text in texts) or tokenizer.encode("".join(texts), add_special_tokens=False) == ids
    if not is_read or not all(map(str.strip, texts)):
        return None
    by_length = sorted(texts, key=len, reverse=True)
    return re.compile(f"({any_of([*special_texts(tokenizer), *by_length]).pattern})")


def reads_otherwise(policy: Policy) -> bool:
    """Return whether `text_of` returns another text than the tokenizer's `decode` without special tokens."""
    tokenizer = policy.tokenizer
    of_tokenizer = (symbol_pattern, text_beginnings, drops_spaces, prefix_in_words)
    return bool(text_tokens(policy)) or any(differs(tokenizer) for differs in of_tokenizer)


def prefix_in_words(tokenizer: Tokenizer) -> str:
    """Return what begins the tokens that continue a word, ## of WordPiece: no text, and `decode` shows it in the first
    token. "": nothing does.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return str(model.continuing_subword_prefix) if type(model).__name__ == "WordPiece" else ""


def drops_spaces(tokenizer: Tokenizer) -> bool:
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))


def text_tokens(policy: Policy) -> Mapping[int, str]:
    """Return the special tokens that a model writes as a part of its answers, such as <answer>, by id.

    These are all but the tokenizer's and the model's own (pad, mask, end ...), those that the tokenizer adds around a
    text, and those with which the chat template begins and ends a turn.
    """
    tokenizer = policy.tokenizer
    if not hasattr(type(tokenizer), "all_special_ids"):
        return {}
    own = frozenset({policy.spec.mask_id, *policy.spec.eos_ids})
    return _text_tokens(tokenizer, len(tokenizer), str(getattr(tokenizer, "chat_template", None)), own)


@lru_cache(maxsize=16)
def _text_tokens(tokenizer: Any, size: int, template: str, own: frozenset[int]) -> Mapping[int, str]:
    roles = {getattr(tokenizer, f"{name}_token_id", None) for name in ROLES}
    found = {token: text for token, text in _added_special(tokenizer).items() if token not in own | roles}
    if not found:
        return {}
    text = _ordinary_text(tokenizer)
    around = {*tokenizer.encode(text)} if text is not None else set()
    turn = _user_turn(tokenizer) if tokenizer.chat_template else ""
    return {
        token: text for token, text in found.items() if token not in around and turn is not None and text not in turn
    }


def _user_turn(tokenizer: Any) -> str | None:
    """Return what the chat template writes around a user's turn; None if it does not write one."""
    from jinja2 import TemplateError  # local: not needed for --help

    turns = [{"role": role, "content": "a"} for role in ("system", "user")]
    for messages in (turns, turns[1:]):
        fixed = fixed_template(tokenizer)
        with suppress(TemplateError, *TEMPLATE_ERRORS):
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **fixed))
    return None


def never_text(policy: Policy) -> frozenset[int]:
    """Return the special tokens that no text has: all but `text_tokens` and the unknown."""
    if not hasattr(type(policy.tokenizer), "all_special_ids"):
        return frozenset()
    return _special_ids(policy.tokenizer, len(policy.tokenizer)).difference(text_tokens(policy))


@lru_cache(maxsize=16)
def _special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    return frozenset({*tokenizer.all_special_ids, *_added_special(tokenizer)} - {tokenizer.unk_token_id})


def _added_special(tokenizer: Any) -> dict[int, str]:
    return {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def text_beginnings(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Return short texts, each with its ids, after which a tokenizer reads a text as it is; [] if it reads every
    text so.

    Many tokenizers begin a text with the mark of a word, which is a space in what they decode.
    """
    # As in `symbol_pattern`, another tokenizer may have no hash.
    is_of_transformers = hasattr(type(tokenizer), "all_special_ids")
    return _beginnings_of(tokenizer) if is_of_transformers and symbol_pattern(tokenizer) is None else []


@lru_cache(maxsize=16)
def _beginnings_of(tokenizer: Any) -> list[tuple[str, list[int]]]:
    read = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
    special = {*tokenizer.all_special_ids}
    ordinary = (token for token in range(len(tokenizer)) if token not in special)
    texts = (tokenizer.decode([token]).strip() for token in islice(ordinary, 400))
    found = []
    for text in dict.fromkeys(text for text in texts if text and text.isprintable() and "\ufffd" not in text):
        ids, twice = read(text), read(text * 2)
        rest = twice[len(ids) :]
        if ids and special.isdisjoint(ids) and twice[: len(ids)] == ids and tokenizer.decode(rest).strip() == text:
            if rest == ids:  # no mark
                return []
            found.append((text, ids))
    return found


def any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches each of the texts; without texts it matches nothing."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def special_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the special tokens, longest first, so that a regular expression prefers longer ones."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda text: (-len(text), text))
