"""Checks of an untrusted checkpoint before a library opens any of its files."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_rl.screen import escape_controls

SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py")  # of the files that libraries open
MOST_REPEATS = 3  # unbounded, in a row: the time of a search is the text's length to this power
LONGEST_PATTERN = 20_000  # characters
REPEAT = r"(?:[*+]|\{\d*,?\d*\})"
CHOOSES_CODE = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")


def check_regular(folder: Path) -> None:
    """Raise ValueError on a FIFO, a device or a directory instead of a file."""
    # Reading a FIFO might never end. is_file() follows links: the hub's cache consists of them.
    for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        if not path.is_file() and (path.suffix in SUFFIXES or not path.is_dir()):
            raise ValueError(f"{folder}: {path.name} is no regular file; fetch the checkpoint again")


def check_plain(raw: dict[str, Any], folder: Path) -> None:
    """Raise ValueError on weights that another tool quantised."""
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"{folder}: config.json has a quantization_config; give the checkpoint in 16 or 32 bits, and quantise it "
            "with base_quantization or rollout_quantization"
        )


def without_code(fields: Any) -> Any:
    """A config without the names of implementations."""
    if isinstance(fields, dict):  # by such a name transformers would download a kernel from the hub
        return {name: without_code(value) for name, value in fields.items() if not CHOOSES_CODE.fullmatch(name)}
    return [without_code(value) for value in fields] if isinstance(fields, list) else fields


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError on a pattern in tokenizer.json that may take exponential time to match."""
    path = folder / "tokenizer.json"
    for pattern in _patterns(json.loads(path.read_bytes())) if path.exists() else ():
        if why := explodes(pattern):
            raise ValueError(f"{path}: the pattern {pattern[:80]!r} {why}, and may take any time to match; correct it")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Config, tensors and metadata of saved adapters. Raises ValueError on damage and on impossible numbers."""
    check_regular(folder)
    path = folder / "adapter_model.safetensors"
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
            metadata = file.metadata() or {}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder}: the adapters are damaged: {error}") from None
    fields: dict[str, Any] = config if isinstance(config, dict) else {}
    for name, kinds in {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float)}.items():
        if type(fields.get(name)) not in kinds:  # True is an int for isinstance
            raise ValueError(f"{folder}: adapter_config.json is damaged: {name}={fields.get(name)!r} is no number")
    if not any(fields["r"] in tensor.shape for tensor in state.values()):
        raise ValueError(f"{folder}: adapter_config.json is damaged: r={fields['r']} is the rank of no tensor")
    return fields, state, metadata


def _patterns(fields: Any) -> list[str]:
    """All texts under the key Regex, at any depth."""
    found: list[str] = []
    if isinstance(fields, list):
        for value in fields:
            found += _patterns(value)
    elif isinstance(fields, dict):
        for name, value in fields.items():
            found += [value] if name == "Regex" and isinstance(value, str) else _patterns(value)
    return found


def explodes(pattern: str) -> str:
    """Why a search for the pattern may take unbounded time, or ""."""
    if len(pattern) > LONGEST_PATTERN:
        return f"has {len(pattern)} characters"
    if re.search(r"(?<!\\)(?:\\\\)*\\[1-9gk]", pattern):
        return "refers to its own groups"
    text = _without_classes(pattern)
    # From the innermost group out: a group that repeats must contain neither a choice nor a repeat.
    while group := re.search(r"\((?:\?(?:[:=!>]|<[=!]|[imsu-]+:|<\w+>))?([^()]*)\)", text):
        inside = group[1]
        if inside.startswith("?"):
            return "has a group of a kind that is not known"
        again = re.match(REPEAT, text[group.end() :])
        if again and re.search(rf"{REPEAT}|[|?]", inside):
            return "repeats a group that repeats or chooses"
        # The group's repeats count outside too; a choice within the group stays a choice.
        left = "x" + "x+" * len(re.findall(REPEAT, inside)) + "x?" * ("|" in inside or "?" in inside)
        text = text[: group.start()] + left + text[group.end() :]
    if re.search(r"[()\[\]]", text):
        return "has groups that do not close"
    text = re.sub(r"([*+?}])[+?]", r"\1", text)  # a lazy or possessive mark is no repeat of its own
    most = max(len(re.findall(REPEAT, part)) for part in text.split("|"))
    return f"has {most} repeats in a row" if most > MOST_REPEATS else ""


def _without_classes(pattern: str) -> str:
    """The pattern with x for an escaped character or a class, and without flags and exact numbers."""
    text = re.sub(r"\\[pP]\{[^}]*\}|\\.", "x", pattern, flags=re.DOTALL)
    for unit, left in ((r"\[\^?\]?[^\[\]]*\]", "x"), (r"\(\?[imsu-]*\)", ""), (r"(?<=x)\{\d+\}", "")):
        while (shorter := re.sub(unit, left, text)) != text:  # classes may stand inside each other
            text = shorter
    return text


def show_messages() -> None:
    """Escape control characters in transformers' messages, which quote a checkpoint's fields."""

    def escaped(record: logging.LogRecord) -> bool:
        record.msg = escape_controls(record.getMessage(), keep="\n\t")
        record.args = None  # they are in the message already
        return True

    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(escaped)
