"""Stored completions under every protocol, of the formats of others."""

import json

import pytest

from dllm_rl.cli.main import main
from dllm_rl.evaluation.grading import compare_files, grade_by_every_protocol, grade_file, read_completions
from dllm_rl.evaluation.intervals import wilson
from dllm_rl.evaluation.results import Evaluation, GradedAnswer, paired_differences
from dllm_rl.tasks.base import Reward

TEXTS = [
    "<answer>18</answer>",
    "\\boxed{18}",
    "#### 18",
    "so 18 it is",
    "<answer>17</answer> no: <answer>18</answer>",
    "\\boxed{17}, no: \\boxed{18}",
    "17 or 18 or 19",
]


def write(path, rows) -> str:
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


def test_each_protocol_by_hand(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [{"completion": text, "answer": "18"} for text in TEXTS])
    found = grade_by_every_protocol(path, task="gsm8k")
    right = {name: row["right"] for name, row in found["protocols"].items()}
    # d1 reads the first box, and the first block's last number.
    assert right == {"strict": 4, "d1": 2, "spg": 4, "espo": 6} and found["not_graded"] == {}
    for name, row in found["protocols"].items():
        alone = grade_file(path, task="gsm8k", protocol=name)
        assert row == {"right": right[name]} | {key: alone[key] for key in row if key != "right"}


def test_files_of_d1_and_of_the_harness_are_read(tmp_path) -> None:
    grid, puzzle = "1234341221434321", "1234341200430021"
    files = {
        "gsm8k": [{"question": "?", "prompt_input": "?", "generations": "\\boxed{18}", "ground_truth": 18.0}],
        "math500": [{"generations": "\\boxed{18}", "ground_truth": "18"}],
        "countdown": [{"generations": "\\boxed{3*5+7}", "ground_truth": [[3, 5, 7], 22]}],
        "sudoku": [
            {"question": puzzle, "generations": f"<answer>{grid}</answer>", "ground_truth": grid},
            {"question": f"The puzzle: {puzzle}.", "generations": f"<answer>{grid}</answer>", "ground_truth": grid},
        ],
    }
    for task, rows in files.items():
        path = tmp_path / f"{task}.json"
        path.write_text(json.dumps({"generations": rows, "metrics": {}}))
        found = grade_by_every_protocol(path, task=task)
        assert found["protocols"]["strict"]["right"] == found["protocols"]["d1"]["right"] == found["n"] == len(rows)
    sample = {"doc_id": 7, "doc": {"question": "?", "answer": "9 and 9 #### 18"}, "target": "x", "resps": [["#### 18"]]}
    path = write(tmp_path / "samples.jsonl", [sample, {"completion": "#### 18", "reference": {"answer": 18}}])
    assert [each.location.rpartition(", ")[2] for each in read_completions(path, "gsm8k")] == ["line 1", "line 2"]
    assert grade_by_every_protocol(path, task="gsm8k")["protocols"]["espo"]["right"] == 2
    path = write(tmp_path / "b.jsonl", [sample | {"resps": [["18", "<answer>18</answer>"]]}])
    assert [each.completion for each in read_completions(path, "gsm8k")] == ["18", "<answer>18</answer>"]
    with pytest.raises(ValueError, match=r"line 1: completion must be text or a list of texts, not list"):
        grade_file(write(tmp_path / "c.jsonl", [sample | {"resps": [["a"], ["b"]]}]), task="gsm8k")


def test_a_protocol_that_cannot_grade_the_rows_is_named(tmp_path) -> None:
    nine = {"completion": "", "puzzle": "0" * 81, "solution": "1" * 81}
    with pytest.raises(ValueError, match="line 1"):  # strict's fault is the file's
        grade_by_every_protocol(write(tmp_path / "a.jsonl", [nine | {"puzzle": 1}]), task="sudoku")
    solved = "123456789456789123789123456214365897365897214897214365531642978642978531978531642"
    row = {"completion": solved, "puzzle": "0" + solved[1:], "solution": solved}
    found = grade_by_every_protocol(write(tmp_path / "b.jsonl", [row]), task="sudoku")
    assert found["protocols"].keys() == {"strict"} and found["protocols"]["strict"]["right"] == 1
    assert found["not_graded"].keys() == {"d1", "spg", "espo"} and "4x4" in found["not_graded"]["d1"]


