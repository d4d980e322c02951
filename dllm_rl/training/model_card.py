"""The model card of a run's checkpoints, and the upload to the Hugging Face hub."""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dllm_rl.checkpoints.optimizer_shards import PATTERN
from dllm_rl.recipe import Recipe
from dllm_rl.records import describe_json
from dllm_rl.screen import escape_controls
from dllm_rl.training.prompts import HISTORY

OMITTED_SETTINGS = (
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "dry_run",
    "push_to_hub",
    "report_to",
)
SHOWN_METRICS = ("reward", "rollout_corr/k3_kl", "rollout_corr/ess", "grad_norm", "completions/mean_length")
PROTOCOL_SETTINGS = ("eval_task", "eval_sampler", "seed", "dtype")
# Only a resume needs these files.
NOT_UPLOADED = ("optimizer.pt", PATTERN, "state.json", "manifest.json", "rollouts/*", "*.state", HISTORY)


def card(recipe: Recipe, *, step: int, evaluations: dict[str, dict[str, float]], metrics: dict[str, float]) -> str:
    """Return the README.md of a checkpoint.

    Args:
        recipe: Settings of the run.
        step: Number of steps that the weights were trained for.
        evaluations: Held-out metrics of each evaluation, by its column title ("before RL" ...).
        metrics: Metrics of the last step.
    """
    stored = {name: value for name, value in recipe.settings().items() if name not in OMITTED_SETTINGS}
    settings = {name: value if isinstance(value, str) else describe_json(value) for name, value in stored.items()}
    front_matter: dict[str, Any] = {"library_name": "dllm_rl", "tags": ["reinforcement-learning", "grpo", "dllm_rl"]}
    if isinstance(recipe.model, str):
        if Path(recipe.model).exists():  # a folder on this machine: show only its name
            settings["model"] = Path(recipe.model).name
        else:
            front_matter["base_model"] = recipe.model
    sections = [
        # The front matter is YAML, and JSON values are valid YAML.
        "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in front_matter.items()), "---"]),
        f"# {_code(recipe.name)}, seed {recipe.seed}",
        f"{step} of {recipe.num_steps} steps of GRPO by dllm_rl, from {_code(settings['model'])}.",
        "## Held-out problems",
        *_evaluation_tables(evaluations),
        f"{len(recipe.eval_task)} problems of the task {_code(recipe.eval_task.name)}, version "
        f"{_code(recipe.eval_task.version)}, as the task itself grades them.",
        _table(("protocol", ""), [(name, _code(settings[name])) for name in PROTOCOL_SETTINGS]),
        "## The last step",
        _last_step(metrics),
        "## Recipe",
        _table(("setting", "value"), [(name, _code(value)) for name, value in settings.items()]),
    ]
    return "\n\n".join(sections) + "\n"


def _evaluation_tables(evaluations: dict[str, dict[str, float]]) -> list[str]:
    """Return a table with a row per metric and a column per evaluation; [] without metrics."""
    names = dict.fromkeys(chain.from_iterable(evaluations.values()))
    rows = [(name, *(_number(metrics.get(name)) for metrics in evaluations.values())) for name in names]
    return [_table(("metric", *evaluations), rows)] if rows else []


def _last_step(metrics: dict[str, float]) -> str:
    rows = [(name, _number(metrics[name])) for name in SHOWN_METRICS if name in metrics]
    return _table(("metric", ""), rows) if rows else "None was taken."


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload a checkpoint, without the files that only a resume needs, to a hub repository (private if new); return the
    repository's address.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repo_url = api.create_repo(repo, private=True, exist_ok=True)
    api.upload_folder(repo_id=repo_url.repo_id, folder_path=folder, ignore_patterns=list(NOT_UPLOADED))
    return str(repo_url)


def check_hub(push_to_hub: str | None) -> None:
    """Raise ValueError if the run is to be uploaded and no user is logged in."""
    if push_to_hub is None:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError(f"push_to_hub={push_to_hub!r} needs a login: run `hf auth login`, or set HF_TOKEN")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _code(text: object) -> str:
    """Format text as inline Markdown code that is safe in a table: markup and HTML in the text have no effect."""
    # A backtick would end the code, and a bar the table's cell.
    escaped = escape_controls(str(text)).replace("`", "'").replace("|", "\\|").strip()
    return f"`{escaped or ' '}`"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *((_code(name), *cells) for name, *cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
