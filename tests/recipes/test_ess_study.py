"""The study of ESS and harm: the AUC by hand, and which trials have which twin."""

import pytest

from recipes.studies import ess_early
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


def early_runs(ends):
    """A cell's runs: by lag the end, and an ESS of the first steps that falls with it; later steps are not read."""
    runs = {}
    for name in ess_early.ARMS:
        lag = int(name[4])
        for seed in ess_early.SEEDS:
            steps = [1 - lag / 10] * 10 + [0.0] * 70
            runs[name, seed] = {
                "arm": name, "seed": seed, "after": ends[lag], "ess of steps": steps, "reward of first steps": 1.0,
            }  # fmt: skip
    return runs


def test_early_trials_stand_beside_their_twins():
    runs = early_runs({0: 0.7, 2: 0.69, 4: 0.65, 8: 0.2})
    found = ess_early.trials(runs)
    assert len(found) == 72 and sum(trial.harmed for trial in found) == 24, "the lag of 8"
    assert {(trial.kind, round(trial.ess, 3)) for trial in found} == {("lag 2", 0.8), ("lag 4", 0.6), ("lag 8", 0.2)}
    stored = {"a": list(runs.values()), "b": list(runs.values())}
    warns, more = ess_early.claim_rows(stored)
    assert (warns["found, 95 %"], warns["above 0"], warns["Holm's p"]) == ("0.500±0.000", "8 of 8", "0.016")
    # 8 x 5e-4 is 4 x 1e-3: of a cell's 6 x 12 pairs 3 x 3 tie, so that lag times rate has an AUC of 1 - 4.5 / 72
    assert (more["found, 95 %"], more["above 0"]) == ("0.062±0.000", "8 of 8")
    marks = ess_early.threshold_rows(stored)[0]
    assert (marks["ESS below 0.70, harmed"], marks["ESS below 0.70, others"]) == ("48 of 48", "48 of 96")
    assert marks["ESS below 0.95, others"] == "96 of 96"


def test_a_cell_without_harm_has_no_auc():
    runs = early_runs({0: 0.7, 2: 0.7, 4: 0.7, 8: 0.7})
    assert ess_early.auc_rows({"a": list(runs.values())})[0]["ESS"] == "-"
