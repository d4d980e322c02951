"""What a number was computed with: the versions of packages, and the commit of this library."""

import json
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

PACKAGE = Path(__file__).parent


def versions() -> dict[str, str | None]:
    """Versions of dllm_rl and of the packages that its numbers depend on (None: not installed), and its commit."""
    found: dict[str, str | None] = {}
    for package in ("dllm_rl", "torch", "transformers", "accelerate", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"dllm_rl_commit": commit(PACKAGE)}


@cache  # of the code that was imported: a checkout may change while a run lasts
def commit(package: Path) -> str | None:
    """The commit of a package's code, or None if nothing knows it (a wheel, no git program).

    In a git checkout, whose top level holds the package, it is that of HEAD, with "+" behind it if tracked files of the
    package differ. Installed from a git address, it is the one that pip wrote down.
    """
    if (package.parent / ".git").exists():
        head = _git(package, "rev-parse", "HEAD")
        return head and head + ("+" if _git(package, "status", "--porcelain", "--untracked-files=no", ".") else "")
    try:
        origin = json.loads(distribution(package.name).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return None
    found = origin.get("vcs_info", {}).get("commit_id")
    return found if isinstance(found, str) else None


def _git(folder: Path, *words: str) -> str | None:
    """What git prints, or None: there is no such program, or it refuses the folder (it is somebody else's)."""
    # Without optional locks `status` leaves the index as it is: the user may be working in this checkout.
    try:
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
