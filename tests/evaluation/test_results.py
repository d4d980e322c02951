"""Means, intervals and differences by hand; stored completions graded again, and malformed rows by their line."""

import json

import pytest
import torch
from refusals import refuses

from dllm_rl.evaluation.grading import grade_file
from dllm_rl.evaluation.intervals import wilson
from dllm_rl.evaluation.results import (
    WHY_NULL,
    Evaluation,
    GradedAnswer,
    best_of,
    compared_with,
    interval,
    metric_of,
    paired_differences,
    varying,
    with_bounds,
)
from dllm_rl.tasks import Problem, Reward, Sudoku
from dllm_rl.tasks.protocols import PROTOCOLS, under_protocol

GRID, PUZZLE = "1234341221434321", "1234341200430021"
EASY = "1234341221434320"  # one blank


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_countdown(tmp_path) -> None:
    texts = ["\\boxed{3*4+5}", "<answer>3*4+5 = 17</answer>", "\\boxed{3+4+5}", "no"]
    rows = [
        {"completion": text, "numbers": [3, 4, 5], "target": 17, "doc_id": place} for place, text in enumerate(texts)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    graded = grade_file(path, task="countdown", protocol="d1")
    assert graded == {
        "task": "countdown",
        "version": "4",
        "protocol": "d1",
        "n": 4,
        "problems": 4,
        "parsed": 0.75,
        "parsed_interval": list(wilson(3, 4)),
        "accuracy": 0.5,
        "accuracy_interval": list(wilson(2, 4)),
        "undecided": 0.0,
        "undecided_interval": list(wilson(0, 4)),
    }
    assert grade_file(path, task="countdown")["accuracy"] == 0.25  # strict: no "= 17" behind
    rows[3]["completion"] = "\\boxed{3**4**5**99}"
    graded = grade_file(write(tmp_path / "a.jsonl", rows), task="countdown", protocol="d1")
    assert (graded["accuracy"], graded["undecided"]) == (0.5, 0.25)
    json.dumps(graded)


def test_sudoku_cells_are_counted_over_the_set(tmp_path) -> None:
    rows = [
        {"completion": GRID, "puzzle": EASY, "solution": GRID},  # 1 of 1 empty cells
        {"completion": GRID[:8] + "3" + GRID[9:], "puzzle": PUZZLE, "solution": GRID},  # 3 of 4
        {"completion": "?", "puzzle": PUZZLE.replace("0", "."), "solution": GRID},  # 0 of 4
        {"completion": "", "puzzle": GRID, "solution": GRID},  # no empty cell
    ]
    graded = grade_file(write(tmp_path / "a.jsonl", rows), task="sudoku")
    assert (graded["n"], graded["solve_rate"], graded["parsed"]) == (4, 0.25, 0.5)
    assert graded["cell_accuracy"] == 4 / 9
    low, high = graded["cell_accuracy_interval"]
    assert 0.0 <= low < 4 / 9 < high <= 1.0
    assert grade_file(tmp_path / "a.jsonl", task="sudoku", protocol="d1")["cell_accuracy"] == 4 / 9


def test_sudoku_any_valid_completion_is_solved_but_d1_wants_the_reference(tmp_path) -> None:
    rows = [{"completion": "1234341223414123", "puzzle": "1234341200000000", "solution": GRID}]
    path = write(tmp_path / "a.jsonl", rows)
    strict, d1 = (grade_file(path, task="sudoku", protocol=name) for name in ("strict", "d1"))
    assert (strict["solve_rate"], strict["cell_accuracy"]) == (1.0, 1.0)
    assert (d1["solve_rate"], d1["cell_accuracy"]) == (1.0, 0.5)
    with pytest.raises(
        ValueError, match=r"line 1: puzzle=.* has \d+ solutions; protocol spg needs puzzles with exactly one solution"
    ):
        grade_file(path, task="sudoku", protocol="spg")


def test_mathematics(tmp_path) -> None:
    rows = [{"completion": "\\boxed{42}", "answer": answer} for answer in ("so\n#### 42", 42, 42.0, "41")]
    path = write(tmp_path / "a.jsonl", rows)
    for protocol in ("strict", "d1", "spg", "espo"):
        assert grade_file(path, task="gsm8k", protocol=protocol)["accuracy"] == 0.75
    rows = [{"completion": "\\boxed{\\frac12}", "answer": answer} for answer in ("\\frac{1}{2}", "x", 2)]
    path = write(tmp_path / "b.jsonl", rows)
    for protocol in ("strict", "d1", "spg", "math-verify", "espo"):
        assert grade_file(path, task="math500", protocol=protocol)["accuracy"] == pytest.approx(1 / 3)
    texts = ("1+1", "2" + "+0" * 200, "3", "2.0")  # the second is too long to be compared
    rows = [{"completion": f"\\boxed{{{text}}}", "answer": "2"} for text in texts]
    found = grade_file(write(tmp_path / "c.jsonl", rows), task="math500", protocol="math-verify")
    assert (found["accuracy"], found["undecided"], found["parsed"]) == (0.5, 0.25, 1.0)


@pytest.mark.parametrize("task", ["gsm8k", "math500"])
def test_a_null_answer_is_graded_wrong_and_counted(tmp_path, task: str) -> None:
    """As d1 counts them: of all rows, they cannot be right."""
    rows = [{"completion": "\\boxed{42}", "answer": answer} for answer in ("42", None, "42", None, "41")]
    path = write(tmp_path / "a.jsonl", rows)
    for protocol in PROTOCOLS[task]:
        found = grade_file(path, task=task, protocol=protocol)
        assert (found["n"], found["no_answer"], found["accuracy"], found["parsed"]) == (5, 2, 0.4, 1.0)
    assert "no_answer" not in grade_file(write(tmp_path / "b.jsonl", rows[:1]), task=task)


GOOD = {
    "sudoku": {"completion": GRID, "puzzle": PUZZLE, "solution": GRID},
    "countdown": {"completion": "1+2", "numbers": [1, 2], "target": 3},
    "gsm8k": {"completion": "1", "answer": "1"},
    "math500": {"completion": "1", "answer": "1"},
    "code": {"completion": "1", "prelude": "", "entry_point": "f", "arguments": 1, "tests": "assert f(1)"},
}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("sudoku", {"completion": None}, "completion must be text or a list of texts, not NoneType"),
        ("gsm8k", {"completion": []}, "completion must be text or a list of texts, not empty"),
        ("gsm8k", {"completion": ["1", 2, None]}, "completion must be text or a list of texts, not NoneType or int"),
        ("sudoku", {"puzzle": PUZZLE[1:]}, "must be 16 characters 0-4 or 81"),
        ("sudoku", {"puzzle": "5" + PUZZLE[1:]}, "must be 16 characters 0-4"),
        ("sudoku", {"puzzle": "11" + "0" * 14}, "has no solution"),
        ("sudoku", {"puzzle": 1234}, "puzzle must be text, not int"),
        ("sudoku", {"solution": GRID[1:] + "1"}, "is not a solution of puzzle"),
        ("countdown", {"numbers": "1 2"}, "numbers='1 2' must be a list of integers"),
        ("countdown", {"numbers": "1,x"}, "'x' of numbers='1,x', target=3 is not an integer"),
        ("countdown", {"numbers": "1,2", "target": True}, "'True' of numbers='1,2', target=True is not an integer"),
        ("countdown", {"numbers": [1, 2.0]}, "must be a list of integers"),
        ("countdown", {"numbers": []}, "must be a list of integers"),
        ("countdown", {"target": True}, "target=True must be an integer"),
        ("countdown", {"target": "3"}, "target='3' must be an integer"),
        ("gsm8k", {"answer": "many"}, "answer='many' is not a number"),
        ("gsm8k", {"answer": [1]}, "must be a number or a text"),
        ("code", {"arguments": True}, "arguments=True must be an integer"),
        ("code", {"tests": ["assert f(1)"]}, "tests must be text, not list"),
        ("code", {"tests": "A = 1\n\ndef check(f):\n    assert f(1)"}, "tests have no assert and no call outside"),
        ("math500", {"answer": " "}, "must be a number or a text that is not empty"),
    ],
)
def test_a_malformed_row_is_refused_by_its_line(tmp_path, task: str, change: dict, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD[task], GOOD[task] | change, GOOD[task]])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: ") as caught:
        grade_file(path, task=task)
    assert message in str(caught.value)


