"""Prompts from templates. A template is built in, a string, or a file."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

Prompt = str | list[dict[str, str]]
BLANK = "\u25a1"  # a token to fill in; no prompt text contains this square
_MESSAGE = {"role": str, "content": str}


def load_template(template: str | Path, *, needs: tuple[str, ...]) -> Prompt:
    """Return a template: `template` itself if it has a line break or a placeholder, else the content of that file.

    Raises ValueError if there is no such file, or if the template lacks a placeholder of `needs` ("a|b": a or b).
    """
    required = [[f"{{{name}}}" for name in alternatives.split("|")] for alternatives in needs]
    if isinstance(template, str) and (
        "\n" in template or any(name in template for names in required for name in names)
    ):
        loaded: Prompt = template
    else:
        path = Path(template).expanduser()
        if len(str(path)) > 1000 or not path.is_file():  # the file system refuses a longer name with an OSError
            raise ValueError(f"prompt_format={str(template)!r} is neither a template with {required[0][0]} nor a file")
        loaded = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":  # chat messages; other files hold plain text
            loaded = json.loads(loaded)
            if not _are_messages(loaded):
                raise ValueError(f"{path} must hold a list of messages with exactly a role and a content, both text")
    text = loaded if isinstance(loaded, str) else "".join(message["content"] for message in loaded)
    for names in required:
        if not any(name in text for name in names):
            needed = ", ".join(" or ".join(alternatives) for alternatives in required)
            raise ValueError(f"prompt template lacks {' or '.join(names)}; it needs {needed}")
    return loaded


def _are_messages(loaded: Any) -> bool:
    messages = loaded if isinstance(loaded, list) else [None]
    return all(
        isinstance(message, dict) and {name: type(text) for name, text in message.items()} == _MESSAGE
        for message in messages
    )


class Prompted:
    """The settings prompt_format, chat and opening of a task; the task declares them as its fields."""

    text: ClassVar[str]  # the instruction of prompt_format="text"
    placeholders: ClassVar[tuple[str, ...]]  # that a template must contain, in braces; "a|b": one of the two
    has_compact: ClassVar[bool] = False  # whether the task also has a format "compact"
    opened_tags: ClassVar[tuple[str, ...]] = ("<answer>",)  # see opened_layout

    prompt_format: str | Path
    chat: bool
    opening: str
    reward_rule: str

    @property
    def compact(self) -> bool:
        return self.has_compact and self.prompt_format == "compact"

    def check_prompt(self) -> None:
        """Raise ValueError if the opening has no assistant turn to begin, if the reward would be 0 for every
        completion, or if the template is invalid.
        """
        if self.opening and (not self.chat or self.compact):
            raise ValueError(f"opening={self.opening!r} begins the assistant's turn: it needs chat=True and text")
        if self.compact and self.reward_rule == "d1":
            raise ValueError(
                "reward_rule='d1' reads an <answer> block, which prompt_format='compact' does not ask for: it would be "
                "0 for every completion; use prompt_format='text'"
            )
        if not self.compact:
            _ = self._template  # raises for an invalid one

    def render_prompt(self, **values: str) -> Prompt:
        """Return the prompt: the template with each `{name}` of `values` replaced.

        With `chat`, a text template becomes one user message.
        """
        template = self._template
        if isinstance(template, str) and not self.chat:
            return _replace(template, values)
        template_messages = [{"role": "user", "content": template}] if isinstance(template, str) else template
        messages = [
            {"role": message["role"], "content": _replace(message["content"], values)} for message in template_messages
        ]
        return [*messages, {"role": "assistant", "content": self.opening}] if self.opening else messages

    @classmethod
    def opened_layout(cls, prompt: object) -> str:
        """Return what is graded before the completion: the assistant's turn that the prompt begins, from the first of
        `opened_tags` on; "" if it has none.
        """
        match prompt:
            case [*_, {"role": "assistant", "content": str(opening)}]:
                starts = [opening.index(tag) for tag in cls.opened_tags if tag in opening]
                return opening[min(starts) :] if starts else ""
        return ""

    @property
    def content(self) -> tuple[Any, ...]:
        """What the task has read from files, which may change under their names: a resume compares it."""
        return () if self.compact else (self._template,)

    @cached_property  # a new task reads its file again
    def _template(self) -> Prompt:
        return self.text if self.prompt_format == "text" else load_template(self.prompt_format, needs=self.placeholders)


def _replace(text: str, values: dict[str, str]) -> str:
    # One pass over the template: a value that contains "{name}" stays unchanged. Other braces stay, as in \boxed{}.
    names = re.compile("|".join("\\{" + re.escape(name) + "\\}" for name in values))
    return names.sub(lambda match: values[match[0][1:-1]], text)
