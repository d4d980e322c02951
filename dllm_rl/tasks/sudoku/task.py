"""Sudoku: generated puzzles without downloads or leaks, graded against every valid completion."""

from dataclasses import dataclass
from functools import cached_property, partial
from math import isqrt
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from dllm_rl.tasks.answers import last_answer
from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.tasks.prompt_texts import BLANK, Prompt, Prompted
from dllm_rl.tasks.rows import (
    Row,
    Split,
    as_range,
    check_settings,
    check_split,
    draw_number,
    hashed_split,
    load_rows,
    parse_rows,
    text_of,
)
from dllm_rl.tasks.sudoku.graders import by_rules, first_cells, score, sudoku_d1_training
from dllm_rl.tasks.sudoku.solver import SPLITS, agreeing, completions, is_completion, random_grid, random_unique_puzzle

TEXT = """Fill in this {side}x{side} Sudoku. Every row, every column and each of the {box}x{box} boxes must contain \
the digits 1 to {side} exactly once; a dot marks an empty cell, and the given digits must stay where they are.

{puzzle}

Think it through first if you like, then write the completed grid, {side} rows of {side} digits, between <answer> and \
</answer>."""
# (side, unique) -> fewest clues, most clues, and when this holds. On 9x9, fewer than 26 take too long to generate.
_CLUES = {(4, False): (0, 16, ""), (4, True): (4, 16, " with unique=True"), (9, True): (26, 81, " on 9x9")}


@dataclass(frozen=True)
class Sudoku(Prompted):
    """Sudoku puzzles; problem i is a pure function of (seed, split, i) and the settings.

    Use it as a first task: no downloads, a dense reward, and completions of a fixed length. Metrics: solve_rate (grids
    with all givens that keep the rules), cell_accuracy (right cells / empty cells: against the nearest right grid,
    under a paper's protocol against the file's solution) and givens_kept.

    Args:
        split: "train" (default), "validation" or "test". Splits share no grid that a puzzle is made from, for any
            seeds; with unique=False they share no puzzle either, except the empty one, but other right answers of a
            puzzle may be grids of another split.
        clues: Number of clues, or an inclusive range that each problem draws from; 9x9 needs at least 26. Default: (10,
            12).
        unique: Whether every puzzle has exactly one completion; 9x9 puzzles always have. False: any number of
            completions, and puzzles with few clues repeat: only 64 puzzles have one clue. Default: True.
        size: Number of problems; fewer if a file has fewer. Default: 10000.
        seed: Seed of the puzzles. Default: 0.
        side: Cells per row, 4 or 9. Default: 4.
        path: CSV or JSONL file of problems with Puzzle and Solution. None (default): generated problems.
        prompt_format: "compact" (default): the cells row by row, a dot for a blank, then "="; answered by the digits of
            the grid. "text": an instruction with the grid in lines, answered between <answer> tags. Otherwise a
            template with {puzzle}, the grid in lines, a dot for a blank, or {cells}, its digits in one line, 0 for a
            blank; or the path of its file.
        infill: Whether the compact puzzle itself is filled in: one token to write in place of each dot, and no "=".
            Default: False.
        chat: Whether "text" and templates are one user message; False: plain text. Default: True.
        opening: Text that begins the assistant's turn, such as "<reasoning>"; needs chat. Default: none.
        reward_rule: "own" (default): solved_weight * solved + match_weight * (share of all cells that agree with the
            best matching completion; if only the empty cells counted, training would let the clues drift) [ours]. "d1":
            empty cells that agree with the reference / empty cells [paper]. "rules": only the rules of the game, for
            puzzles with many right answers; needs no solution and no solver; see `by_rules` [ours].
        solved_weight: Weight of a solved puzzle under "own". Default: 1.
        match_weight: Weight of the matching cells under "own". Default: 4.

    Raises:
        ValueError: A setting is out of its range, or the file is malformed.
    """

    name: ClassVar[str] = "sudoku"
    version: ClassVar[str] = "1"
    text: ClassVar[str] = TEXT
    placeholders: ClassVar[tuple[str, ...]] = ("puzzle|cells",)
    has_compact: ClassVar[bool] = True

    split: Split = "train"
    clues: int | tuple[int, int] = (10, 12)
    unique: bool = True
    size: int = 10_000
    seed: int = 0
    side: int = 4
    path: str | Path | None = None
    prompt_format: str | Path = "compact"
    infill: bool = False
    chat: bool = True
    opening: str = ""
    reward_rule: Literal["own", "d1", "rules"] = "own"
    solved_weight: float = 1.0
    match_weight: float = 4.0

    def __post_init__(self) -> None:
        check_split(self.split)
        fewest, most, when = _CLUES.get((self.side, self.unique), (0, 0, ""))
        # `clues` does not apply to a file's puzzles.
        low, high = as_range(self.clues) if self.path is None else (fewest, most)
        rules = ("own", "d1", "rules") if self.side == 4 else ("own", "rules")
        check_settings(
            (self.side not in (4, 9), f"side={self.side} must be 4 or 9"),
            (fewest == most, "unique=False needs side=4: 9x9 puzzles are always made with one completion"),
            (not fewest <= low <= high <= most, f"clues={self.clues} must lie in {fewest}..{most}{when}"),
            (self.infill and not self.compact, "infill=True needs prompt_format='compact'"),
            (
                self.infill and self.path is None and high == self.side**2,
                f"infill=True with clues={self.clues}: a grid without an empty cell has nothing to fill in; use at "
                f"most {self.side**2 - 1}",
            ),
            (self.size < 1, f"size={self.size} must be at least 1"),
            (self.reward_rule not in rules, f"reward_rule={self.reward_rule!r} must be 'own', 'rules', or on 4x4 'd1'"),
        )
        self.check_prompt()
        if self.reward_rule == "d1" and self._stored and len(self._stored[0][0]) != 16:
            raise ValueError(f"reward_rule='d1' is for 4x4 puzzles, and path={str(self.path)!r} has 9x9; use 'own'")

    def __len__(self) -> int:
        return self.size if self.path is None else min(self.size, len(self._stored))

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        # Only random() is used: Python promises its sequence for a seed, in every version.
        if self.path is not None:
            puzzle, solution = self._stored[index]
        elif self.side == 4:
            puzzle, solution = self._generate_4x4(Random(f"sudoku/{self.seed}/{self.split}/{index}"))
        else:
            puzzle, solution = self._generate_9x9(Random(f"sudoku/9x9/{self.seed}/{self.split}/{index}"))
        fields = {"puzzle": puzzle, "solution": solution}
        if self.infill:
            return Problem(puzzle.replace("0", BLANK), fields, blank=BLANK)
        prompt = self._prompt(puzzle)
        answer = solution if self.compact else f"<answer>\n{lines(solution)}\n</answer>"
        return Problem(prompt, fields, answer.removeprefix(self.opened_layout(prompt)))

    @property
    def content(self) -> tuple[object, ...]:
        return (*super().content, self._stored)

    @cached_property  # a new task reads its file again
    def _stored(self) -> tuple[tuple[str, str], ...]:
        if self.path is None:
            return ()
        return parse_rows(load_rows(self.path), partial(_problem_of, sizes=set(), infill=self.infill))

    def reward(self, problem: Problem, completion: str) -> Reward:
        """Grade the first 16 (9x9: 81) non-blank characters; see `score`. Linear in the text's length."""
        completion = self.opened_layout(problem.prompt) + completion
        if self.reward_rule == "d1":
            return sudoku_d1_training(problem.fields, completion)
        puzzle = problem.fields["puzzle"]
        # A compact completion is the grid itself. In a text only the answer block counts: reasoning has digits, too.
        cells = first_cells(completion if self.compact else last_answer(completion) or "", len(puzzle))
        if self.reward_rule == "rules":
            return by_rules(puzzle, cells)
        return score(puzzle, cells, solved_weight=self.solved_weight, match_weight=self.match_weight)

    def _generate_4x4(self, rng: Random) -> tuple[str, str]:
        """Return a random (puzzle, solution) of the split."""
        grids = SPLITS[self.split]
        solution = grids[int(rng.random() * len(grids))]
        num_clues = draw_number(self.clues, rng)
        puzzle = _blanked(solution, num_clues, rng)
        while self.unique and agreeing(puzzle).bit_count() > 1:
            puzzle = _blanked(solution, num_clues, rng)
        # A puzzle with several completions may agree with grids of two splits. So a hash splits the puzzles, too.
        while not self.unique and num_clues and hashed_split(puzzle) != self.split:
            solution = grids[int(rng.random() * len(grids))]
            puzzle = _blanked(solution, num_clues, rng)
        return puzzle, solution

    def _generate_9x9(self, rng: Random) -> tuple[str, str]:
        num_clues = draw_number(self.clues, rng)
        while True:
            solution = random_grid(rng)  # 9x9 grids are too many to list: a hash assigns them to splits
            if hashed_split(solution) == self.split and (puzzle := random_unique_puzzle(solution, num_clues, rng)):
                return puzzle, solution

    def _prompt(self, puzzle: str) -> Prompt:
        dotted = puzzle.replace("0", ".")
        if self.compact:
            return dotted + "="
        side = isqrt(len(puzzle))
        return self.render_prompt(puzzle=lines(dotted), cells=puzzle, side=str(side), box=str(isqrt(side)))


