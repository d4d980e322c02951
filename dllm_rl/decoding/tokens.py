"""Conversion between text and tokens: problems -> Prompts, Rollout -> completions."""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import cache, lru_cache, partial
from itertools import compress, islice, zip_longest
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.models.base import Policy, Tokenizer
from dllm_rl.tasks import Task
from dllm_rl.tasks.base import Cost, Problem
from dllm_rl.types import Prompts, Rollout

# A causal model predicts each token from the tokens before it, so nothing predicts the first token of a row.
NEEDS_TOKEN = "a causal model samples after a token: begin the prompt with text, or let the tokenizer add BOS"
# A piece of a prompt: its text, and how `text_ids` reads it. BLANK becomes a mask token.
Piece = tuple[str | None, Mapping[str, bool]]
BLANK: Piece = (None, {})
_GAP = re.compile(r"(?<=[0-9A-Za-z])\s+(?=[0-9A-Za-z])")  # without it, two numbers or words are one
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
NO_ARGUMENTS: Mapping[str, Any] = {}
# Arguments of `apply_chat_template` that a row may not set, because this module sets them, or they change its return.
_FIXED_ARGUMENTS = """conversation messages chat_template add_generation_prompt continue_final_message tokenize
padding truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs
sanitize_control_tokens"""
# What a message may say beside its content.
MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "audio")
# Unicode's decompositions that change a character's print alone. Others, such as "<super>", change numbers.
FORMS = ("<wide>", "<narrow>", "<noBreak>", "<vertical>", "<initial>", "<medial>", "<final>", "<isolated>")
# The time that a chat template may read: one that never passes, so that a row is always the same prompt. Templates of
# Llama write this day where they have no clock.
TEMPLATE_TIME = datetime(2024, 7, 26)
_CLOCK = re.compile(
    r"""\bstrftime_now\s*\(\s*(?:(?:format\s*=\s*)?(["'])((?:(?!\1)[^\\])*)\1\s*\))?"""
)  # quote, format
# Errors of a chat template, in addition to jinja2's own: its expressions run as Python code does.
TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def encode(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    num_generations: int | Sequence[int] = 1,
    seeds: Sequence[int] | None = None,
    reads_order: bool = True,
) -> Prompts:
    """Tokenize the prompts of problems, each in `num_generations` rows: one number, or one for each problem.

    Chat messages are rendered with the chat template, and plain text begins with what the tokenizer adds before a text
    (`begin_ids`). Each blank becomes one mask token, which the sampler fills in. `reads_order` is explained in
    `Prompts`.
    """
    tokenized = [ids_and_blanks(policy, problem.prompt, problem.blank) for problem in problems]
    ids = [row_ids for row_ids, _ in tokenized]
    blanks = [row_blanks for _, row_blanks in tokenized]
    prompts = Prompts.from_ids(
        ids, pad_id=policy.pad_id, num_generations=num_generations, seeds=seeds, open_positions=blanks
    )
    return replace(prompts, reads_order=reads_order)


