"""Conversations to token ids, by a tokenizer's chat template."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from dllm_rl.decoding.chat_template import TEMPLATE_ERRORS, fixed_template
from dllm_rl.decoding.tokens import BLANK, Piece, quoted, text_ids
from dllm_rl.decoding.vocabulary import any_of, special_texts, text_tokens
from dllm_rl.models.base import Policy

NO_ARGUMENTS: Mapping[str, Any] = {}
# Arguments of `apply_chat_template` that a row may not set, because this module sets them, or they change its return.
_FIXED_ARGUMENTS = """conversation messages chat_template add_generation_prompt continue_final_message tokenize
padding truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs
sanitize_control_tokens"""
# What a message may say besides its content.
MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "audio")


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
    chat = Chat(policy, messages, template_arguments=template_arguments)
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


def check_chat(messages: Any, name: str = "prompt") -> None:
    """Raise ValueError, with the column's name, unless `messages` is a chat: messages with a role, and content that a
    template can render.
    """
    error = f"{name}={quoted(messages)} is neither text nor chat messages, each with role and content"
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
            raise ValueError(f"{error}: content={quoted(content)} of message {number} is not text; give text")
        for part in content if has_parts else ():  # a template leaves out what it does not know
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{error}: {quoted(part)} of message {number} is not text, and only text is read")


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


class Chat:
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
        self.marked_pattern = any_of(self.marked_texts)
        self.answer_pattern = any_of([text for text in self.marked_texts if text == blank or text not in kept])
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
                raise ValueError(f"chat_template_kwargs: {name}={quoted(value)} is set by the library; leave it out")
            if not re.search(rf"\b{re.escape(name)}\b", str(self.policy.tokenizer.chat_template)):
                raise ValueError(
                    f"{name}={quoted(value)} is not read by the model's chat template; leave it out, or use a template "
                    "that reads it"
                )
        without_tools = {name: value for name, value in arguments.items() if name != "tools"}
        if "tools" in arguments and self._apply_template(messages) == self._apply_template(
            messages, template_arguments=without_tools
        ):
            raise ValueError(f"tools={quoted(arguments['tools'])} are not written by the model's chat template")

    def _check_messages(self, messages: Sequence[Mapping[str, Any]], text: str) -> None:
        """Raise ValueError if the template omits a message, or what it has besides its content, or writes a list of
        parts in Python's notation.
        """
        template = str(self.policy.tokenizer.chat_template)
        for number, message in enumerate(messages):
            for key in filter(message.get, MESSAGE_KEYS):
                if not re.search(rf"\b{key}\b", template):
                    raise ValueError(
                        f"{key}={quoted(message[key])} of message {number} is not read by the model's chat template; "
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
                    f"chat_template writes the content of message {number} as {quoted(message['content'])}, in "
                    "Python's notation; give the content as text"
                )
        framed_output = self._apply_template(framed)
        for number, frame, framed_text in framed_texts:
            role = messages[number]["role"]
            # A template may shorten an assistant's reasoning, and may escape a tool's result: their end is enough. It
            # may leave out what the assistant says besides its calls.
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
