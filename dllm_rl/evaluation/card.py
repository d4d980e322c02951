"""Read an evaluation's card (a row of its results.json) as untrusted text, and compare it with settings. No torch."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

from dllm_rl.files import read_json

MAX_BYTES = 2**24  # bytes of a file
MAX_SETTING_LENGTH = 1000  # characters of a setting
TYPES: dict[str, tuple[type, ...]] = dict.fromkeys(("task", "version", "protocol", "quantization"), (str,))
TYPES |= dict.fromkeys(("seed", "n", "samples", "max_new_tokens"), (int,)) | {"temperature": (int, float)}
TYPES |= dict.fromkeys(("diffusion_steps", "block_size", "top_k"), (int, NoneType)) | {"top_p": (int, float, NoneType)}
TYPES |= dict.fromkeys(("split", "rank", "commit", "cache", "dtype"), (str, NoneType))
SETTING_TYPES = (str, int, float, bool, NoneType, list)  # types of a task's setting


def read_card(path: Path) -> list[dict[str, Any]]:
    """Return the `flat` settings of each row of a results.json, or of a file with one row.

    Raises:
        ValueError: The file is too large or malformed.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MiB; give the results.json of an evaluation")
    content = read_json(path)
    rows = list(map(flat, content if isinstance(content, list) else [content]))
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            is_nested = isinstance(value, list) and {list, dict} & set(map(type, value))
            # A prompt template may be long.
            is_long = len(str(value)) > MAX_SETTING_LENGTH and name != "settings.prompt_format"
            if type(value) not in TYPES.get(name, SETTING_TYPES) or is_nested or is_long:
                problem = f"{name[:MAX_SETTING_LENGTH]} is missing, of a wrong type or too long"
                raise ValueError(f"{path}, row {number}: {problem}; give the results.json of an evaluation")
    return rows


def flat(row: Any) -> dict[str, Any]:
    """Return the settings of TYPES, None for a setting that the row lacks, and the settings of its task as
    settings.NAME.
    """
    fields = row if isinstance(row, dict) else {}
    task_settings = fields.get("settings")
    settings = dict(zip(TYPES, map(fields.get, TYPES), strict=True))
    for name, value in task_settings.items() if isinstance(task_settings, dict) else ():
        settings[f"settings.{name}"] = value
    return settings


def differences(row: Mapping[str, Any], others: Sequence[Mapping[str, tuple[Any, ...]]]) -> list[tuple[str, ...]]:
    """Return (setting, the row's value, the values of each of `others`) as texts, for each setting that differs.

    A setting differs if one of `others` has values for it, and the row's value is not among them.
    """
    differing = []
    for name in dict.fromkeys(chain(*others)):
        if any(row.get(name) not in other.get(name, (row.get(name),)) for other in others):
            values = [(row.get(name),), *(other.get(name, ()) for other in others)]
            differing.append((name, *map(format_values, values)))
    return differing


def format_values(values: tuple[Any, ...]) -> str:
    return " or ".join("-" if value in (None, "") else str(value)[:MAX_SETTING_LENGTH] for value in values)
