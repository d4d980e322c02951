"""MATH500: 500 problems of the MATH test set, answered by a LaTeX expression."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from dllm_rl.tasks.answers import last_box
from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.tasks.loading import Split, check_split, load_problems
from dllm_rl.tasks.math import verify as math_check
from dllm_rl.tasks.math.graders import math500_math_verify, math500_strict
from dllm_rl.tasks.prompts import Prompt, check_opening, fill, load_template

TEXT = """Solve this problem step by step. Put your working between <reasoning> and </reasoning>, then the final \
answer as \\boxed{...}, and nothing else, between <answer> and </answer>.

{problem}"""
_RULES = {"own": math500_strict, "espo": math500_math_verify}


@dataclass(frozen=True)
class MATH500:
    """MATH problems in their published form: rows with `problem`, `solution` and, where the file has it, `answer`.

    path           a JSONL or Parquet file, or a folder with one per split; None: `datasets` looks for
                   HuggingFaceH4/MATH-500, which has a test split alone. For "train" give a file of other MATH problems;
                   "validation" is a tenth of it, by a hash of the problem, and "train" the rest.
    size           number of problems, in the file's order; None for all.
    prompt_format  "text": an instruction of ours; a template with {problem}, or the path of a file with one.
    chat           one user message (True) or plain text (False).
    opening        the text with which the assistant's turn begins, such as "<reasoning>"; needs chat.
    Value of a completion: "own": 1 when right under the strict protocol [ours]; "espo": 1 when math-verify holds it
    equal [paper].
    """

    name: ClassVar[str] = "math500"
    version: ClassVar[str] = "2"

    split: Split = "test"
    path: str | Path | None = None
    size: int | None = None
    prompt_format: str | Path = "text"
    chat: bool = True
    opening: str = ""
    reward_rule: Literal["own", "espo"] = "own"

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.split != "test" and self.path is None:
            raise ValueError(f"split={self.split!r} needs path=: MATH-500 is a test set; give a file of MATH problems")
        if self.reward_rule not in _RULES:
            raise ValueError(f"reward_rule={self.reward_rule!r} must be one of {', '.join(map(repr, _RULES))}")
        if self.reward_rule == "espo":
            math_check.require()
        check_opening(self.opening, chat=self.chat, prompt_format=self.prompt_format)
        _template(self.prompt_format)

    def __len__(self) -> int:
        rows = len(_problems(self.path, self.split))
        return rows if self.size is None else min(self.size, rows)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        problem, answer, working = _problems(self.path, self.split)[index]
        prompt = fill(_template(self.prompt_format), chat=self.chat, opening=self.opening, problem=problem)
        solution = f"<reasoning>\n{working}\n</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer>\n"
        return Problem(prompt, {"answer": answer}, solution.removeprefix(self.opening))

    def reward(self, problem: Problem, completion: str) -> Reward:
        return _RULES[self.reward_rule](problem.fields, completion)


@lru_cache(maxsize=8)
def _problems(path: str | Path | None, split: Split) -> tuple[tuple[str, str, str], ...]:
    return load_problems(path, split, ("HuggingFaceH4/MATH-500", None), _problem)


def _problem(place: str, row: dict[str, Any]) -> tuple[str, str, str]:
    problem, working = row.get("problem"), row.get("solution")
    answer = row.get("answer") or (last_box(working) if isinstance(working, str) else None)
    if not (isinstance(problem, str) and isinstance(working, str) and isinstance(answer, str)) or not (
        problem and working and answer
    ):
        raise ValueError(f"{place}: a MATH row needs the texts problem, solution, and answer or a box in the solution")
    return problem, answer, working


@lru_cache(maxsize=64)
def _template(prompt_format: str | Path) -> Prompt:
    return TEXT if prompt_format == "text" else load_template(prompt_format, needs=("problem",))
