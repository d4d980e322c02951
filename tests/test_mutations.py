"""The changes of mutations.txt can be made in today's code, and name tests that are there."""

from pathlib import Path
from runpy import run_path

TESTS = Path(__file__).parent
MUTATIONS = run_path(str(TESTS / "mutations.py"))


def why_not(change) -> str:
    try:
        MUTATIONS["mutated"](TESTS.parent / "dllm_rl", change)
    except ValueError as error:
        return str(error)
    return ""


def test_no_mutation_is_stale():
    changes = MUTATIONS["mutations"]()
    stale = [f"mutations.txt:{change.line}: {why}" for change in changes if (why := why_not(change))]
    missing = {name for change in changes for name in change.tests.split() if not (TESTS / name).exists()}
    assert len(changes) > 150 and not missing and not stale, "\n".join(stale)
