"""The study of ESS and harm: the AUC by hand, and which trials have which twin."""

import pytest

from recipes.studies.ess import Trial, auc, late_trials


def trial(ess, loss):
    return Trial(arm="none", kind="lag 1", seed=0, ess=ess, loss=loss, known=0.0, reward=0.0, twins=0.0)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([(0.2, 0.3), (0.9, 0.0)], 1),
        ([(0.9, 0.3), (0.2, 0.0)], 0),
        ([(0.5, 0.3), (0.5, 0.0)], 0.5),
        ([(0.1, 0.3), (0.6, 0.3), (0.5, 0.0), (0.8, -0.1)], 0.75),  # pairs: yes, yes, no, yes
        ([(0.5, 0.1), (0.6, 0.0)], None),  # a loss of 0.1 is no harm, so there is no pair
        ([(0.5, 0.2)], None),
    ],
)
def test_auc_is_the_share_of_pairs_in_order(trials, expected):
    assert auc([trial(*each) for each in trials], lambda each: each.ess) == expected


def test_a_twin_has_the_seed_and_the_rate_and_no_lag():
    runs = [
        {"arm": "lag 0 at 0.0005", "seed": 1, "learning_rate": 5e-4, "after": 0.8, "ess": 1.0, "reward": 2.0},
        {"arm": "lag 0 at 0.001", "seed": 1, "learning_rate": 1e-3, "after": 0.7, "ess": 1.0, "reward": 3.0},
        {"arm": "lag 4, tis at 0.001", "seed": 1, "learning_rate": 1e-3, "after": 0.5, "ess": 0.6, "reward": 2.0},
        {"arm": "lag 4 at 0.001", "seed": 2, "learning_rate": 1e-3, "after": 0.5, "ess": 0.6, "reward": 2.0},  # no twin
        {"arm": "lag 2 at 0.002", "seed": 1, "learning_rate": 2e-3, "after": 0.5, "ess": 0.6, "reward": 2.0},  # no twin
    ]
    (found,) = late_trials(runs, {})
    assert (found.arm, found.kind, found.ess, found.known) == ("tis", "lag 4", 0.6, 4e-3)
    assert found.loss == pytest.approx(0.2) and found.harmed
    assert (found.reward, found.twins) == (2.0, 3.0)
