"""The study of late rollouts: its tuning by hand, its placebo, and one short run of an arm."""

from dataclasses import replace

import pytest
import torch
from tiny_recipe import tiny_recipe

from dllm_rl.algorithms.correctors import TIS, NoCorrection, TokenStats
from dllm_rl.monitoring.plots import read_metrics
from recipes.studies import late_pretrained, late_rollouts
from recipes.studies.controls import Permuted
from recipes.studies.late_rollouts import AGAIN, TUNED, best_two, widened


def test_rates_are_widened_while_the_best_is_at_an_edge():
    assert widened((1.0, 2.0, 4.0), 2.0) == (1.0, 2.0, 4.0)
    assert widened((1.0, 2.0, 4.0), 1.0) == (0.5, 1.0, 2.0, 4.0)
    assert widened((1.0, 2.0, 4.0), 4.0) == (1.0, 2.0, 4.0, 8.0)


def test_the_second_seed_gets_the_best_rate_and_its_better_neighbor():
    assert best_two({4.0: 0.1, 1.0: 0.2, 2.0: 0.5}) == (2.0, 1.0)
    assert best_two({0.5: 0.9, 1.0: 0.1, 2.0: 0.95, 4.0: 0.3}) == (2.0, 4.0)


def test_the_placebo_has_the_weights_of_tis_at_other_tokens():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    ratios = torch.tensor([[0.5, 3.0, 9.0], [1.5, 9.0, 0.25]])
    none_read = torch.zeros(2, 3)
    stats = TokenStats(ratios.log(), torch.ones(2), mask, none_read, none_read, none_read.int())
    weights, keep, _ = Permuted(corrector=TIS(cap=2.0)).weights(stats)
    # TIS: 0.5, 2 (capped) and 1.5, 0.25. By column and then by row: 0.5, 1.5, 2, 0.25; each goes one place on.
    torch.testing.assert_close(weights, torch.tensor([[0.25, 1.5, 1.0], [0.5, 1.0, 2.0]]))
    assert torch.equal(keep, mask)


def test_the_ess_is_averaged_over_twelve_steps_at_a_time():
    steps = [0.9] * 12 + [0.8] * 12 + [0.7] * 12 + [0.6] * 12
    found = {("FP8", seed): {"ess of steps": [each + seed / 100 for each in steps]} for seed in range(2)}
    (row,) = late_pretrained.quarters(found)
    assert row["arm"] == "FP8" and [row[name][:5] for name in row if name != "arm"] == [
        "0.905",
        "0.805",
        "0.705",
        "0.605",
    ]


@pytest.mark.parametrize(("name", "seed"), [("lag 1, dual clip", 0), (AGAIN, 1001)])
def test_an_arm_runs_with_its_lag_and_seed(name, seed, tmp_path):
    study = late_rollouts.at_rates(late_rollouts.STUDY, dict.fromkeys(TUNED, 1e-3))
    base = tiny_recipe(tmp_path, corrector=NoCorrection(), **late_rollouts.QUIET)
    late_rollouts.run_late(replace(study, base=base), tmp_path, 3, name, seed % 1000)
    ((_, found),) = late_rollouts.load(tmp_path).items()
    assert found["learning_rate"] == 1e-3 and 0 < found["least ess"] <= found["ess"]
    (folder,) = (tmp_path / "runs").iterdir()
    lag = study.arms[name]["max_staleness"]
    assert [row["staleness"] for row in read_metrics(folder)] == [min(lag, step) for step in range(3)]
    assert f'"seed": {seed},' in (folder / "summary.json").read_text()
