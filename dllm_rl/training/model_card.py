"""The model card of a run's checkpoints, and the upload to the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from dllm_rl.checkpoints.optimizer_shards import PATTERN
from dllm_rl.monitoring.health import health
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls

OWN = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run", "push_to_hub", "report_to")
PROTOCOL = ("eval_task", "eval_sampler", "seed", "dtype")
LEFT_OUT = ("optimizer.pt", PATTERN, "state.json", "manifest.json")  # what training goes on from is not uploaded


def card(recipe: Recipe, *, step: int, evaluations: dict[str, dict[str, float]], metrics: dict[str, float]) -> str:
    """README.md of a checkpoint. evaluations: held-out metrics by when they were taken; metrics: of the last step."""
    settings = {name: value for name, value in recipe.settings().items() if name not in OWN}
    base = recipe.model if isinstance(recipe.model, str) else None
    if base is not None and Path(base).exists():  # a folder of this machine
        settings["model"], base = Path(base).name, None
    front = {"library_name": "dllm_rl", "tags": ["reinforcement-learning", "grpo", "dllm_rl"]}
    front |= {"base_model": base} if base else {}
    names = list(dict.fromkeys(name for found in evaluations.values() for name in found))
    rows = [(name, *(_number(found.get(name)) for found in evaluations.values())) for name in names]
    said = health(metrics)
    shown = ("reward", "rollout_corr/k3_kl", "rollout_corr/ess", "grad_norm", "completions/mean_length")
    last = [(name, _number(metrics[name])) for name in shown if name in metrics]
    last += [("mismatch", _code(f"{said[0]}: {said[1]}"))] if said else []
    parts = [
        "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in front.items()), "---"]),  # JSON is YAML
        f"# {_code(recipe.name)}, seed {recipe.seed}",
        f"{step} of {recipe.num_steps} steps of GRPO by dllm_rl, from {_code(settings['model'])}.",
        "## Held-out problems",
        *([_table(("metric", *evaluations), rows)] if names else []),
        f"{len(recipe.eval_task)} problems of the task {_code(recipe.eval_task.name)}, version "
        f"{_code(recipe.eval_task.version)}, as the task itself grades them.",
        _table(("protocol", ""), [(name, _code(settings[name])) for name in PROTOCOL]),
        "## The last step",
        _table(("metric", ""), last) if last else "None was taken.",
        "## Recipe",
        _table(("setting", "value"), [(name, _code(value)) for name, value in settings.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload a checkpoint, less what only training needs, to a hub repository (private if new); returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    made = api.create_repo(repo, private=True, exist_ok=True)
    api.upload_folder(repo_id=made.repo_id, folder_path=folder, ignore_patterns=list(LEFT_OUT))
    return str(made)


def check_hub(recipe: Recipe) -> None:
    """Raise ValueError if a run is to be uploaded and nobody is logged in."""
    if recipe.push_to_hub is None:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError(f"push_to_hub={recipe.push_to_hub!r} needs a login: run `hf auth login`, or set HF_TOKEN")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _code(text: object) -> str:
    """Text as Markdown code, also in a table: no markup or HTML in the text is obeyed."""
    shown = escape_controls(str(text)).replace("`", "'").replace("|", "\\|").strip()
    return f"`{shown or ' '}`"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *((_code(name), *cells) for name, *cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
