"""A paired study, cut short: its arms start from one model, and its tables say what was compared."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
from tiny_recipe import with_changes

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


def test_interval_is_students():
    # Mean 0.5, sample deviation 0.1, three values: 4.303 * 0.1 / sqrt 3 = 0.2484.
    assert paired.interval([0.4, 0.5, 0.6]) == "0.500±0.248"
    assert paired.interval([0.4]) == "0.400"


def test_sign_flip_counts_all_choices_of_signs():
    # Of the 8 choices for (1, 2, 3) two have a sum as far from 0 as 6; for (1, -2, 3) those with 2 or more: all but the
    # two that give 0 (1 + 2 - 3 and its mirror).
    assert paired.sign_flip([1, 2, 3]) == 2 / 8
    assert paired.sign_flip([1, -2, 3]) == 6 / 8
    assert paired.sign_flip([0.0, 0.0]) == 1
    assert paired.sign_flip([0.1] * 10) == 2 / 1024  # equal ones, whatever their rounding


def test_holm_by_hand():
    # 0.01 * 3; 0.02 * 2 = 0.04; 0.03 * 1 may not be below 0.04.
    assert paired.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert paired.holm([0.9, 0.6]) == [1.0, 1.0]


def test_benjamini_hochberg_by_hand():
    """Of four at 5 % the limits are 0.0125, 0.025, 0.0375, 0.05: 0.036 passes as the third, and takes 0.03 along, which
    is above its own."""
    assert paired.benjamini_hochberg([0.036, 0.9, 0.03, 0.01]) == [True, False, True, True]
    assert paired.benjamini_hochberg([0.06, 0.2]) == [False, False]


def keyed(*results):
    return {(arm, seed): {"after": after, "quantized": 0.5} for arm, seed, after in results}


def test_pairs_are_the_seeds_that_both_arms_have():
    runs = keyed(("a", 0, 0.5), ("a", 2, 0.7), ("b", 2, 0.4), ("b", 1, 0.9))
    assert paired.paired(runs, "a", "b") == pytest.approx([0.3])
    assert paired.paired(runs, "a", "b", "quantized") == [0.0]


def test_a_row_of_each_table():
    """Differences -0.3 and -0.1: deviation 0.1414, 12.706 * 0.1414 / sqrt 2 = 1.271. Both are below 0: of four choices
    of signs two are as far; alone among the claims that were run, Holm's correction leaves it."""
    more = Contrast("not run", arm="tis, 2", against="tis")
    claimed = dataclasses.replace(study, arms=study.arms | {"tis, 2": {}}, contrasts=(*study.contrasts, more))
    runs = keyed(("tis", 0, 0.2), ("tis", 1, 0.4), ("none", 0, 0.5), ("none", 1, 0.5))
    runs["tis", 0]["ess"], runs["tis", 1]["ess"] = 0.5, 0.7
    plain, tis = paired.arm_rows(claimed, runs)
    assert (plain["arm"], plain["ess"], tis["seeds"], tis["after"], tis["ess"]) == (
        "none",
        "-",
        "2",
        "0.300±1.271",
        "0.6",
    )
    assert (tis["each seed"], tis["less"], tis["difference, 95 %"]) == ("0.20, 0.40", "none", "-0.200±1.271")
    (claim,) = paired.contrast_rows(claimed, runs)
    assert [*claim.values()][4:] == ["2", "-0.200±1.271", "0 of 2", "0.500", "0.500"]


@pytest.mark.parametrize(("seeds", "fewer", "said"), [(5, {}, True), (2, {}, False), (5, {"tis": 2, "none": 2}, False)])
def test_the_tables_of_an_unfinished_study_say_how_many_seeds_there_are(seeds, fewer, said):
    planned = dataclasses.replace(study, seeds=seeds, fewer=fewer)
    runs = keyed(("tis", 0, 0.2), ("tis", 1, 0.4), ("none", 0, 0.5), ("none", 1, 0.5))
    arms, claims = paired.tables(planned, runs).split("\n\n")
    assert ("| 2 of 5 |" in arms) == ("| 2 of 5 |" in claims) == said == ("| seeds |" in arms)


