"""`dllm-rl replay`: run a failed step again, from its dump, and compare."""

import importlib.util
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_rl.config import from_command_line
from dllm_rl.distributed import versions
from dllm_rl.screen import escape_controls
from dllm_rl.training import checkpoint, dump, train
from dllm_rl.training.folder import FAILED


def replay_command(folder: Path, script: str | None, overrides: list[str]) -> int:
    """Run the dump's step again from the newest whole checkpoint before it, in a folder that is deleted afterwards;
    returns 0 when it fails as it did, else 1. Raises ValueError.

    The dump only tells how far to go and what to compare with: the code that runs is the script's.
    """
    facts, tensors = dump.read(folder)
    step, run = facts["step"], folder.resolve().parents[1]
    if script is None:
        raise ValueError(
            "a dump holds no code, and none is run because a dump names it: add the recipe's script and its options; "
            f"the run's were {facts['command']}"
        )
    recipe = from_command_line(recipe_of(Path(script)), overrides)
    if step >= recipe.num_steps:
        raise ValueError(f"{folder}: step={step} is none of the recipe's num_steps={recipe.num_steps}")
    starts = [path for number, path in checkpoint.found(run / "checkpoints") if number <= step]
    if not starts:
        raise ValueError(f"{run / 'checkpoints'} holds no checkpoint of step {step} or before, to begin from")
    with tempfile.TemporaryDirectory(prefix="replay-") as scratch:
        there = Path(scratch)
        (there / "checkpoints").mkdir()
        for path in starts:
            (there / "checkpoints" / path.name).symlink_to(path)
        if (run / "reference").is_dir():
            (there / "reference").symlink_to(run / "reference")
        alone = {"num_steps": step + 1, "lr_schedule_steps": recipe.schedule_steps, "save_steps": step + 1}
        alone |= {"resume_from_checkpoint": "latest", "overwrite_output_dir": False, "dry_run": False}
        with ExitStack() as stack:
            stack.push(lambda *_: (there / FAILED).is_dir())  # the error of a step, which leaves a dump, ends here
            train(replace(recipe, output_dir=scratch, **alone))
        for again in (there / FAILED).glob("step-*"):
            return compare(facts, tensors, *dump.read(again))
    print(f"The step after step {step} did not fail. Before, it did: {escape_controls(facts['error'])}")
    return 1


def recipe_of(script: Path) -> Any:
    """The `recipe` of a script, imported: what stands below `if __name__ == "__main__"` does not run."""
    spec = importlib.util.spec_from_file_location("replayed_recipe", script)
    if not script.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{script} is no Python file; give the recipe's script")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(script.resolve().parent))  # as Python does for a script
    spec.loader.exec_module(module)
    if not hasattr(module, "recipe"):
        raise ValueError(f"{script} has no `recipe`; assign it at the top level of the script")
    return module.recipe


def compare(before: dict[str, Any], tensors: dict[str, Tensor], after: dict[str, Any], again: dict[str, Tensor]) -> int:
    """Print whether a step failed as it did before; returns 0 when it did.

    The processes of a run have a share of the batch each, and a replay has all of it in one: errors alone are compared
    then.
    """
    error = escape_controls(after["error"])
    names = sorted(tensors.keys() | again.keys()) if before["processes"] == 1 else []
    other = [n for n in names if n not in tensors or n not in again or not _same(tensors[n], again[n])]
    if (after["step"], after["error"]) == (before["step"], before["error"]) and not other:
        bitwise = f", its {len(names)} tensors the same bit for bit" if names else ""
        print(f"The step after step {after['step']} failed as before{bitwise}: {error}")
        return 0
    print(f"The step after step {after['step']} failed otherwise: {error}")
    print(f"Before, that after step {before['step']} did: {escape_controls(before['error'])}")
    if other:
        print(f"Tensors that differ: {', '.join(map(escape_controls, other))}")
    changed = [f"{n} was {before['versions'].get(n)}, is {v}" for n, v in versions().items()]
    print(f"Numbers may change with the device, a grader that is not deterministic, and versions: {'; '.join(changed)}")
    return 1


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
