"""The picture of a run, and its numbers by hand."""

import json
import math
import os
import subprocess
import sys

import matplotlib
import pytest
from matplotlib import pyplot as plt

from dllm_rl.monitoring.plots import (
    Panel,
    draw_run,
    headline,
    plot,
    smoothed,
)

ALWAYS = {"reward": 0.5, "parsed": 1.0, "rollout_corr/k3_kl": 0.0, "rollout_corr/rollout_is_eff_sample_size": 1.0}


def test_a_curve_is_smoothed_by_hand():
    nan = math.nan
    assert smoothed([0.0, 3.0, 6.0, nan, 9.0], width=1) == [1.5, 3.0, 4.5, 7.5, 9.0]
    assert smoothed([1.0, 2.0], width=0) == [1.0, 2.0] and math.isnan(smoothed([nan], width=3)[0])


def test_a_metric_without_a_number_is_not_drawn():
    panel = Panel("Both", "nats", {"a": "first", "b": "second"})
    assert panel.drawn([{"step": 0}, {"step": 1, "b": 0.5}]) == ["b"]
    assert panel.drawn([{"step": 0, "c": 1.0}]) == []


def test_ticks_are_whole_steps_and_one_point_is_seen(tmp_path):
    for last in (1, 2, 3, 7, 1000):
        rows = [json.dumps({"step": step, "reward": 0.5}) + "\n" for step in range(last)]
        (tmp_path / "metrics.jsonl").write_text("".join(rows))
        (axis,) = draw_run(tmp_path).axes
        assert (axis.lines[0].get_marker() == "o") == (last == 1), "one point is no line"
        assert all(tick == round(tick) for tick in axis.get_xticks()), "a tick between two steps"


def test_the_headline_says_what_is_known_of_a_run():
    summary = {"recipe": {"name": "a\x1b", "seed": 1}, "eval_problems": 8}
    summary |= {"eval_before": {"reward": 0.5, "solve_rate": 0.25}, "eval_after": {"reward": 0.5, "solve_rate": 0.75}}
    assert headline(summary) == "a␛, seed 1: solve rate 0.250 → 0.750 on 8 held-out problems"
    assert headline({}) == "a run, seed ?"


def test_which_panels_a_picture_has(tmp_path):
    """RL's loss is no likelihood: its picture does not show it."""
    for row, titles in [
        ({"step": 0, "reward": 0.5, "loss": 1.0}, ["Reward"]),
        ({"step": 0, "loss": 1.0, "grad_norm": 2.0}, ["Loss", "Gradient norm"]),
    ]:
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        assert [axis.get_title() for axis in draw_run(tmp_path).axes] == titles


def drawn(folder, rows, **summary):
    """The axes of a run by title."""
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows))
    )
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    figure = draw_run(folder)
    figure.draw_without_rendering()
    return {axis.get_title(): axis for axis in figure.axes}, figure.get_suptitle()


def test_mismatch_is_drawn_where_there_is_some(tmp_path):
    for mismatch, are_drawn in [(0.0, False), (6e-8, False), (1e-4, True)]:
        row = {"reward": 0.5, "rollout_corr/ess": 1 - mismatch, "rollout_corr/abs_log_ratio_mean": mismatch}
        axes, _ = drawn(tmp_path, [row, row | {"rollout_corr/ess": 1 - mismatch / 2}])
        assert list(axes) == ["Reward"] + ["Mismatch", "Effective sample size"] * are_drawn
    offset = axes["Effective sample size"].yaxis.get_major_formatter().get_offset()
    assert offset == "", "ticks are what they say"