def test_the_screen_shows_tables_and_no_control_character(tmp_path, capsys) -> None:
    evil = "\x1b[2J[bold]\u202e"
    rows = [{"completion": f"{evil}<answer>17</answer><answer>18</answer>{evil}", "answer": "18"}]
    path = write(tmp_path / f"{evil}.jsonl", rows)
    assert main(["grade", "--task", "gsm8k", "--protocol", "all", path]) == 0
    out = capsys.readouterr().out
    assert "graded by" in out and "espo" in out and "[bold]" in out and not {"\x1b", "\u202e"} & set(out)
    assert main(["grade", "--task", "gsm8k", "--protocol", "all", "--json", path]) == 0
    assert json.loads(capsys.readouterr().out)["protocols"]["strict"]["right"] == 1


def test_two_files_are_compared_problem_by_problem(tmp_path, capsys) -> None:
    """The first gains problem 1, loses none and lacks problem 2: (1 + 1) / 2 - (1 + 0) / 2."""

    def rows(*texts, first=0):
        return [
            {"completion": text, "answer": str(place), "evaluation": {"problem": place, "sample": 0}}
            for place, text in enumerate(texts, first)
        ]

    now = write(tmp_path / "now.jsonl", rows("0", "1"))
    before = write(tmp_path / "before.jsonl", rows("0", "7", "2"))
    found = compare_files(now, before, task="gsm8k", protocol="espo")
    assert found["difference"]["accuracy"][0] == 0.5 and found["accuracy"] == 1.0 and found["against"] == before
    assert (
        found["difference"]["accuracy"][1:] == paired_differences(*map(as_evaluation, ((1, 1), (1, 0))))["accuracy"][1:]
    )
    plain = [
        write(tmp_path / f"{text}.jsonl", [{"completion": text, "answer": "5"}]) for text in "56"
    ]  # by their place
    assert main(["grade", "--json", "--task", "gsm8k", "--protocol", "espo", plain[0], "--against", plain[1]]) == 0
    assert json.loads(capsys.readouterr().out)["difference"]["accuracy"] == [1.0, None, None]
    with pytest.raises(ValueError, match=r"now.jsonl, line 1 is a different problem from .*5.jsonl, line 1"):
        compare_files(now, plain[0], task="gsm8k")
    more = write(tmp_path / "more.jsonl", [{"completion": "5", "answer": "5"}] * 2)
    with pytest.raises(
        ValueError, match=r"5.jsonl has 1 completions and .*more.jsonl has 2, and nothing in .*5.jsonl, line 1"
    ):
        compare_files(plain[0], more, task="gsm8k")
    with pytest.raises(ValueError, match=r"more.jsonl, line 1 says which problem it is; add .* as question or doc_id"):
        compare_files(more, plain[0], task="gsm8k")
    with pytest.raises(ValueError, match="have no problem in common"):
        compare_files(write(tmp_path / "late.jsonl", rows("9", first=9)), before, task="gsm8k")
    assert main(["grade", "--task", "gsm8k", "--protocol", "all", plain[0], "--against", plain[1]]) == 2
    assert "--against compares under one protocol" in capsys.readouterr().err


