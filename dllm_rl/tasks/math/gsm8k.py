"""GSM8K: school arithmetic in words, answered by one number."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.tasks.loading import Split, check_split, load_problems
from dllm_rl.tasks.math.graders import gsm8k_d1_training, gsm8k_espo, gsm8k_strict, reference_number
from dllm_rl.tasks.prompts import Prompt, check_opening, fill, load_template

TEXT = """Solve this problem step by step. Put your working between <reasoning> and </reasoning>, then the final \
number, and nothing else, between <answer> and </answer>.

{question}"""
_RULES = {"own": gsm8k_strict, "d1": gsm8k_d1_training, "espo": gsm8k_espo}


@dataclass(frozen=True)
class GSM8K:
    """GSM8K in its published form: rows with `question` and `answer`, the number behind "####".

    path           a JSONL or Parquet file, or a folder with one per split; None: `datasets` looks for openai/gsm8k.
    split          "test" is the published one; "validation" is a tenth of the published train rows, by a hash of the
                   question, and "train" the rest.
    size           number of problems, in the file's order; None for all.
    prompt_format  "text": an instruction of ours; a template with {question}, or the path of a file with one.
    chat           one user message (True) or plain text (False).
    opening        the text with which the assistant's turn begins, such as "<reasoning>"; needs chat.
    Value of a completion: "own": 1 when strictly right [ours]; "d1": up to 4 with terms of format [paper]; "espo": 1
    when right by ESPO's reading [paper].
    """

    name: ClassVar[str] = "gsm8k"
    version: ClassVar[str] = "1"

    split: Split = "train"
    path: str | Path | None = None
    size: int | None = None
    prompt_format: str | Path = "text"
    chat: bool = True
    opening: str = ""
    reward_rule: Literal["own", "d1", "espo"] = "own"

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.reward_rule not in _RULES:
            raise ValueError(f"reward_rule={self.reward_rule!r} must be one of {', '.join(map(repr, _RULES))}")
        check_opening(self.opening, chat=self.chat, prompt_format=self.prompt_format)
        _template(self.prompt_format)

    def __len__(self) -> int:
        rows = len(_problems(self.path, self.split))
        return rows if self.size is None else min(self.size, rows)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        question, answer, working = _problems(self.path, self.split)[index]
        prompt = fill(_template(self.prompt_format), chat=self.chat, opening=self.opening, question=question)
        solution = f"<reasoning>\n{working}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"
        return Problem(prompt, {"answer": answer}, solution.removeprefix(self.opening))

    def reward(self, problem: Problem, completion: str) -> Reward:
        return _RULES[self.reward_rule](problem.fields, completion)


@lru_cache(maxsize=8)
def _problems(path: str | Path | None, split: Split) -> tuple[tuple[str, str, str], ...]:
    return load_problems(path, split, ("openai/gsm8k", "main"), _problem)


def _problem(place: str, row: dict[str, Any]) -> tuple[str, str, str]:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(f"{place}: a GSM8K row needs the texts question and answer")
    try:
        reference_number(answer)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    working, _, number = answer.rpartition("####")
    return question, number.strip(), working.strip()


@lru_cache(maxsize=64)
def _template(prompt_format: str | Path) -> Prompt:
    return TEXT if prompt_format == "text" else load_template(prompt_format, needs=("question",))
