"""`dllm-rl replay`: a step that failed, run again from the run's checkpoint, and compared with what it had left."""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from dllm_rl.config import from_command_line
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls
from dllm_rl.training.failures import compared, described_error, read, replayed
from dllm_rl.training.loop import train


def replay_command(arguments: argparse.Namespace) -> int:
    """0 where the step fails again with the same error and the same numbers, bit for bit; else 1."""
    folder, rank = Path(arguments.dump), int(os.environ.get("RANK", 0))
    facts, before = read(folder, rank)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes != facts["num_processes"]:
        raise ValueError(f"the step failed in {facts['num_processes']} processes, not {processes}: launch as many")
    if arguments.recipe is None:
        raise ValueError(
            f"--recipe is missing: name the file with the run's recipe, which is run as a program; the run's command "
            f"was {' '.join(facts['command'])}"
        )
    recipe, step = recipe_of(Path(arguments.recipe)), facts["step"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        again = replayed(facts, from_command_line(recipe, facts["command"][1:]), scratch)
        try:
            train(again, until=step + 1)
        except Exception as error:  # whatever the step raises is what the replay is after
            said = described_error(error)
            _, now = read(scratch / f"failed-step-{step:06d}", rank)
        else:
            print(f"step {step} does not fail again; it had failed with {escape_controls(facts['error'])}")
            return 1
    found = compared(before, now)
    for tensor, difference in found.items():
        print(f"{tensor}: {difference}")
    print(f"step {step} fails again: {escape_controls(said)}")
    if said != facts["error"]:
        print(f"it had failed with {escape_controls(facts['error'])}")
    return int(said != facts["error"] or set(found.values()) - {"equal"} != set())


def recipe_of(file: Path) -> Recipe:
    """What a recipe file calls `recipe`; the file is run, as an import would. Raises ValueError where it has none."""
    spec = importlib.util.spec_from_file_location("replayed_recipe", file)
    if spec is None or not file.is_file():
        raise ValueError(f"--recipe {file} is no Python file; name the run's")
    sys.path.insert(0, str(file.parent.absolute()))  # as for a program
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(found := getattr(module, "recipe", None), Recipe):
        raise ValueError(f"--recipe {file} defines no `recipe`; give its Recipe that name")
    return found
