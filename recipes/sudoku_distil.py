"""sudoku_tiny.py without its reward: the model learns to write in two steps from itself, writing in eight.

The teacher is the supervised model before RL, frozen. It scores each completion as it would have written it: each of
the student's two steps becomes up to four, and cells of one of them are seen by the next. Digits that contradict each
other are unlikely then, and no rule of the game is needed to say so. The task's rewards are measured, and not used.

    accelerate launch --config_file recipes/accelerate/cpu.yaml --num_cpu_threads_per_process 2 recipes/sudoku_distil.py

The teacher beside the reward, which ended lower: --teacher_coeff 0.02. One cell at a time, sixteen steps:
--teacher_substeps 8. What each of them reaches: recipes/studies/distillation.md.
"""

from dataclasses import replace

from dllm_rl import main
from recipes.sudoku_tiny import recipe as base

recipe = replace(
    base,
    name="sudoku-distil",
    teacher="reference",
    teacher_substeps=4,
    entropy_coeff=0.0,  # the reverse KL has an entropy of its own
    learning_rate=1e-3,
    num_steps=50,
    eval_steps=10,
)

if __name__ == "__main__":
    main(recipe)
