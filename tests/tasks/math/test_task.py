"""GSM8K and MATH500 from their published forms, and their prompts."""

import json

import pytest

from dllm_rl.tasks import GSM8K, MATH500, Task
from dllm_rl.tasks.protocols import under_protocol

TRAIN = [
    {
        "question": f"Ann has {n} apples and eats one. How many?",
        "answer": f"{n} - 1 = <<{n}-1={n - 1}>>{n - 1}\n#### {n - 1:,}",
    }
    for n in range(990, 1050)
]
TEST = [{"question": "What is 40 + 2?", "answer": "40 + 2 = 42\n#### 42"}]
MATH = [
    {
        "problem": "Halve 1.",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
        "answer": "\\frac{1}{2}",
        "subject": "Algebra",
    },
    {"problem": "Double 3.", "solution": "It is $\\boxed{5}$, plus one.", "answer": "6"},
    {"problem": "Square 3.", "solution": "It is $\\boxed{9}$.", "level": "Level 1"},
]


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "train.jsonl", TRAIN)
    write_lines(tmp_path / "test.jsonl", TEST)
    return tmp_path


@pytest.mark.parametrize("around", ["${}$", "\\({}\\)", "\\[{}\\]", "\\boxed{{{}}}", "$$\\boxed{{{}}}$$."])
def test_a_reference_between_delimiters_is_the_answer(tmp_path, around) -> None:
    rows = [{"problem": "p", "answer": around.format("\\frac{1}{2}")}, {"problem": "q", "answer": 73.0}]
    rows += [{"problem": "r", "solution": "So \\boxed{$9$}."}]
    task = MATH500(path=write_lines(tmp_path / "math.jsonl", rows))
    assert [problem.fields["answer"] for problem in task] == ["\\frac{1}{2}", "73", "9"]
    assert task[2].solution.endswith("<answer>\n\\boxed{9}\n</answer>\n")
    assert [task.reward(task[0], f"\\boxed{{{text}}}").value for text in ("\\frac12", "$1/2$", "1/3")] == [1, 1, 0]
    row = {"question": "q", "answer": f"9 + 9 #### {around.format(18)}"}
    for rule, right in (("own", 1.0), ("d1", 4.0), ("espo", 1.0)):
        task = GSM8K(path=write_lines(tmp_path / "gsm8k.jsonl", [row]), split="test", reward_rule=rule)
        assert task[0].fields == {"answer": "18"} and task.reward(task[0], task[0].solution).value == right


def test_a_reference_that_no_answer_equals_is_refused_by_its_line(tmp_path) -> None:
    path = write_lines(tmp_path / "math.jsonl", [MATH[0], {"problem": "p", "answer": "$1$ and $2$"}])
    with pytest.raises(ValueError, match=r"math.jsonl, line 2: answer='\$1\$ and \$2\$' has text around"):
        len(MATH500(path=path))


def test_gsm8k_splits(folder) -> None:
    tasks = {split: GSM8K(split=split, path=folder) for split in ("train", "validation", "test")}
    assert all(isinstance(task, Task) for task in tasks.values())
    asked = {split: {problem.prompt[0]["content"] for problem in task} for split, task in tasks.items()}
    assert len(asked["train"] | asked["validation"]) == len(tasks["train"]) + len(tasks["validation"]) == len(TRAIN)
    assert not asked["train"] & asked["validation"] and 0 < len(tasks["validation"]) < 20
    assert len(GSM8K(split="train", path=folder, size=3)) == 3
    assert len(GSM8K(split="train", path=folder, size=1000)) == len(tasks["train"])

    problem = tasks["test"][0]
    assert problem.fields == {"answer": "42"} and problem.prompt[0]["content"].endswith("What is 40 + 2?")
    assert problem.solution == "<reasoning>\n40 + 2 = 42\n</reasoning>\n<answer>\n42\n</answer>\n"
    for rule, value in (("own", 1.0), ("d1", 4.0), ("espo", 1.0)):
        task = GSM8K(split="test", path=folder / "test.jsonl", reward_rule=rule)
        assert task.reward(problem, problem.solution).value == value
        assert task.reward(problem, "no idea").value == 0.0
    with pytest.raises(IndexError):
        tasks["test"][1]


