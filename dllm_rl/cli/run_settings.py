"""Read the task, samplers and quantization scheme of a run, for commands called without options for them."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Imported so that the sampler of a run that sampled from a server can be read.
import dllm_rl.integrations.serving.engine
import dllm_rl.integrations.vllm  # noqa: F401
from dllm_rl.cli.options import recipe_of
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.records import annotations_of, folders_beside, from_json
from dllm_rl.screen import escape_controls
from dllm_rl.tasks.base import Problem

if TYPE_CHECKING:
    from dllm_rl.quantization.schemes import Scheme
    from dllm_rl.samplers import Sampler


def task_of(model: str) -> tuple[str, dict[str, Any]]:
    """Return the name, as in --task, and the settings of the held-out task that a run was evaluated on.

    Raises:
        ValueError: The model is not a run's folder, or its task is defined in a script.
    """
    from dllm_rl.tasks.protocols import TASKS

    recipe = recipe_of(model) if model else None
    if recipe is None:
        beside = "" if not model or Path(model).exists() else f" ({model} does not exist{folders_beside(model)})"
        raise ValueError(
            f"task is not given, and {model!r} is not the folder of a run with a task{beside}; use {', '.join(TASKS)}"
        )
    stored = recipe.get("eval_task")
    if isinstance(stored, dict):
        for name, task in TASKS.items():
            settings = {field: _tuples(value) for field, value in stored["init_args"].items()}
            if task.__name__ == stored["class_path"] and settings.keys() <= annotations_of(task).keys():
                return name, settings
    remedy = "give --task, also as MODULE:NAME, or call dllm_rl.evaluate in the script"
    raise ValueError(f"{model}: a script defines its task, {stored}; {remedy}")


def task_named(models: Sequence[str], name: str | None) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of a command's task, which are those of the first run with this task.

    Args:
        models: The command's models, runs or not.
        name: The task that --task names. Without a run of this task, its settings are {}. None: that of the first run.

    Raises:
        ValueError: There is no name and no run, the first run's task is defined in a script, or a run has no complete
            checkpoint.
    """
    runs = [model for model in models if recipe_of(model) is not None]
    if name is None:
        return task_of((*runs, *models, "")[0])
    for run in runs:
        with suppress(ValueError):  # a script defines its task
            found = task_of(run)
            if found[0] == name:
                return found
    return name, {}


def _tuples(value: Any) -> Any:
    """Return a stored value with tuples in place of JSON's lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def problems_of(model: str, count: int) -> list[Problem]:
    """Return a run's first held-out problems, or the first prompts of its completions.jsonl if a script defines its
    task.

    The list is empty for a folder that is not a run's. Without new tokens, only prompts with blanks have work to do.
    """
    from dllm_rl.tasks.protocols import TASKS

    try:
        name, settings = task_of(model)
    except ValueError:
        path, sampler = Path(model) / "completions.jsonl", (recipe_of(model) or {}).get("eval_sampler")
        if not isinstance(sampler, dict) or not path.is_file():
            return []
        new_tokens = sampler["init_args"].get("max_new_tokens")
        rows = {
            str(row["prompt"]): row for row in current_rows(path) if new_tokens or "blank" in row
        }  # each prompt once
        return [Problem(row["prompt"], blank=row.get("blank")) for row in rows.values()][:count]
    task = TASKS[name](**settings)
    return [task[i] for i in range(min(count, len(task)))]


def form_of_prompts(model: str) -> tuple[bool, str | None]:
    """Return whether the prompts of a run's task are chats, and the text that marks a token to fill in."""
    try:
        _, settings = task_of(model)
    except ValueError:
        return False, None
    problem = problems_of(model, 1) if settings.get("infill") else []
    chat = settings.get("chat") is True and settings.get("prompt_format") != "compact"
    return chat, problem[0].blank if problem else None


def sampler_of(model: str, field: str = "eval_sampler") -> "Sampler | None":
    """Return the sampler of a run's evaluations, or of its rollouts (field="sampler").

    None if the folder is not a run's, or, with a note on standard error, if only the run's script can make the sampler
    or one of its rules.
    """
    from dllm_rl.samplers import Sampler

    recipe = recipe_of(model)
    if recipe is None or field not in recipe:  # from SFT
        return None
    try:
        sampler: Sampler = from_json(Sampler, recipe.get(field), field)
    except ValueError:
        stored = f"{field}={recipe.get(field)}"
        note = f"note: {stored} is not part of the library, so the command uses its default; evaluate(...) takes yours"
        print(escape_controls(note), file=sys.stderr)
        return None
    return sampler


def scheme_of(model: str) -> "Scheme | None":
    """Return the quantization scheme of a run's rollouts.

    None for rollouts in full precision, and for a folder that is not a run's.

    Raises:
        ValueError: A script defines the scheme.
    """
    from dllm_rl.quantization.schemes import Scheme

    stored = (recipe_of(model) or {}).get("rollout_quantization")
    if stored is None:
        return None
    try:
        scheme: Scheme = from_json(Scheme, stored, "rollout_quantization")
    except ValueError:
        raise ValueError(f"{model}: a script defines its rollout_quantization, {stored}; give --quantization") from None
    return scheme
