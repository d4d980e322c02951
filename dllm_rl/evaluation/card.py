"""An evaluation's card, a row of its results.json: read as untrusted text and compared with settings. No torch."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

from dllm_rl.files import read_json

LARGEST = 2**24  # bytes of a file
MAX_SETTING_LENGTH = 1000  # characters of a setting
KINDS: dict[str, tuple[type, ...]] = dict.fromkeys(("task", "version", "protocol", "quantization"), (str,))
KINDS |= dict.fromkeys(("seed", "n", "samples", "max_new_tokens"), (int,)) | {"temperature": (int, float)}
KINDS |= dict.fromkeys(("diffusion_steps", "block_size"), (int, NoneType))
KINDS |= dict.fromkeys(("split", "rank", "commit", "cache", "dtype"), (str, NoneType))
PLAIN = (str, int, float, bool, NoneType, list)  # a setting of a task


def read_card(path: Path) -> list[dict[str, Any]]:
    """Return the `flat` settings of each row of a results.json, or of a file with one row.

    Raises:
        ValueError: The file is too large or malformed.
    """
    if path.is_file() and path.stat().st_size > LARGEST:
        raise ValueError(f"{path} is larger than {LARGEST >> 20} MiB; give the results.json of an evaluation")
    found = read_json(path)
    rows = list(map(flat, found if isinstance(found, list) else [found]))
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            nested = isinstance(value, list) and {list, dict} & set(map(type, value))
            # The template of a prompt is long.
            long = len(str(value)) > MAX_SETTING_LENGTH and name != "settings.prompt_format"
            if type(value) not in KINDS.get(name, PLAIN) or nested or long:
                wrong = f"{name[:MAX_SETTING_LENGTH]} is missing, of a wrong type or too long"
                raise ValueError(f"{path}, row {number}: {wrong}; give the results.json of an evaluation")
    return rows


def flat(row: Any) -> dict[str, Any]:
    """Return the settings of KINDS, None for a setting that the row lacks, and the settings of its task as
    settings.NAME.
    """
    whole = row if isinstance(row, dict) else {}
    own = whole.get("settings")
    found = dict(zip(KINDS, map(whole.get, KINDS), strict=True))
    for name, value in own.items() if isinstance(own, dict) else ():
        found[f"settings.{name}"] = value
    return found


def differences(row: Mapping[str, Any], others: Sequence[Mapping[str, tuple[Any, ...]]]) -> list[tuple[str, ...]]:
    """Return (setting, the row's value, each other value) as texts, for settings whose value another card does not
    have.
    """
    found = []
    for name in dict.fromkeys(chain(*others)):
        if any(row.get(name) not in other.get(name, (row.get(name),)) for other in others):
            values = [(row.get(name),), *(other.get(name, ()) for other in others)]
            found.append((name, *map(shown, values)))
    return found


def shown(values: tuple[Any, ...]) -> str:
    return " or ".join("-" if value in (None, "") else str(value)[:MAX_SETTING_LENGTH] for value in values)