def _blanked(solution: str, num_clues: int, rng: Random) -> str:
    """Return the 4x4 solution with all cells except `num_clues`, chosen uniformly, set to 0."""
    cells = list(range(16))
    puzzle = ["0"] * 16
    for i in range(num_clues):
        j = i + int(rng.random() * (16 - i))
        cells[i], cells[j] = cells[j], cells[i]
        puzzle[cells[i]] = solution[cells[i]]
    return "".join(puzzle)


def lines(grid: str) -> str:
    """Return the rows of a grid, one per line."""
    side = isqrt(len(grid))
    return "\n".join(grid[start : start + side] for start in range(0, len(grid), side))


def _text(row: Row, name: str) -> str:
    """Return a text field whose name may be capitalized or lower case.

    Raises ValueError if the row has both fields, neither, or a value that is not text.
    """
    if name in row and name.lower() in row:
        raise ValueError(f"{name} and {name.lower()} are both in one row; remove one")
    return text_of(row, name if name in row else name.lower())


def _problem_of(row: Row, sizes: set[int], infill: bool) -> tuple[str, str]:
    """Return (puzzle, solution) of a row. `sizes` holds the number of cells of the rows before it."""
    puzzle = _text(row, "Puzzle").replace(".", "0")
    solution = _text(row, "Solution")
    completions(puzzle)  # raises for an invalid puzzle; it lists the first 64
    if not is_completion(puzzle, solution):
        raise ValueError(f"solution={solution!r} is not a completion of puzzle={puzzle!r}")
    if infill and puzzle == solution:
        raise ValueError(f"puzzle={puzzle!r} has no empty cell, and infill=True has nothing to fill in; leave it out")
    sizes.add(len(puzzle))
    if len(sizes) > 1:
        raise ValueError(f"a puzzle of {len(puzzle)} cells among those of another size; give one file for each size")
    return puzzle, solution
