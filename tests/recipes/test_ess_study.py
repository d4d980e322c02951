"""The study of ESS and harm: the AUC by hand, and which trials have which twin."""

import dataclasses
import json
from itertools import product

import pytest

from recipes.studies import ess_early
from recipes.studies.ess import Trial, auc, late_trials
from recipes.studies.paired import keep, result_path


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
    """All runs of a task: by lag the end, and the ESS of the first steps, which falls with it."""
    runs = []
    for name, seed in product(ess_early.ARMS, ess_early.SEEDS):
        lag = int(name[4])
        steps = {"ess of steps": [1 - lag / 10] * 10 + [0.0] * 70, "reward of steps": [1.0] * 80}
        runs.append({"arm": name, "seed": seed, "after": ends[lag]} | steps)
    return runs


def test_early_trials_stand_beside_their_twins():
    runs = early_runs({0: 0.7, 2: 0.65, 8: 0.2})
    found = ess_early.trials(dict.fromkeys(ess_early.STUDIES, runs))
    assert len(found) == 2 * 72 and sum(trial.harmed for trial in found) == 72, "those of the lag of 8"
    assert {(round(trial.ess, 3), trial.harmed, trial.reward - trial.twins) for trial in found} == {
        (0.8, False, 0.0),
        (0.2, True, 0.0),
    }
    warns, more = ess_early.claim_rows(found)
    assert (warns["found, 95 %"], warns["above 0"], warns["Holm's p"]) == ("0.500±0.000", "8 of 8", "0.016")
    # 8 x 2.5e-4 is 2 x 1e-3: of the 3 x 3 pairs of a cell and a bound one ties, so that what is known has 8.5 / 9.
    assert (more["found, 95 %"], more["above 0"]) == ("0.056±0.000", "8 of 8")
    marks = ess_early.threshold_rows(found)[0]
    assert (marks["below 0.70, harmed"], marks["below 0.70, others"]) == ("72 of 72", "0 of 72")
    assert marks["below 0.95, others"] == "72 of 72"
    row = ess_early.auc_rows(found)[0]
    assert (row["harmed"], row["ESS"], row["known before"], row["reward less the twin's"]) == (
        "36 of 72", "1.00", "0.94", "0.50",
    )  # fmt: skip


def test_pairs_are_of_one_bound():
    late = {"task": "4x4 Sudoku", "seed": 20, "kind": "lag 2", "known": 1e-3, "later": 0.0, "reward": 0.0, "twins": 0.0}
    harmed = ess_early.Early(arm="none", ess=0.1, loss=0.3, **late)
    other = ess_early.Early(arm="two-sided", ess=0.9, loss=0.0, **late)
    assert ess_early.auc_of([harmed, other], "ESS") is None
    assert ess_early.auc_of([harmed, other, dataclasses.replace(other, arm="none", ess=0.05)], "ESS") == 0


def test_without_harm_there_is_no_auc():
    every = ess_early.trials(dict.fromkeys(ess_early.STUDIES, early_runs(dict.fromkeys((0, 2, 8), 0.7))))
    assert ess_early.auc_rows(every)[0]["ESS"] == "-"
    assert ess_early.claim_rows(every)[0]["above 0"] == "0 of 0"


def test_the_steps_of_a_run_are_read_from_its_folder(tmp_path):
    keep(tmp_path, {"arm": "lag 2, none at 0.001", "seed": 20, "after": 0.5})
    folder = tmp_path / "runs" / result_path(tmp_path, "lag 2, none at 0.001", 20).stem
    folder.mkdir(parents=True)
    rows = [{"step": 0, "reward": 1.0, "rollout_corr/ess": 0.9}, {"step": 1, "reward": 2.0, "rollout_corr/ess": 0.8}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = ess_early.with_steps(tmp_path, "lag 2, none at 0.001", 20)
    assert (found["after"], found["ess of steps"], found["reward of steps"]) == (0.5, [0.9, 0.8], [1.0, 2.0])
