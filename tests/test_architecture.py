"""The files that docs/ARCHITECTURE.md names are there."""

import re
from pathlib import Path

import dllm_rl

PACKAGE = Path(dllm_rl.__file__).parent


def test_the_named_files_are_there():
    text = (PACKAGE.parent / "docs" / "ARCHITECTURE.md").read_text()
    names = re.findall(r"`([\w/]+\.py)`", text)
    roots = (PACKAGE, PACKAGE.parent)
    assert len(names) > 30 and [name for name in names if not any((root / name).is_file() for root in roots)] == []
