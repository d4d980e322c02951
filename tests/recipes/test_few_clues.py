"""The few-clues task and what exact probabilities reach on it, worked by hand."""

from pathlib import Path

import pytest
import torch
from small_sudoku import GRID

from dllm_rl.config import override
from dllm_rl.rng import generator_for
from dllm_rl.tasks.sudoku.solver import SPLITS, completions
from dllm_rl.training.summary import Summary
from recipes import latin_sudoku, sudoku_tiny
from recipes.perfect import ceiling
from recipes.sudoku_tiny import any_grids, taught

# Two digits swap in two rows and two columns: two completions, which differ in all of the four blank cells.
RECTANGLE = "0204040221434321"


@pytest.mark.parametrize(
    ("puzzle", "steps", "rate"),
    [
        (GRID, 1, 1.0),  # nothing is blank
        ("0" + GRID[1:], 1, 1.0),
        ("1234341200430021", 1, 1.0),  # four blank cells, and one completion
        (RECTANGLE, 1, 2 / 16),  # each cell takes one of two digits at random: two of the sixteen ways are right
        (RECTANGLE, 2, 1 / 2),  # the first two agree in half of the cases, and then the others are known
        (RECTANGLE, 4, 1.0),  # one cell a step, and the next one sees it
        ("0" * 16, 16, 1.0),
    ],
)
def test_the_ceiling_worked_by_hand(puzzle, steps, rate):
    assert len(completions(RECTANGLE)) == 2
    assert ceiling([puzzle], steps, draws=4000) == pytest.approx(rate, abs=0 if rate == 1 else 0.03)


def test_the_ceiling_is_the_mean_over_puzzles_also_where_they_repeat():
    alone = ceiling([RECTANGLE], 2, draws=50)
    assert ceiling([RECTANGLE, RECTANGLE, GRID], 2, draws=50) == pytest.approx((2 * alone + 1) / 3)


def test_the_seed_makes_the_model_and_its_lessons():
    first, again, other = (taught(seed=seed, steps=2).module.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    puzzles, grids = any_grids(generator_for(0, "lesson", 0))
    assert set(puzzles) == {"0" * 16} and set(grids) <= set(SPLITS["train"])


@pytest.mark.parametrize("module", [sudoku_tiny, latin_sudoku])
@pytest.mark.parametrize(
    ("words", "is_drawn"),
    [
        ("--num_steps 7", True),
        ("--eval_task.clues 5,7", False),
        ("--eval_task.size 60", False),
        ("--eval_sampler.diffusion_steps 3", False),
    ],
)
def test_a_level_is_drawn_of_the_puzzles_and_sampler_of_the_run_alone(module, words, is_drawn, monkeypatch):
    drawn = []
    monkeypatch.setattr(sudoku_tiny, "plot", lambda run, *, levels: drawn.append((run, levels)))
    changed = override(module.recipe, words.split())
    summary = Summary({"checkpoint": "run/checkpoints/step-000001", "recipe": changed.settings()})
    sudoku_tiny.draw(summary, module.recipe, "level", len)
    assert drawn == [(Path("run"), {"level": 400} if is_drawn else None)]
