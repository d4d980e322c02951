"""Checks of an untrusted checkpoint before a library opens any of its files."""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_rl.screen import escape_controls, without_middle

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py")  # files that the libraries open
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
