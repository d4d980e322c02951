"""What a sampler reaches that knows each cell's exact probabilities, and writes several cells at once.

Trained for ever on answers drawn uniformly, a model knows each cell's exact probabilities, given what it sees. Here
they are counted over all 288 grids. The sampler then does as `Unmask` with `MaxProb` at temperature 0.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_rl.rng import generator_for
from dllm_rl.tasks.sudoku.solver import SOLVED

GRIDS = torch.tensor([[int(digit) - 1 for digit in grid] for grid in SOLVED])  # (288, 16), digits from 0
HOLDS = torch.nn.functional.one_hot(GRIDS, 4).flatten(1).double()  # (288, 64)


def ceiling(puzzles: Sequence[str], diffusion_steps: int, *, draws: int = 10) -> float:
    """The share of puzzles that exact probabilities solve in `diffusion_steps` parallel steps, greedily.

    puzzles  16 digits each, 0 for a blank
    draws    ties between cells and between digits are broken at random, so many times; the mean counts
    """
    generator = generator_for(0, "ceiling", diffusion_steps)
    times = Counter(puzzles)  # puzzles of few clues repeat
    rates = {puzzle: _rate(puzzle, diffusion_steps, torch.rand(draws, 16, 4, generator=generator)) for puzzle in times}
    return sum(rates[puzzle] * count for puzzle, count in times.items()) / len(puzzles)


def _rate(puzzle: str, diffusion_steps: int, noise: Float[Tensor, "D 16 4"]) -> float:
    """The share of the draws of the ties in which one puzzle is solved."""
    cells = torch.tensor([int(digit) - 1 for digit in puzzle]).repeat(len(noise), 1)  # -1: blank
    rows = torch.arange(len(noise))[:, None]
    for step in range(diffusion_steps):
        blank = cells < 0
        fits = ((cells[:, None] == GRIDS) | blank[:, None]).all(-1)  # (D, 288): grids that agree with what is written
        counts = (fits.double() @ HOLDS).unflatten(-1, (16, 4))  # of the grids with this digit in this cell
        marginals = counts / fits.sum(-1).clamp(min=1)[:, None, None]  # no grid fits after a contradiction
        best, digits = (marginals + 1e-6 * noise).max(-1)
        count = -(-int(blank[0].sum()) // (diffusion_steps - step))  # as `schedule`: every draw has as many blanks
        places = best.masked_fill(~blank, -1.0).topk(count).indices
        cells[rows, places] = digits[rows, places]
    return (cells[:, None] == GRIDS).all(-1).any(-1).double().mean().item()


def luckiest(puzzle: str) -> bool:
    """Whether SOME choice among equal probabilities, of cells and of digits, solves the puzzle in two steps, greedily.

    For every grid that fits, and every set of cells that the first step may take: are the grid's digits of these cells
    among the likeliest, and those of the others, once these are known?
    """
    cells = torch.tensor([int(digit) - 1 for digit in puzzle])
    fitting = ((cells == GRIDS) | (cells < 0)).all(-1)
    grids, holds = GRIDS[fitting], HOLDS[fitting].unflatten(-1, (16, 4))
    counts = holds.sum(0)
    best = counts.max(-1).values
    blank = (cells < 0).nonzero().flatten().tolist()
    first = -(-len(blank) // 2)  # cells of the first step
    least = sorted((best[cell].item() for cell in blank), reverse=True)[first - 1]
    certain = [cell for cell in blank if best[cell] > least]
    tied = [cell for cell in blank if best[cell] == least]
    likeliest = counts[torch.arange(16), grids] == best  # (N, 16): is the grid's digit a likeliest one?
    for grid, fine in zip(grids, likeliest, strict=True):
        usable = [cell for cell in tied if fine[cell]]
        for more in combinations(usable, first - len(certain)) if fine[certain].all() else ():
            taken = [*certain, *more]
            rest = [cell for cell in blank if cell not in taken]
            then = holds[(grids[:, taken] == grid[taken]).all(-1)].sum(0)[rest]
            if (then[torch.arange(len(rest)), grid[rest]] == then.max(-1).values).all():
                return True
    return False
