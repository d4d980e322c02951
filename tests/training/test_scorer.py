"""Which groups are scored, and where the log-probs of both sides come from."""

import pytest
import torch
from tiny_recipe import tiny_recipe

from dllm_rl.algorithms.correctors import aligned, qarl, tis
from dllm_rl.likelihoods import coupled, trajectory
from dllm_rl.training.scorer import learned_groups, sides


@pytest.mark.parametrize("changes", [{"beta": 0.1}, {"entropy_coeff": 0.1}])
def test_a_term_of_every_row_learns_from_groups_of_equal_rewards_too(tmp_path, changes):
    advantages = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert learned_groups(tiny_recipe(tmp_path), advantages).tolist() == [True, False]
    assert learned_groups(tiny_recipe(tmp_path, **changes), advantages).tolist() == [True, True]


@pytest.mark.parametrize(
    ("changes", "copied", "rollout", "aligns"),
    [
        ({"likelihood": trajectory()}, True, "recorded", False),
        ({"likelihood": trajectory()}, False, "recorded", False),
        ({"likelihood": trajectory(num_segments=2)}, True, "scored", False),
        ({"likelihood": coupled()}, True, "scored", False),
        ({"likelihood": coupled()}, False, "learner", False),
        ({"corrector": tis()}, True, "recorded", False),
        ({"corrector": aligned()}, True, "recorded", True),
        ({"corrector": qarl()}, False, "recorded", False),  # without a copy there is nothing to align with
    ],
)
def test_where_log_probs_come_from(changes, copied, rollout, aligns, tmp_path):
    recipe = tiny_recipe(tmp_path, **changes)
    policy = recipe.model()
    rollout_policy = recipe.model() if copied else policy
    assert sides(recipe, policy, rollout_policy) == (rollout, aligns)
