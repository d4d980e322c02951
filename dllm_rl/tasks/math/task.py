"""GSM8K and MATH500: questions of a published file, with a solution and a final answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from dllm_rl.tasks.answers import last_box, without_delimiters
from dllm_rl.tasks.base import Grader, Problem, Reward
from dllm_rl.tasks.math import graders
from dllm_rl.tasks.math.math_verify import require
from dllm_rl.tasks.prompt_texts import Prompted
from dllm_rl.tasks.rows import Row, Split, check_settings, check_split, load_problems

TEXT = """Solve this problem step by step. Put your working between <reasoning> and </reasoning>, then the final \
{answer}, and nothing else, between <answer> and </answer>.

"""
SOLUTION = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>\n"


@dataclass(frozen=True)
class Questions(Prompted, ABC):
    """Base of tasks whose problems are the rows of a file, or of the hub's data set `hub` (name, configuration)."""

    opened_tags: ClassVar[tuple[str, ...]] = ("<reasoning>", "<answer>")
    hub: ClassVar[tuple[str, str | None]]
    rules: ClassVar[Mapping[str, Grader]]  # grader by reward_rule
    # By reward_rule: a function (fields, completions) -> None that does the slow part of many grades in parallel, and
    # caches it for the grader.
    prepare: ClassVar[Mapping[str, Callable[[Sequence[Mapping[str, Any]], Sequence[str]], None]]] = {}

    split: Split = "train"
    path: str | Path | None = None
    size: int | None = None
    prompt_format: str | Path = "text"
    chat: bool = True
    opening: str = ""

    def __post_init__(self) -> None:
        check_split(self.split)
        rules = ", ".join(map(repr, self.rules))
        check_settings((self.reward_rule not in self.rules, f"reward_rule={self.reward_rule!r} must be one of {rules}"))
        self.check_prompt()

    def __len__(self) -> int:
        rows = len(self._rows)
        return rows if self.size is None else min(self.size, rows)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        question, fields, solution = self._rows[index]
        prompt = self.render_prompt(**{self.placeholders[0]: question})
        return Problem(prompt, fields, solution and solution.removeprefix(self.opened_layout(prompt) or self.opening))

    def reward(self, problem: Problem, completion: str) -> Reward:
        return self.rules[self.reward_rule](problem.fields, self.opened_layout(problem.prompt) + completion)

    def rewards(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Reward]:
        if self.reward_rule in self.prepare:
            pairs = zip(problems, completions, strict=True)
            opened = [self.opened_layout(problem.prompt) + completion for problem, completion in pairs]
            self.prepare[self.reward_rule]([problem.fields for problem in problems], opened)
        return list(map(self.reward, problems, completions))

    @staticmethod
    @abstractmethod
    def read_row(row: Row) -> tuple[str, dict[str, Any], str | None]:
        """Return (question, the grader's fields, solution or None) of a row. Raises ValueError if it is malformed."""

    @property
    def content(self) -> tuple[Any, ...]:
        return (*super().content, self._rows)

    @cached_property  # a new task reads its file again
    def _rows(self) -> tuple[tuple[Any, ...], ...]:
        return load_problems(self.path, self.split, self.hub, type(self).read_row)