def prompt_ids(
    policy: Policy,
    prompt: str | list[dict[str, str]],
    blank: str | None = None,
    *,
    template_arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> list[int]:
    """Return the token ids of a prompt, as rollouts, evaluations, scores, the server and SFT read it.

    A plain text begins with `begin_ids`. Of a chat, only the template's special tokens are among the ids.
    `template_arguments` is explained in `conversation_ids`.
    """
    return ids_and_blanks(policy, prompt, blank, template_arguments=template_arguments)[0]


def ids_and_blanks(
    policy: Policy,
    prompt: str | list[dict[str, str]],
    blank: str | None,
    *,
    template_arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a prompt, and for each id whether it is a mask token that replaces the text `blank`.

    `template_arguments` is explained in `conversation_ids`. Raise ValueError for a prompt that the model cannot read.
    """
    if blank == "":
        raise ValueError(f"blank={blank!r} is empty; leave it at None")
    if blank is not None and policy.spec.mask_id is None:
        raise ValueError(
            f"blank={blank!r} is to be filled in, and the model has no mask token; leave it at None, or use a "
            "diffusion model"
        )
    if isinstance(prompt, str):
        pieces: list[Piece] = []
        for text in [prompt] if blank is None else prompt.split(blank):
            pieces += [BLANK, (text, {})]
        del pieces[0]  # the blank before the first text
    else:
        chat = _Chat(policy, prompt, blank=blank, template_arguments=template_arguments)
        # The template would end an assistant's turn that the model continues, so this is appended after rendering.
        answer_start = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
        if not isinstance(answer_start, str):
            raise ValueError(
                f"prompt={_quote(prompt)}: the last assistant turn, which the model continues, is not text; give its "
                "content as text, or leave the turn out"
            )
        messages = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
        text = chat.render(messages, add_generation_prompt=True) + chat.mark_special_tokens(answer_start, answer=True)
        pieces = chat.pieces(text)
    ids = begin_ids(policy) if isinstance(prompt, str) else []
    blanks = [False] * len(ids)
    read = cache(partial(text_ids, policy))  # a prompt with many blanks has equal pieces, such as empty ones
    num_begin = len(ids)
    for piece, reading in pieces:
        if piece is not None:
            piece_ids = read(piece, **reading, continues=len(ids) > num_begin)
        else:
            assert policy.spec.mask_id is not None, "a blank was refused"
            piece_ids = [policy.spec.mask_id]
        ids += piece_ids
        blanks += [piece is None] * len(piece_ids)
    if not ids and policy.spec.attention == "causal":
        raise ValueError(f"prompt={prompt!r} has no token, and {NEEDS_TOKEN}")
    return ids, blanks


def conversation_ids(
    policy: Policy,
    messages: Sequence[Mapping[str, Any]],
    answers: Collection[int],
    *,
    template_arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> list[tuple[list[int], bool]]:
    """Return the token ids of a conversation in pieces, and for each piece whether it is one of the answers.

    Args:
        policy: Policy with the tokenizer.
        messages: Chat messages.
        answers: Indices of the assistant's messages that become pieces of their own.
        template_arguments: More arguments of the chat template: `tools`, and variables such as `enable_thinking`.

    Raises:
        ValueError: The template does not write the messages, or does not read an argument.
    """
    chat = _Chat(policy, messages, template_arguments=template_arguments)
    messages = list(messages)
    full_text = chat.render(messages)
    pieces: list[tuple[list[int], bool]] = []

    def ids(text: str) -> list[int]:
        found: list[int] = []
        for piece, reading in chat.pieces(text):
            assert piece is not None, "a conversation has no blanks"
            found += text_ids(policy, piece, **reading, continues=bool(pieces or found))
        return found

    num_done = 0  # number of characters of `full_text` that `pieces` already covers
    for i in sorted(answers):
        before = chat.render(messages[:i], add_generation_prompt=True)
        after = chat.render(messages[: i + 1])
        if not (full_text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"messages: the chat template does not write message {i} as the continuation of those before it; give "
                "a row for each turn, with prompt and completion as text"
            )
        pieces.append((ids(full_text[num_done : len(before)]), False))  # ends like `prompt_ids` of messages[:i]
        pieces.append((ids(full_text[len(before) : len(after)]), True))
        num_done = len(after)
    return [*pieces, (ids(full_text[num_done:]), False)]


def _quote(prompt: Any) -> str:
    """Return a prompt for an error message, shortened to 200 characters."""
    text = repr(prompt)
    return text if len(text) <= 200 else f"{text[:197]}..."


def check_chat(messages: Any, name: str = "prompt") -> None:
    """Raise ValueError, with the column's name, unless `messages` is a chat: messages with a role, and content that a
    template can render.
    """
    error = f"{name}={_quote(messages)} is neither text nor chat messages, each with role and content"
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(error)
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(error)
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not role.strip():
            raise ValueError(f"{error}: role={role!r} of message {number} is not a name; use user, assistant or system")
        has_parts = isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content)
        has_calls = content is None and message.get("tool_calls")
        if not (isinstance(content, str) or has_parts or has_calls):
            raise ValueError(f"{error}: content={_quote(content)} of message {number} is not text; give text")
        for part in content if has_parts else ():  # a template leaves out what it does not know
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{error}: {_quote(part)} of message {number} is not text, and only text is read")


def fixed_template(tokenizer: Tokenizer, tools: Any = None) -> dict[str, Any]:
    """Return arguments of `apply_chat_template` with which a row is the same prompt at each call: none, or a template
    that writes TEMPLATE_TIME where the tokenizer's own reads the clock.

    Raises:
        ValueError: The template draws at random, or computes the format of the time that it writes.
    """
    template = str(tokenizer.chat_template)
    if drawn := re.search(r"\|\s*random\b|\blipsum\b", template):
        raise ValueError(
            f"chat_template draws at random ({drawn[0]}), so that a row is another prompt at each call; correct it"
        )
    if not _CLOCK.search(template):
        return {}
    if isinstance(tokenizer.chat_template, Mapping):
        template = str(tokenizer.get_chat_template(tools=tools))
    fixed = _CLOCK.sub(lambda call: json.dumps(TEMPLATE_TIME.strftime(call[2])) if call[1] else call[0], template)
    if computed := _CLOCK.search(fixed):
        raise ValueError(
            f"chat_template reads the clock, {template[computed.start() :][:40]!r}, so that a row is another prompt at "
            "another time; write the time as text there"
        )
    return {"chat_template": fixed}


def _with_text(message: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return a message with `change` applied to its text, or to the text of each of its parts."""
    content = message["content"]
    if isinstance(content, str):
        content = change(content)
    elif isinstance(content, list):
        content = [
            {**part, "text": change(part["text"])} if isinstance(part.get("text"), str) else part for part in content
        ]
    return {**message, "content": content}


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with `change` applied to each of its texts that is not a key."""
    if isinstance(value, Mapping):
        return {key: _map_texts(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


class _Chat:
    """Renders and tokenizes chats.

    If a message contains the text of a special token, such as "<eos>", that text is tokenized as ordinary text. Only
    the template can write special tokens, and the assistant `text_tokens`. To keep the two apart, `render` replaces the
    texts in messages by markers.
    """

    def __init__(
        self,
        policy: Policy,
        messages: Sequence[Mapping[str, Any]],
        *,
        blank: str | None = None,
        template_arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> None:
        check_chat(messages)
        if not getattr(policy.tokenizer, "chat_template", None):
            raise ValueError(
                "prompt is a chat, but the tokenizer has no chat template; give plain text (of a task: chat=False), "
                "or a tokenizer with a chat_template"
            )
        self.policy = policy
        self.blank = blank
        self.marked_texts = [*([] if blank is None else [blank]), *special_texts(policy.tokenizer)]
        kept = text_tokens(policy).values()
        self.marked_pattern = _any_of(self.marked_texts)
        self.answer_pattern = _any_of([text for text in self.marked_texts if text == blank or text not in kept])
        tools = template_arguments.get("tools")
        all_content = json.dumps(
            [tools, *(message["content"] for message in messages)], ensure_ascii=False, default=str
        )
        # A marker is the index of a text between two copies of a private-use character that no message contains.
        self.delimiter = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in all_content)
        self.template_arguments = dict(template_arguments)
        if tools is not None:
            self.template_arguments["tools"] = _map_texts(tools, self.mark_special_tokens)
        self._check_template_arguments(messages)

    def mark_special_tokens(self, text: str, *, answer: bool = False) -> str:
        """Replace each blank, and each text of a special token, by a marker; of an assistant's answer, `text_tokens`
        are kept.
        """
        return (self.answer_pattern if answer else self.marked_pattern).sub(
            lambda match: f"{self.delimiter}{self.marked_texts.index(match[0])}{self.delimiter}", text
        )

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Return the template's text, with markers.

        With `add_generation_prompt`, the text ends where the assistant's answer starts.

        Raises:
            ValueError: The template fails, omits a message, or does not begin the assistant's turn.
        """
        marked = [
            _with_text(message, partial(self.mark_special_tokens, answer=message["role"] == "assistant"))
            for message in messages
        ]
        text = self._apply_template(marked, add_generation_prompt)
        self._check_messages(marked, text)
        if add_generation_prompt:
            self._check_generation_prompt(marked, text)
        return text

    def _apply_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        from jinja2 import TemplateError  # local: not needed for --help

        tokenizer = self.policy.tokenizer
        arguments = self.template_arguments if template_arguments is None else template_arguments
        fixed = fixed_template(tokenizer, arguments.get("tools"))
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=add_generation_prompt, tokenize=False, **arguments, **fixed
                )
            )
        except (TemplateError, *TEMPLATE_ERRORS) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(
                f"chat_template does not write these messages: {reason}; give plain text instead"
            ) from error

    def _check_template_arguments(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for an argument that the template does not read, or that this module sets itself."""
        arguments = self.template_arguments
        for name, value in arguments.items():
            if name in _FIXED_ARGUMENTS.split():
                raise ValueError(f"chat_template_kwargs: {name}={_quote(value)} is set by the library; leave it out")
            if not re.search(rf"\b{re.escape(name)}\b", str(self.policy.tokenizer.chat_template)):
                raise ValueError(
                    f"{name}={_quote(value)} is not read by the model's chat template; leave it out, or use a template "
                    "that reads it"
                )
        without_tools = {name: value for name, value in arguments.items() if name != "tools"}
        if "tools" in arguments and self._apply_template(messages) == self._apply_template(
            messages, template_arguments=without_tools
        ):
            raise ValueError(f"tools={_quote(arguments['tools'])} are not written by the model's chat template")

    def _check_messages(self, messages: Sequence[Mapping[str, Any]], text: str) -> None:
        """Raise ValueError if the template omits a message, or what it has beside its content, or writes a list of
        parts in Python's notation.
        """
        template = str(self.policy.tokenizer.chat_template)
        for number, message in enumerate(messages):
            for key in filter(message.get, MESSAGE_KEYS):
                if not re.search(rf"\b{key}\b", template):
                    raise ValueError(
                        f"{key}={_quote(message[key])} of message {number} is not read by the model's chat template; "
                        "put it into the content, or leave it out"
                    )
        # A text may also occur in another message, so each is framed by a text of its own and all are written again.
        framed_texts: list[tuple[int, str, str]] = []  # number of the message, frame, and the text in its frame

        def put_in_frame(number: int, text: str) -> str:
            frame = f"{self.delimiter}:{len(framed_texts)}:{self.delimiter}"
            framed_texts.append((number, frame, f"{frame}{text}{frame}" if text.strip() else text))
            return framed_texts[-1][2]

        framed = [_with_text(message, partial(put_in_frame, number)) for number, message in enumerate(messages)]
        for number, message in enumerate(messages):
            if isinstance(message["content"], list) and str(message["content"]) in text:
                raise ValueError(
                    f"chat_template writes the content of message {number} as {_quote(message['content'])}, in "
                    "Python's notation; give the content as text"
                )
        framed_output = self._apply_template(framed)
        for number, frame, framed_text in framed_texts:
            role = messages[number]["role"]
            # A template may shorten an assistant's reasoning, and may escape a tool's result: their end is enough. It
            # may leave out what the assistant says beside its calls.
            if role in ("assistant", "tool", "function", "ipython"):
                is_written = bool(messages[number].get("tool_calls")) or frame in framed_output
            else:
                is_written = framed_text in framed_output
            if not is_written and framed_text.strip():
                content = framed_text.removeprefix(frame).removesuffix(frame)
                raise ValueError(
                    f"chat_template leaves out message {number}, of role {role!r}: {content[:80]!r}; use a role that "
                    "the template knows, or put the text into a user's message"
                )

    def _check_generation_prompt(self, messages: Sequence[Mapping[str, Any]], prompt: str) -> None:
        """Raise ValueError if the model would have to write the start of its turn itself.

        That is so if `add_generation_prompt` changes nothing, and the template writes something before an answer.
        """
        if prompt != self._apply_template(messages):
            return
        answer = f"{self.delimiter}answer{self.delimiter}"
        text = self._apply_template([*messages, {"role": "assistant", "content": answer}])
        start = text.partition(answer)[0]
        if not start.startswith(prompt) or start[len(prompt) :].strip():
            raise ValueError(
                f"chat_template has no generation prompt: the prompt ends with {prompt[-30:]!r}, and an answer begins "
                f"after {start[-30:]!r}; write what is missing if add_generation_prompt is true"
            )

    def pieces(self, text: str) -> list[Piece]:
        """Split a text with markers into pieces."""
        pieces: list[Piece] = []
        for i, part in enumerate(re.split(rf"{self.delimiter}(\d+){self.delimiter}", text)):
            if i % 2 == 0:  # text between markers: the template wrote its special tokens
                pieces.append((part, {"special": True}))
            else:
                marked_text = self.marked_texts[int(part)]
                pieces.append(BLANK if marked_text == self.blank else (marked_text, {"spelled": True}))
        return pieces


def text_ids(
    policy: Policy, text: str, *, special: bool = False, spelled: bool = False, continues: bool = False
) -> list[int]:
    """Return the token ids of a text.

    Args:
        policy: Policy with the tokenizer.
        text: Text, or a piece of one.
        special: Whether the text of every special token becomes that token. Otherwise only `text_tokens` do.
        spelled: Whether all texts of special tokens are ordinary text.
        continues: Whether the text stands behind other tokens, as a completion does. Then nothing is added before it,
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
    beginnings = _beginnings(tokenizer)
    tokens = _any_of([*text_tokens(policy).values()])
    if not spelled and tokens.search(text) and tokens.fullmatch(text) is None:
        others = _any_of(special_texts(tokenizer))
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
            f"text {_quote(text)}: the tokenizer reads the mask token in it, which samplers fill in; leave it out, or "
            "give it as blank"
        )
    if not special and (found := sorted(_never_text(policy).intersection(ids))):
        raise ValueError(
            f"text {_quote(text)}: the tokenizer reads the special token {tokenizer.decode(found[:1])} in it, and not "
            "its letters; leave it out"
        )
    tokenized_text = tokenizer.decode(ids, skip_special_tokens=False)
    pairs = zip_longest(_comparable(text), _comparable(tokenized_text))
    lost = next((character for character, tokenized in pairs if character != tokenized), None)
    if lost is not None:
        raise ValueError(
            f"text {_quote(text)} cannot be tokenized by this model: {lost!r} is lost, and the tokens "
            f"read {_quote(tokenized_text)}; write the text with characters that the tokenizer has"
        )
    joined = _GAP.sub("", text)
    may_be_joined = symbols is None and joined != text and not _GAP.search(tokenized_text)
    if may_be_joined and ids == read(joined):
        raise ValueError(
            f"text {_quote(text)} cannot be tokenized by this model: the tokenizer drops its spaces, and reads "
            f"{_quote(joined)}; write the text without them, or with another separator"
        )
    return ids


