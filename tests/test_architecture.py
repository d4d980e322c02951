"""docs/ARCHITECTURE.md says which files go when a feature is removed: they are there."""

import re
from pathlib import Path

import dllm_rl

PACKAGE = Path(dllm_rl.__file__).parent


def test_the_files_of_the_table_are_there():
    text = (PACKAGE.parent / "docs" / "ARCHITECTURE.md").read_text()
    for line in text[text.index("| feature |") :].split("\n\n")[0].splitlines()[2:]:
        _, its_files, _, others = line.strip("|").split("|")
        names = re.findall(r"`([\w/]+\.py)`", its_files + others)
        assert names and [name for name in names if not (PACKAGE / name).is_file()] == []
