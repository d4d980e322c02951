"""A step that fails: what it leaves behind, and running it again.

`failed-step-NNNNNN/` in the run's folder holds, of every process that failed, process-R.json (the error, the recipe,
the checkpoint to start from) and process-R.safetensors (what the step had made until then). No pickle, and no code: a
replay runs the recipe file that its user names.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_rl.config import described
from dllm_rl.distributed import machine
from dllm_rl.files import replacing, write_json
from dllm_rl.recipe import Recipe
from dllm_rl.training import checkpoint
from dllm_rl.training.run import Run, check_same_recipe

FORMAT = 1
# How gloo, NCCL and the store of processes word it.
LATE = re.compile(r"Timed out waiting \d+ ?ms|(NCCL|[Ww]atchdog).{0,200}time ?out|wait timeout after", re.DOTALL)


@contextmanager
def recorded(run: Run, step: int) -> Iterator[dict[str, Any]]:
    """Yields a dictionary for what a step makes; when the step raises, that is written to the run's folder.

    An exchange between processes that timed out is said to be one, by RuntimeError.
    """
    made: dict[str, Any] = {}
    try:
        yield made
    except Exception as error:
        if isinstance(error, RuntimeError) and LATE.search(str(error)) and run.accelerator.num_processes > 1:
            late = RuntimeError(
                f"process {run.accelerator.process_index}: step {step} waited collective_timeout="
                f"{run.recipe.collective_timeout:g} s for another process, which is stuck or far behind; see where in "
                "its own last lines, raise collective_timeout, or continue with --resume_from_checkpoint latest"
            )
            raise late from error
        try:
            folder = write(run, step, made, error)
        except OSError as full:  # the step's own error is what matters
            error.add_note(f"what step {step} had made could not be kept: {full}")
        else:
            error.add_note(f"to run step {step} again: dllm-rl replay {folder} --recipe RECIPE.py")
        raise


def write(run: Run, step: int, made: dict[str, Any], error: BaseException) -> Path:
    """Write this process's part of the dump, each file whole; returns the folder."""
    recipe, rank = run.recipe, run.accelerator.process_index
    folder = Path(recipe.directory) / f"failed-step-{step:06d}"
    kept = [(at, path) for at, path in checkpoint.found(Path(recipe.directory) / "checkpoints") if at <= step]
    with replacing(folder / f"process-{rank}.safetensors") as partial:
        save_file(tensors(made), partial)
    facts = {
        "format": FORMAT,
        "step": step,
        "error": described_error(error),
        "checkpoint": str(kept[-1][1].absolute()) if kept else None,
        "weights_version": run.policy.version,
        "seed": recipe.seed,
        "num_processes": run.accelerator.num_processes,
        "directory": str(Path(recipe.directory).absolute()),
        "command": sys.argv,
        "recipe": described(recipe),
        "machine": machine(run.accelerator),
    }
    write_json(folder / f"process-{rank}.json", facts)
    return folder


def described_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def tensors(made: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of records, by path: `rollout.tokens`, `logps.old` ..."""
    found: dict[str, Tensor] = {}
    for name, value in made.items():
        if isinstance(value, Tensor):
            found[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        elif is_dataclass(value):
            found |= tensors({f"{name}.{field.name}": getattr(value, field.name) for field in fields(value)})
    return found


def read(folder: Path, rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A process's part of a dump. Raises ValueError on a folder that is none, or of another format."""
    file = folder / f"process-{rank}.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no {file.name}: give the failed-step-NNNNNN folder of a run")
    facts = json.loads(file.read_text())
    if facts.get("format") != FORMAT:
        raise ValueError(f"{file}: format={facts.get('format')!r} is not {FORMAT}; replay it with the version it is of")
    return facts, load_file(file.with_suffix(".safetensors"))


def replayed(facts: dict[str, Any], recipe: Recipe, scratch: Path) -> Recipe:
    """The recipe as a replay runs it: from the dump's checkpoint, in a folder of its own.

    Raises ValueError on another recipe than the dump's, and when its checkpoint is gone.
    """
    check_same_recipe(facts["recipe"], described(recipe))
    start = facts["checkpoint"]
    if start is None or not Path(start).is_dir():
        raise ValueError(f"checkpoint={start!r} of the dump is gone; step {facts['step']} cannot be run again without")
    reference = Path(facts["directory"]) / "reference"
    if reference.is_dir() and not (scratch / "reference").exists():
        (scratch / "reference").symlink_to(reference)
    return replace(
        recipe,
        num_steps=facts["recipe"]["num_steps"],
        resume_from_checkpoint=start,
        output_dir=str(scratch),
        overwrite_output_dir=False,
        save_steps=10**9,
    )


def compared(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, str]:
    """For each tensor of either: "equal", bit for bit (NaN is NaN), or how the two differ."""
    return {name: _difference(before.get(name), now.get(name)) for name in sorted({*before, *now})}


def _difference(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None:
        return "only made by the replay" if a is None else "not made by the replay"
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()):
        return "equal"
    return f"differs by up to {(a.double() - b.double()).abs().nan_to_num().max().item():.3g}"
