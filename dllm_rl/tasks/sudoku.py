"""Sudoku: puzzles without downloads or leaks, graded against every valid completion."""

from dataclasses import dataclass
from functools import lru_cache
from operator import eq
from pathlib import Path
from random import Random
from typing import ClassVar

from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.tasks.grids import SPLITS, Split, completions, count_completions
from dllm_rl.tasks.prompts import Prompt, fill, last_answer, load_template

TEXT = """Fill in this 4x4 Sudoku. Every row, every column and each of the four 2x2 boxes must contain 1, 2, 3 and 4 \
exactly once; a dot marks an empty cell, and the given digits must stay where they are.

{puzzle}

Think it through first if you like, then write the completed grid, four rows of four digits, between <answer> and \
</answer>."""


@dataclass(frozen=True)
class Sudoku:
    """4x4 Sudoku puzzles; problem i is a pure function of (seed, split, i), and of nothing else.

    split          solution grids of train, validation and test are disjoint, whatever the seeds.
    clues          how many digits are given, or an inclusive range that each problem draws from.
    unique         whether every puzzle has exactly one completion; the clues are uniform among those that qualify.
    size           number of problems.
    prompt_format  "compact": 16 characters of digits and dots, then "="; the completion is the 16 digits of the grid.
                   "text": an instruction with the grid in four lines; the answer stands between <answer> tags.
                   A template with {puzzle}, or the path of a file with one: as "text", in those words.
    chat           "text" and templates: one user message (True) or plain text (False).
    Value of a completion: solved_weight * solved + match_weight * (cells of the best matching valid completion)/16.
    All 16 cells count: over the empties alone training lets the givens drift [ours].
    """

    name: ClassVar[str] = "sudoku"
    version: ClassVar[str] = "1"

    split: Split = "train"
    clues: int | tuple[int, int] = (10, 12)
    unique: bool = True
    size: int = 10_000
    seed: int = 0
    prompt_format: str | Path = "compact"
    chat: bool = True
    solved_weight: float = 1.0
    match_weight: float = 4.0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} must be one of {sorted(SPLITS)}")
        low, high = _range(self.clues)
        fewest = 4 if self.unique else 0
        if not fewest <= low <= high <= 16:
            reason = " with unique=True (no puzzle with fewer than 4 has one completion)" if self.unique else ""
            raise ValueError(f"clues={self.clues} must lie in {fewest}..16{reason}")
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1")
        _template(self.prompt_format)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(f"problem {index} of {self.size}")
        # Only random() is used: Python promises its sequence for a seed, in every version and under every hash seed.
        rng = Random(f"sudoku/{self.seed}/{self.split}/{index}")
        grids = SPLITS[self.split]
        solution = grids[int(rng.random() * len(grids))]
        low, high = _range(self.clues)
        given = low + int(rng.random() * (high - low + 1))
        puzzle = _blanked(solution, given, rng)
        while self.unique and count_completions(puzzle) > 1:
            puzzle = _blanked(solution, given, rng)
        return Problem(self._prompt(puzzle), {"puzzle": puzzle, "solution": solution}, self._answer(solution))

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Grades the first 16 non-blank characters: solved when they are a valid completion, else cell by cell.

        `parsed`: the 16 characters are digits 1-4. Other characters match nothing. Linear in the text's length.
        """
        text = completion if self.prompt_format == "compact" else last_answer(completion)
        return score(problem.fields["puzzle"], first_cells(text or ""), self.solved_weight, self.match_weight)

    def _prompt(self, puzzle: str) -> Prompt:
        dotted = puzzle.replace("0", ".")
        if self.prompt_format == "compact":
            return dotted + "="
        return fill(_template(self.prompt_format), chat=self.chat, puzzle=_lines(dotted))

    def _answer(self, solution: str) -> str:
        return solution if self.prompt_format == "compact" else f"<answer>\n{_lines(solution)}\n</answer>"


def first_cells(text: str) -> str:
    """The first 16 characters of the text that are not white space."""
    # 15 splits leave the rest as a 16th piece: the pieces' first 16 characters are all that is asked for.
    return "".join(text.split(None, 15))[:16]


def score(puzzle: str, cells: str, solved_weight: float = 1.0, match_weight: float = 4.0) -> Reward:
    """Compares up to 16 characters with every valid completion of the puzzle.

    solve_rate     1 when they are a valid completion: every rule holds and the givens are kept.
    cell_accuracy  originally empty cells that agree with the best matching completion / empty cells (1 if none).
    givens_kept    the same over the given cells (1 if none).
    """
    grids = completions(puzzle)
    solved = cells in grids
    # The givens are the same in every completion, so the best match over all cells is the best over the empties.
    matching = 16 if solved else max(sum(map(eq, cells, grid)) for grid in grids)
    empty = puzzle.count("0")
    kept = sum(a == b for a, b in zip(cells, puzzle, strict=False) if b != "0")
    breakdown = {
        "solve_rate": float(solved),
        "cell_accuracy": (matching - kept) / empty if empty else 1.0,
        "givens_kept": kept / (16 - empty) if empty < 16 else 1.0,
    }
    parsed = solved or (len(cells) == 16 and not cells.strip("1234"))
    return Reward(solved_weight * solved + match_weight * matching / 16, parsed, breakdown)


def _range(clues: int | tuple[int, int]) -> tuple[int, int]:
    return (clues, clues) if isinstance(clues, int) else clues


def _blanked(solution: str, given: int, rng: Random) -> str:
    """The solution with all but `given` cells, chosen uniformly, set to 0."""
    cells, kept = list(range(16)), ["0"] * 16
    for taken in range(given):
        other = taken + int(rng.random() * (16 - taken))
        cells[taken], cells[other] = cells[other], cells[taken]
        kept[cells[taken]] = solution[cells[taken]]
    return "".join(kept)


def _lines(grid: str) -> str:
    return "\n".join(grid[start : start + 4] for start in range(0, 16, 4))


@lru_cache(maxsize=64)
def _template(prompt_format: str | Path) -> Prompt:
    if prompt_format == "compact":
        return "{puzzle}="
    return TEXT if prompt_format == "text" else load_template(prompt_format, needs=("puzzle",))