def test_every_reward_function_is_drawn_with_its_held_out_values(tmp_path):
    row = {"reward": 1.5, "rewards/a/mean": 0.5, "rewards/$b/mean": 1.0, "frac_reward_zero_std": 0.25}
    rows = [row, row | {"eval/reward": 2.0, "eval/a": 0.75, "eval/parsed": 1.0}]
    before, after = {"a": 0.25, "reward": 1.0, "parsed": 1.0}, {"a": 0.875, "reward": 2.5, "parsed": 1.0}
    axes, title = drawn(tmp_path, rows, eval_before=before, eval_after=after)
    assert list(axes) == ["Reward", "Reward functions", "Mixed groups"] and "\n" not in title
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes["Reward functions"].lines}
    assert lines[r"\$b"] == [[1, 1.0], [2, 1.0]] and lines["a"] == [[1, 0.5], [2, 0.5]]
    assert sorted(lines["a, held out: 0.250 → 0.875"]) == [[0, 0.25], [2, 0.875]], "the last evaluation, at step 2"
    (line, _) = axes["Mixed groups"].lines
    assert line.get_ydata().tolist() == [0.75, 0.75] and axes["Mixed groups"].get_ylim() == (-0.02, 1.02)


def test_one_reward_function_that_is_the_reward_has_no_panel(tmp_path):
    for value, titles in [(0.1 + 0.2, ["Reward"]), (0.6, ["Reward", "Reward functions"])]:
        axes, _ = drawn(tmp_path, [{"reward": 0.3, "rewards/own/mean": value}] * 2)
        assert list(axes) == titles


def test_the_title_says_that_a_run_does_not_learn(tmp_path):
    row = {"reward": 0.0, "frac_reward_zero_std": 1.0, "grad_norm": 0.0}
    assert drawn(tmp_path, [row] * 20)[1].endswith("\nnot learning: constant reward")
    assert "\n" not in drawn(tmp_path, [row | {"frac_reward_zero_std": 0.5, "grad_norm": 1.0}] * 20)[1]


def test_levels_are_lines_of_the_solved_problems_alone(tmp_path):
    row = {"step": 0, "reward": 0.5, "rewards/solve_rate/mean": 0.25, "eval/solve_rate": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    axes = draw_run(tmp_path, levels={"the ceiling": 0.155}).axes
    lines = {axis.get_title(): [(each.get_label(), *each.get_ydata()) for each in axis.lines] for axis in axes}
    assert ("the ceiling: 0.155", 0.155, 0.155) in lines.pop("Problems solved")
    assert list(lines) == ["Reward"] and "ceiling" not in str(lines)


def test_a_picture_is_drawn_where_a_step_lacks_a_breakdown(tmp_path):
    rows = [{"step": 0, "reward": 0.5}, {"step": 1, "reward": 0.5, "rewards/accuracy/mean": 1.0}]
    rows.append({"step": 2, "reward": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot(tmp_path).is_file()


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("backend", ["svg", "pdf", "agg"])
def test_the_callers_backend_and_figures_stay(tmp_path, backend):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
    plt.switch_backend(backend)
    own = plt.figure()
    plot(tmp_path)
    assert matplotlib.get_backend().lower() == backend
    assert plt.get_fignums() == [own.number] and plt.gcf() is own
    plt.close("all")


def test_a_style_that_cannot_be_drawn_with_is_not_used(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
    for own in ({"text.usetex": True, "text.latex.preamble": r"\usepackage{nosuch}"}, {"figure.dpi": 1e6}):
        with matplotlib.rc_context(own):
            assert plot(tmp_path).stat().st_size < 10**6
            assert [matplotlib.rcParams[name] for name in own] == [*own.values()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chosen"), [("", "False"), ("QtAggg", "False"), ("module://own.backend", "True")])
@pytest.mark.repeated(first_only=True)
def test_a_picture_of_a_run_chooses_no_backend(tmp_path, name, chosen):
    """A notebook's first use of pyplot, after a run, chooses the backend that shows figures. One that MPLBACKEND names
    is kept, and one that is not installed costs no picture."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, **ALWAYS}) + "\n")
    code = (
        "import sys; from pathlib import Path; from dllm_rl.monitoring.plots import plot; plot(Path(sys.argv[1]));"
        "print('matplotlib.pyplot' in sys.modules, isinstance(sys.modules['matplotlib'].rcParams._get('backend'), str))"
    )
    environment = os.environ | {"MPLBACKEND": name}
    output = subprocess.check_output([sys.executable, "-c", code, tmp_path], env=environment, text=True)
    assert output.split() == ["False", chosen]
