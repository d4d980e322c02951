"""What a sampler reaches that knows each cell's exact probabilities, and writes several cells at once.

Trained for ever on answers drawn uniformly, a model knows each cell's exact probabilities, given what it sees. Here
they are counted over all 288 grids. The sampler then does as `Unmask` with `MaxProb` at temperature 0.
"""

from collections import Counter
from collections.abc import Sequence

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
