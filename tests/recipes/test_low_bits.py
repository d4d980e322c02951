"""The studies of four-bit rollouts: statistics of gradients by hand, their control, and which runs count."""

import math

import pytest
import torch
from tiny_recipe import tiny_recipe

from dllm_rl import AIS, Lora, MaxProb, NoCorrection, RandomOrder, Trajectory
from dllm_rl.files import read_json, write_json
from dllm_rl.testing import make_stats
from recipes.smollm2_diffusion import recipe
from recipes.studies import low_bits_tuned
from recipes.studies.controls import Permuted
from recipes.studies.low_bits_gradients import (
    BASELINE,
    CASES,
    OWN,
    claim_rows,
    cosine_of,
    jackknife,
    mean_product,
    measure,
    rows_of,
)
from recipes.studies.low_bits_tuned import FIRST_SEED, HALF, STUDY, TUNED, TUNING, go_on, rated, whole
from recipes.studies.paired import interval, keep, load


def test_a_product_of_means_counts_different_batches_alone():
    """(1, 2, 3) with itself: (1*2 + 1*3 + 2*3) * 2 / 6 = 11/3, and the mean's square would be 4."""
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert mean_product(values[:, None] * values, [0, 1, 2]) == pytest.approx(11 / 3)
    assert mean_product(values[:, None] * values, [0, 2]) == 3


def test_the_jackknife_of_a_mean_is_students_interval():
    values = [0.1, 0.5, 0.4, 0.9]
    mean, half = jackknife(lambda batches: sum(values[i] for i in batches) / len(batches), 4)
    assert f"{mean:.3f}±{half:.3f}" == interval(values)


def test_rows_of_gradients_without_noise():
    """Own gradients (1, 0) in every batch. Twice as long: bias 1; at a right angle: bias 1 + 1, cosine 0."""
    own = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    arms = {OWN: own, BASELINE: torch.tensor([[0.0, 1.0]] * 4, dtype=torch.float64), "twice": 2 * own}
    rows = rows_of({arm: x @ x.T for arm, x in arms.items()}, {arm: x @ own.T for arm, x in arms.items()})
    numbers = {row.pop("arm"): {name: value for name, (value, _) in row.items()} for row in rows}
    assert numbers[OWN] == {"bias": 0, "cosine": 1, "gain": 1, "noise": 0}
    assert numbers[BASELINE] == {"bias": 2, "cosine": 0, "gain": 0, "noise": 0}
    assert numbers["twice"] == {"bias": 1, "cosine": 1, "gain": 1, "noise": 0}


def test_noise_is_the_variance_of_a_batch():
    """Gradients 1 and 3 in turn: mean square 5, product of different batches (8 * 8 - 20) / 12 = 11/3."""
    own = torch.tensor([[1.0], [3.0], [1.0], [3.0]], dtype=torch.float64)
    (row,) = rows_of({OWN: own @ own.T, BASELINE: own @ own.T}, {OWN: own @ own.T, BASELINE: own @ own.T})[:1]
    assert row["noise"][0] == pytest.approx((5 - 11 / 3) / (11 / 3))


def test_each_batch_has_a_gradient_of_each_arm(tmp_path):
    """In a random order there is none to agree on; learner and copy may draw the same completions."""
    settings = {"lora": Lora(r=2), "likelihood": Trajectory(), "corrector": NoCorrection(), "report_to": None}
    tiny = tiny_recipe(tmp_path, **settings, train_batch_size=2)
    for rank, has_order in ((RandomOrder(), False), (MaxProb(), True)):
        gradients, rewards, agreement = measure(tiny.replace(sampler=tiny.sampler.replace(rank=rank)), range(2))
        assert {len(each) for each in gradients.values()} == {2} and {len(each) for each in rewards.values()} == {2}
        assert len({each.shape for each in gradients.values()}) == 1 and len(agreement) == 2 * has_order
        assert all(each.isfinite().all() for each in gradients.values())
        assert all((gradients[arm] - gradients[BASELINE]).norm() > 0 for arm in ("int4, tis", "int4, aligned"))


def test_a_mean_that_points_nowhere_has_no_cosine():
    own = torch.tensor([[1.0], [1.0], [1.0], [1.0]], dtype=torch.float64)
    around = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    products, cross = {OWN: own @ own.T, "around": around @ around.T}, {"around": around @ own.T}
    assert math.isnan(cosine_of(products, cross, "around", [0, 1, 2, 3]))


def test_the_claims_of_other_cases():
    """The own gradient (1, 0); without a corrector at a right angle; TIS and AIS along it, in `max_prob` halfway."""
    own = torch.tensor([[1.0, 0.0]] * 32, dtype=torch.float64)

    def stored(along):
        arms = {OWN: own, "int4": torch.tensor([[0.0, 1.0]] * 32, dtype=torch.float64)}
        arms |= dict.fromkeys(("int4, tis", "int4, ais"), torch.tensor([along] * 32, dtype=torch.float64))
        kinds = {"products": {arm: each @ each.T for arm, each in arms.items()}}
        kinds["cross"] = {arm: each @ own.T for arm, each in arms.items()}
        return {kind: {arm: each.tolist() for arm, each in of.items()} for kind, of in kinds.items()}

    rows = claim_rows({case: stored([3.0, 4.0] if case == "max_prob" else [2.0, 0.0]) for case in CASES[1:]})
    found = {row["stated before the runs"]: (row["difference, corrected"], row["holds"]) for row in rows}
    assert len(found) == 9 and found["again: int4, tis above no corrector"] == ("1.00±0.00", "yes")
    assert found["max_prob: int4, ais above no corrector"] == ("0.60±0.00", "yes")
    assert found["int4, tis: again above max_prob"] == ("0.40±0.00", "yes")