@pytest.mark.filterwarnings("always")
def test_tests_with_an_unknown_escape_are_read_without_a_warning(tmp_path, recwarn) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD["code"] | {"tests": r'assert f("\d")'}])
    assert grade_file(path, task="code")["n"] == 1
    assert not recwarn.list


@pytest.mark.parametrize("task", GOOD)
def test_a_missing_field_is_named(tmp_path, task: str) -> None:
    for name in GOOD[task]:
        if (task, name) == ("sudoku", "solution"):
            continue
        row = {key: value for key, value in GOOD[task].items() if key != name}
        with pytest.raises(ValueError, match=f"line 1: no field '{name}'"):
            grade_file(write(tmp_path / "a.jsonl", [row]), task=task)


def test_bad_files(tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    refuses("has no rows", lambda: grade_file(tmp_path / "empty.jsonl", task="gsm8k"))
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD["gsm8k"]) + "\n\n{broken\n")
    refuses("line 3: not JSON", lambda: grade_file(tmp_path / "a.jsonl", task="gsm8k"))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    refuses("line 1: not JSON", lambda: grade_file(tmp_path / "deep.jsonl", task="gsm8k"))
    (tmp_path / "huge.jsonl").write_text('{"completion": "", "answer": 1' + "0" * 5000 + "}")
    refuses("line 1: ", lambda: grade_file(tmp_path / "huge.jsonl", task="gsm8k"))
    refuses(r"must be a \.jsonl file", lambda: grade_file(tmp_path / "a.csv", task="gsm8k"))
    nine = {"completion": "", "puzzle": "0" * 81, "solution": "1" * 81}
    with pytest.raises(ValueError, match="protocol d1 is for 4x4"):
        grade_file(write(tmp_path / "nine.jsonl", [nine]), task="sudoku", protocol="d1")


