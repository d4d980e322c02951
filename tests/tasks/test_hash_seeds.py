"""Problems and digests are the same in every process, whatever its strings hash to."""

import os
import subprocess
import sys

import pytest

from dllm_rl.tasks import Countdown, Sudoku

PROGRAM = """
from dllm_rl.identity import digest_of_code, digest_of_value
from dllm_rl.tasks import Countdown, Sudoku
from dllm_rl.tasks.datasets import digest_of

def f(c, k=frozenset("abc")):
    return c in {"x", "y", "z"}, {"p": {1, 2}, "q": object}

print([p.prompt + p.solution for p in Countdown(size=30, seed=5, count=(3, 6), split="test")])
print([p.prompt for split in ("train", "test") for p in Sudoku(size=50, seed=5, split=split)])
print(digest_of([{"prompt": "a", "any": {"x", "y", "z"}, "by": object(), "board": {(0, 0): 1, None: [{"p", "q"}]}}]))
print(digest_of_code(f), digest_of_value({"abc", object, len}))
"""
PARTS = ["countdown", "sudoku", "rows", "code and values"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, set[str]]:
    """What each part prints under two values of PYTHONHASHSEED, which order each of these sets otherwise."""
    lines = []
    file = tmp_path_factory.mktemp("program") / "mine.py"  # code counts by the text of its file
    file.write_text(PROGRAM)
    for seed in ("0", "4242"):
        command = [sys.executable, str(file)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        lines.append(done.stdout.splitlines())
    return {part: set(found) for part, *found in zip(PARTS, *lines, strict=True)}


@pytest.mark.parametrize("part", PARTS)
def test_every_process_prints_the_same(printed, part) -> None:
    """Also the digest of rows with values that JSON lacks: sets, objects at an address, keys that are not text."""
    assert len(printed[part]) == 1


def test_and_this_process_makes_the_same_problems(printed) -> None:
    countdown = [p.prompt + p.solution for p in Countdown(size=30, seed=5, count=(3, 6), split="test")]
    sudoku = [p.prompt for split in ("train", "test") for p in Sudoku(size=50, seed=5, split=split)]
    assert (printed["countdown"], printed["sudoku"]) == ({f"{countdown}"}, {f"{sudoku}"})
