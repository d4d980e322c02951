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

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py")  # files that the libraries open
# Unbounded repeats in one alternative of a pattern. With n of them, a search may take time proportional to length**n.
MAX_REPEATS = 3
MAX_PATTERN_LENGTH = 20_000  # in characters
REPEAT = r"(?:[*+]|\{\d*,?\d*\})"
TRIAL = Path(__file__).with_name("checkpoint") / "trial.py"
LIMITS = {"seconds": 4, "memory": 2 << 30}  # a published tokenizer of 256,000 tokens takes 2 s and 1 GiB
WALL_SECONDS = 60.0  # elapsed time; LIMITS counts processor time, which passes more slowly on a busy machine
MAX_COUNT = 1_000_000  # largest number of layers, heads, experts or labels in a config
# Fields of a config that choose an implementation of attention or experts.
IMPLEMENTATION_FIELDS = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")


def check_regular(folder: Path) -> None:
    """Raise ValueError for a FIFO, a device or a directory in place of a file."""
    # Reading a FIFO might never end. is_file() follows links: the hub's cache consists of them.
    for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        if not path.is_file() and (path.suffix in SUFFIXES or not path.is_dir()):
            raise ValueError(f"{folder}: {path.name} is not a regular file; fetch the checkpoint again")


def check_not_quantized(raw: dict[str, Any], folder: Path) -> None:
    """Raise ValueError for weights that another tool has quantized."""
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"{folder}: config.json has a quantization_config; give the checkpoint in 16 or 32 bits, and quantize it "
            "with base_quantization or rollout_quantization"
        )


def check_numbers(fields: Any, folder: str | Path, name: str = "config.json") -> None:
    """Raise ValueError for a count above MAX_COUNT, and for a number that is NaN or infinite, at any depth."""
    if isinstance(fields, dict | list):
        for key, value in fields.items() if isinstance(fields, dict) else ((name, value) for value in fields):
            # A list may be a range without an upper end: the time_step_limit of Mamba is [0, Infinity].
            if not (isinstance(fields, list) and value == math.inf):
                check_numbers(value, folder, key)
    # transformers allocates this many labels, heads or experts before it compares the count with any tensor.
    elif isinstance(fields, int) and name.startswith(("num_", "n_")) and fields > MAX_COUNT:
        raise ValueError(f"{folder}: {name}={fields:.6g} is more than {MAX_COUNT}; correct config.json")
    elif isinstance(fields, float) and not math.isfinite(fields):
        raise ValueError(f"{folder}: {name}={fields} is not finite; correct config.json")


def without_implementation_fields(fields: Any) -> Any:
    """Return a config without the fields that choose an implementation, at any depth."""
    if isinstance(fields, dict):  # transformers would download a kernel that such a field names from the hub
        return {
            name: without_implementation_fields(value)
            for name, value in fields.items()
            if not IMPLEMENTATION_FIELDS.fullmatch(name)
        }
    return [without_implementation_fields(value) for value in fields] if isinstance(fields, list) else fields


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError for a tokenizer.json that takes too much time or memory on short texts, or whose patterns may
    take unlimited time on other texts.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    for pattern in _patterns(json.loads(path.read_bytes())):
        if reason := unbounded_reason(pattern):
            raise ValueError(
                f"{path}: the pattern {pattern[:80]!r} {reason}, and may take unlimited time to match; correct it"
            )
    if error := try_out(tokenizer=path):
        raise ValueError(f"{path}: the tokenizer was tried on short texts: {error}; use another tokenizer.json")


def check_templates(folder: Path, templates: str | Mapping[str, str] | None, tokens: Mapping[str, Any]) -> None:
    """Raise ValueError for a chat template that takes too much time or memory, or that jinja2's sandbox stops.

    `tokens` has the names and texts of the tokenizer's special tokens, which a template can read.
    """
    named = {"": templates} if isinstance(templates, str) else templates or {}
    texts = list(named.values())
    if texts and (error := try_out(templates=texts, tokens=tokens)):
        raise ValueError(f"{folder}: the chat template was tried on short chats: {error}; use another chat_template")