@dataclass(frozen=True)
class GSM8K(Questions):
    """GSM8K in its published form: rows with `question` and `answer`, the number after "####".

    Use it for grade-school word problems whose answer is one number.

    Args:
        path: JSONL or Parquet file, or a folder with one file per split. None (default): openai/gsm8k by `datasets`.
        split: "test": the published test rows; "validation": a tenth of the published train rows, by a hash of the
            question; "train" (default): the remaining train rows.
        size: Number of problems, in the file's order. None (default): all.
        prompt_format: "text" (default): the built-in instruction. Otherwise a template with {question}, or the path of
            its file.
        chat: Whether the prompt is one user message; False: plain text. Default: True.
        opening: Text that begins the assistant's turn, such as "<reasoning>"; needs chat. Default: none.
        reward_rule: "own" (default): 1 if strictly right [ours]; "d1": up to 4, with terms for the format [paper];
            "espo": 1 if right by ESPO's reading [paper].

    Raises:
        ValueError: A setting is unknown, or a row is malformed.
    """

    name: ClassVar[str] = "gsm8k"
    version: ClassVar[str] = "5"
    text: ClassVar[str] = TEXT.replace("{answer}", "number") + "{question}"
    placeholders: ClassVar[tuple[str, ...]] = ("question",)
    hub: ClassVar[tuple[str, str | None]] = ("openai/gsm8k", "main")
    rules: ClassVar[Mapping[str, Grader]] = {
        "own": graders.gsm8k_strict,
        "d1": graders.gsm8k_d1_training,
        "espo": graders.gsm8k_espo,
    }

    reward_rule: Literal["own", "d1", "espo"] = "own"

    @staticmethod
    def read_row(row: Row) -> tuple[str, dict[str, Any], str]:
        question = row.get("question")
        answer = row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
            raise ValueError("a GSM8K row needs the texts question and answer")
        graders.reference_number(answer)  # raises ValueError if it is not a number
        working, _, number = answer.rpartition("####")
        number = without_delimiters(number)
        return question, {"answer": number}, SOLUTION.format(working.strip(), number)


@dataclass(frozen=True)
class MATH500(Questions):
    """MATH problems in their published form: rows with `problem`, `solution` and, optionally, `answer`.

    Use it for problems whose answer is LaTeX. Problems of AIME, AMC and olympiads fit too, in your file: `problem` and
    `answer`, a text or an integer.

    Args:
        path: JSONL or Parquet file, or a folder with one file per split. None (default): HuggingFaceH4/MATH-500 by
            `datasets`, which has only a test split.
        split: "test" (default); with a file of other MATH problems also "validation", a tenth of its rows by a hash of
            the problem, and "train", the remaining rows.
        size: Number of problems, in the file's order. None (default): all.
        prompt_format: "text" (default): the built-in instruction. Otherwise a template with {problem}, or the path of
            its file.
        chat: Whether the prompt is one user message; False: plain text. Default: True.
        opening: Text that begins the assistant's turn, such as "<reasoning>"; needs chat. Default: none.
        reward_rule: "own" (default): 1 if right under the strict protocol [ours]; "espo": 1 if math-verify finds it
            equal [paper].

    Raises:
        ValueError: A setting is unknown, a row is malformed, or another split than "test" has no path.
        ImportError: reward_rule="espo" without the package math-verify.
    """

    name: ClassVar[str] = "math500"
    version: ClassVar[str] = "9"
    text: ClassVar[str] = TEXT.replace("{answer}", "answer as \\boxed{...}") + "{problem}"
    placeholders: ClassVar[tuple[str, ...]] = ("problem",)
    hub: ClassVar[tuple[str, str | None]] = ("HuggingFaceH4/MATH-500", None)
    rules: ClassVar[Mapping[str, Grader]] = {"own": graders.math500_strict, "espo": graders.math500_math_verify}
    prepare: ClassVar[Mapping[str, Any]] = {"espo": graders.compare_all}

    split: Split = "test"
    reward_rule: Literal["own", "espo"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split != "test" and self.path is None:
            raise ValueError(f"split={self.split!r} needs path=: MATH-500 is a test set; give a file of MATH problems")
        if self.reward_rule == "espo":
            require()

    @staticmethod
    def read_row(row: Row) -> tuple[str, dict[str, Any], str | None]:
        problem: Any = row.get("problem")
        working: Any = row.get("solution")
        answer: Any = row.get("answer")
        if type(answer) in (int, float) and answer % 1 == 0:
            answer = str(int(answer))  # some files write 73 as 73.0
        given: Any = answer or (last_box(working) if isinstance(working, str) else None)
        if not all(isinstance(text, str) and text.strip() for text in (problem, given, working or "none")):
            raise ValueError("a MATH row needs texts: problem, and answer or a solution with a box")
        answer = graders.reference_answer(answer) if answer else without_delimiters(given)
        return problem, {"answer": answer}, SOLUTION.format(working, f"\\boxed{{{answer}}}") if working else None
