"""MATH500 from its published form."""

import json

import pytest

from dllm_rl.tasks import MATH500

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


def test_math500_from_its_published_form(tmp_path) -> None:
    task = MATH500(path=write_lines(tmp_path / "test.jsonl", MATH))
    assert [problem.fields["answer"] for problem in task] == ["\\frac{1}{2}", "6", "9"]
    assert all(task.reward(problem, problem.solution).value == 1.0 for problem in task)
    assert task[0].solution.endswith("<answer>\n\\boxed{\\frac{1}{2}}\n</answer>\n")
    with pytest.raises(ValueError, match="split='train' needs path="):
        MATH500(split="train")
    both = [MATH500(split=split, path=tmp_path / "test.jsonl") for split in ("train", "validation")]
    assert sum(map(len, both)) == 3