def try_out(
    *, tokenizer: Path | None = None, templates: Sequence[str] = (), tokens: Mapping[str, Any] | None = None
) -> str:
    """Run a tokenizer.json or chat templates on short inputs. Return the error as one line, or "" if there is none.

    They run in a separate process with limits of time and memory, because only a run shows what they cost.
    """
    job = {"tokenizer": tokenizer and str(tokenizer), "templates": [*templates], "tokens": dict(tokens or {})}
    single_thread = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "USE_TORCH": "0"}
    try:
        process = subprocess.run(
            [sys.executable, "-P", str(TRIAL)],
            input=json.dumps(job | {"limits": LIMITS}).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            env=os.environ | single_thread,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {WALL_SECONDS:g} s"
    code = process.returncode
    if code == 0:
        return ""
    last_line = (process.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"stopped after {LIMITS['seconds']} s of processor time"
    if code == -signal.SIGABRT or last_line.startswith("MemoryError"):  # the tokenizers library aborts
        return f"stopped at {LIMITS['memory'] >> 20} MiB of memory"
    return escape_controls(last_line)[:200] if code > 0 else f"ended by signal {-code}"


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Return config, tensors and metadata of saved adapters. Raise ValueError for damaged files or invalid numbers."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: the adapters are missing; give the folder of saved ones, or an earlier checkpoint")
    check_regular(folder)
    path = folder / "adapter_model.safetensors"
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is not a mapping)
            metadata = file.metadata() or {}
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder}: the adapters are damaged: {error}") from None
    fields: dict[str, Any] = config if isinstance(config, dict) else {}
    for name, kinds in {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float)}.items():
        value: Any = fields.get(name)
        # True is an int for isinstance. JSON has integers too large for a float; NaN and infinity fail too.
        if type(value) not in kinds or not abs(value) < 1e30:
            raise ValueError(f"{folder}: adapter_config.json is damaged: {name}={value!r} is not a number")
    if not 0 <= fields["lora_dropout"] < 1:
        raise ValueError(
            f"{folder}: lora_dropout={fields['lora_dropout']} is not in [0, 1); correct adapter_config.json"
        )
    for name, tensor in state.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{folder}: {name} has dtype {tensor.dtype}, which is not an adapter's; save the adapters again"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name} has NaN or infinite numbers; use earlier adapters")
    if not any(fields["r"] in tensor.shape for tensor in state.values()):
        raise ValueError(
            f"{folder}: adapter_config.json is damaged: no adapter tensor has a dimension of size r={fields['r']}"
        )
    for name, limit in {
        "seed": 1 << 64,  # a torch.Generator takes seeds below this limit
        "dropout_calls": 1 << 62,  # far below overflow
    }.items():
        text = metadata.get(name, "0")
        if not re.fullmatch(r"-?\d{1,20}", text) or not -(1 << 63) <= int(text) < limit:
            raise ValueError(f"{folder}: {name}={text[:40]!r} of the adapters is out of range; save them again")
    return fields, state, metadata


def _patterns(fields: Any) -> list[str]:
    """Return all texts under the key Regex, at any depth."""
    patterns: list[str] = []
    if isinstance(fields, list):
        for value in fields:
            patterns += _patterns(value)
    elif isinstance(fields, dict):
        for name, value in fields.items():
            patterns += [value] if name == "Regex" and isinstance(value, str) else _patterns(value)
    return patterns


def unbounded_reason(pattern: str) -> str:
    """Return why a search for the pattern may take unlimited time, or "" if it cannot.

    The check is conservative: it also refuses some harmless patterns.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"has {len(pattern)} characters"
    if re.search(r"(?<!\\)(?:\\\\)*\\[1-9gk]", pattern):
        return "refers to its own groups"
    text = _simplify_pattern(pattern)
    # From the innermost group outwards: a repeated group must contain neither a repeat nor an alternative.
    while group := re.search(r"\((?:\?(?:[:=!>]|<[=!]|[imsu-]+:|<\w+>))?([^()]*)\)", text):
        content = group[1]
        if content.startswith("?"):
            return "has a group of an unknown kind"
        is_repeated = re.match(REPEAT, text[group.end() :])
        if is_repeated and re.search(rf"{REPEAT}|[|?]", content):
            return "repeats a group that contains a repeat or an alternative"
        # Replace the group by a text that has no groups: an x+ for each repeat in the group, and an x? if the group has
        # an alternative (| or ?). So the checks of the groups around it still see its repeats and alternatives.
        has_alternative = "|" in content or "?" in content
        replacement = "x" + "x+" * len(re.findall(REPEAT, content)) + "x?" * has_alternative
        text = text[: group.start()] + replacement + text[group.end() :]
    if re.search(r"[()\[\]]", text):
        return "has groups that do not close"
    text = re.sub(r"([*+?}])[+?]", r"\1", text)  # a lazy or possessive suffix is not another repeat
    num_repeats = max(len(re.findall(REPEAT, part)) for part in text.split("|"))
    return f"has {num_repeats} repeats in one alternative" if num_repeats > MAX_REPEATS else ""


def _simplify_pattern(pattern: str) -> str:
    """Return the pattern with x for an escaped character or a class, and without flags and exact repeat counts."""
    text = re.sub(r"\\[pP]\{[^}]*\}|\\.", "x", pattern, flags=re.DOTALL)
    # Classes, flags and exact repeat counts.
    for unit, replacement in ((r"\[\^?\]?[^\[\]]*\]", "x"), (r"\(\?[imsu-]*\)", ""), (r"(?<=x)\{\d+\}", "")):
        while (shorter := re.sub(unit, replacement, text)) != text:  # classes may be nested
            text = shorter
    return text


def escape_transformers_logs() -> None:
    """Shorten transformers' log messages, and escape control characters in them.

    The messages may quote fields of an untrusted checkpoint.
    """

    def escaped(record: logging.LogRecord) -> bool:
        record.msg = escape_controls(without_middle(record.getMessage()), keep="\n\t")
        record.args = None  # already part of the message
        return True

    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(escaped)
