"""reasoning-gym's generators as a task, with graders of this library.

reasoning-gym's own scorers are not used, because they evaluate code that a model writes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from dllm_rl.tasks.answers import final_answer
from dllm_rl.tasks.base import Grader, Problem, Reward
from dllm_rl.tasks.countdown import graders as countdown
from dllm_rl.tasks.math import graders as math
from dllm_rl.tasks.prompt_texts import BLANK, Prompted
from dllm_rl.tasks.rows import Split, check_settings, check_split, hashed_split, text_of
from dllm_rl.tasks.sudoku import graders as sudoku
from dllm_rl.tasks.sudoku.task import lines

MAX_TRIES = 1000  # generated entries per problem before giving up

Fields = Mapping[str, Any]
# (question, grader's fields, right answer, text whose hash decides the split, answer with blanks for infilling or "").
GeneratedProblem = tuple[str, dict[str, Any], str, str, str]


def exact(fields: Fields, completion: str) -> Reward:
    """Check that the strict answer (`final_answer`) equals `answer` [ours].

    Case, surrounding blanks and a final period are ignored.
    """
    answer = (final_answer(completion) or "").removesuffix(".").strip().casefold()
    value = float(answer != "" and answer == fields["answer"].casefold())
    return Reward(value, answer != "", {"accuracy": value})


def _parse_entry(entry: Fields) -> GeneratedProblem:
    """Convert an entry of the generator to a problem."""
    question = entry["question"]
    answer = entry["answer"]
    metadata = entry["metadata"]
    if "numbers" in metadata:
        fields = {"numbers": metadata["numbers"], "target": metadata.get("target", 24)}
        return question, fields, answer, repr(sorted(metadata["numbers"])), ""
    if "puzzle" in metadata:
        puzzle = _joined(metadata["puzzle"])
        solution = _joined(metadata["solution"])
        blanks = lines(puzzle.replace("0", BLANK))
        return question, {"puzzle": puzzle, "solution": solution}, answer, solution, blanks
    return question, {"answer": str(answer)}, str(answer), question, ""


def _joined(grid: Sequence[Sequence[int]]) -> str:
    return "".join(map(str, chain.from_iterable(grid)))


# Generator -> its grader, and the function that reads the grader's fields from a stored row.
KINDS: dict[str, Any] = {
    **dict.fromkeys(("mini_sudoku", "sudoku"), (sudoku.sudoku_strict, sudoku.read_fields)),
    **dict.fromkeys(("countdown", "puzzle24"), (countdown.countdown_strict, countdown.read_fields)),
    "gsm_symbolic": (math.gsm8k_strict, math.read_gsm8k),
    "zebra_puzzles": (exact, lambda row, _: {"answer": text_of(row, "answer")}),
}


def _grader_and_reader(generator: str) -> tuple[Grader, Callable[[Fields, str], dict[str, Any]]]:
    if generator not in KINDS:
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"generator={generator!r} must be one of {known}: only these have graders of ours")
    return KINDS[generator]


def gym_strict(fields: Fields, completion: str) -> Reward:
    """Grade by the strict grader of the generator that the field `generator` names [ours]."""
    return _grader_and_reader(fields["generator"])[0](fields, completion)


def read_fields(row: Fields, protocol: str) -> dict[str, Any]:
    """Read the generator and its grader's fields of a stored row. Raises ValueError if they are malformed."""
    generator = text_of(row, "generator")
    return {"generator": generator} | _grader_and_reader(generator)[1](row, protocol)


@dataclass(frozen=True)
class ReasoningGym(Prompted):
    """Problems of a reasoning-gym generator with strict graders; problem i depends only on seed, split, i and the
    settings.

    Use it for generated puzzles and logic problems; it needs the package reasoning-gym.

    Args:
        generator: Name of the generator. Default: "mini_sudoku".
        size: Number of problems. Default: 1000.
        seed: Seed of the problems. Default: 0.
        settings: Settings of the generator, such as its difficulty, as JSON: '{"num_people": 3}'. Default: "{}".
        split: "train" (default), "validation" or "test". Splits share no solution grid (Sudoku), set of numbers
            (Countdown, puzzle24) or question: 70, 10 and 20 in 100, by a hash.
        infill: Whether the prompt ends in the answer with a blank per empty cell: both Sudokus. Default: False.
        prompt_format: "text" (default): the built-in instruction. Otherwise a template with {question}, or the path of
            its file.
        chat: Whether the prompt is one user message; False: plain text. Default: True.
        opening: Text that begins the assistant's turn, such as "<reasoning>"; needs chat. Default: none.

    Raises:
        ValueError: A setting is unknown, or no problem of the split was generated in 1000 tries.
        ImportError: The package reasoning-gym is not installed.
    """

    name: ClassVar[str] = "reasoning_gym"
    version: ClassVar[str] = "2"
    text: ClassVar[str] = "{question}\n\nWrite the final answer between <answer> and </answer>."
    placeholders: ClassVar[tuple[str, ...]] = ("question",)

    generator: str = "mini_sudoku"
    size: int = 1000
    seed: int = 0
    settings: str = "{}"
    split: Split = "train"
    infill: bool = False
    prompt_format: str | Path = "text"
    chat: bool = True
    opening: str = ""

    def __post_init__(self) -> None:
        check_split(self.split)
        _grader_and_reader(self.generator)
        self.check_prompt()
        *_, blanks = _generate(self.generator, self.settings, self.seed, self.split, 0)  # raises on a wrong setting
        check_settings(
            (self.size < 1, f"size={self.size} must be at least 1"),
            (self.infill and not blanks, "infill=True needs a generator with a grid to fill in"),
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(f"problem {index} of {self.size}")
        question, fields, answer, _, blanks = _generate(self.generator, self.settings, self.seed, self.split, index)
        if self.infill:
            return Problem(self.render_prompt(blanks, question=question), fields, blank=BLANK)
        return Problem(self.render_prompt(question=question), fields, f"<answer>\n{answer}\n</answer>")

    def reward(self, problem: Problem, completion: str) -> Reward:
        return gym_strict(problem.fields, completion)


@lru_cache(maxsize=4096)
def _generate(generator: str, settings: str, seed: int, split: Split, index: int) -> GeneratedProblem:
    try:
        import reasoning_gym
    except ImportError:
        raise ImportError("ReasoningGym needs the reasoning-gym package: pip install 'dllm_rl[gym]'") from None
    # Only random() is used: Python promises its sequence for a seed, in every version.
    rng = Random(f"reasoning_gym/{generator}/{seed}/{split}/{index}")
    for _ in range(MAX_TRIES):
        entry_seed = int(rng.random() * 2**53)
        try:
            entry = reasoning_gym.create_dataset(generator, seed=entry_seed, size=1, **json.loads(settings))[0]
        except (AssertionError, TypeError, ValueError) as error:  # the package raises these for a wrong setting
            raise ValueError(
                f"settings={settings!r} of {generator}: {error}; give the generator's settings as JSON"
            ) from None
        problem = _parse_entry(entry)
        if hashed_split(problem[3]) == split:
            return problem[0], {"generator": generator} | problem[1], *problem[2:]
    raise ValueError(f"settings={settings!r}: no problem of split {split!r} in {MAX_TRIES} tries; widen them")
