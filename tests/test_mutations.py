"""The changes of mutations.txt are changes of today's code, and name tests that are there."""

from pathlib import Path
from runpy import run_path

TESTS = Path(__file__).parent


def test_no_mutation_is_stale():
    entries = run_path(str(TESTS / "mutations.py"))["mutations"]()
    package = TESTS.parent / "dllm_rl"
    stale = [
        f"{path}: {old}"
        for path, old, _, _ in entries
        if not (package / path).exists() or (package / path).read_text().count(old) != 1
    ]
    missing = {name for *_, tests in entries for name in tests.split() if not (TESTS / name).exists()}
    assert len(entries) > 150 and not stale and not missing
