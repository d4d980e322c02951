"""MATH500: 500 problems of the MATH test set, answered by a LaTeX expression."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from dllm_rl.tasks.answers import last_box
from dllm_rl.tasks.base import Grader, Problem, Reward
from dllm_rl.tasks.math import math_verify as math_check
from dllm_rl.tasks.math.graders import compare_all, math500_math_verify, math500_strict
from dllm_rl.tasks.math.questions import Questions
from dllm_rl.tasks.rows import Row, Split

TEXT = """Solve this problem step by step. Put your working between <reasoning> and </reasoning>, then the final \
answer as \\boxed{...}, and nothing else, between <answer> and </answer>.

{problem}"""


@dataclass(frozen=True)
class MATH500(Questions):
    """MATH problems in their published form: rows with `problem`, `solution` and, where the file has it, `answer`.

    path           a JSONL or Parquet file, or a folder with one per split; None: HuggingFaceH4/MATH-500 by `datasets`,
                   which has only a test split. For "train" give a file of other MATH problems: "validation" is a tenth
                   of it, by a hash of the problem, and "train" the rest.
    size           number of problems, in the file's order; None: all.
    prompt_format  "text": the built-in instruction; else a template with {problem}, or the path of its file.
    chat           one user message (True) or plain text (False).
    opening        the text with which the assistant's turn begins, such as "<reasoning>"; needs chat.
    reward_rule    "own": 1 when right under the strict protocol [ours]; "espo": 1 when math-verify finds it equal
                   [paper].
    """

    name: ClassVar[str] = "math500"
    version: ClassVar[str] = "3"
    text: ClassVar[str] = TEXT
    placeholders: ClassVar[tuple[str, ...]] = ("problem",)
    hub: ClassVar[tuple[str, str | None]] = ("HuggingFaceH4/MATH-500", None)
    rules: ClassVar[Mapping[str, Grader]] = {"own": math500_strict, "espo": math500_math_verify}

    split: Split = "test"
    reward_rule: Literal["own", "espo"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split != "test" and self.path is None:
            raise ValueError(f"split={self.split!r} needs path=: MATH-500 is a test set; give a file of MATH problems")
        if self.reward_rule == "espo":
            math_check.require()

    def rewards(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Reward]:
        if self.reward_rule == "espo":
            # In parallel; `reward` finds the verdicts remembered.
            compare_all([problem.fields for problem in problems], completions)
        return list(map(self.reward, problems, completions))

    @staticmethod
    def read_row(place: str, row: Row) -> tuple[str, str, str]:
        problem = row.get("problem")
        working = row.get("solution")
        answer = row.get("answer") or (last_box(working) if isinstance(working, str) else None)
        texts = isinstance(problem, str) and isinstance(working, str) and isinstance(answer, str)
        if not (texts and problem and working and answer):
            wanted = "the texts problem, solution, and answer or a box in the solution"
            raise ValueError(f"{place}: a MATH row needs {wanted}")
        return problem, answer, working

    @staticmethod
    def final(answer: str) -> str:
        return f"\\boxed{{{answer}}}"
