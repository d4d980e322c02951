"""The common part of GSM8K and MATH500: questions with a working and a final answer, in a published file."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dllm_rl.tasks.base import Grader, Problem, Reward
from dllm_rl.tasks.prompt_texts import Prompted
from dllm_rl.tasks.rows import Row, Split, check_settings, check_split, load_problems


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
        question, answer, working = self._rows()[index]
        solution = f"<reasoning>\n{working}\n</reasoning>\n<answer>\n{self.final(answer)}\n</answer>\n"
        prompt = self.worded(**{self.placeholders[0]: question})
        return Problem(prompt, {"answer": answer}, solution.removeprefix(self.opening))  # the prompt has the opening

    def reward(self, problem: Problem, completion: str) -> Reward:
        return self.rules[self.reward_rule](problem.fields, completion)

    @staticmethod
    @abstractmethod
    def read_row(place: str, row: Row) -> tuple[str, str, str]:
        """(question, answer, working). Errors: ValueError naming the place."""

    @staticmethod
    def final(answer: str) -> str:
        """The answer as a solution writes it."""
        return answer

    def _rows(self) -> tuple[tuple[Any, ...], ...]:
        return load_problems(self.path, self.split, self.hub, type(self).read_row)