def test_a_line_separator_of_unicode_does_not_end_a_row(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"completion": "<answer>1</answer>\u2028", "answer": "1"}\r\n', encoding="utf-8")
    assert grade_file(tmp_path / "a.jsonl", task="gsm8k")["accuracy"] == 1.0


def test_cell_accuracy_is_one_number_under_every_reward() -> None:
    """3 of 4 empty cells and 1 of 1: 4 of 5 of the set, where the mean of the puzzles' shares is 7/8."""
    rows = [(PUZZLE, GRID[:8] + "3" + GRID[9:]), (EASY, GRID)]
    problems = [Problem("", {"puzzle": puzzle, "solution": GRID}) for puzzle, _ in rows]
    tasks = [
        Sudoku(),
        Sudoku(reward_rule="d1", prompt_format="text"),
        *(under_protocol(Sudoku(), name) for name in ("strict", "d1")),
    ]
    for task in tasks:
        answers = [
            GradedAnswer(i, 0, task.reward(problem, f"<answer>{cells}</answer>" if task is tasks[1] else cells))
            for i, (problem, (_, cells)) in enumerate(zip(problems, rows, strict=True))
        ]
        found = Evaluation(tuple(answers), {})
        assert found.means["cell_accuracy"] == found.summary["cell_accuracy"] == 4 / 5
        assert not {"correct_cells", "empty_cells"} & set(found.summary)


def graded(*accuracies):
    """An evaluation of a problem for each accuracy; None: the problem lacks the metric."""
    rewards = [Reward(0.0, True, {} if value is None else {"accuracy": value}) for value in accuracies]
    return Evaluation(tuple(GradedAnswer(i, 0, reward) for i, reward in enumerate(rewards)), {})


def test_cells_are_no_trials_even_where_each_puzzle_is_all_or_nothing():
    """Four puzzles of eight cells, all right: whatever is drawn again has a mean of 1. Wilson's is of trials."""
    assert interval("cell_accuracy", [8.0] * 4, [8.0] * 4) is None


def samples_of(*problems, metric="accuracy"):
    """An evaluation with samples of these scores for each problem."""
    return Evaluation(
        tuple(
            GradedAnswer(problem, sample, Reward(float(score), True, {metric: float(score)}, str(score)))
            for problem, scores in enumerate(problems)
            for sample, score in enumerate(scores)
        ),
        {},
    )


@pytest.mark.parametrize(
    ("evaluation", "name"),
    [
        (samples_of([1, 0, 1, 0, 1, 0, 1, 1]), "accuracy"),
        (samples_of([1, 0], [0, 1], [1, 0]), "accuracy"),
        (samples_of([0], [0], [0], [0], metric="solved"), "reward"),
        (samples_of([2.5], [2.5]), "reward"),
        (samples_of([1, 0, 0, 0]), "pass@2"),
        (samples_of([1, 0, 0, 0], [0, 0, 1, 0]), "pass@2"),
    ],
)
def test_numbers_without_spread_have_no_interval_and_the_reason(evaluation, name):
    found = evaluation.summary
    assert found[f"{name}_interval"] is None and found["why_null"] == WHY_NULL
    json.loads(json.dumps(found, allow_nan=False))


def test_one_problem_of_0_or_1_has_wilson_s_interval():
    """One trial: the two p with |1 - p| = z sqrt(p (1 - p)) are 1 / (1 + z^2) and 1."""
    found = samples_of([1, 1, 1]).summary
    assert found["accuracy_interval"] == found["pass@3_interval"] == [pytest.approx(1 / (1 + 1.959964**2)), 1.0]
    found = samples_of([1, 0, 0]).majority([1, 3])
    assert found["maj@1_interval"] is None and found["why_null"] == WHY_NULL
    assert found["maj@3_interval"] == [0.0, pytest.approx(1 - 1 / (1 + 1.959964**2))]
    assert "why_null" not in samples_of([1, 0], [1, 1]).majority([1])


