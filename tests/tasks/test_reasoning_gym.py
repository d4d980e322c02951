"""reasoning-gym's problems under our graders; tests/golden/graded.jsonl has each generator's answers by hand."""

import json
import re
from itertools import product

import pytest
from hash_seeds import printed_under_hash_seeds

from dllm_rl.evaluation.grading import grade_file
from dllm_rl.tasks import ReasoningGym, Task
from dllm_rl.tasks.reasoning_gym import KINDS, exact, read_fields

QUICK = ["mini_sudoku", "gsm_symbolic", "puzzle24"]
SMALL = {"zebra_puzzles": '{"num_people": 2, "num_characteristics": 2}', "sudoku": '{"min_empty": 9, "max_empty": 12}'}


@pytest.mark.parametrize("generator", KINDS)
def test_reasoning_gym_under_our_graders(generator: str) -> None:
    task = ReasoningGym(generator, size=4, seed=3, settings=SMALL.get(generator, "{}"))
    assert isinstance(task, Task) and task.name == "reasoning_gym" and len(task) == 4
    for problem in task:
        assert problem.fields["generator"] == generator
        assert task.reward(problem, problem.solution).value == 1.0
        assert task.reward(problem, "no answer").value == 0.0
        assert read_fields(json.loads(json.dumps(problem.fields)), "strict") == problem.fields
    with pytest.raises(IndexError):
        task[4]


@pytest.mark.parametrize("generator", QUICK)
def test_a_problem_depends_on_seed_split_and_index_only(generator: str) -> None:
    task = ReasoningGym(generator, seed=3)
    known = [task[i] for i in (2, 1)]
    assert [ReasoningGym(generator, size=9, seed=3)[i] for i in (2, 1)] == known
    for other in ({"seed": 4}, {"seed": 3, "split": "test"}):
        assert not {problem.prompt[0]["content"] for problem in known} & {
            ReasoningGym(generator, **other)[i].prompt[0]["content"] for i in range(5)
        }


@pytest.mark.slow
def test_problems_do_not_depend_on_how_strings_hash() -> None:
    """zebra_puzzles draws from sets."""
    code = (
        "from dllm_rl.tasks import ReasoningGym\n"
        "small = {'zebra_puzzles': '{\"num_people\": 2, \"num_characteristics\": 2}'}\n"
        "print([ReasoningGym(name, settings=small.get(name, '{}'))[i].prompt"
        " for name in ('zebra_puzzles', 'gsm_symbolic') for i in range(2)])"
    )
    assert len(printed_under_hash_seeds(code)) == 1


def shared(problem) -> str:
    """What two splits must not share."""
    fields = problem.fields
    if "numbers" in fields:
        return str(sorted(fields["numbers"]))
    return fields.get("solution") or problem.prompt[0]["content"]


def assert_no_problem_is_in_two_splits(generator: str, settings: str, size: int) -> None:
    """With four seeds; the problems are so small that every split draws the same ones again and again."""
    found: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for split, seed in product(found, range(4)):
        task = ReasoningGym(generator, seed=seed, split=split, settings=settings)
        found[split] |= {shared(task[i]) for i in range(size)}
    assert all(found.values()) and sum(map(len, found.values())) == len(set.union(*found.values()))


def test_no_problem_is_in_two_splits() -> None:
    assert_no_problem_is_in_two_splits("mini_sudoku", "{}", 12)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("generator", "settings"),
    [
        ("puzzle24", '{"max_value": 5}'),
        ("countdown", '{"min_numbers": 3, "max_numbers": 3, "max_value": 6, "min_target": 1}'),
        ("zebra_puzzles", SMALL["zebra_puzzles"]),
        ("sudoku", SMALL["sudoku"]),
        ("gsm_symbolic", "{}"),
    ],
)
def test_no_problem_is_in_two_splits_of_the_slow_generators(generator: str, settings: str) -> None:
    assert_no_problem_is_in_two_splits(generator, settings, 4)


