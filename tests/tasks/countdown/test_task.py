"""Countdown: the solver against enumeration, the generator, and the reward worked by hand."""

import re
from fractions import Fraction
from functools import cache
from itertools import combinations, product
from random import Random

import countdown_solver
import pytest
from countdown_solver import solve

from dllm_rl.tasks.base import Problem, Task
from dllm_rl.tasks.countdown import Countdown
from dllm_rl.tasks.countdown.expressions import evaluate
from dllm_rl.tasks.rows import hashed_split


def used(expression: str) -> list[int]:
    """The numbers of an expression, in order of size."""
    return sorted(map(int, re.findall("[0-9]+", expression)))


@cache
def enumerate_values(numbers: tuple[Fraction, ...], operators: str, minus: bool = False) -> frozenset[Fraction]:
    """Every value: join any two of the operands in any way until one is left. With `minus`, negate any on the way."""
    if len(numbers) == 1:
        return frozenset({numbers[0], -numbers[0]} if minus else {numbers[0]})
    values: set[Fraction] = set()
    for i, j in combinations(range(len(numbers)), 2):
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        joined: set[Fraction] = set()
        for x, y in product(*({n, -n} if minus else {n} for n in (numbers[i], numbers[j]))):
            if "+" in operators:
                joined.add(x + y)
            if "-" in operators:
                joined |= {x - y, y - x}
            if "*" in operators:
                joined.add(x * y)
            if "/" in operators:
                joined |= ({x / y} if y else set()) | ({y / x} if x else set())
        for value in joined:
            values |= enumerate_values(tuple(sorted((*rest, value))), operators, minus)
    return frozenset(values)


def targets(reachable: frozenset[Fraction], rng: Random) -> list[int]:
    """Some integers that can be reached, if any, and some that cannot."""
    within = sorted(int(value) for value in reachable if value.denominator == 1)
    without = [n for n in range(-5, 99) if n not in reachable]
    return rng.sample(within, min(8, len(within))) + rng.sample(without, min(8, len(without)))


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("tabulated", [1, 4])
@pytest.mark.parametrize(("count", "trials"), [(1, 2), (2, 6), (3, 8), (4, 2)])
@pytest.mark.parametrize("operators", ["+-*/", "-/", "+*"])
def test_solver_agrees_with_enumeration(monkeypatch, count: int, trials: int, operators: str, tabulated: int) -> None:
    """With tables of single numbers alone, everything is found by meeting in the middle."""
    monkeypatch.setattr(countdown_solver, "_TABULATED", tabulated)
    rng = Random(f"{count}{operators}")
    for _ in range(trials):
        numbers = [rng.randint(1, 12) for _ in range(count)]
        reachable = enumerate_values(tuple(map(Fraction, numbers)), operators)
        for target in [0, *targets(reachable, rng)]:
            found = solve(numbers, target, operators)
            assert (found is not None) == (Fraction(target) in reachable), (numbers, target)
            if found is not None:
                assert evaluate(found) == target and used(found) == sorted(numbers)
                assert not set(found) - set("0123456789()" + operators)


def test_a_zero_part_meets_whatever_is_left() -> None:
    """7-7 is 0, and so is its product or quotient with any other value but 0 / 0."""
    for operators in ("-*", "-/", "+-*/"):
        found = solve([7, 7, 5, 3, 2], 0, operators)
        assert evaluate(found) == 0 and used(found) == [2, 3, 5, 7, 7]
    assert solve([2, 2, 2, 2, 2], 0, "/") is None


def test_six_numbers() -> None:
    assert solve([1, 1, 1, 1, 1, 1], 100) is None  # the most is (1+1+1)*(1+1+1) = 9
    assert solve([1, 1, 1, 1, 1, 1], 9) is not None and solve([1, 1, 1, 1, 1, 1], 10) is None
    found = solve([75, 50, 2, 3, 8, 7], 812)
    assert found is None or evaluate(found) == 812
    assert evaluate(solve([97, 3, 5, 7, 11, 13], 0)) == 0


@pytest.mark.parametrize("numbers", [(1, 2, 3), (2, 2, 5), (7, 3, 1)])
def test_unary_minus_reaches_no_further_positive_target(numbers: tuple[int, ...]) -> None:
    fractions = tuple(map(Fraction, numbers))
    plain, signed = (enumerate_values(fractions, "+-*/", minus) for minus in (False, True))
    assert {value for value in plain if value > 0} == {value for value in signed if value > 0}


