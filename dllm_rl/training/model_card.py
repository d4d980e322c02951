"""The model card of a run's checkpoints, and the upload to the Hugging Face hub."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dllm_rl.checkpoints.optimizer_shards import PATTERN
from dllm_rl.monitoring.health import health
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls

OWN = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run", "push_to_hub", "report_to")
SHOWN = ("reward", "rollout_corr/k3_kl", "rollout_corr/ess", "grad_norm", "completions/mean_length")
PROTOCOL = ("eval_task", "eval_sampler", "seed", "dtype")
LEFT_OUT = ("optimizer.pt", PATTERN, "state.json", "manifest.json")  # files that only a resume needs are not uploaded


def card(recipe: Recipe, *, step: int, evaluations: dict[str, dict[str, float]], metrics: dict[str, float]) -> str:
    """Return a checkpoint's README.md. `evaluations` has held-out metrics by the time of evaluation, `metrics` the last
    step's.
    """
    settings = {name: value for name, value in recipe.settings().items() if name not in OWN}
    front: dict[str, Any] = {"library_name": "dllm_rl", "tags": ["reinforcement-learning", "grpo", "dllm_rl"]}
    if isinstance(recipe.model, str):
        if Path(recipe.model).exists():  # a folder of this machine: show only its name
            settings["model"] = Path(recipe.model).name
        else:
            front["base_model"] = recipe.model
    parts = [
        "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in front.items()), "---"]),  # JSON is YAML
        f"# {_code(recipe.name)}, seed {recipe.seed}",
        f"{step} of {recipe.num_steps} steps of GRPO by dllm_rl, from {_code(settings['model'])}.",
        "## Held-out problems",
        *_evaluated(evaluations),
        f"{len(recipe.eval_task)} problems of the task {_code(recipe.eval_task.name)}, version "
        f"{_code(recipe.eval_task.version)}, as the task itself grades them.",
        _table(("protocol", ""), [(name, _code(settings[name])) for name in PROTOCOL]),
        "## The last step",
        _last_step(metrics),
        "## Recipe",
        _table(("setting", "value"), [(name, _code(value)) for name, value in settings.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _evaluated(evaluations: dict[str, dict[str, float]]) -> list[str]:
    """Return a table with a row per metric and a column per evaluation; [] without metrics."""
    names = dict.fromkeys(chain.from_iterable(evaluations.values()))
    rows = [(name, *(_number(found.get(name)) for found in evaluations.values())) for name in names]
    return [_table(("metric", *evaluations), rows)] if rows else []


def _last_step(metrics: dict[str, float]) -> str:
    rows = [(name, _number(metrics[name])) for name in SHOWN if name in metrics]
    if said := health(metrics):
        rows.append(("mismatch", _code(f"{said[0]}: {said[1]}")))
    return _table(("metric", ""), rows) if rows else "None was taken."


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload a checkpoint, without the files that only training needs, to a hub repository (private if new); return its
    address.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    made = api.create_repo(repo, private=True, exist_ok=True)
    api.upload_folder(repo_id=made.repo_id, folder_path=folder, ignore_patterns=list(LEFT_OUT))
    return str(made)


def check_hub(recipe: Recipe) -> None:
    """Raise ValueError if the run is to be uploaded and no user is logged in."""
    if recipe.push_to_hub is None:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError(f"push_to_hub={recipe.push_to_hub!r} needs a login: run `hf auth login`, or set HF_TOKEN")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _code(text: object) -> str:
    """Return text as Markdown code that is safe in a table: no markup or HTML in the text takes effect."""
    # A backtick would end the code, and a bar the table's cell.
    shown = escape_controls(str(text)).replace("`", "'").replace("|", "\\|").strip()
    return f"`{shown or ' '}`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *((_code(name), *cells) for name, *cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
