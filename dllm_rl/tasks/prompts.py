"""Prompts from templates, and the answer block they ask for."""

import json
from pathlib import Path

Prompt = str | list[dict[str, str]]


def load_template(template: str | Path, *, needs: tuple[str, ...]) -> Prompt:
    """The template itself, or the contents of the file it names.

    A string that contains one of the placeholders `{name}` for name in `needs` is the template. Anything else is the
    path of a file: `.json` holds chat messages [{"role": ..., "content": ...}], other suffixes hold plain text.
    Errors: ValueError when the file is missing or a placeholder occurs nowhere.
    """
    if isinstance(template, str) and any("{" + name + "}" in template for name in needs):
        loaded: Prompt = template
    else:
        path = Path(template)
        if not path.is_file():
            raise ValueError(f"prompt_format={str(template)!r} is neither a template with {{{needs[0]}}} nor a file")
        text = path.read_text(encoding="utf-8")
        loaded = json.loads(text) if path.suffix == ".json" else text
    whole = loaded if isinstance(loaded, str) else "".join(message["content"] for message in loaded)
    missing = [name for name in needs if "{" + name + "}" not in whole]
    if missing:
        raise ValueError(f"prompt template lacks {{{missing[0]}}}; it needs every one of {list(needs)}")
    return loaded


def fill(template: Prompt, *, chat: bool, **values: str) -> Prompt:
    """The template with each `{name}` replaced, as one user message when `chat` and the template is plain text.

    Plain replacement, not str.format: templates may hold other braces, such as \\boxed{}.
    """
    if not isinstance(template, str):
        return [{"role": m["role"], "content": _replace(m["content"], values)} for m in template]
    text = _replace(template, values)
    return [{"role": "user", "content": text}] if chat else text


def _replace(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def last_answer(text: str) -> str | None:
    """What stands after the last `<answer>`, up to the next `</answer>` or the end; None without an `<answer>`."""
    start = text.rfind("<answer>")
    if start < 0:
        return None
    start += len("<answer>")
    end = text.find("</answer>", start)
    return text[start:] if end < 0 else text[start:end]
