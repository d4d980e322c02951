"""The upload of a run's last checkpoint to the Hugging Face hub."""

from pathlib import Path

from dllm_rl.checkpoints.optimizer_shards import PATTERN
from dllm_rl.training.prompts import HISTORY

# Only a resume needs these files.
NOT_UPLOADED = ("optimizer.pt", PATTERN, "state.json", "manifest.json", "rollouts/*", "*.state", HISTORY)


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