@pytest.mark.parametrize("num_samples", [2, 5, 16])
def test_an_interval_is_over_problems_and_not_over_their_samples(tmp_path, num_samples) -> None:
    """Three problems, all samples of which are equal: the interval is that of three rows."""
    rows = [
        {"completion": f"#### {int(problem != 1)}", "answer": "1", "evaluation": {"problem": problem, "sample": sample}}
        for problem in range(3)
        for sample in range(num_samples)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    samples = [[f"#### {int(problem != 1)}"] * num_samples for problem in range(3)]
    harness = [
        {"doc_id": problem, "doc": {"answer": "1"}, "resps": [samples[problem]], "filter": name}
        for name in ("strict-match", "flexible-extract")  # the harness writes a row of each sample for every filter
        for problem in range(3)
    ]
    for each in (path, write(tmp_path / "b.jsonl", harness)):
        found = grade_file(each, task="gsm8k", protocol="espo")
        assert found["n"] == 3 * num_samples and found["accuracy"] == pytest.approx(2 / 3)
        assert found["accuracy_interval"] == list(wilson(2, 3))
        every = grade_by_every_protocol(each, task="gsm8k")["protocols"]["espo"]
        assert every["accuracy_interval"] == found["accuracy_interval"] and every["right"] == 2 * num_samples


def test_a_published_solution_of_gsm8k_is_read_for_its_number(tmp_path) -> None:
    """Also one with amounts in dollars, which look like formulas; so two files of a problem are of the same one."""
    solution = "Each costs $5, so two cost $<<2*5=10>>10.\n#### 10"
    harness = {"doc_id": 0, "doc": {"question": "Q", "answer": solution}, "resps": [["so \\boxed{10}"]]}
    ours = {"completion": "so \\boxed{10}", "answer": "10", "evaluation": {"problem": 0, "sample": 0}}
    paths = [write(tmp_path / f"{name}.jsonl", [row]) for name, row in (("harness", harness), ("ours", ours))]
    assert [grade_file(path, task="gsm8k")["accuracy"] for path in paths] == [1.0, 1.0]
    assert compare_files(*paths, task="gsm8k")["difference"]["accuracy"][0] == 0.0


def test_samples_of_the_harness_are_paired_by_doc_id(tmp_path) -> None:
    """Files of other orders, filters and problems; problem 1 is lost, problem 2 is in one file only."""

    def sample(problem, text, filter_name="none"):
        doc = {"question": "?", "answer": str(problem)}
        return {"doc_id": problem, "doc": doc, "resps": [[f"#### {text}"]], "filter": filter_name}

    now = [sample(problem, text, name) for name in ("strict", "flexible") for problem, text in ((0, 0), (1, 7), (2, 2))]
    for place, before in enumerate(([(3, 3), (1, 1), (0, 0)], [(0, 0), (1, 1)], [(1, 1), (0, 0)])):
        paths = [
            write(tmp_path / f"now{place}.jsonl", now),
            write(tmp_path / f"before{place}.jsonl", [sample(*each) for each in before]),
        ]
        assert grade_file(paths[0], task="gsm8k", protocol="espo")["n"] == 3  # a sample of each problem, not two
        assert compare_files(*paths, task="gsm8k", protocol="espo")["difference"]["accuracy"][0] == -0.5
        assert compare_files(*paths[::-1], task="gsm8k", protocol="espo")["difference"]["accuracy"][0] == 0.5
    same_answers = [sample(problem, 5) | {"doc": {"answer": "5"}} for problem in (8, 9)]
    paths = [write(tmp_path / f"{end}.jsonl", same_answers[end:]) for end in (0, 1)]
    assert compare_files(*paths, task="gsm8k")["n"] == 2


GRID, PUZZLES = "1234341221434321", ("1234341221434320", "1234341221434301", "1234341221434021")
SAMPLED = {
    "gsm8k": [{"question": f"{n} + 1?", "answer": "5"} for n in range(3)],  # equal answers
    "math500": [{"problem": f"{n} + 1?", "reference": "5"} for n in range(3)],
    "countdown": [{"numbers": [5, n], "target": 5 + n} for n in range(3)],
    "sudoku": [{"puzzle": puzzle, "solution": GRID, "prompt": "Solve it."} for puzzle in PUZZLES],
    "code": [
        {"prelude": "", "entry_point": "f", "arguments": 0, "tests": f"assert f() == {n}", "id": f"row {n}"}
        for n in range(3)
    ],
}


@pytest.mark.parametrize("task", SAMPLED)
@pytest.mark.parametrize("form", ["a row each", "lists", "other ids", "shuffled"])
@pytest.mark.repeated(every=12)
def test_the_samples_of_a_problem_are_known_by_its_text_or_fields(tmp_path, task, form) -> None:
    """As with `doc_id`: three problems, whatever the number of samples."""
    texts = {"sudoku": [GRID, "no", GRID, "no"], "code": ["def f():\n    return 1", "no"] * 2}.get(
        task, ["5", "no"] * 2
    )
    texts = texts if task in ("sudoku", "code") else [f"<answer>{text}</answer>" for text in texts]
    rows = [row | {"completion": text} for row in SAMPLED[task] for text in texts]
    numbered = [row | {"doc_id": place // 4} for place, row in enumerate(rows)]
    if form == "lists":
        rows = [row | {"completion": texts} for row in SAMPLED[task]]
    elif form == "other ids":  # of samples
        rows = [row | {"id": place} for place, row in enumerate(rows)]
    elif form == "shuffled":
        rows = rows[::3] + rows[1::3] + rows[2::3]
    found = grade_file(write(tmp_path / "a.jsonl", rows), task=task)
    expected = grade_file(write(tmp_path / "b.jsonl", numbered), task=task)
    assert (found["n"], found["problems"]) == (12, 3) == (expected["n"], expected["problems"])
    if form != "shuffled":  # the bootstrap depends on the order of the problems
        assert found == expected
    compared = compare_files(tmp_path / "a.jsonl", write(tmp_path / "c.jsonl", rows[::-1]), task=task)
    assert compared["problems_compared"] == 3 and {numbers[0] for numbers in compared["difference"].values()} == {0.0}


def test_rows_that_name_no_problem_are_problems_each_unless_an_id_repeats(tmp_path) -> None:
    rows = [{"answer": "5", "completion": text} for text in ("<answer>5</answer>", "no", "no", "no")]
    assert grade_file(write(tmp_path / "a.jsonl", rows), task="gsm8k")["problems"] == 4
    (several,) = [{"answer": "5", "completion": [row["completion"] for row in rows]}]
    found = grade_file(write(tmp_path / "a.jsonl", [several, several]), task="gsm8k")  # a row's texts are its samples
    assert (found["n"], found["problems"], found["pass@1"], found["pass@4"]) == (8, 2, 0.25, 1.0)
    for name in ("id", "task_id", "question_id", "problem_id", "doc_id"):
        named = [row | {name: f"test/{place // 2}"} for place, row in enumerate(rows)]
        found = grade_file(write(tmp_path / "b.jsonl", named), task="gsm8k")
        assert (found["problems"], found["accuracy"], found["pass@2"]) == (2, 0.25, 0.5), name
        assert found["accuracy_interval"] == [0.0, 0.5]


def test_pass_at_k_by_hand(tmp_path) -> None:
    """Of problem 0 two of three samples are right, of problem 1 none of four: pass@2 is (1 + 0) / 2."""
    right, wrong = "<answer>5</answer>", "no"
    rows = [
        {"question": "a", "answer": "5", "completion": [right, wrong, right]},
        {"question": "b", "answer": "5", "completion": [wrong] * 4},
    ]
    found = grade_file(write(tmp_path / "a.jsonl", rows), task="gsm8k")
    passes = {name: value for name, value in found.items() if name.startswith("pass") and "interval" not in name}
    assert passes == {"pass@1": pytest.approx(1 / 3), "pass@2": 0.5, "pass@3": 0.5}
    assert found["accuracy"] == pytest.approx(2 / 7) and found["pass@3_interval"] == list(wilson(1, 2))


def test_a_table_is_printed_unless_json_is_asked_for(tmp_path, capsys) -> None:
    rows = [{"question": str(n), "answer": str(n), "completion": f"<answer>{n % 2}</answer>"} for n in range(4)]
    now, before = write(tmp_path / "now.jsonl", rows), write(tmp_path / "before.jsonl", rows[:1] + rows[2:])
    assert main(["grade", "--task", "gsm8k", now, "--against", before]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "protocol strict, 4 completions of 4 problems in" in text and "over the 3 problems of both" in text
    assert "accuracy 0.500 [0.150, 0.850] +0.000 [no interval]" in text and "no interval: one problem" in text
    assert main(["grade", "--task", "gsm8k", now]) == 0
    text = capsys.readouterr().out
    assert "difference" not in text and "no interval" not in text and "accuracy  0.500 [0.150, 0.850]" in text
    null = write(tmp_path / "null.jsonl", [rows[0], {"completion": "1", "answer": None}])
    assert main(["grade", "--task", "gsm8k", null]) == 0
    assert "graded wrong, because their reference answer is null: 1" in " ".join(capsys.readouterr().out.split())


def test_numbers_of_countdown_may_be_d1_s_text(tmp_path) -> None:
    rows = [
        {"numbers": "3,5,7", "target": "22"},
        {"numbers": "3, 5, 7", "target": 22},
        {"input": "3,5,7", "output": "22"},
        {"input": "3,5,7,22", "output": "3*5=15,15+7=22"},  # Dream's
        {"numbers": [3, 5, 7], "target": 22},
    ]
    path = write(tmp_path / "a.jsonl", [row | {"completion": "<answer>3*5+7</answer>"} for row in rows])
    found = grade_file(path, task="countdown")
    assert (found["accuracy"], found["problems"], found["n"]) == (1.0, 1, 5)


def test_a_missing_field_s_message_names_those_that_the_row_has(tmp_path, capsys) -> None:
    path = write(tmp_path / "a.jsonl", [{"response": "5", "gold": "5"}])
    assert main(["grade", "--task", "gsm8k", path]) == 2
    assert "line 1: no field 'completion', only 'response', 'gold'; rename the one" in capsys.readouterr().err
    path = write(tmp_path / "a.jsonl", [{"completion": "5", "gold": "5"}])
    assert main(["grade", "--task", "gsm8k", path]) == 2
    assert "line 1: no field 'answer', only 'completion', 'gold'; rename the one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("countdown", {"out": "3", "ground_truth": "7"}, "'completion', only 'out', 'ground_truth';"),
        ("countdown", {"text": "3=", "completion": "3", "reference": "7"}, "'numbers', only 'text', 'completion',"),
        ("countdown", {"completion": "3", "reference": {"goal": 7}}, "'numbers', only 'completion', 'reference', 'r"),
        ("sudoku", {"question": "Fill it.", "generations": "1", "ground_truth": "1234"}, "'puzzle', only 'question',"),
        ("gsm8k", {"doc": {"query": "1+1"}, "doc_id": 4, "resps": [["2"]]}, "'answer', only 'resps', 'doc.query';"),
        ("code", {"completion": "def f(): ...", "reference": "assert f"}, "'arguments', only 'completion', 'ref"),
    ],
)
def test_a_missing_field_s_message_has_the_names_of_the_file_alone(tmp_path, capsys, task, row, message):
    """A grader's own name, such as the `answer` that a reference becomes, is not in the file of the user."""
    assert main(["grade", "--task", task, write(tmp_path / "a.jsonl", [row])]) == 2
    said = capsys.readouterr().err
    assert f"line 1: no field {message}" in said
    ours = said[said.index("only") : said.index("; rename")]
    assert all(f"'{name}'" not in ours for name in {"answer", "completion", "solution", "doc_id"} - row.keys())


def as_evaluation(values) -> Evaluation:
    return Evaluation(
        tuple(GradedAnswer(i, 0, Reward(value, True, {"accuracy": float(value)})) for i, value in enumerate(values)), {}
    )


def test_a_resumed_runs_rows_replace_those_of_the_steps_that_it_repeats(tmp_path) -> None:
    """Also the rows of the step at which it resumes; and a second resume drops rows of the first."""
    path = tmp_path / "completions.jsonl"
    steps = [0, 1, 2, {"resume_from": 1}, 1, 2, 3, {"resume_from": 2}, 2]
    rows = [
        step if isinstance(step, dict) else {"step": step, "completion": f"line {line}", "answer": "5"}
        for line, step in enumerate(steps, 1)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert [each.completion for each in read_completions(path, "gsm8k")] == ["line 1", "line 5", "line 9"]
