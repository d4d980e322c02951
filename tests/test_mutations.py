"""The runner of mutation tests on a toy package; the real list is run by hand (python -m tests.mutations)."""

import os
from pathlib import Path

import pytest

from tests.mutations.__main__ import everything
from tests.mutations.record import Mutation, mutations
from tests.mutations.runner import ROOT, Outcome, applicable, apply, run_all, score

SOURCE = "def clamp(x):\n    return min(x, 1)\n"
TEST = "from toy import clamp\n\n\ndef test_clamp():\n    assert clamp(2) == 1\n"


def mutation(old: str, new: str, **more: str) -> Mutation:
    return Mutation("toy.py", old, new, ("test_toy.py",), **more)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    root = tmp_path / "toy"
    (root / "tests/mutations").mkdir(parents=True)
    for file in (ROOT / "tests/mutations").glob("*.py"):
        (root / "tests/mutations" / file.name).write_text(file.read_text())
    (root / "toy.py").write_text(SOURCE)
    (root / "test_toy.py").write_text(TEST)
    return root


def plain(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def test_a_mutation_is_written_only_where_its_text_stands_once(tmp_path):
    (tmp_path / "toy.py").write_text(SOURCE)
    assert not apply(mutation("max(x, 1)", "x"), tmp_path)
    assert not apply(mutation("x", "y"), tmp_path)
    assert not apply(mutation("min", "max"), tmp_path), "its test is not there"
    (tmp_path / "test_toy.py").write_text(TEST)
    assert (tmp_path / "toy.py").read_text() == SOURCE
    assert apply(mutation("min", "max"), tmp_path)
    assert (tmp_path / "toy.py").read_text() == "def clamp(x):\n    return max(x, 1)\n"


@pytest.mark.slow
def test_the_runner_tells_killed_survived_not_found_and_broken_apart(toy):
    chosen = [
        mutation("min", "max"),
        mutation("min(x, 1)", "min(1, x)", equivalent="the smaller of two numbers has no order"),
        mutation("min(x, 2)", "x"),
        mutation("return min", "return ("),
    ]
    seen: list[Outcome] = []
    outcomes = run_all(chosen, root=toy, report=seen.append, environment=plain)
    assert [outcome.verdict for outcome in outcomes] == ["killed", "survived", "not found", "broken"]
    assert seen == outcomes
    assert (toy / "toy.py").read_text() == SOURCE, "the real tree must not be touched"
    assert score(outcomes) == (
        "4 mutations: 1 killed, 1 survived, 1 not found, 1 broken; 25.0 % killed, 1 survivors explained"
    )


@pytest.mark.slow
def test_a_test_that_fails_anyway_proves_nothing(toy):
    (toy / "test_toy.py").write_text(TEST.replace("== 1", "== 3"))
    with pytest.raises(RuntimeError, match="fail without a mutation"):
        run_all([mutation("min", "max")], root=toy, environment=plain)


def test_a_short_list_becomes_records():
    made = mutations("a.py", "test_a.py test_b.py", ("1", "2"), ("3", "4", "test_c.py"), ("5", "6", "", "why"))
    assert [(m.file, m.old, m.new) for m in made] == [
        ("dllm_rl/a.py", "1", "2"),
        ("dllm_rl/a.py", "3", "4"),
        ("dllm_rl/a.py", "5", "6"),
    ]
    assert [m.tests for m in made] == [
        ("tests/test_a.py", "tests/test_b.py"),
        ("tests/test_c.py",),
        ("tests/test_a.py", "tests/test_b.py"),
    ]
    assert [m.equivalent for m in made] == ["", "", "why"]


def test_the_list_is_long_and_without_repetition():
    found = everything()
    assert len({(m.file, m.old, m.new) for m in found}) == len(found) >= 150


def test_every_mutation_of_the_list_can_be_applied():
    gone = [mutation.name for mutation in everything() if not applicable(mutation, ROOT)]
    assert not gone, "the code has moved on; write these anew: " + "\n".join(gone)