def test_gsm8k_prompts(tmp_path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(TEST[0]))
    assert GSM8K(split="test", path=path, prompt_format="Q: {question} {x}", chat=False)[0].prompt == (
        "Q: What is 40 + 2? {x}"
    )
    opened = GSM8K(split="test", path=path, opening="<reasoning>\n")[0]
    assert opened.prompt[-1] == {"role": "assistant", "content": "<reasoning>\n"}
    assert opened.solution.startswith("40 + 2")  # the opening is the prompt's, not the completion's


@pytest.mark.parametrize("protocol", ["strict", "d1"])
def test_a_protocol_grades_what_the_opening_began(tmp_path, protocol) -> None:
    """As the task itself does in training."""
    path = write_lines(tmp_path / "test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    task = GSM8K(split="test", path=path, opening="<reasoning>\n</reasoning>\n<answer>\n")
    graded = under_protocol(task, protocol)
    assert task.reward(task[0], "2\n</answer>").breakdown["accuracy"] == 1
    for completion, right in (("2\n</answer>", 1), ("3\n</answer>", 0)):
        (together,) = graded.rewards([graded[0]], [completion])
        assert graded.reward(graded[0], completion).breakdown["accuracy"] == together.breakdown["accuracy"] == right


@pytest.mark.parametrize("opening", ["", "<reasoning>", "<reasoning>\n", "<think>\n\n</think>\n\n<reasoning>"])
def test_a_solution_has_the_full_reward_of_d1_whatever_opens_the_turn(tmp_path, opening) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(TEST[0]))
    task = GSM8K(split="test", path=path, opening=opening, reward_rule="d1")
    solution = task[0].solution
    assert solution is not None and (opening + solution).count("<reasoning>") == 1
    assert task.reward(task[0], solution).value == 4.0


def test_a_thinking_block_is_no_part_of_d1s_layout(tmp_path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(TEST[0]))
    task = GSM8K(split="test", path=path, opening="<think>\n\n</think>\n\n", reward_rule="d1")
    written = "<reasoning>\n40 + 2\n</reasoning>\n<answer>\n42\n</answer>\n"
    assert task.reward(task[0], written).value == 4.0


def test_math500_from_its_published_form(tmp_path) -> None:
    task = MATH500(path=write_lines(tmp_path / "test.jsonl", MATH))
    assert [problem.fields["answer"] for problem in task] == ["\\frac{1}{2}", "6", "9"]
    assert all(task.reward(problem, problem.solution).value == 1.0 for problem in task)
    assert task[0].solution.endswith("<answer>\n\\boxed{\\frac{1}{2}}\n</answer>\n")
    with pytest.raises(ValueError, match="split='train' needs path="):
        MATH500(split="train")
    both = [MATH500(split=split, path=tmp_path / "test.jsonl") for split in ("train", "validation")]
    assert sum(map(len, both)) == 3


AIME = [
    {"id": "2025-I-1", "problem": "Sum the bases.", "answer": "70"},
    {"problem": "Count the ways.", "answer": 16, "solution": None},
    {"problem": "Find m + n.", "answer": 117.0, "solution": ""},
    {"problem": "Remainder?", "answer": 0},
    {"problem": "Last digits?", "answer": "025", "solution": "So $\\boxed{025}$."},
]


def test_a_competitions_file_has_problems_and_answers(tmp_path) -> None:
    """References that are numbers, 117.0 as tables write them; no working, so that warm-up refuses the problem."""
    task = under_protocol(MATH500(path=write_lines(tmp_path / "aime.jsonl", AIME)), "strict")
    assert [problem.fields["answer"] for problem in task] == ["70", "16", "117", "0", "025"]
    assert [problem.solution is None for problem in task] == [True, True, True, True, False]
    for problem, right in zip(task, ("70", "16", "117.0", "0", "25"), strict=True):
        assert task.reward(problem, f"so <answer>\\boxed{{{right}}}</answer>").value == 1.0
        assert task.reward(problem, f"so <answer>\\boxed{{1{right}}}</answer>").value == 0.0


@pytest.mark.parametrize("answer", [None, "", 0.5, float("inf"), float("nan"), True, [1], {"a": 1}])
def test_an_answer_that_is_neither_text_nor_whole_is_refused(tmp_path, answer) -> None:
    path = write_lines(tmp_path / "aime.jsonl", [AIME[0], {"problem": "How many?", "answer": answer}])
    with pytest.raises(ValueError, match=r"aime\.jsonl, line 2: a MATH row needs texts: problem, and answer or a sol"):
        len(MATH500(path=path))