def test_solver_refuses_what_is_no_problem() -> None:
    for bad in ([], [0, 1], [1] * 7):
        with pytest.raises(ValueError, match="positive"):
            solve(bad, 3)
    with pytest.raises(ValueError, match="operators"):
        solve([1, 2], 3, "%")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"count": (3, 6)},
        {"count": 4, "operators": "*/"},
        {"operators": "+-"},
        {"max_number": 10, "max_target": 20, "split": "validation"},
        {"split": "test", "prompt_format": "text"},
    ],
)
def test_problems_are_solvable_and_as_asked(settings: dict) -> None:
    task = Countdown(size=20, seed=2, **settings)
    counts = set()
    for problem in task:
        numbers, target = problem.fields["numbers"], problem.fields["target"]
        counts.add(len(numbers))
        assert max(numbers) <= task.max_number and 1 <= target <= task.max_target
        assert hashed_split(repr(sorted(numbers))) == task.split
        assert solve(numbers, target, task.operators) is not None
        assert task.reward(problem, problem.solution).breakdown["accuracy"] == 1.0
        if task.prompt_format == "compact":
            assert len(problem.solution) == task.width
    assert counts == (set(range(3, 7)) if task.count == (3, 6) else {task.count})


def test_splits_share_no_set_of_numbers() -> None:
    seen = {
        split: {
            tuple(sorted(p.fields["numbers"])) for seed in (0, 1) for p in Countdown(split=split, size=200, seed=seed)
        }
        for split in ("train", "validation", "test")
    }
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_a_problem_depends_on_seed_split_and_index_only() -> None:
    """That it is the same in every process is in tasks/test_hash_seeds.py."""
    in_order = list(Countdown(size=30, seed=5, count=(3, 6), split="test"))
    task = Countdown(size=31, seed=5, count=(3, 6), split="test")
    assert [task[i] for i in reversed(range(30))][::-1] == in_order
    assert [p.prompt for p in Countdown(size=9)] != [p.prompt for p in Countdown(size=9, seed=1)]


def test_the_problems_themselves_are_pinned() -> None:
    """A change here changes what every stored result was measured on: `version` must change with it."""
    task = Countdown(size=2, count=4)
    assert [(p.prompt, p.solution) for p in task] == [
        ("62,47, 1,69>84=", "62+69/1-47     "),
        ("96,52,43,25>62=", "43+96-(52+25)  "),
    ]
    assert solve([10, 35, 29, 6], 11) == "10-6/(29-35)" and solve([23, 40, 19, 44], 46) == "44+19-(40-23)"


ASKED = Problem(prompt="", fields={"numbers": [3, 4, 5], "target": 17})


def test_stored_problems(tmp_path) -> None:
    path = tmp_path / "cd.jsonl"
    path.write_text('{"input": "30,100,93", "output": "23"}\n\n{"numbers": [1, 2], "target": 3}\n')
    task = Countdown(path=path, prompt_format="text")
    assert len(task) == 2 and [dict(p.fields) for p in task] == [
        {"numbers": [30, 100, 93], "target": 23},
        {"numbers": [1, 2], "target": 3},
    ]
    assert "30, 100, 93" in task[0].prompt[0]["content"] and "exactly 23" in task[0].prompt[0]["content"]
    assert task[0].solution is None
    path = tmp_path / "cd4.jsonl"
    path.write_text('{"input": "86,28,13,31,96", "output": "86+28=114,31-13=18,114-18=96"}\n')
    assert [dict(p.fields) for p in Countdown(path=path)] == [{"numbers": [86, 28, 13, 31], "target": 96}], "Dream's"
    path = tmp_path / "bad.jsonl"
    path.write_text('{"numbers": [1], "target": 1}\n{"input": "1,x", "output": "2"}\n')
    with pytest.raises(ValueError, match="line 2"):
        len(Countdown(path=path))


@pytest.mark.parametrize(
    "bad",
    [
        {"split": "dev"},
        {"count": 2},
        {"count": (5, 4)},
        {"operators": "+%"},
        {"max_number": 9},
        {"size": 0},
        {"reward_rule": "mine"},
        {"prompt_format": "{numbers} alone"},
    ],
)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(Exception, match=next(iter(bad)) if "prompt_format" not in bad else "target"):
        Countdown(**bad)


def test_the_task_protocol() -> None:
    assert isinstance(Countdown(), Task)
    with pytest.raises(IndexError):
        Countdown(size=3)[3]
