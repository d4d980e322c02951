"""The versions of the software that computed a number: packages, and the commit of this library."""

import json
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

PACKAGE = Path(__file__).parent


@cache  # parsing a package's metadata takes milliseconds, and every checkpoint stores the versions
def versions() -> dict[str, str | None]:
    """Return the versions of dllm_rl and of packages that affect its results (None: not installed), and its commit."""
    found: dict[str, str | None] = {}
    for package in ("dllm_rl", "torch", "transformers", "accelerate", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"dllm_rl_commit": commit(PACKAGE)}


@cache  # the commit of the imported code: a checkout may change during a run
def commit(package: Path) -> str | None:
    """Return the commit of a package's code, or None if it cannot be determined (a wheel, no git program).

    In a git checkout whose top level contains the package, it is HEAD, followed by "+" if tracked files of the package
    differ. For an installation from a git address, it is the commit that pip recorded.
    """
    if (package.parent / ".git").exists():
        head = _git(package, "rev-parse", "HEAD")
        return head and head + ("+" if _git(package, "status", "--porcelain", "--untracked-files=no", ".") else "")
    try:
        origin = json.loads(distribution(package.name).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return None
    commit_id = origin.get("vcs_info", {}).get("commit_id")
    return commit_id if isinstance(commit_id, str) else None


def _git(folder: Path, *words: str) -> str | None:
    """Return git's output, or None if git is missing or refuses the folder (another user owns it)."""
    try:
        # Without optional locks `status` does not write to the index: the user may be working in this checkout.
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
