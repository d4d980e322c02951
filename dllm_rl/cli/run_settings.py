"""Read the task, samplers and quantization scheme of a run, for commands called without options for them."""

import ast
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from dllm_rl.cli.options import checkpoint_of
from dllm_rl.files import read_json
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.screen import escape_controls
from dllm_rl.tasks.base import Problem

Call = tuple[str, dict[str, Any]]  # a function's name and its keyword arguments


def recipe_of(model: str) -> dict[str, Any] | None:
    """Return the recipe stored in a run's newest checkpoint, as text and numbers; None if `model` is no run's folder.

    Raises:
        ValueError: The folder has no complete checkpoint, or its state.json contains no recipe.
    """
    if not (Path(model) / "checkpoints").is_dir():
        return None
    state = read_json(Path(checkpoint_of(model, quick=True)) / "state.json")
    recipe = state.get("recipe") if isinstance(state, dict) else None
    if not isinstance(recipe, dict):
        raise ValueError(f"{model}: state.json of its newest checkpoint contains no settings")
    return recipe


def task_of(model: str) -> Call:
    """Return the name, as in --task, and the settings of the held-out task that a run was evaluated on.

    Raises:
        ValueError: The model is not a run's folder, or its task is defined in a script.
    """
    from dllm_rl.tasks.protocols import TASKS

    recipe = recipe_of(model) if model else None
    if recipe is None:
        raise ValueError(
            f"task is not given, and {model!r} is not the folder of a run with a task; use {', '.join(TASKS)}"
        )
    text = recipe.get("eval_task")
    call = read_call(text)
    for name, task in TASKS.items():
        if call is not None and task.__name__ == call[0] and call[1].keys() <= parameters_of(task):
            return name, call[1]
    remedy = "give --task, also as MODULE:NAME, or call dllm_rl.evaluate in the script"
    raise ValueError(f"{model}: a script defines its task, {text}; {remedy}")


def problems_of(model: str, count: int) -> list[Problem]:
    """Return a run's first held-out problems, or the first prompts of its completions.jsonl if a script defines its
    task.

    The list is empty for a folder that is not a run's, and for prompts with blanks, which the file does not mark.
    """
    from dllm_rl.tasks.protocols import TASKS

    try:
        name, settings = task_of(model)
    except ValueError:
        return logged_problems(model)[:count]
    task = TASKS[name](**settings)
    return [task[i] for i in range(min(count, len(task)))]


def logged_problems(model: str) -> list[Problem]:
    """Return the distinct prompts of a run's completions.jsonl."""
    path, sampler = Path(model) / "completions.jsonl", sampler_of(model)
    if sampler is None or sampler.keywords.get("max_new_tokens") == 0 or not path.is_file():
        return []
    prompts = {str(row.get("prompt")): row.get("prompt") for row in current_rows(path)}
    return [Problem(prompt) for prompt in prompts.values() if is_prompt(prompt)]


def is_prompt(value: Any) -> TypeGuard[str | list[dict[str, str]]]:
    """Return whether a value of a file is text or a list of chat messages."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(turn, dict) for turn in value))


def form_of_prompts(model: str) -> tuple[bool, str | None]:
    """Return whether the prompts of a run's task are chats, and the text that marks a token to fill in."""
    try:
        _, settings = task_of(model)
    except ValueError:
        return False, None
    problem = problems_of(model, 1) if settings.get("infill") else []
    chat = settings.get("chat") is True and settings.get("prompt_format") != "compact"
    return chat, problem[0].blank if problem else None


