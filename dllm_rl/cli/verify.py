"""`dllm-rl verify`: whether checkpoints are whole."""

from pathlib import Path

from dllm_rl import manifest
from dllm_rl.checkpoints import checkpoint
from dllm_rl.files import folder_size


def folders_of(path: Path) -> list[Path]:
    """The checkpoint itself, or a run's reference and checkpoints. Raises ValueError where there is none."""
    if (path / "state.json").is_file() or (path / manifest.NAME).is_file():
        return [path]
    reference = [path / "reference"] * (path / "reference" / manifest.NAME).is_file()
    found = [folder for _, folder in checkpoint.found(path / "checkpoints") or checkpoint.found(path)]
    if not found + reference:
        raise ValueError(f"{path}: neither a checkpoint nor a run with checkpoints; give one of them")
    return reference + found


def verify_command(path: Path, *, quick: bool) -> int:
    """Print one line per checkpoint; returns 1 when one is damaged, else 0."""
    damaged = 0
    for folder in folders_of(path):
        try:
            if folder.name == "reference":  # it has no state.json, and belongs to no step
                manifest.verify(folder, quick=quick)
            else:
                checkpoint.check(folder, quick=quick)
        except ValueError as error:
            damaged += 1  # and go on: all that is damaged is named
            print(f"damaged  {error}")
        else:
            print(f"whole    {folder} ({folder_size(folder) / 1e6:.1f} MB)")
    return int(damaged > 0)
