"""Checks of an untrusted checkpoint before a library opens any of its files."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_rl.screen import escape_controls, without_middle

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py")  # of the files that libraries open
MOST_REPEATS = 3  # unbounded, in a row: the time of a search is the text's length to this power
LONGEST_PATTERN = 20_000  # characters
REPEAT = r"(?:[*+]|\{\d*,?\d*\})"
TRIAL = Path(__file__).with_name("checkpoint") / "trial.py"
LIMITS = {"seconds": 4, "memory": 2 << 30}  # a published tokenizer of 256,000 tokens takes 2 s and 1 GiB
WALL_SECONDS = 60.0  # seconds by the clock: the other limit counts processor time, slow on a busy machine
MOST_COUNTED = 1_000_000
CHOOSES_CODE = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")


def check_regular(folder: Path) -> None:
    """Raise ValueError for a FIFO, a device or a directory in place of a file."""
    # Reading a FIFO might never end. is_file() follows links: the hub's cache consists of them.
    for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        if not path.is_file() and (path.suffix in SUFFIXES or not path.is_dir()):
            raise ValueError(f"{folder}: {path.name} is no regular file; fetch the checkpoint again")


def check_plain(raw: dict[str, Any], folder: Path) -> None:
    """Raise ValueError for weights that another tool quantized."""
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"{folder}: config.json has a quantization_config; give the checkpoint in 16 or 32 bits, and quantise it "
            "with base_quantization or rollout_quantization"
        )


def check_numbers(fields: Any, folder: str | Path, name: str = "config.json") -> None:
    """Raise ValueError for a count above MOST_COUNTED, and for a number that is NaN or infinite, at any depth."""
    if isinstance(fields, dict | list):
        for key, value in fields.items() if isinstance(fields, dict) else ((name, value) for value in fields):
            # A list may have no upper end: the time_step_limit of Mamba is [0, Infinity].
            if not (isinstance(fields, list) and value == math.inf):
                check_numbers(value, folder, key)
    # A count makes a list of labels, heads or experts before any tensor is compared with it.
    elif isinstance(fields, int) and name.startswith(("num_", "n_")) and fields > MOST_COUNTED:
        raise ValueError(f"{folder}: {name}={fields:.6g} is more than {MOST_COUNTED}; correct config.json")
    elif isinstance(fields, float) and not math.isfinite(fields):
        raise ValueError(f"{folder}: {name}={fields} is not finite; correct config.json")


def without_code(fields: Any) -> Any:
    """Return a config without the names of implementations."""
    if isinstance(fields, dict):  # for such a name transformers would download a kernel from the hub
        return {name: without_code(value) for name, value in fields.items() if not CHOOSES_CODE.fullmatch(name)}
    return [without_code(value) for value in fields] if isinstance(fields, list) else fields


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError for a tokenizer.json that takes too much time or memory, or may do so for another text."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    for pattern in _patterns(json.loads(path.read_bytes())):
        if why := explodes(pattern):
            raise ValueError(f"{path}: the pattern {pattern[:80]!r} {why}, and may take any time to match; correct it")
    if why := try_out(tokenizer=path):
        raise ValueError(f"{path}: the tokenizer was tried on short texts: {why}; take another tokenizer.json")


def check_templates(folder: Path, templates: str | Mapping[str, str] | None, tokens: Mapping[str, Any]) -> None:
    """Raise ValueError for a chat template that takes too much time or memory, or accesses what it must not.

    `tokens` has the names and texts of the tokenizer's special tokens, which a template sees.
    """
    texts = [] if templates is None else [templates] if isinstance(templates, str) else list(templates.values())
    if texts and (why := try_out(templates=texts, tokens=tokens)):
        raise ValueError(f"{folder}: the chat template was tried on short chats: {why}; take another chat_template")


def try_out(
    *, tokenizer: Path | None = None, templates: Sequence[str] = (), tokens: Mapping[str, Any] | None = None
) -> str:
    """Use a tokenizer.json or chat templates, and return the error in one short line, or "".

    A separate process uses them, with limits of time and memory, because only running a pipeline shows its cost.
    """
    asked = {"tokenizer": tokenizer and str(tokenizer), "templates": [*templates], "tokens": dict(tokens or {})}
    alone = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "USE_TORCH": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(TRIAL)],
            input=json.dumps(asked | {"limits": LIMITS}).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            env=os.environ | alone,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {WALL_SECONDS:g} s"
    if done.returncode == 0:
        return ""
    said = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"stopped after {LIMITS['seconds']} s of processor time"
    if done.returncode == -signal.SIGABRT or said.startswith("MemoryError"):  # the tokenizers library aborts
        return f"stopped at {LIMITS['memory'] >> 20} MiB of memory"
    return escape_controls(said)[:200] if done.returncode > 0 else f"ended by signal {-done.returncode}"


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return config, tensors and metadata of saved adapters. Raise ValueError for damage and impossible numbers."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: the adapters are missing; give the folder of saved ones, or an earlier checkpoint")
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
        value: Any = fields.get(name)
        # True is an int for isinstance. JSON has integers too large for a float; NaN and infinity fail too.
        if type(value) not in kinds or not abs(value) < 1e30:
            raise ValueError(f"{folder}: adapter_config.json is damaged: {name}={value!r} is no number")
    if not 0 <= fields["lora_dropout"] < 1:
        raise ValueError(
            f"{folder}: lora_dropout={fields['lora_dropout']} is not in [0, 1); correct adapter_config.json"
        )
    for name, tensor in state.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{folder}: {name} is of {tensor.dtype}, which no adapter is; save the adapters again")
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name} holds numbers that are not finite; take earlier adapters")
    if not any(fields["r"] in tensor.shape for tensor in state.values()):
        raise ValueError(f"{folder}: adapter_config.json is damaged: r={fields['r']} is the rank of no tensor")
    for name, limit in {"seed": 1 << 64, "dropout_calls": 1 << 62}.items():  # a generator's limit, and below 63 bits
        said = metadata.get(name, "0")
        if not re.fullmatch(r"-?\d{1,20}", said) or not -(1 << 63) <= int(said) < limit:
            raise ValueError(f"{folder}: {name}={said[:40]!r} of the adapters is out of range; save them again")
    return fields, state, metadata


def _patterns(fields: Any) -> list[str]:
    """Return all texts under the key Regex, at any depth."""
    found: list[str] = []
    if isinstance(fields, list):
        for value in fields:
            found += _patterns(value)
    elif isinstance(fields, dict):
        for name, value in fields.items():
            found += [value] if name == "Regex" and isinstance(value, str) else _patterns(value)
    return found


def explodes(pattern: str) -> str:
    """Return why a search for the pattern may take unbounded time, or ""."""
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
        # The group's repeats also count outside; a choice within the group stays a choice.
        left = "x" + "x+" * len(re.findall(REPEAT, inside)) + "x?" * ("|" in inside or "?" in inside)
        text = text[: group.start()] + left + text[group.end() :]
    if re.search(r"[()\[\]]", text):
        return "has groups that do not close"
    text = re.sub(r"([*+?}])[+?]", r"\1", text)  # a lazy or possessive mark is not another repeat
    most = max(len(re.findall(REPEAT, part)) for part in text.split("|"))
    return f"has {most} repeats in a row" if most > MOST_REPEATS else ""


def _without_classes(pattern: str) -> str:
    """Return the pattern with x for an escaped character or a class, and without flags and exact numbers."""
    text = re.sub(r"\\[pP]\{[^}]*\}|\\.", "x", pattern, flags=re.DOTALL)
    for unit, left in ((r"\[\^?\]?[^\[\]]*\]", "x"), (r"\(\?[imsu-]*\)", ""), (r"(?<=x)\{\d+\}", "")):
        while (shorter := re.sub(unit, left, text)) != text:  # classes may be nested
            text = shorter
    return text


def show_messages() -> None:
    """Escape control characters in transformers' messages, which quote a checkpoint's fields, and shorten long ones."""

    def escaped(record: logging.LogRecord) -> bool:
        record.msg = escape_controls(without_middle(record.getMessage()), keep="\n\t")
        record.args = None  # already part of the message
        return True

    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(escaped)
