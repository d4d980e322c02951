"""What a failed step leaves: the state before it as a checkpoint, and a dump that `dllm-rl replay` runs again.

A dump is RUN/failed/step-NNNNNN, followed by -process-R where there are several:

    dump.json          the step, its stage, the error, the recipe's settings, the command, versions
    made.safetensors   rollout, noise, log-probs, batch, as far as they were made, by name: `rollout.tokens` ...

It holds data, no code, and no random numbers: each is a function of (seed, step), so that the recipe, a checkpoint
before the step and the step's number give the step again.
"""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from traceback import format_exception, walk_tb
from types import FrameType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_rl.distributed import sharding_of, versions
from dllm_rl.files import replacing
from dllm_rl.recipe import Recipe
from dllm_rl.training import checkpoint
from dllm_rl.training.finish import Summary
from dllm_rl.training.folder import FAILED, settings_of
from dllm_rl.training.peers import of_an_exchange
from dllm_rl.training.run import Run
from dllm_rl.training.saving import write_checkpoint
from dllm_rl.training.stop import how_to_continue

FORMAT = 1
BEFORE_UPDATE = ("", "rollout", "reward", "waiting", "scoring")  # stages that leave the weights alone
MADE = ("rollout", "rewards", "advantages", "groups", "noise", "logps", "batch")


def leaving_a_dump(train: Callable[[Recipe], Summary]) -> Callable[[Recipe], Summary]:
    """`train`; the error of a failed step bears a note that says what is saved and how to run the step again.

    What the step had made is read from the frames that the error came through, as a debugger does, so that the loop
    need not hand it on.
    """

    @wraps(train)
    def wrapped(recipe: Recipe) -> Summary:
        try:
            return train(recipe)
        except Exception as error:  # of any kind: it goes on from here
            frames = [frame for frame, _ in walk_tb(error.__traceback__)]
            while frames and frames[0].f_code.co_name != train.__name__:
                frames.pop(0)
            loop = frames[0].f_locals if frames else {}
            if "step" in loop and loop["run"].history["whole"] == loop["step"]:  # neither at the start nor at the end
                error.add_note(_leave(loop["run"], loop["step"], error, frames[1:]))
            raise

    return wrapped


def _leave(run: Run, step: int, error: Exception, frames: list[FrameType]) -> str:
    """Save the last whole state, where it is at hand, and what `frames` hold; returns the note."""
    recipe, main, stage = run.recipe, run.accelerator.is_main_process, run.log.entered
    said = f"process {run.accelerator.process_index}: the step after step {step} failed"
    # A gradient that is not finite stops the first inner update before it touches the weights.
    updating = any(frame.f_code.co_name == "update" for frame in frames) and not (
        isinstance(error, FloatingPointError) and recipe.num_iterations == 1
    )
    whole = stage in BEFORE_UPDATE or (stage == "update" and not updating)
    try:
        alone = sharding_of(run.policy.module) is None  # else saving takes all processes
        if main and alone and whole and not checkpoint.folder_of(Path(recipe.directory) / "checkpoints", step).exists():
            write_checkpoint(run, step)
        if run.accelerator.num_processes > 1 and of_an_exchange(error):
            return (
                f"{said}: another process ended, and its own message says why, or kept this one waiting for "
                f"collective_timeout={recipe.collective_timeout:g} s; {how_to_continue(recipe)}"
            )
        dump = write(run, step, error, frames)
    except (OSError, RuntimeError, ArithmeticError, SafetensorError) as other:
        return f"{said}, and saving what there was failed too: {other}; {how_to_continue(recipe)}"
    script = sys.argv if sys.argv[0].endswith(".py") else ["RECIPE.py"]
    replay = shlex.join(["dllm-rl", "replay", str(dump), *script])
    return f"{said}; mend the cause and {how_to_continue(recipe)}; to run that step alone: {replay}"


def write(run: Run, step: int, error: Exception, frames: list[FrameType]) -> Path:
    """The dump's folder. In the loop's own frame, variables may be the last step's: `frames` are those below it."""
    index, processes = run.accelerator.process_index, run.accelerator.num_processes
    made: dict[str, Any] = {}
    for frame in reversed(frames):
        made |= {name: frame.f_locals[name] for name in MADE if name in frame.f_locals}
    facts = {
        "format": FORMAT,
        "step": step,
        "stage": run.log.entered,
        "error": f"{type(error).__name__}: {error}",
        "traceback": "".join(format_exception(error)),
        "process": index,
        "processes": processes,
        "seed": run.recipe.seed,
        "command": sys.argv,
        "versions": versions(),
        "recipe": settings_of(run.recipe),
    }
    name = f"step-{step:06d}" + (f"-process-{index}" if processes > 1 else "")
    with replacing(Path(run.recipe.directory) / FAILED / name) as partial:
        partial.mkdir()
        (partial / "dump.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        save_file(_tensors(made), partial / "made.safetensors")
    return Path(run.recipe.directory) / FAILED / name


def _tensors(made: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors, and those of records and of the records in them, by dotted name."""
    found = {name: x.detach().cpu().clone().contiguous() for name, x in made.items() if isinstance(x, Tensor)}
    for name, record in made.items():
        if is_dataclass(record):
            found |= _tensors({f"{name}.{field.name}": getattr(record, field.name) for field in fields(record)})
    return found


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A dump's facts and tensors. Raises ValueError where it is none, or damaged."""
    try:
        facts, tensors = json.loads((folder / "dump.json").read_bytes()), load_file(folder / "made.safetensors")
    except FileNotFoundError:
        raise ValueError(f"{folder} is no dump of a failed step (dump.json, made.safetensors)") from None
    except (ValueError, SafetensorError) as error:  # neither UTF-8 nor JSON; no safetensors
        raise ValueError(f"{folder}: the dump is damaged: {error}") from None
    kinds = {"format": int, "step": int, "processes": int, "error": str, "command": list, "versions": dict}
    if not isinstance(facts, dict) or any(type(facts.get(name)) is not kind for name, kind in kinds.items()):
        raise ValueError(f"{folder}: the dump is damaged: dump.json lacks one of {', '.join(kinds)}")
    if facts["format"] != FORMAT or facts["step"] < 0:
        raise ValueError(f"{folder}: format={facts['format']}, step={facts['step']} is no dump of this version")
    return facts, tensors