def test_a_share_of_the_harm_by_hand():
    """Parts 1, 3 of losses 2, 4: t^2/n = 12.706^2/2, both variances and the covariance 2, so nothing is bounded; of
    losses 399, 401 the quadratic's roots are (b -+ sqrt(b^2 - ac)) / a."""
    results = {("none", seed): {"after": 0.0} for seed in (0, 1)}
    results |= {("TIS", 0): {"after": 1.0}, ("TIS", 1): {"after": 3.0}}
    whole = {("whole", 0): {"after": 2.0}, ("whole", 1): {"after": 4.0}}
    assert paired.share(results | whole, "TIS", "none", "whole") == "0.67, without bounds"
    whole = {("whole", 0): {"after": 399.0}, ("whole", 1): {"after": 401.0}}
    t = 12.7062**2 / 2
    a, b, c = 160_000 - 2 * t, 800 - 2 * t, 4 - 2 * t
    root = (b * b - a * c) ** 0.5
    expected = f"0.01 [{(b - root) / a:.2f}, {(b + root) / a:.2f}]"
    assert paired.share(results | whole, "TIS", "none", "whole") == expected == "0.01 [-0.03, 0.04]"


def test_an_interval_of_twelve_values():
    """Six times 0 and 1: the standard deviation is sqrt(3/11), and 2.201 * sqrt(3/11/12) is 0.332."""
    assert paired.interval([0, 1] * 6) == "0.500±0.332"


def test_runs_of_an_unfinished_study_are_stored_and_none_is_lost(tmp_path, capsys):
    """Of 2 arms and 5 seeds: first three runs, then four; then three again, in another folder."""
    path, runs = tmp_path / "stored.json", [("none", 0), ("tis", 0), ("none", 1), ("tis", 1)]
    for count, kept in ((3, 3), (4, 4), (3, 4)):
        made = {(arm, seed): {"arm": arm, "seed": seed} for arm, seed in runs[:count]}
        paired.store(path, study, made)
        assert len(read_json(path)) == kept
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["stored.json: of 10 runs there are 3", "stored.json: of 10 runs there are 4"]
    assert printed[2:] == ["stored.json is not written: it has 4 runs, and here are 3 of 10"]


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
    def after_update(self, context):
        return {"seen": 1.0}


def test_a_study_trains_its_arms_from_one_model_and_prints_its_tables(tmp_path, monkeypatch, capsys):
    few = {"sft_warmup_steps": 2, "train_batch_size": 4, "report_to": None, "log_completions_steps": 0}
    few |= {name: dataclasses.replace(getattr(recipe, name), size=8) for name in ("validation_task", "eval_task")}
    base, arms = with_changes(recipe, **few), study.arms | {"tis": study.arms["tis"] | {"features": (Seen(),)}}
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
    assert capsys.readouterr().out == f"{printed}stored.json is not written: of 10 runs there are 0\n"
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


def left_by(study, root, num_steps, arm, seed):
    paired.keep(root, {"arm": arm, "seed": seed, "num_steps": num_steps})


def test_what_is_missing_beside_finished_runs_is_run(tmp_path):
    base = with_changes(recipe, model="a model", sft_warmup_steps=0)
    plain = Study("plain", base, {"none": {}, "tis": {}}, {}, {}, seeds=2, num_steps=180)
    left_by(plain, tmp_path, 180, "none", 0)
    pairs = [("none", 0), ("tis", 0), ("none", 1)]
    paired.run_missing(plain, tmp_path, pairs, num_steps=lambda _: 180, workers=1, run=left_by)
    assert paired.load(tmp_path).keys() == set(pairs)
