"""Damage to a checkpoint's folder, each kind a function of the folder and a source of chance; returns what it did."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from dllm_rl import manifest
from dllm_rl.checkpoints import checkpoint

Damage = Callable[[Path, Random], str]


def _file(folder: Path, chance: Random) -> Path:
    """Any but the model card, which a resume does not read and anyone may edit."""
    return chance.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != manifest.CARD])


def flip(folder: Path, chance: Random) -> str:
    path = _file(folder, chance)
    content = bytearray(path.read_bytes())
    at, bit = chance.randrange(len(content)), chance.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} of {path.name}"


def truncate(folder: Path, chance: Random) -> str:
    path = _file(folder, chance)
    size = chance.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} cut to {size} bytes"


def lose(folder: Path, chance: Random) -> str:
    path = _file(folder, chance)
    path.unlink()
    return f"{path.name} deleted"


def swap(folder: Path, chance: Random) -> str:
    """A file of another step in the place of this one's."""
    others = [path for _, path in checkpoint.list_checkpoints(folder.parent) if path != folder]
    path, other = _file(folder, chance), chance.choice(others)
    while (other / path.relative_to(folder)).read_bytes() == path.read_bytes():
        path = _file(folder, chance)
    shutil.copyfile(other / path.relative_to(folder), path)
    return f"{path.name} of {other.name}"


def rename(folder: Path, chance: Random) -> str:
    """The whole folder of another step under this one's name. (Another one may hold this one's by now.)"""
    paths = [path for _, path in checkpoint.list_checkpoints(folder.parent)]
    held = {path: json.loads((path / "state.json").read_text())["step"] for path in paths}
    other = chance.choice([path for path in held if folder.name != f"step-{held[path]:06d}"])
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    return f"all of {other.name}"


def empty_optimizer(folder: Path, chance: Random) -> str:
    path = folder / "optimizer.pt"
    torch.save(torch.load(path) | {"state": {}}, path)
    return "optimizer.pt without moments"


def nan_moment(folder: Path, chance: Random) -> str:
    path = folder / "optimizer.pt"
    held = torch.load(path)
    chance.choice(list(held["state"].values()))["exp_avg"].fill_(float("nan"))
    torch.save(held, path)
    return "optimizer.pt with NaN moments"


def wrong_step(folder: Path, chance: Random) -> str:
    path = folder / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"step": state["step"] + 1}))
    return "state.json with another step"


DAMAGES: dict[str, Damage] = {
    "bit flip": flip,
    "truncation": truncate,
    "lost file": lose,
    "file of another step": swap,
    "folder of another step": rename,
    "emptied optimizer": empty_optimizer,
    "NaN moments": nan_moment,
    "wrong step number": wrong_step,
}
