"""Prompts from templates: ours, a string, or a file with another paper's wording."""

import json
import re
from pathlib import Path

Prompt = str | list[dict[str, str]]


def load_template(template: str | Path, *, needs: tuple[str, ...]) -> Prompt:
    """The template itself, or the contents of the file it names.

    A string that contains one of the placeholders `{name}` for name in `needs` is the template. Anything else is the
    path of a file: `.json` holds chat messages [{"role": ..., "content": ...}], other suffixes hold plain text.
    Errors: ValueError when the file is missing or a placeholder occurs nowhere.
    """
    if isinstance(template, str) and ("\n" in template or any("{" + name + "}" in template for name in needs)):
        loaded: Prompt = template
    else:
        path = Path(template)
        if len(str(path)) > 1000 or not path.is_file():
            raise ValueError(f"prompt_format={str(template)!r} is neither a template with {{{needs[0]}}} nor a file")
        loaded = _messages(path) if path.suffix == ".json" else path.read_text(encoding="utf-8")
    whole = loaded if isinstance(loaded, str) else "".join(message["content"] for message in loaded)
    missing = [name for name in needs if "{" + name + "}" not in whole]
    if missing:
        raise ValueError(f"prompt template lacks {{{missing[0]}}}; it needs every one of {list(needs)}")
    return loaded


def _messages(path: Path) -> list[dict[str, str]]:
    loaded = json.loads(path.read_text(encoding="utf-8"))
    good = isinstance(loaded, list) and all(
        isinstance(message, dict) and set(message) == {"role", "content"} and all(map(_is_text, message.values()))
        for message in loaded
    )
    if not good:
        raise ValueError(f"{path} must hold a list of chat messages with exactly a role and a content, both text")
    return loaded


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def check_opening(opening: str, *, chat: bool, prompt_format: str | Path) -> None:
    """Errors: ValueError for an opening where the prompt has no assistant's turn to begin."""
    if opening and (not chat or prompt_format == "compact"):
        raise ValueError(f"opening={opening!r} begins the assistant's turn: it needs chat=True and a text prompt")


def fill(template: Prompt, *, chat: bool, opening: str = "", **values: str) -> Prompt:
    """The template with each `{name}` replaced, as one user message when `chat` and the template is plain text.

    Only the names given are replaced, each once and never inside a value: templates and problems may hold other
    braces, such as \\boxed{}. With an `opening`, a last message of the assistant's begins its turn with that text.
    """
    if isinstance(template, str) and not chat:
        return _replace(template, values)
    asked = [{"role": "user", "content": template}] if isinstance(template, str) else template
    messages = [{"role": message["role"], "content": _replace(message["content"], values)} for message in asked]
    return [*messages, {"role": "assistant", "content": opening}] if opening else messages


def _replace(text: str, values: dict[str, str]) -> str:
    names = re.compile("|".join("\\{" + re.escape(name) + "\\}" for name in values))
    return names.sub(lambda found: values[found[0][1:-1]], text)
