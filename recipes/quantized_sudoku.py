"""GRPO with four-bit rollouts, with and without their correction, beside full precision. Results: results.md.

A small masked-diffusion model, made here, is warmed up on 4x4 Sudoku (sudoku_unique.py). From this one start, three
arms train side by side, each in a process of its own:

unquantized   the learner samples
uncorrected   a copy with NVFP4 weights samples, and its samples count as the learner's own
corrected     the same copy samples, and TIS multiplies each token's gradient by p(learner) / p(copy), cut at 2

Cells are written in random order, which does not depend on the weights, so that TIS can correct what the copy changes.
Options are those of every recipe: `--seed 1`, `--rollout_quantization Int4WeightOnly`, `--corrector AIS`. The table is
of 400 test puzzles that the unquantized learner decodes greedily, and the curves of the picture are of 200 others.
"""

from dataclasses import replace
from pathlib import Path

from dllm_rl import NVFP4, TIS, NoCorrection, RandomOrder, Recipe
from dllm_rl.cli.run_recipe import as_program
from dllm_rl.config import from_command_line
from dllm_rl.files import write_json
from recipes.sudoku_unique import recipe as sudoku

recipe = sudoku.replace(
    name="quantized-sudoku",
    sampler=sudoku.sampler.replace(diffusion_steps=4, rank=RandomOrder()),
    eval_sampler=sudoku.eval_sampler.replace(diffusion_steps=4),  # greedy, the most confident cells first
    rollout_quantization=NVFP4(),
    corrector=TIS(),
    learning_rate=1e-3,
    num_steps=60,
    evaluation={"steps": 10},
)


def arms_of(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of each arm by its name, which is also its folder's.

    Raises:
        ValueError: The recipe quantizes or corrects nothing.
    """
    if recipe.rollout_quantization is None:
        raise ValueError("rollout_quantization=None leaves nothing to compare: choose a scheme, such as NVFP4")
    if recipe.corrector == NoCorrection():
        raise ValueError("corrector=NoCorrection leaves nothing to compare: choose another one, such as TIS")
    uncorrected = replace(recipe, corrector=NoCorrection())
    return {
        "unquantized": replace(uncorrected, rollout_quantization=None),
        "uncorrected": uncorrected,
        "corrected": recipe,
    }


def main(recipe: Recipe) -> None:
    """The job as a program, with the options of a recipe."""
    with as_program():
        recipe = from_command_line(recipe)
        arms = arms_of(recipe)
        from dllm_rl import train, train_arms  # from here on: --help and wrong options need not wait for torch
        from dllm_rl.cli.compare_runs import show
        from dllm_rl.distributed.stop import started_by_command

        with started_by_command():
            if recipe.dry_run:
                train(recipe)
                return
            comparison = train_arms(arms)
        folder = Path(comparison.arms[0].runs[0].folder).parent
        write_json(folder / "arms.json", comparison.as_json())
        comparison.plot(folder / "arms.png")
        show(comparison, folder / "arms.png")
        print(f"\nNumbers: {folder / 'arms.json'}")
        print(f"Doctor:  dllm-rl doctor {folder / 'corrected'}")


if __name__ == "__main__":
    main(recipe)