def sampler_of(model: str, field: str = "eval_sampler") -> partial | None:
    """Return the sampler of a run's evaluations, or of its rollouts (field="sampler").

    None if the folder is not a run's, or if the sampler or one of its rules is defined in a script.
    """
    from dllm_rl.samplers.autoregress import autoregress
    from dllm_rl.samplers.by_name import CACHES, COMMITS, RANKS
    from dllm_rl.samplers.renoise import renoise
    from dllm_rl.samplers.unmask import unmask

    recipe = recipe_of(model)
    call = read_call(recipe.get(field)) if recipe else None
    samplers = {function.__name__: function for function in (unmask, autoregress, renoise)}
    sampler = samplers.get(call[0]) if call else None
    if call is None or sampler is None or not call[1].keys() <= parameters_of(sampler):
        return None
    keywords = dict(call[1])
    cache_classes = {cache.__name__: cache for cache in CACHES.values()}
    for option, choices in (("rank", RANKS), ("commit", COMMITS), ("cache", cache_classes)):
        if isinstance(keywords.get(option), tuple):
            name, bound_keywords = keywords[option]
            if name not in choices or any(isinstance(value, tuple) for value in bound_keywords.values()):
                return None  # a rule of a script, or a rule that binds another function
            rule_or_cache = choices[name]
            if option == "cache":
                keywords[option] = rule_or_cache(**bound_keywords)
            else:
                keywords[option] = partial(rule_or_cache, **bound_keywords) if bound_keywords else rule_or_cache
    return partial(sampler, **keywords)


def sampler_or_note(model: str, field: str = "eval_sampler") -> partial | None:
    """Return `sampler_of`, and print a note if the run has a sampler that only its script can make."""
    sampler, recipe = sampler_of(model, field), recipe_of(model)
    if sampler is None and recipe is not None:
        text = escape_controls(
            f"note: {field}={recipe.get(field)} is defined in a script; the command uses its default sampler instead"
        )
        print(text, file=sys.stderr)
    return sampler


def with_passed(
    run_options: dict[str, Any], passed: dict[str, Any], run_sampler: partial | None = None
) -> dict[str, Any]:
    """Return a run's sampler options, overridden by the passed ones that are not None.

    If max_new_tokens is passed without diffusion_steps, the run's number of steps is capped at max_new_tokens, except
    for `renoise`, whose steps are those of a canvas.
    """
    from dllm_rl.samplers.renoise import renoise

    options = run_options | {name: value for name, value in passed.items() if value is not None}
    steps, length = options.get("diffusion_steps"), passed.get("max_new_tokens")
    is_per_canvas = run_sampler is not None and run_sampler.func is renoise
    if passed.get("diffusion_steps") is None and steps is not None and length and not is_per_canvas:
        options["diffusion_steps"] = min(steps, length)
    return options


def scheme_of(model: str) -> Callable[[], Any] | None:
    """Return the function that makes the quantization scheme of a run's rollouts.

    None for rollouts in full precision, and for a folder that is not a run's.

    Raises:
        ValueError: A script defines the scheme.
    """
    from dllm_rl.recipe import CHOICES

    text = (recipe_of(model) or {}).get("rollout_quantization")
    if text is None:
        return None
    name, keywords = read_call(text) or (text, {})
    make = CHOICES["rollout_quantization"].get(name)
    if make is None or not keywords.keys() <= parameters_of(make):
        raise ValueError(f"{model}: a script defines its rollout_quantization, {text}; give --quantization")
    return partial(make, **keywords)


def read_call(text: Any) -> Call | None:
    """Parse text such as `Sudoku(split='test', clues=(1, 3))` into the function's name and its keywords.

    A value is a number, text, a tuple of these, or the name and keywords of another call. Nothing is executed. None if
    the text is not such a call.
    """
    try:
        parsed = ast.parse(text, mode="eval").body if isinstance(text, str) else None
        return _call(parsed) if isinstance(parsed, ast.Call) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call(node: ast.Call) -> Call:
    if not isinstance(node.func, ast.Name) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("not a call of a name with keywords")
    return node.func.id, {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id, {}
    return _call(node) if isinstance(node, ast.Call) else ast.literal_eval(node)


def parameters_of(function: Callable) -> set[str]:
    """Return the names of a function's parameters."""
    return set(inspect.signature(function).parameters)
