"""Run a recipe as a program: parse its command line, train, and print errors in one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

# Imported so that options can name the samplers and engines of servers.
import dllm_rl.integrations.serving.engine
import dllm_rl.integrations.vllm  # noqa: F401
from dllm_rl.config import from_command_line
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls, interactive, line_of, printing_anything
from dllm_rl.supervised.sft import SFT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dllm_rl.step.context import StepFeature
    from dllm_rl.training.summary import Summary


@contextmanager
def as_program() -> Iterator[None]:
    """In the block, end the process on an error as a program does.

    An invalid setting (ValueError) is printed in one line by one process, and every process exits with 2. A file error
    (OSError) is printed in one line, and the process exits with 1; after Ctrl-C it exits with 130. With
    DLLM_RL_TRACEBACK=1 in the environment the error is raised instead.
    """
    rank = os.environ.get("RANK", "0")
    with printing_anything():
        try:
            yield
        except KeyboardInterrupt:
            if interactive():
                raise
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except (ValueError, OSError) as error:
            if os.environ.get("DLLM_RL_TRACEBACK") == "1":
                raise
            is_setting_error = isinstance(error, ValueError)  # every process raises it, and only one prints it
            if rank == "0" or not is_setting_error:
                prefix = "" if rank == "0" else f"process {rank}: "
                print(f"error: {prefix}{line_of(error)}", file=sys.stderr, flush=True)
            raise SystemExit(2 if is_setting_error else 1) from None


def main(recipe: Recipe | SFT, *, features: "Sequence[StepFeature]" = ()) -> "Summary":
    """Train a recipe of RL or SFT, with the settings that the command line overrides, and return the run's summary.

    Call it in the last line of a script. Errors end the process as `as_program` says.

    Args:
        recipe: Settings of the run.
        features: Parts of a step of RL that no setting has, as for `train`. Default: none.

    Returns:
        The content of summary.json, with the trained policy as its attribute `policy`.
    """
    with as_program():
        recipe = from_command_line(recipe)
        # Printed before the imports, which take seconds.
        if os.environ.get("RANK", "0") == "0" and (isinstance(recipe, SFT) or not recipe.dry_run):
            warmup = f"up to {recipe.warmup.steps} warm-up steps, then " if recipe.warmup.steps else ""
            plan = f"{recipe.name}, seed {recipe.seed}: {warmup}{recipe.num_steps} steps"
            plan += f", into {recipe.output_dir}" if recipe.output_dir else ""  # else `train` chooses and prints it
            if isinstance(recipe, Recipe) and recipe.rollout_quantization is not None:
                names = [type(part).__name__ for part in (recipe.rollout_quantization, recipe.corrector)]
                plan += f"; rollouts in {names[0]}, corrector {names[1]}"
            print(escape_controls(f"{plan}; the time left is known from the second step on"), flush=True)
        from dllm_rl.distributed.stop import started_by_command
        from dllm_rl.training.fine_tune import fine_tune
        from dllm_rl.training.trainer import train

        with started_by_command():
            return fine_tune(recipe) if isinstance(recipe, SFT) else train(recipe, features=features)
