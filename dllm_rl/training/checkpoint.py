"""Checkpoints: atomic to write, bounded in number, enough to continue a run bit for bit."""

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

import torch

from dllm_rl.files import remove, replacing
from dllm_rl.models.base import Policy
from dllm_rl.models.lora import save_adapter

# Names in the descriptions of recipes that version 0.1.0 wrote.
RENAMED = {
    "given": "with_advantages",
    "replays": "exact_for_sampler",
    "adaptive": "adaptive_weights",
    "masked": "masked_weights",
    "rejected": "rejection",
    "truncated": "truncated_weights",
}
_NAME = re.compile(r"step-(\d{6,})")


def save(
    directory: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, keep: int
) -> Path:
    """Write `directory`/step-NNNNNN, then drop all but the newest `keep`. `load_policy` opens the folder as it is.

    The folder is written under another name, flushed to disk and renamed, so a folder with a checkpoint's name is
    always complete. state must be JSON-serialisable; a run's random numbers are functions of (seed, step) and need no
    saving.
    """
    for stale in [*directory.glob(".*.partial"), *directory.glob(".partial-*")]:
        remove(stale)
    final = folder_of(directory, step)
    with replacing(final) as partial:
        policy.save_pretrained(partial)
        if policy.lora is not None:
            save_adapter(policy, partial / "adapter")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps({"step": step, "version": policy.version, **state}, indent=1))
    for _, old in found(directory)[:-keep]:
        remove(old)
    return final


def folder_of(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies, or is to lie."""
    return directory / f"step-{step:06d}"


def set_aside(directory: Path, resumed: Path) -> list[Path]:
    """Rename the checkpoints in `directory` that a run leaves behind when it goes on from `resumed`; returns new paths.

    Those are the later ones, and another of the same step: step-NNNNNN becomes step-NNNNNN.set-aside, or .set-aside-2
    and so on where that is taken. They are found no more, neither as the newest nor as surplus; nothing is deleted.
    """
    step, moved = read_state(resumed)["step"], []
    for number, folder in found(directory):
        if number > step or (number == step and folder.resolve() != resumed.resolve()):
            names = (f"{folder.name}.set-aside" + (f"-{n}" if n > 1 else "") for n in count(1))
            free = next(path for name in names if not (path := folder.with_name(name)).exists())
            moved.append(folder.rename(free))
    return moved


def found(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    folders = directory.iterdir() if directory.is_dir() else []
    return sorted((int(m[1]), p) for p in folders if (m := _NAME.fullmatch(p.name)))


def locate(which: str, directory: Path) -> Path | None:
    """The folder that `resume_from_checkpoint` means; None for 'latest' when there is none yet.

    Raises ValueError when a named folder is no checkpoint.
    """
    if which == "latest":
        checkpoints = found(directory)
        return checkpoints[-1][1] if checkpoints else None
    path = Path(which)
    if not (path / "state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint={which!r} is not a checkpoint folder (no state.json); give one, or 'latest'"
        )
    return path


def read_state(folder: Path) -> dict[str, Any]:
    """What `save` was given, with the recipe's functions and fields under the names that they have today."""
    state = json.loads((folder / "state.json").read_text())
    names = re.compile(rf"\b({'|'.join(RENAMED)})(?=[(=])")
    for field, value in state["recipe"].items():
        if isinstance(value, str):
            state["recipe"][field] = names.sub(lambda match: RENAMED[match[1]], value)
    return state


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))
