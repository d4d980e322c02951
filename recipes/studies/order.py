"""The order's part of confidence-ranked unmasking in training: the main job with it and without it.

Both arms train the same warmed-up model (one per seed) on 4x4 Sudoku, unquantised and on-policy, their rollouts ranked
as LLaDA ranks them (`confidence`); held-out puzzles are filled in greedily, as in the main job. Finished runs are kept
as one JSON each below `--output_dir`; started again, the script runs what is missing. What the numbers say: order.md.

    python -m recipes.studies.order                        run what is missing, then print the table
    python -m recipes.studies.order --num_steps 60 --seeds 2
"""

from dataclasses import replace
from functools import partial

from dllm_rl.algorithms.correctors import none
from dllm_rl.likelihoods.estimators import trajectory
from dllm_rl.samplers.rules import confidence
from recipes.studies.paired import Study, main
from recipes.sudoku_tiny import recipe

study = Study(
    name="order",
    base=replace(recipe, sampler=partial(recipe.sampler, rank=confidence), corrector=none(), rollout_quantization=None),
    arms={
        "tokens and order": {"likelihood": trajectory()},
        "tokens alone": {"likelihood": trajectory(order="given")},
    },
    against={"tokens and order": "tokens alone"},
    metrics={},
    seeds=5,
    num_steps=120,
)

if __name__ == "__main__":
    main(study, __doc__)