def test_permuted_weights_are_those_of_ais_elsewhere():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    stats = make_stats(torch.tensor([[-0.5, 0.9, 0.0], [0.3, 0.0, -1.2]]), torch.ones(2), mask)
    ours, moved = AIS().weights(stats).importance_weights, Permuted(corrector=AIS()).weights(stats).importance_weights
    torch.testing.assert_close(moved[mask].sort().values, ours[mask].sort().values)
    assert (moved != ours)[mask].all() and (moved[~mask] == 1).all()


def test_trials_are_evaluated_on_sums_of_neither_training_nor_the_study():
    texts = [
        {task[i].prompt for i in range(len(task))}
        for task in (recipe.task, STUDY.base.eval_task, TUNING.base.eval_task)
    ]
    assert [len(each) for each in texts] == [1200, 289, 111]
    assert len(set.union(*texts)) == 1600, "all sums of two numbers from 10 to 49, each in one set"


def test_half_the_rate_is_half_of_that_of_no_corrector():
    arms = rated(dict.fromkeys(TUNED, 1e-3) | {"int4": 5e-4}).arms
    assert (arms[HALF]["learning_rate"], arms["int4"]["learning_rate"]) == (2.5e-4, 5e-4)
    assert {name: arm for name, arm in arms[HALF].items() if name != "learning_rate"} == TUNED["int4"]


def a_run(arm, seed, machine="this"):
    measured = {"before": 0.4, "after": 0.5, "quantized": 0.4, "ess": 0.6}
    return {"arm": arm, "seed": seed, "machine": machine} | measured


@pytest.fixture
def made(monkeypatch):
    """The runs that the driver makes, in their order, in place of training."""
    order = []

    def run_missing(study, root, runs, **_):
        for arm, seed in runs:
            if (arm, seed) not in load(root):
                order.append((arm, seed))
                keep(root, a_run(arm, seed))

    monkeypatch.setattr(low_bits_tuned, "run_missing", run_missing)
    monkeypatch.setattr(low_bits_tuned, "here", lambda: "this")
    monkeypatch.setattr(low_bits_tuned, "tune", lambda *_: (dict.fromkeys(TUNED, 5e-4), []))
    return order


def test_the_driver_goes_on_seed_by_seed_and_repeats_nothing(tmp_path, made):
    keep(tmp_path, a_run("int4", FIRST_SEED))
    go_on(tmp_path, workers=1)
    every = [(arm, seed) for seed in range(FIRST_SEED, FIRST_SEED + 10) for arm in STUDY.arms]
    assert made == [each for each in every if each != ("int4", FIRST_SEED)]
    go_on(tmp_path, workers=1)
    assert len(made) == 79


def test_a_seed_begun_on_another_machine_waits_for_it(tmp_path, made):
    keep(tmp_path, a_run("int4", FIRST_SEED, "other"))
    for arm in STUDY.arms:
        keep(tmp_path, a_run(arm, FIRST_SEED + 1, "other"))
    go_on(tmp_path, workers=1)
    assert {seed for _, seed in made} == set(range(FIRST_SEED + 2, FIRST_SEED + 11)), "nine, beside the whole one"
    assert {seed for _, seed in whole(load(tmp_path))} == set(range(FIRST_SEED + 1, FIRST_SEED + 11))


def test_a_failed_run_ends_the_driver(tmp_path, made, monkeypatch):
    monkeypatch.setattr(low_bits_tuned, "run_missing", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="seed 10 failed"):
        go_on(tmp_path, workers=1)


def test_stored_runs_are_taken_over_and_new_ones_added(tmp_path, made, monkeypatch, capsys):
    stored = tmp_path / "stored.json"
    write_json(stored, {"rates": None, "tuning": [], "runs": [a_run("int4", FIRST_SEED)]})
    options = ["--output_dir", str(tmp_path / "out"), "--stored", str(stored)]
    monkeypatch.setattr("sys.argv", ["low_bits_tuned", *options])
    low_bits_tuned.main()
    assert ("int4", FIRST_SEED) not in made and len(read_json(stored)["runs"]) == 1, "a run writes to its own folder"
    monkeypatch.setattr("sys.argv", ["low_bits_tuned", *options, "--report"])
    low_bits_tuned.main()
    kept = read_json(stored)
    assert len(kept["runs"]) == 80 and kept["rates"]["int4"] == 5e-4
    printed = capsys.readouterr().out
    assert "0 trials, 80 runs" in printed and "| int4 at half the rate | 0.00025 |" in printed
    assert stored.with_suffix(".png").exists()
