"""GSM8K: school arithmetic in words, answered by one number."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from dllm_rl.tasks.base import Grader
from dllm_rl.tasks.math.graders import gsm8k_d1_training, gsm8k_espo, gsm8k_strict, reference_number
from dllm_rl.tasks.math.questions import Questions
from dllm_rl.tasks.rows import Row

TEXT = """Solve this problem step by step. Put your working between <reasoning> and </reasoning>, then the final \
number, and nothing else, between <answer> and </answer>.

{question}"""


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
    reward_rule    "own": 1 when strictly right [ours]; "d1": up to 4, with terms of format [paper]; "espo": 1 when
                   right by ESPO's reading [paper].
    """

    name: ClassVar[str] = "gsm8k"
    version: ClassVar[str] = "2"
    text: ClassVar[str] = TEXT
    placeholders: ClassVar[tuple[str, ...]] = ("question",)
    hub: ClassVar[tuple[str, str | None]] = ("openai/gsm8k", "main")

    rules: ClassVar[Mapping[str, Grader]] = {"own": gsm8k_strict, "d1": gsm8k_d1_training, "espo": gsm8k_espo}

    reward_rule: Literal["own", "d1", "espo"] = "own"

    @staticmethod
    def read_row(place: str, row: Row) -> tuple[str, str, str]:
        question = row.get("question")
        answer = row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise ValueError(f"{place}: a GSM8K row needs the texts question and answer")
        try:
            reference_number(answer)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        working, _, number = answer.rpartition("####")
        return question, number.strip(), working.strip()