def test_a_difference_without_spread_has_no_interval_and_the_reason():
    for after, before, expected in (
        (samples_of([1, 0, 1, 0]), samples_of([0, 0, 1, 0]), 0.25),  # one problem
        (samples_of([1], [0], [1]), samples_of([1], [0], [1]), 0.0),  # equal models
        (samples_of([1], [1], [1]), samples_of([0], [0], [0]), 1.0),
    ):
        found = compared_with("before", after, before)
        assert found["difference"]["accuracy"] == [expected, None, None] and found["why_null"] == WHY_NULL
    # `parsed` is equal on both problems; `accuracy` is not.
    found = compared_with("before", samples_of([1], [0]), samples_of([0], [0]))
    assert found["difference"]["accuracy"] == [0.5, 0.0, 1.0] and found["difference"]["parsed"] == [0.0, None, None]


def test_a_number_without_an_interval_is_shown_as_such():
    assert with_bounds(0.5, [0.25, 0.75]) == "0.500 [0.250, 0.750]"
    assert with_bounds(0.5, None) == "0.500 [no interval]"
    assert with_bounds(0.5, [None, None], sign="+", separator="\n") == "+0.500\n[no interval]"
    assert with_bounds(-0.5, [-0.75, 0.25], sign="+") == "-0.500 [-0.750, +0.250]"


def test_a_difference_is_of_problems_that_both_have():
    """The first problem's difference is 1; the second has no accuracy before, the third none now."""
    found = paired_differences(graded(1.0, 0.0, None), graded(0.0, None, 1.0))
    assert found["accuracy"] == [1.0, None, None]


def test_each_side_of_a_difference_has_its_own_number_of_completions():
    """One completion of each of three problems, all right; before, two of each and one of them right: 1 - 1/2."""
    now = graded(1.0, 1.0, 1.0)
    before = [Reward(0.0, True, {"accuracy": float(sample)}) for _ in range(3) for sample in range(2)]
    halves = Evaluation(tuple(GradedAnswer(*divmod(place, 2), reward) for place, reward in enumerate(before)), {})
    assert paired_differences(now, halves)["accuracy"] == [0.5, None, None]
    assert paired_differences(halves, now)["accuracy"] == [-0.5, None, None]


def test_the_interval_of_a_difference_divides_each_side_by_its_own_number_of_completions():
    """Before, each problem has two completions, which agree: the interval is that of the means of the problems."""
    now, before = (1.0, 1.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0)
    twice = [Reward(value, True, {"accuracy": value}) for value in before for _ in range(2)]
    doubled = Evaluation(tuple(GradedAnswer(*divmod(place, 2), reward) for place, reward in enumerate(twice)), {})
    found = paired_differences(graded(*now), doubled)["accuracy"]
    assert found == paired_differences(graded(*now), graded(*before))["accuracy"] and None not in found


def test_the_best_is_named_with_how_many_it_is_the_best_of_and_the_last():
    found = best_of([(0.5, "step 60"), (0.75, "step 120"), (0.625, "step 180")], "solve rate")
    assert found == (
        "best solve rate: 0.750 (step 120), the highest of 3, which flatters it; the last: 0.625 (step 180)"
    )