def _comparable(text: str) -> str:
    """Return a text without what tokenizers may change: whitespace, case, and the form of a character.

    A character of another meaning, such as an exponent or a letter of another alphabet, is no form.
    """
    if not text.isascii():
        characters = unicodedata.normalize("NFC", text)
        text = "".join(unicodedata.normalize("NFKC", each) if _is_form(each) else each for each in characters)
    return unicodedata.normalize("NFC", "".join(text.split()).casefold())


def _is_form(character: str) -> bool:
    """Return whether a character, such as a wide digit, a ligature or an ellipsis, is one or more others in print."""
    kind = unicodedata.decomposition(character).partition(" ")[0]
    return kind in FORMS or (kind == "<compat>" and not character.isnumeric())


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
    return re.compile(f"({_any_of([*special_texts(tokenizer), *by_length]).pattern})")


def text_of(policy: Policy, ids: Sequence[int], *, continues: bool = True) -> str:
    """Return the text of token ids, without special tokens but `text_tokens`, and without the spaces between symbols
    (`symbol_pattern`).

    With `continues`, the ids stand behind other tokens, as a completion's do; then a space before them is a part of the
    text. Otherwise they begin a text.
    """
    tokenizer = policy.tokenizer
    if kept := text_tokens(policy):
        hidden = {*_never_text(policy), tokenizer.unk_token_id}
        ids = [token for token in ids if token not in hidden]
    beginnings = _beginnings(tokenizer) if continues else []
    beginning = beginnings[0][1] if beginnings else []
    # A space before a comma is one that the model wrote.
    options = {"clean_up_tokenization_spaces": False} if _drops_spaces(tokenizer) else {}
    text = tokenizer.decode([*beginning, *ids], skip_special_tokens=not kept, **options)
    if symbol_pattern(tokenizer) is not None:
        return "".join(text.split())
    if continues and ids and (prefix := _prefix_in_words(tokenizer)) and text.startswith(prefix):
        is_in_word = tokenizer.convert_ids_to_tokens([ids[0]])[0].startswith(prefix)
        text = text.removeprefix(prefix) if is_in_word else text
    return text[len(tokenizer.decode(beginning)) :] if beginning else text