def test_prompts() -> None:
    chat, text = (ReasoningGym("mini_sudoku", chat=chat)[0] for chat in (True, False))
    assert chat.prompt == [{"role": "user", "content": text.prompt}] and chat.fields == text.fields
    assert text.prompt.endswith("\n\nWrite the final answer between <answer> and </answer>.")
    own = ReasoningGym("mini_sudoku", prompt_format="Grid: {question}", opening="<reasoning>")[0]
    assert own.prompt[0]["content"].startswith("Grid: ") and own.prompt[1]["content"] == "<reasoning>"


@pytest.mark.parametrize("chat", [True, False])
def test_infilling_puts_the_answer_into_the_prompt(chat: bool) -> None:
    task = ReasoningGym(infill=True, chat=chat)
    asked = task[0]
    answer = re.search(r"<answer>\n(.*)\n", ReasoningGym()[0].solution, re.DOTALL)[1]
    whole = "\n".join(turn["content"] for turn in asked.prompt) if chat else asked.prompt
    assert not chat or asked.prompt[-1]["role"] == "assistant"
    puzzle = asked.fields["puzzle"]
    assert whole.count(asked.blank) == puzzle.count("0") > 0 and asked.solution is None
    digits = re.findall(r"\d", answer)
    right = [digit for digit, given in zip(digits, puzzle, strict=True) if given == "0"]
    for filling, value in ((right, 1.0), ([*right[:-1], "9"], 0.0)):
        filled = whole
        for digit in filling:
            filled = filled.replace(asked.blank, digit, 1)
        assert task.reward(asked, filled).value == value


def test_difficulty_is_a_setting() -> None:
    for settings in ('{"min_empty": 4, "max_empty": 4}', '{"min_empty": 9, "max_empty": 9}'):
        empty = json.loads(settings)["max_empty"]
        assert ReasoningGym("mini_sudoku", settings=settings)[0].fields["puzzle"].count("0") == empty


# Three sets of two numbers, none of which is in the validation split.
FEW = '{"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 2, "min_target": 1, "max_target": 5}'


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"generator": "chess"}, "generator='chess' must be one of 'mini_sudoku'"),
        ({"size": 0}, "size=0 must be at least 1"),
        ({"settings": "{"}, "settings='{' of mini_sudoku: .*JSON"),
        ({"settings": "[1]"}, "settings=.*mapping"),
        ({"settings": '{"hard": 1}'}, "settings=.*'hard'"),
        ({"settings": '{"min_empty": 40}'}, "settings=.*min_empty must be between"),
        ({"settings": '{"seed": 1}'}, "settings=.*'seed'"),
        (
            {"generator": "countdown", "split": "validation", "settings": FEW},
            "no problem of split 'validation' in 1000",
        ),
        ({"generator": "gsm_symbolic", "infill": True}, "infill=True needs a generator with a grid"),
        ({"prompt_format": "nowhere"}, "prompt_format='nowhere'"),
    ],
)
def test_bad_settings_are_one_line(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ReasoningGym(**bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"generator": "chess"},
        {},
        {"generator": "zebra_puzzles", "answer": 3},
        {"generator": "mini_sudoku", "puzzle": "0" * 16},
        {"generator": "puzzle24", "numbers": [1, "x"], "target": 24},
        {"generator": "gsm_symbolic", "answer": "none"},
    ],
)
def test_malformed_rows_are_refused(row: dict, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row | {"completion": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: "):
        grade_file(path, task="reasoning_gym")


def test_an_empty_answer_is_never_right() -> None:
    assert exact({"answer": ""}, "<answer></answer>").value == exact({"answer": ""}, "").value == 0.0


def test_reasoning_gyms_scorers_would_run_this_and_ours_do_not() -> None:
    task = ReasoningGym("countdown", size=1, settings='{"min_numbers": 3, "max_numbers": 3}')
    assert len(task[0].fields["numbers"]) == 3
    for text in ("__import__('os').abort()", "9**9**9**9"):
        assert task.reward(task[0], f"<answer>{text}</answer>").value == 0.0
