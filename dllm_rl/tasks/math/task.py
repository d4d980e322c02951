"""GSM8K and MATH500: questions of a published file, with a working and a final answer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dllm_rl.tasks.answers import last_box
from dllm_rl.tasks.base import Grader, Problem, Reward
from dllm_rl.tasks.math import graders
from dllm_rl.tasks.math.math_verify import require
from dllm_rl.tasks.prompt_texts import Prompted
from dllm_rl.tasks.rows import Row, Split, check_settings, check_split, load_problems

TEXT = """Solve this problem step by step. Put your working between <reasoning> and </reasoning>, then the final \
{answer}, and nothing else, between <answer> and </answer>.

"""
TAGGED = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>\n"  # a solution


@dataclass(frozen=True)
class Questions(Prompted, ABC):
    """The rows of a published file, or of the data set `hub` (name, configuration) by `datasets`."""

    hub: ClassVar[tuple[str, str | None]]
    rules: ClassVar[Mapping[str, Grader]]  # by reward_rule

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
        rows = len(self._rows())
        return rows if self.size is None else min(self.size, rows)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        question, fields, solution = self._rows()[index]
        prompt = self.worded(**{self.placeholders[0]: question})
        return Problem(prompt, fields, solution and solution.removeprefix(self.opening))  # the prompt has the opening

    def reward(self, problem: Problem, completion: str) -> Reward:
        return self.rules[self.reward_rule](problem.fields, completion)

    @staticmethod
    @abstractmethod
    def read_row(place: str, row: Row) -> tuple[str, dict[str, Any], str | None]:
        """(question, the graders' fields, solution or None). Errors: ValueError naming the place."""

    def _rows(self) -> tuple[tuple[Any, ...], ...]:
        return load_problems(self.path, self.split, self.hub, type(self).read_row)


@dataclass(frozen=True)
class GSM8K(Questions):
    """GSM8K in its published form: rows with `question` and `answer`, the number after "####".

    path           a JSONL or Parquet file, or a folder with one per split; None: openai/gsm8k by `datasets`.
    split          "test": the published one; "validation": a tenth of the published train rows, by a hash of the
                   question; "train": the rest.
    size           number of problems, in the file's order; None: all.
    prompt_format  "text": the built-in instruction; else a template with {question}, or the path of its file.
    chat           one user message (True) or plain text (False).
    opening        the text with which the assistant's turn begins, such as "<reasoning>"; needs chat.

    Args:
        reward_rule: "own": 1 when strictly right [ours]; "d1": up to 4, with terms of format [paper]; "espo": 1 when
            right by ESPO's reading [paper].
    """

    name: ClassVar[str] = "gsm8k"
    version: ClassVar[str] = "3"
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
    def read_row(place: str, row: Row) -> tuple[str, dict[str, Any], str]:
        question = row.get("question")
        answer = row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
            raise ValueError(f"{place}: a GSM8K row needs the texts question and answer")
        try:
            graders.reference_number(answer)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        working, _, number = answer.rpartition("####")
        return question, {"answer": number.strip()}, TAGGED.format(working.strip(), number.strip())


@dataclass(frozen=True)
class MATH500(Questions):
    """MATH problems in their published form: rows with `problem`, `solution` and, where the file has it, `answer`.
    Or those of AIME, AMC and olympiads, in a file of yours: `problem` and `answer`, a text or a whole number.

    path           as for GSM8K; None: HuggingFaceH4/MATH-500 by `datasets`, which has only a test split. For "train"
                   give a file of other MATH problems: "validation" is a tenth of it, by a hash of the problem, and
                   "train" the rest.
    prompt_format  as for GSM8K, with {problem}; size, chat and opening, too.

    Args:
        reward_rule: "own": 1 when right under the strict protocol [ours]; "espo": 1 when math-verify finds it equal
            [paper].
    """

    name: ClassVar[str] = "math500"
    version: ClassVar[str] = "4"
    text: ClassVar[str] = TEXT.replace("{answer}", "answer as \\boxed{...}") + "{problem}"
    placeholders: ClassVar[tuple[str, ...]] = ("problem",)
    hub: ClassVar[tuple[str, str | None]] = ("HuggingFaceH4/MATH-500", None)
    rules: ClassVar[Mapping[str, Grader]] = {"own": graders.math500_strict, "espo": graders.math500_math_verify}

    split: Split = "test"
    reward_rule: Literal["own", "espo"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split != "test" and self.path is None:
            raise ValueError(f"split={self.split!r} needs path=: MATH-500 is a test set; give a file of MATH problems")
        if self.reward_rule == "espo":
            require()

    def rewards(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Reward]:
        if self.reward_rule == "espo":
            # In parallel; `reward` finds the verdicts remembered.
            graders.compare_all([problem.fields for problem in problems], completions)
        return list(map(self.reward, problems, completions))

    @staticmethod
    def read_row(place: str, row: Row) -> tuple[str, dict[str, Any], str | None]:
        problem: Any = row.get("problem")
        working: Any = row.get("solution")
        answer: Any = row.get("answer")
        if type(answer) in (int, float) and answer % 1 == 0:
            answer = str(int(answer))  # some files have 73.0
        answer = answer or (last_box(working) if isinstance(working, str) else None)
        if not all(isinstance(text, str) and text.strip() for text in (problem, answer, working or "none")):
            raise ValueError(f"{place}: a MATH row needs texts: problem, and answer or a solution with a box")
        return problem, {"answer": answer}, TAGGED.format(working, f"\\boxed{{{answer}}}") if working else None
