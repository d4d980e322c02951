"""A recipe as a program: its command line, its run, and errors in one line."""

import os
import sys
from typing import TYPE_CHECKING

from dllm_rl.config import from_command_line
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls, imports_interruptible, interactive, line_of
from dllm_rl.supervised.recipe import SFT

if TYPE_CHECKING:
    from dllm_rl.training.finish import Summary


def main(recipe: Recipe | SFT) -> "Summary":
    """Train the recipe, of RL or SFT, with the command line's changes; a script's last line. Returns `train`'s result.

    An error of a setting (ValueError, printed by one process) or of a file (OSError) is one line, and the process exits
    with 2 or 1. DLLM_RL_TRACEBACK=1 in the environment raises the error instead.
    """
    rank = os.environ.get("RANK", "0")
    try:
        with imports_interruptible():
            return run(from_command_line(recipe), first=rank == "0")
    except KeyboardInterrupt:
        if interactive():
            raise
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        if os.environ.get("DLLM_RL_TRACEBACK") == "1":  # for whoever looks for the cause
            raise
        setting = isinstance(error, ValueError)  # which every process finds, so that one prints it
        if rank == "0" or not setting:
            where = "" if rank == "0" else f"process {rank}: "
            print(f"error: {where}{line_of(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2 if setting else 1) from None


def run(recipe: Recipe | SFT, *, first: bool) -> "Summary":
    """`train` or `fine_tune`; the first process prints what is done before the imports that it takes."""
    if first and (isinstance(recipe, SFT) or not recipe.dry_run):
        warmup = f"up to {recipe.sft_warmup_steps} warm-up steps, then " if recipe.sft_warmup_steps else ""
        steps = f"{recipe.name}, seed {recipe.seed}: {warmup}{recipe.num_steps} steps, into {recipe.directory}"
        print(escape_controls(f"{steps}; the time left is known from the second step on"), flush=True)
    from dllm_rl.distributed.stop import started_by_command
    from dllm_rl.supervised.train import fine_tune  # here: importing it takes seconds
    from dllm_rl.training.trainer import train

    with started_by_command():
        return fine_tune(recipe) if isinstance(recipe, SFT) else train(recipe)