def voted(*votes: str) -> tuple:
    """Answers to problem 0, the first half, and problem 1; R: right, -: no answer, else the answer's spelling."""
    graded = []
    for place, vote in enumerate(votes):
        reward = Reward(0.0, vote != "-", {"accuracy": float(vote == "R")}, vote.replace("-", ""))
        graded.append(GradedAnswer(*divmod(place, len(votes) // 2), reward))
    return Evaluation(tuple(graded), {})


def test_majority_counts_equal_answers_of_each_problem() -> None:
    """R R x -, and x x R y. Of 1: 1/2 and 1/4. Of 4: R wins the first and loses the second."""
    found = voted("R", "R", "x", "-", "x", "x", "R", "y").majority([1, 4])
    assert (found["maj@1"], found["maj@4"]) == (0.375, 0.5)
    assert found["maj@4_interval"] == list(wilson(1, 2)) and found["maj@1_interval"] == [0.25, 0.5]
    # Three wrong answers outvote one right one only if they are equal.
    assert [voted("R", "x", "x", "x", *more).majority([4])["maj@4"] for more in ("Rxyz", "Rxxy")] == [0.125, 0.0]
    assert voted("-", "-", "-", "-").majority([2]) == {"maj@2": 0.0, "maj@2_interval": list(wilson(0, 2))}
    # Two completions without an answer do not outvote a right one.
    assert voted("R", "-", "-", "R", "-", "-").majority([3])["maj@3"] == 1.0
    assert voted("R", "-").majority([]) == {}


def test_majority_needs_answers_and_an_accuracy() -> None:
    for reward in (Reward(0.0, True, {"accuracy": 0.0}), Reward(0.0, True, {}, "x")):
        with pytest.raises(ValueError, match="needs a grader that gives the answers that it compares, and an accuracy"):
            Evaluation((GradedAnswer(0, 0, reward),), {}).majority([1])


@pytest.mark.parametrize(
    ("values", "right"),
    [((2.0, 2.0, 1.0), 1), ((1.0, -1.0, -1.0), 1), ((0.5, 0.5, 0.5), 0), ((1, None, 0.25), 1), ((3.0, 1.0, True), 2)],
)
def test_a_sample_is_right_if_its_accuracy_is_1(values, right) -> None:
    """A sample without an accuracy does not count, as in the mean."""
    breakdowns = [{} if value is None else {"accuracy": value} for value in values]
    graded = (Reward(0.0, True, breakdown, "x") for breakdown in breakdowns)
    evaluation = Evaluation(tuple(GradedAnswer(0, sample, reward) for sample, reward in enumerate(graded)), {})
    for found, name in ((evaluation.summary, "pass@1"), (evaluation.majority([1]), "maj@1")):
        assert found[name] == pytest.approx(right / (3 - values.count(None)))


def test_pass_at_k_is_over_the_samples_that_have_an_accuracy() -> None:
    """Of problem 0 the two samples with an accuracy are right, of problem 1 one of three; pass@1 is their mean."""
    samples = {0: [1.0, None, 1.0, None], 1: [0.0, 1.0, 0.0, None]}
    graded = [
        GradedAnswer(
            problem, sample, Reward(0.5, True, {"short": 0.5} | ({} if value is None else {"accuracy": value}))
        )
        for problem, values in samples.items()
        for sample, value in enumerate(values)
    ]
    found = Evaluation(tuple(graded), {}).summary
    assert found["pass@1"] == pytest.approx((1 + 1 / 3) / 2) and found["pass@2"] == pytest.approx((1 + 2 / 3) / 2)
    assert "pass@3" not in found and "pass@4" not in found


def test_equal_rewards_are_equal_whatever_their_type() -> None:
    graded = [GradedAnswer(0, sample, Reward(torch.tensor(1.0), True, {})) for sample in range(4)]
    assert Evaluation(tuple(graded), {}).summary["frac_reward_zero_std"] == 1.0


def test_a_majority_is_over_the_problems_that_have_enough_samples() -> None:
    rewards = {0: [Reward(1.0, True, {"accuracy": 1.0}, "R")] * 4, 1: [Reward(0.0, True, {"accuracy": 0.0}, "W")] * 3}
    rewards[1].append(Reward(None, False, {}, "W"))
    graded = [GradedAnswer(problem, i, each) for problem, row in rewards.items() for i, each in enumerate(row)]
    evaluation = Evaluation(tuple(graded), {})
    assert evaluation.majority([3])["maj@3"] == 0.5 and evaluation.majority([4])["maj@4"] == 1.0
    refuses("maj@5 needs 5 samples of a problem with an accuracy; give more samples", lambda: evaluation.majority([5]))


def test_settings_that_vary():
    first = {"diffusion_steps": 2, "model": "m", "accuracy": 0.5}
    assert varying([first, first | {"diffusion_steps": 4}]) == ["diffusion_steps"]
    others = [first | {"rank": "a"}, first | {"diffusion_steps": 4, "rank": "b"}]
    assert varying(others) == ["diffusion_steps", "rank"]
    assert varying([first, first | {"accuracy": 0.75}]) == ["model"]  # accuracy is not a setting


@pytest.mark.parametrize(
    ("facts", "metric"),
    [
        ({"protocol": "d1", "cell_accuracy": 0.25}, "cell_accuracy"),
        ({"protocol": "strict", "cell_accuracy": 0.25}, "accuracy"),
        ({"protocol": "own", "cell_accuracy": 0.25}, "accuracy"),
        ({"protocol": "d1"}, "accuracy"),
    ],
)
def test_the_metric_is_the_one_that_the_protocol_reports(facts, metric):
    assert metric_of([{"accuracy": 0.5} | facts]) == metric
