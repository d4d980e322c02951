"""A recipe as a program: its command line, its run, and errors in one line."""

import os
import sys

from dllm_rl.config import from_command_line
from dllm_rl.recipe import Recipe
from dllm_rl.screen import line_of
from dllm_rl.supervised.recipe import SFT
from dllm_rl.supervised.train import fine_tune
from dllm_rl.training.finish import Summary
from dllm_rl.training.loop import train


def main(recipe: Recipe | SFT) -> Summary:
    """Train the recipe, of RL or SFT, with the command line's changes; a script's last line. Returns `train`'s result.

    An error of a setting (ValueError, printed by one process) or of a file (OSError) is one line, and the process exits
    with 2 or 1. DLLM_RL_TRACEBACK=1 in the environment raises the error instead."""
    chosen = from_command_line(recipe)
    try:
        return fine_tune(chosen) if isinstance(chosen, SFT) else train(chosen)
    except (ValueError, OSError) as error:
        if os.environ.get("DLLM_RL_TRACEBACK") == "1":  # for whoever looks for the cause
            raise
        rank = os.environ.get("RANK", "0")
        setting = isinstance(error, ValueError)  # which every process finds, so that one prints it
        if rank == "0" or not setting:
            where = "" if rank == "0" else f"process {rank}: "
            print(f"error: {where}{line_of(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2 if setting else 1) from None
