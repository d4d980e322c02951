"""sudoku_tiny.py with rollouts in a process of their own, one step late: while the learner trains on a batch, a Ray
worker makes the next one, with the weights before the update. `pip install -e ".[ray]"` first.

    accelerate launch --config_file recipes/accelerate/cpu.yaml --num_cpu_threads_per_process 1 recipes/async_sudoku.py

One thread each, for two cores: the worker takes as many threads as the learner. Ratios are against the weights that
sampled, and PPO's clip bounds them from both sides: of what was tried against a lag, that did best
(recipes/studies/late/README.md).
"""

from dataclasses import replace

from dllm_rl import PPOClip, main
from dllm_rl.groups import Late
from recipes.sudoku_tiny import recipe as base

recipe = replace(
    base,
    name="async-sudoku",
    late=Late(workers=1, max_staleness=1),
    old_logprobs="rollout",
    loss=PPOClip(delta=1.2),
)

if __name__ == "__main__":
    main(recipe)
