"""reasoning-gym's generators as a task."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, ClassVar

from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.tasks.countdown.graders import countdown_strict
from dllm_rl.tasks.math.graders import gsm8k_strict
from dllm_rl.tasks.sudoku.graders import sudoku_strict


def _sudoku_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    rows = entry["metadata"]
    return {name: "".join(map(str, chain.from_iterable(rows[name]))) for name in ("puzzle", "solution")}


def _countdown_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"numbers": list(entry["metadata"]["numbers"]), "target": entry["metadata"]["target"]}


# Each generator's way from its entry to our grader's fields, and the grader.
_GYM = {
    "mini_sudoku": (_sudoku_fields, sudoku_strict),
    "sudoku": (_sudoku_fields, sudoku_strict),
    "countdown": (_countdown_fields, countdown_strict),
    "gsm_symbolic": (lambda entry: {"answer": str(entry["answer"])}, gsm8k_strict),
}


@dataclass(frozen=True)
class ReasoningGym:
    """A reasoning-gym generator with our strict graders (its own scorers evaluate model text).

    generator  "mini_sudoku", "sudoku", "countdown" or "gsm_symbolic".
    settings   of the generator, as JSON: '{"min_numbers": 3, "max_numbers": 3}'.
    The prompt is the generator's question and a line that asks for <answer> tags. Value: 1 when right, else 0.
    """

    version: ClassVar[str] = "1"

    generator: str
    size: int = 1000
    seed: int = 0
    settings: str = "{}"

    def __post_init__(self) -> None:
        if self.generator not in _GYM:
            known = ", ".join(map(repr, _GYM))
            raise ValueError(f"generator={self.generator!r} must be one of {known}: only these have graders of ours")
        _generated(self.generator, self.size, self.seed, self.settings)  # a wrong setting is found here

    @property
    def name(self) -> str:
        return f"reasoning_gym/{self.generator}"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(f"problem {index} of {self.size}")
        entry = _generated(self.generator, self.size, self.seed, self.settings)[index]
        asked = f"{entry['question']}\n\nWrite the final answer between <answer> and </answer>."
        fields = _GYM[self.generator][0](entry)
        return Problem([{"role": "user", "content": asked}], fields, f"<answer>\n{entry['answer']}\n</answer>")

    def reward(self, problem: Problem, completion: str) -> Reward:
        return _GYM[self.generator][1](problem.fields, completion)


@lru_cache(maxsize=8)
def _generated(generator: str, size: int, seed: int, settings: str) -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ImportError("ReasoningGym needs the reasoning-gym package: pip install 'dllm_rl[gym]'") from None
    return reasoning_gym.create_dataset(generator, size=size, seed=seed, **json.loads(settings))
