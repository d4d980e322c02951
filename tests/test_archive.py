"""Archived studies: each row of the table names a commit at which its page stands."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results-and-limits.md"


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def archived(text):
    """The (commit, page) pairs of the table."""
    section = text.split("### Archived studies\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    return [re.search(r"\| `(\w+)`, `(\w+\.md)` \|$", row).groups() for row in rows]


def test_each_archived_study_stands_at_its_commit():
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("needs a git checkout with its history")
    pairs = archived(PAGE.read_text())
    assert len(pairs) > 10
    missing = [pair for pair in pairs if git("cat-file", "-e", "{}:recipes/studies/{}".format(*pair)).returncode]
    assert not missing