def reads_otherwise(policy: Policy) -> bool:
    """Return whether `text_of` returns another text than the tokenizer's `decode` without special tokens."""
    tokenizer = policy.tokenizer
    of_tokenizer = (symbol_pattern, _beginnings, _drops_spaces, _prefix_in_words)
    return bool(text_tokens(policy)) or any(differs(tokenizer) for differs in of_tokenizer)


def _prefix_in_words(tokenizer: Tokenizer) -> str:
    """Return what begins the tokens that continue a word, ## of WordPiece: no text, and `decode` shows it in the first
    token. "": nothing does.
    """
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return str(model.continuing_subword_prefix) if type(model).__name__ == "WordPiece" else ""


def _drops_spaces(tokenizer: Tokenizer) -> bool:
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


def _never_text(policy: Policy) -> frozenset[int]:
    """Return the special tokens that no text has: all but `text_tokens` and the unknown."""
    if not hasattr(type(policy.tokenizer), "all_special_ids"):
        return frozenset()
    return _special_ids(policy.tokenizer, len(policy.tokenizer)).difference(text_tokens(policy))


@lru_cache(maxsize=16)
def _special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    return frozenset({*tokenizer.all_special_ids, *_added_special(tokenizer)} - {tokenizer.unk_token_id})


def _added_special(tokenizer: Any) -> dict[int, str]:
    return {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def _beginnings(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Return short texts, each with its ids, behind which a tokenizer reads a text as it stands; [] if it reads every
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


def _read_behind(beginnings: Sequence[tuple[str, list[int]]], read: Callable[[str], list[int]], text: str) -> list[int]:
    """Return the ids of a text behind the first of `beginnings` with which it does not make up a token."""
    for beginning, ids in beginnings:
        both = read(beginning + text)
        if both[: len(ids)] == ids:
            return both[len(ids) :]
    raise ValueError("behind every other text it makes up tokens with it; begin it with another character")


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that matches each of the texts; without texts it matches nothing."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def ordinary_ids(policy: Policy) -> Int[Tensor, " V"]:
    """Return the ids of the vocabulary that are not special tokens, in ascending order."""
    size = len(policy.tokenizer) if hasattr(policy.tokenizer, "__len__") else policy.vocab_size
    added = getattr(policy.tokenizer, "added_tokens_decoder", {})
    special = {policy.pad_id, policy.spec.mask_id, *policy.spec.eos_ids}
    special |= {token for token in added if added[token].special}
    return torch.tensor([i for i in range(min(size, policy.vocab_size)) if i not in special])


def special_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the special tokens, longest first, so that a regular expression prefers longer ones."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda text: (-len(text), text))


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
