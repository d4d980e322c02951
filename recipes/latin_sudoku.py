"""A small masked-diffusion model, made here, knows Latin squares; a reward teaches it Sudoku. Results: results.md.

Rollouts are in FP8, TIS corrects their mismatch, and right answers are trained on again.

Supervised training shows 4x4 squares whose rows and columns hold each digit once, all 576 equally often. Only the
reward knows that the boxes count, too. A model that knows the labels' exact probabilities solves 0.548 of the test
puzzles, one cell a step (`recipes.latin_limit`, the dashed line of the picture).
"""

from functools import partial

import torch
from torch import Generator

from dllm_rl import TIS, Float8WeightOnly, MaxProb, Policy, Replay, Trajectory, Unmask, main
from dllm_rl.models.tiny import tiny_masked_lm
from recipes.latin_limit import LATIN, limit
from recipes.sudoku_tiny import NO_DIGITS, draw, learn
from recipes.sudoku_tiny import recipe as few_clues

write = Unmask(max_new_tokens=0, rank=MaxProb(), suppress=NO_DIGITS, temperature=1.0)


def taught_latin(*, seed: int = 0, steps: int = 400, dry_run: bool = False) -> Policy:
    """A model after supervised steps on Latin squares, any cells of which are hidden.

    seed     of the weights, squares and masks
    steps    of AdamW, on 64 squares each
    dry_run  no step: `--dry_run` asks for the size of the model alone
    """
    policy = tiny_masked_lm(characters="1234", seed=seed, hidden_size=64, num_layers=2, intermediate_size=192)
    if not dry_run:
        learn(policy, steps, seed, any_latin)
    return policy


def any_latin(generator: Generator) -> tuple[list[str], list[str]]:
    """64 Latin squares, and no givens: every cell may be hidden."""
    picked = torch.randint(len(LATIN), (64,), generator=generator).tolist()
    return ["0" * 16] * 64, [LATIN[i] for i in picked]


recipe = few_clues.replace(
    name="latin-sudoku",
    model=partial(taught_latin, steps=400),
    sampler=write.replace(diffusion_steps=4),
    eval_sampler=write.replace(diffusion_steps=16),  # one cell a step
    likelihood=Trajectory(),  # ratios exact given the order, which TIS needs
    rollout_quantization=Float8WeightOnly(),
    corrector=TIS(),
    replay=Replay(min_reward=6.0, num_updates=4, learning_rate=2e-3),  # 6: all rules hold
    train_batch_size=16,
    max_retained_graphs=16,
    num_steps=60,
    evaluation={"steps": 10},
)


if __name__ == "__main__":
    draw(main(recipe), recipe, "pretraining data alone, known perfectly", lambda puzzles: float(limit(puzzles)))
