"""A paired study, cut short: its arms start from one model, and its tables say what was compared."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from dllm_rl import TIS, NoCorrection, StepFeature
from dllm_rl.files import read_json
from recipes.studies import paired
from recipes.studies.paired import Contrast, Study
from recipes.sudoku_unique import recipe

study = Study(
    name="my-study",
    base=recipe,
    arms={"none": {"corrector": NoCorrection()}, "tis": {"corrector": TIS()}},
    against={"tis": "none"},
    metrics={"ess": "rollout_corr/ess"},
    seeds=5,
    num_steps=180,
    contrasts=(Contrast("TIS raises the solve rate", arm="tis", against="none"),),
)


def test_a_share_of_the_harm_by_hand():
    """Parts 1, 3 of losses 2, 4: t^2/n = 12.706^2/2, both variances and the covariance 2, so nothing is bounded; of
    losses 399, 401 the quadratic's roots are (b -+ sqrt(b^2 - ac)) / a."""
    results = {("none", seed): {"after": 0.0} for seed in (0, 1)}
    results |= {("TIS", 0): {"after": 1.0}, ("TIS", 1): {"after": 3.0}}
    whole = {("whole", 0): {"after": 2.0}, ("whole", 1): {"after": 4.0}}
    assert paired.share(results | whole, "TIS", "none", "whole") == "not shown"
    whole = {("whole", 0): {"after": 399.0}, ("whole", 1): {"after": 401.0}}
    t = 12.706**2 / 2
    a, b, c = 160_000 - 2 * t, 800 - 2 * t, 4 - 2 * t
    root = (b * b - a * c) ** 0.5
    expected = f"0.01 [{(b - root) / a:.2f}, {(b + root) / a:.2f}]"
    assert paired.share(results | whole, "TIS", "none", "whole") == expected == "0.01 [-0.03, 0.04]"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        *zip(range(2, 11), (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), strict=True),
        *((11, 2.228), (12, 2.201), (20, 2.093), (31, 2.042), (32, 2.040), (121, 1.980), (1001, 1.962)),
    ],
)
def test_students_t_is_that_of_printed_tables(values, expected):
    assert paired.student_t(values) == expected


def test_an_interval_of_twelve_values():
    """Six times 0 and 1: the standard deviation is sqrt(3/11), and 2.201 * sqrt(3/11/12) is 0.332."""
    assert paired.interval([0, 1] * 6) == "0.500±0.332"


@pytest.mark.parametrize(
    ("arm", "changes", "stored", "asked"),
    [("none", {}, 5, 180), ("tis", {}, 181, 180), ("none", {"num_steps": 0}, 180, 0), ("tis", {"num_steps": 7}, 6, 7)],
)
def test_a_result_of_other_numbers_of_steps_is_refused_before_any_run(arm, changes, stored, asked, tmp_path):
    """Such as a rehearsal's; nor does it count among the runs of the finished study."""
    of_one = dataclasses.replace(study, arms={arm: study.arms[arm] | changes}, seeds=1)

    def run(*_):
        raise AssertionError

    def go():
        paired.run_missing(of_one, tmp_path, [(arm, 0)], num_steps=lambda _: 180, workers=1, run=run)
        paired.store(tmp_path / "stored.json", of_one, paired.load(tmp_path))

    paired.keep(tmp_path, {"arm": arm, "seed": 0, "num_steps": stored})
    with pytest.raises(SystemExit, match=rf"{arm}_0.json has num_steps={stored}, not {asked}: choose another"):
        go()
    paired.store(tmp_path / "stored.json", of_one, paired.load(tmp_path))
    assert not (tmp_path / "stored.json").exists()
    for steps in ({"num_steps": asked}, {}):  # a study's own runs may store none
        paired.keep(tmp_path, {"arm": arm, "seed": 0} | steps)
        go()
        assert len(read_json(tmp_path / "stored.json")) == 1


class Seen(StepFeature):
    def metrics(self, context):
        return {"seen": 1.0}


def test_a_study_trains_its_arms_from_one_model_and_prints_its_tables(tmp_path, monkeypatch, capsys):
    few = {"sft_warmup_steps": 2, "train_batch_size": 4, "report_to": None, "log_completions_steps": 0}
    few |= {name: dataclasses.replace(getattr(recipe, name), size=8) for name in ("validation_task", "eval_task")}
    base, arms = dataclasses.replace(recipe, **few), study.arms | {"tis": study.arms["tis"] | {"features": (Seen(),)}}
    short = dataclasses.replace(study, base=base, arms=arms, metrics=study.metrics | {"seen": "seen"})
    for arm in short.arms:
        paired.run_one(short, tmp_path, 1, arm, seed=0)
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["study.py", "--report", "--output_dir", str(tmp_path)])
    results = paired.main(short, None, stored=tmp_path / "stored.json")
    assert results["none", 0]["before"] == results["tis", 0]["before"] and "ess" in results["tis", 0]
    assert results["tis", 0]["seen"] == 1 and "seen" not in results["none", 0]
    printed = capsys.readouterr().out
    assert "| tis | 1 |" in printed and "| TIS raises the solve rate | tis | none |" in printed
    assert not (tmp_path / "stored.json").exists() and not (tmp_path / "tables.json").exists()
    drawn = []
    monkeypatch.setattr("sys.argv", ["study.py", "--seeds", "0", "--output_dir", str(tmp_path)])
    stored = {"stored": tmp_path / "stored.json", "draw": lambda *given: drawn.append(given)}
    assert paired.main(short, None, **stored) == results
    assert capsys.readouterr().out == f"{printed}stored.json is not written: 10 of 10 runs are missing\n"
    assert drawn == [(results, tmp_path / "stored.png")] and (tmp_path / "tables.json").exists()
    paired.store(tmp_path / "stored.json", dataclasses.replace(short, seeds=1, num_steps=1), results)
    assert read_json(tmp_path / "stored.json") == list(results.values())
    monkeypatch.setattr("sys.argv", ["study.py", "--report", "--output_dir", str(tmp_path / "nothing")])
    assert paired.main(short, None, **stored) == results
    assert capsys.readouterr().out == printed and len(drawn) == 1
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(SystemExit):
        paired.main(short, None, stored=tmp_path / "no.json")
    assert "--report: no runs below" in capsys.readouterr().err


def test_the_clock_counts_each_step(monkeypatch):
    times = iter([0.0, 1.0, 9.0, 10.0])
    monkeypatch.setattr(paired, "time", SimpleNamespace(process_time=lambda: next(times)))
    clock = paired.Clock()
    clock.on_start(None)
    for _ in range(3):
        clock.on_step(None, {})
    assert clock.seconds == [1.0, 8.0, 1.0]


def test_a_study_of_several_is_named_first(monkeypatch):
    monkeypatch.setattr("sys.argv", ["study.py", "half", "--seeds", "2"])
    assert paired.which(["full", "half"]) == "half" and sys.argv[1:] == ["--seeds", "2"]
    assert paired.which(["full", "half"]) == "full" and sys.argv[1:] == ["--seeds", "2"]
